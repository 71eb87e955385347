"""Backbones for the labelers that need no text: feature maps, and class logits where the network is a classifier.

encoder = load_encoder("timm:mobilenetv2_100", weights="mobilenetv2_100_imagenet.safetensors", pad_type="same")
encoder = load_encoder("path/or/hub-id/of/a/transformers/backbone")
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

# timm modules behind the last feature map: a weights file without them is a headless backbone, not a broken one.
HEAD_MODULES = ("conv_head", "bn2", "norm_head", "classifier", "head", "head_fc", "head_drop", "fc", "fc_norm")


@dataclass(frozen=True)
class Encoded:
    """maps: feature maps (B, C_l, h_l, w_l), finest first. logits: (B, K) of the whole picture, or None."""

    maps: tuple[torch.Tensor, ...]
    logits: torch.Tensor | None = None


class Encoder:
    """A frozen network with what is needed to feed it.

    name: for headers and reports. image_mean, image_std: of RGB scaled to [0, 1]. shift: how far, as a share of
    (stride - 1) / stride, the cells of a map lie right of and below the place that the grid alone gives them.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        shift: float = 0.0,
        num_classes: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        self.model = model.eval().requires_grad_(False).to(device)
        self.name = name
        self.image_mean, self.image_std = tuple(image_mean), tuple(image_std)
        self.shift = shift
        self.num_classes = num_classes
        self.device = torch.device(device)

    def cell_offset(self, stride: float) -> float:
        """Offset of the cells of a stride-`stride` map, in cells (see `instances.upsample_grid`)."""
        return self.shift * (stride - 1) / stride

    def pixels(self, images: Sequence[Image.Image], size: tuple[int, int]) -> torch.Tensor:
        """Stretch PIL pictures to `size` (height, width) and normalise: (B, 3, H, W) float32."""
        return pictures_to_pixels(images, size, self.image_mean, self.image_std).to(self.device)

    @torch.inference_mode()
    def __call__(self, pixels: torch.Tensor) -> Encoded:
        """pixels: (B, 3, H, W), normalised, sides multiples of 32."""
        if hasattr(self.model, "forward_intermediates"):
            final, maps = self.model.forward_intermediates(pixels)
            if not self.num_classes:
                return Encoded(tuple(maps))
            return Encoded(tuple(maps), self.model.forward_head(final))
        return Encoded(tuple(self.model(pixels).feature_maps))

    @torch.inference_mode()
    def classify(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits (B, K) of whole pictures. Raises ValueError for a network without a classifier."""
        if not self.num_classes:
            raise ValueError(f"{self.name} has no classifier head; name classes with CLIP, or load classifier weights")
        return self.model(pixels)


def pictures_to_pixels(
    images: Sequence[Image.Image], size: tuple[int, int], mean: Sequence[float], std: Sequence[float]
) -> torch.Tensor:
    """Bilinear (antialiased) resize to `size` (height, width), scale to [0, 1], normalise: (B, 3, H, W) float32."""
    resized = [np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR), dtype=np.float32) for image in images]
    pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2) / 255
    return (pixels - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)


def fit_longest(width: int, height: int, longest: int, multiple: int = 32) -> tuple[int, int]:
    """(height, width) with the longer side about `longest`, each rounded to a multiple (at least one), so that the
    grid of a strided network covers the picture exactly."""
    scale = longest / max(width, height)
    return tuple(max(multiple, round(side * scale / multiple) * multiple) for side in (height, width))


def load_encoder(
    name_or_path: str,
    weights: str | os.PathLike[str] | None = None,
    pad_type: str | None = None,
    allow_random: bool = False,
    device: str | torch.device = "cpu",
) -> Encoder:
    """A frozen encoder by name.

    Args:
        name_or_path: `timm:NAME`, with `weights`; `timm:hf-hub:OWNER/NAME`, which downloads; or a folder or hub id that
            `transformers.AutoBackbone` reads.
        weights: safetensors file for a timm model, of the whole classifier or of the backbone alone.
        pad_type: "same" for networks trained with TensorFlow's padding (timm's EfficientNet and MobileNet families).
        allow_random: run without trained weights. Only for tests.

    Raises ValueError when there are no trained weights, when the weights do not fit, or for an unknown timm name.
    """
    if name_or_path.startswith("timm:"):
        return _load_timm(name_or_path.removeprefix("timm:"), weights, pad_type, allow_random, device)
    if weights is not None or pad_type is not None:
        raise ValueError(f"backbone {name_or_path!r}: weights and pad_type are for timm:NAME; a folder holds its own")
    return _load_backbone(name_or_path, allow_random, device)


def _load_timm(name: str, weights, pad_type: str | None, allow_random: bool, device) -> Encoder:
    import timm

    hub = name.startswith(("hf-hub:", "hf_hub:"))
    if weights is None and not hub and not allow_random:
        raise ValueError(
            f"backbone timm:{name} has no trained weights: a random one proposes noise. Give a weights file "
            f"(--backbone-weights FILE.safetensors) or name a hub repository (timm:hf-hub:timm/{name}.ra_in1k)"
        )
    extra = {} if pad_type is None else {"pad_type": pad_type}
    try:
        model = timm.create_model(name, pretrained=hub and weights is None, **extra)
    except (RuntimeError, TypeError) as error:  # unknown name; a family without padding types
        raise ValueError(f"timm cannot build {name!r} with {extra or 'its defaults'}: {error}") from error
    num_classes = model.num_classes
    if weights is not None and not _load_weights(model, Path(weights), name):
        num_classes = 0
    settings = model.pretrained_cfg
    mean, std = settings.get("mean", (0.5,) * 3), settings.get("std", (0.5,) * 3)
    if pad_type == "same":  # the TensorFlow family: RGB in [-1, 1]
        mean = std = (0.5, 0.5, 0.5)
    # Each strided layer of one-sided padding looks half a (finer) cell to the right: (stride - 1) / 2 pixels in all.
    return Encoder(model, f"timm:{name}", mean, std, 0.5 if pad_type == "same" else 0.0, num_classes, device)


def _load_weights(model: nn.Module, path: Path, name: str) -> bool:
    """Load a safetensors file; True where it includes the classifier. Raises ValueError when it does not fit."""
    if not path.is_file():
        raise ValueError(f"backbone weights {path}: no such file")
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"backbone weights {path}: not a safetensors file ({error})") from error
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"backbone weights {path} do not fit timm:{name}: {error}") from error
    trunk = [key for key in missing if key.split(".")[0] not in HEAD_MODULES]
    if trunk or unexpected:
        raise ValueError(
            f"backbone weights {path} do not fit timm:{name}: {len(trunk)} missing tensors {trunk[:3]}, "
            f"{len(unexpected)} unknown ones {unexpected[:3]}"
        )
    return not missing


def _load_backbone(path: str, allow_random: bool, device) -> Encoder:
    from transformers import AutoConfig, AutoImageProcessor
    from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING

    config = AutoConfig.from_pretrained(path)
    stages = getattr(config, "stage_names", None)
    if not stages or type(config) not in MODEL_FOR_BACKBONE_MAPPING:
        raise ValueError(f"backbone {path}: a {config.model_type} model has no feature stages for AutoBackbone")
    config.out_features = list(stages[1:])
    # Not AutoBackbone.from_pretrained: transformers 5.23 takes every local folder for the name of a timm model.
    backbone = MODEL_FOR_BACKBONE_MAPPING[type(config)]
    try:
        model, info = backbone.from_pretrained(path, config=config, output_loading_info=True)
        missing = sorted(info["missing_keys"])
    except OSError:
        if not allow_random:
            raise
        model, missing = backbone(config), []
    # Norms of the outputs (`hidden_states_norms`) do not exist in classification checkpoints: identity at the start.
    missing = [key for key in missing if not key.startswith("hidden_states_norms")]
    if missing and not allow_random:
        raise ValueError(f"backbone {path}: {len(missing)} tensors are not in the checkpoint, such as {missing[:3]}")
    try:
        processor = AutoImageProcessor.from_pretrained(path)
        mean, std = processor.image_mean, processor.image_std
    except (OSError, ValueError):  # a bare backbone folder: the ImageNet numbers
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return Encoder(model, path, mean, std, device=device)
