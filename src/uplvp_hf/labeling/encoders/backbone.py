"""Backbones for the labelers that need no text: feature maps, and class logits where the network is a classifier.

encoder = load_encoder("timm:mobilenetv2_100", weights="mobilenetv2_100_imagenet.safetensors", pad_type="same")
encoder = load_encoder("path/or/hub-id/of/a/transformers/backbone")  # ResNet, Swin, DINOv2, DINO's ViT, ...
classifier = load_classifier("path/or/hub-id/of/an/image/classifier")
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ...conversion.weights_look import weights_look
from ...models.errors import UserError, reading
from ...models.image_processing_base_uplvp import stored_settings
from .pixels import Size, fit_longest, group_by_size, images_to_pixels
from .weights import refuse_missing, weights_license

# timm modules behind the last feature map: a weights file without them is a headless backbone, not a broken one.
HEAD_MODULES = ("conv_head", "bn2", "norm_head", "classifier", "head", "head_fc", "head_drop", "fc", "fc_norm")
# Plain vision transformers that AutoBackbone does not read; DINO's and MAE's checkpoints are of type "vit".
TOKEN_MODELS = ("vit", "vit_msn", "deit")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Encoder:
    """A frozen network with what is needed to feed it.

    Args:
        model: has timm's `forward_intermediates`, or returns `feature_maps` like transformers' backbones. With
            `maps=False`, a classifier of transformers, which returns `logits`.
        name: for headers and reports.
        image_mean, image_std: of RGB scaled to [0, 1].
        shift: how far, as a share of (stride - 1) / stride, the cells of a map lie right of and below the place that
            the grid alone gives them.
        num_classes: of the classifier; 0 for none. id2label: its class names, where known.
        size_multiple: what the input's sides have to be multiples of: 32 for most convolutional networks, the patch
            size for plain vision transformers.
        fixed_size: (height, width) of a network that takes no other.
        license: of the weights, where known.
        pad_type: "same" for TensorFlow's padding.
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
        size_multiple: int = 32,
        fixed_size: tuple[int, int] | None = None,
        id2label: Mapping[int, str] | None = None,
        license: str | None = None,
        maps: bool = True,
        pad_type: str = "",
    ) -> None:
        # Channels last, as the pixels are: a third less time for MobileNetV2 on a CPU.
        self.model = model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
        self.device, self.dtype = torch.device(device), next((p.dtype for p in model.parameters()), torch.float32)
        self.name, self.license, self.maps, self.shift = name, license, maps, shift
        self.image_mean, self.image_std = tuple(image_mean), tuple(image_std)
        self.num_classes, self.id2label = num_classes, id2label
        self.size_multiple, self.fixed_size, self.pad_type = size_multiple, fixed_size, pad_type

    @property
    def look(self) -> dict[str, Any]:
        """How the network is shown its images, for the store's header: JSON values."""
        mean, std = list(self.image_mean), list(self.image_std)
        return {"network": self.name, "image_mean": mean, "image_std": std, "pad_type": self.pad_type}

    @property
    def dtype_name(self) -> str:
        """Precision of weights and activations, such as "float32"."""
        return str(self.dtype).removeprefix("torch.")

    def cell_offset(self, stride: float, given: float | None = None) -> float:
        """Offset of the cells of a stride-`stride` map, in cells (`proposals.upsample_grid`); `given` wins."""
        return self.shift * (stride - 1) / stride if given is None else given

    def fit(self, width: int, height: int, longest: int) -> tuple[int, int]:
        """(height, width) that an image is stretched to: longer side about `longest`, multiples of what it needs."""
        return self.fixed_size or fit_longest(width, height, longest, self.size_multiple)

    def passes(self, images: Sequence[Image.Image], longest: Any, fit: Any = None) -> Iterator[tuple[list[int], Size]]:
        """The images that share a forward pass, as indices, with the (height, width) that they are stretched to: about
        a megapixel at a time on a CPU, where that is fastest, 16 on an accelerator. fit: in place of `self.fit`."""
        budget = 1 << (20 if self.device.type == "cpu" else 24)
        for size, indices in group_by_size(images, longest, fit or self.fit).items():
            step = max(1, budget // (size[0] * size[1]))
            for start in range(0, len(indices), step):
                yield indices[start : start + step], size

    def pixels(self, images: Sequence[Image.Image], size: Size) -> torch.Tensor:
        """Stretch PIL images to `size` (height, width) and normalize: (B, 3, H, W) on the device, in its dtype."""
        pixels = images_to_pixels(images, size, self.image_mean, self.image_std, self.device)
        return pixels.to(self.dtype)

    @torch.inference_mode()
    def __call__(self, pixels: torch.Tensor, stages: Sequence[int] | None = None) -> tuple[torch.Tensor, ...]:
        """Feature maps (B, C_l, h_l, w_l), finest first.

        pixels: (B, 3, H, W), normalized, sides multiples of `size_multiple`. stages: which maps, in ascending order,
        counted from the finest (0) or from the last (-1); None: all.
        Raises UserError for a network without maps, or without that stage.
        """
        if not self.maps:
            raise UserError(f"{self.name} was loaded as a classifier; load_encoder gives feature maps")
        if hasattr(self.model, "forward_intermediates"):
            # Without the final map: convolutional families compute it by a wide layer that only the classifier needs.
            maps = tuple(self.model.forward_intermediates(pixels, intermediates_only=True))
        else:
            maps = tuple(self.model(pixels).feature_maps)
        for stage in stages or ():
            if not -len(maps) <= stage < len(maps):
                raise UserError(f"{self.name} has {len(maps)} feature maps: stage {stage} is none of them")
        return maps if stages is None else tuple(maps[stage] for stage in stages)

    def map_of(
        self, images: Sequence[Image.Image], size: Size, stage: int, cell_offset: float | None
    ) -> tuple[torch.Tensor, float]:
        """One feature map of images stretched to `size`, float32, and the offset of its cells."""
        (features,) = self(self.pixels(images, size), stages=(stage,))
        return features.float(), self.cell_offset(size[0] / features.shape[2], cell_offset)

    @torch.inference_mode()
    def last_map(self, pixels: torch.Tensor) -> torch.Tensor:
        """The map that the network's own classifier reads, (B, C, h, w): behind the wide layer that some convolutional
        networks put after their last stage, where the weights hold it; otherwise the last of `__call__`'s maps."""
        if not (self.num_classes and hasattr(self.model, "forward_intermediates")):
            return self(pixels, stages=[-1])[0]
        final, maps = self.model.forward_intermediates(pixels)
        return final if final.shape[2:] == maps[-1].shape[2:] else maps[-1]  # tokens and channels-last maps: theirs

    @torch.inference_mode()
    def classify(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits (B, K) of whole images. Raises UserError for a network without a classifier."""
        self.require_classifier()
        output = self.model(pixels)
        return output if isinstance(output, torch.Tensor) else output.logits

    def require_classifier(self) -> None:
        """Raises UserError for a network without a classifier."""
        if not self.num_classes:
            raise UserError(f"{self.name} has no classifier head; name classes with CLIP, or load classifier weights")


def load_encoder(
    name_or_path: str,
    weights: str | os.PathLike[str] | None = None,
    pad_type: str | None = None,
    allow_random: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Encoder:
    """A frozen encoder by name.

    Args:
        name_or_path: `timm:NAME`, with `weights`; `timm:hf-hub:OWNER/NAME`, which downloads; or a folder or hub id that
            `transformers.AutoBackbone` reads, or that holds a plain vision transformer (DINO's ViT, DeiT).
        weights: safetensors file for a timm model, of the whole classifier or of the backbone alone.
        pad_type: "same" for networks trained with TensorFlow's padding (timm's EfficientNet and MobileNet families).
        allow_random: run without trained weights. Only for tests.
        dtype: of weights and activations; None keeps the checkpoint's (float32 for timm).

    Raises UserError when there are no trained weights, when tensors are missing or do not fit, or for an unknown timm
    name; OSError when a folder or hub id cannot be read.
    """
    if name_or_path.startswith("timm:"):
        return _load_timm(name_or_path.removeprefix("timm:"), weights, pad_type, allow_random, device, dtype)
    _check_own_weights(name_or_path, weights, pad_type)
    return _load_backbone(name_or_path, allow_random, device, dtype)


def load_classifier(
    name_or_path: str,
    weights: str | os.PathLike[str] | None = None,
    pad_type: str | None = None,
    **options: Any,
) -> Encoder:
    """A frozen image classifier: an `Encoder` with `classify`, `num_classes` and, where known, `id2label`.

    name_or_path: as for `load_encoder`, or a folder or hub id that `transformers.AutoModelForImageClassification`
    reads. timm models of 1000 classes are taken to know ImageNet's, in the usual order. options: `allow_random`,
    `device` and `dtype` of `load_encoder`.
    Raises as `load_encoder` does, and UserError for weights without a classifier.
    """
    if name_or_path.startswith("timm:"):
        encoder = load_encoder(name_or_path, weights, pad_type, **options)
        encoder.require_classifier()
        return encoder
    _check_own_weights(name_or_path, weights, pad_type)
    return _load_classifier(name_or_path, **options)


def _check_own_weights(name_or_path: str, weights, pad_type) -> None:
    if weights is not None or pad_type is not None:
        raise UserError(f"backbone {name_or_path!r}: weights and pad_type are for timm:NAME; a folder holds its own")


def _size_multiple(config: Any, default: int) -> int:
    """The patch size of a plain vision transformer; `default` for networks that halve the map several times."""
    patch = getattr(config, "patch_size", None)
    return patch if isinstance(patch, int) and not hasattr(config, "depths") else default


def _mean_and_std(name_or_path: str) -> tuple[Sequence[float], Sequence[float]]:
    from transformers import AutoImageProcessor

    if stored := stored_settings(name_or_path):
        return stored.get("image_mean") or IMAGENET_MEAN, stored.get("image_std") or IMAGENET_STD
    try:  # timm keeps them in the configuration of the model
        processor = AutoImageProcessor.from_pretrained(name_or_path)
    except (OSError, ValueError):  # a bare backbone folder: the ImageNet numbers
        return IMAGENET_MEAN, IMAGENET_STD
    return processor.image_mean or IMAGENET_MEAN, processor.image_std or IMAGENET_STD


class _AnySize(nn.Module):
    """A vision transformer whose position embeddings are interpolated to the image's size."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor):
        return self.model(pixels, interpolate_pos_encoding=True)


class _TokenMaps(nn.Module):
    """Feature maps of a plain vision transformer: every block's output, the last one through the final norm."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor):
        from transformers.modeling_outputs import BackboneOutput

        output = self.model(pixels, output_hidden_states=True, interpolate_pos_encoding=True)
        patch = self.model.config.patch_size
        grid = pixels.shape[-2] // patch, pixels.shape[-1] // patch
        count = grid[0] * grid[1]  # class and distillation tokens come first
        states = [*output.hidden_states[1:-1], output.last_hidden_state]
        return BackboneOutput(
            feature_maps=tuple(state[:, -count:].transpose(1, 2).unflatten(2, grid) for state in states)
        )


def _load_timm(name: str, weights, pad_type: str | None, allow_random: bool, device, dtype) -> Encoder:
    hub = name.startswith(("hf-hub:", "hf_hub:"))
    if weights is None and not hub and not allow_random:
        raise UserError(
            f"backbone timm:{name} has no trained weights: a random one proposes noise. Give a weights file "
            f"(--backbone-weights FILE.safetensors) or name a hub repository (timm:hf-hub:timm/{name}.ra_in1k)"
        )
    own = None if weights is None else weights_look(os.fspath(weights))
    if own is not None and pad_type is not None and (pad_type or "") != own.pad_type:
        raise UserError(
            f"networks.pad_type is {pad_type!r}, but {weights} was trained with {own.pad_type or 'symmetric'!r} "
            f"padding ({own.source}); leave it out"
        )
    pad_type = (own.pad_type or None) if own is not None else pad_type
    model = _create_timm(name, hub and weights is None, {} if pad_type is None else {"pad_type": pad_type})
    num_classes = model.num_classes
    if weights is not None and not _load_weights(model, Path(weights), name):
        num_classes = 0
    settings = model.pretrained_cfg
    mean, std = settings.get("mean", (0.5,) * 3), settings.get("std", (0.5,) * 3)
    if pad_type == "same":  # the TensorFlow family: RGB in [-1, 1]
        mean = std = (0.5, 0.5, 0.5)
    if own is not None:
        mean, std = own.image_mean, own.image_std
    padding = "same" if pad_type == "same" or name.rpartition("/")[2].startswith("tf_") else ""
    options: dict[str, Any] = {"id2label": _timm_labels(model, num_classes)}
    options["license"] = weights_license(name) if hub and weights is None else None
    options["size_multiple"] = max([level["reduction"] for level in getattr(model, "feature_info", [])] or [32])
    embed = getattr(model, "patch_embed", None)
    if embed is not None and getattr(embed, "strict_img_size", False):
        options["fixed_size"] = tuple(embed.img_size)
    # Each strided layer of one-sided padding looks half a (finer) cell to the right: (stride - 1) / 2 pixels in all.
    shift = 0.5 if padding else 0.0
    options["pad_type"] = padding
    return Encoder(model.to(dtype), f"timm:{name}", mean, std, shift, num_classes, device, **options)


def _create_timm(name: str, pretrained: bool, extra: dict[str, Any]) -> nn.Module:
    """The model; vision transformers that can take images of any size do."""
    import timm

    try:
        return timm.create_model(name, pretrained=pretrained, dynamic_img_size=True, **extra)
    except TypeError:  # not a vision transformer
        pass
    except RuntimeError as error:
        raise UserError(f"timm cannot build {name!r}: {error}") from error
    try:
        return timm.create_model(name, pretrained=pretrained, **extra)
    except TypeError as error:  # a family without padding types
        raise UserError(f"timm cannot build {name!r} with {extra or 'its defaults'}: {error}") from error


def _timm_labels(model: nn.Module, num_classes: int) -> dict[int, str] | None:
    names = model.pretrained_cfg.get("label_names")
    if names is not None and len(names) == num_classes:
        return dict(enumerate(names))
    if num_classes != 1000:
        return None
    from timm.data import ImageNetInfo

    return dict(enumerate(ImageNetInfo().label_descriptions()))


def _load_weights(model: nn.Module, path: Path, name: str) -> bool:
    """Load a safetensors file; True where it includes the classifier. Raises UserError when it does not fit."""
    if not path.is_file():
        raise UserError(f"backbone weights {path}: no such file")
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise UserError(f"backbone weights {path}: not a safetensors file ({error})") from error
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        wrong = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        raise UserError(
            f"backbone weights {path} do not fit timm:{name}: {len(wrong)} tensors of another size, "
            f"the first: {wrong[0]}"
        ) from error
    trunk = [key for key in missing if key.split(".")[0] not in HEAD_MODULES]
    if trunk or unexpected:
        raise UserError(
            f"backbone weights {path} do not fit timm:{name}: {len(trunk)} missing tensors {trunk[:3]}, "
            f"{len(unexpected)} unknown ones {unexpected[:3]}"
        )
    return not missing


def _load_classifier(path: str, allow_random: bool = False, device: Any = "cpu", dtype: Any = None) -> Encoder:
    from transformers import AutoModelForImageClassification

    extra = {} if dtype is None else {"dtype": dtype}
    with reading(path):
        model, info = AutoModelForImageClassification.from_pretrained(path, output_loading_info=True, **extra)
    if not allow_random:
        refuse_missing(path, info["missing_keys"])
    config = model.config
    labels = {int(index): str(label) for index, label in config.id2label.items()}
    placeholders = all(label == f"LABEL_{index}" for index, label in labels.items())  # transformers' own
    options = {"id2label": None if placeholders else labels, "license": weights_license(path), "maps": False}
    options["size_multiple"] = _size_multiple(config, default=1)
    if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        model = _AnySize(model)
    return Encoder(model, path, *_mean_and_std(path), num_classes=config.num_labels, device=device, **options)


def _load_backbone(path: str, allow_random: bool, device, dtype) -> Encoder:
    from transformers import AutoConfig, AutoModel
    from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING

    with reading(str(path)):
        config = AutoConfig.from_pretrained(path)
    if type(config) in MODEL_FOR_BACKBONE_MAPPING and getattr(config, "stage_names", None):
        config.out_features = list(config.stage_names[1:])
        # Not AutoBackbone.from_pretrained: transformers 5.23 takes every local folder for the name of a timm model.
        kind: Any = MODEL_FOR_BACKBONE_MAPPING[type(config)]
        wrap = None
    elif config.model_type in TOKEN_MODELS:
        kind, wrap = AutoModel, _TokenMaps
    else:
        raise UserError(f"backbone {path}: a {config.model_type} model has no feature stages for AutoBackbone")
    extra = {} if dtype is None else {"dtype": dtype}
    try:
        model, info = kind.from_pretrained(path, config=config, output_loading_info=True, **extra)
        # Norms of a backbone's outputs start as the identity, and classification checkpoints do not have them.
        missing = [key for key in info["missing_keys"] if not key.startswith(("pooler.", "hidden_states_norms"))]
    except OSError:
        if not allow_random:
            raise
        model, missing = (kind.from_config(config) if wrap else kind(config)).to(dtype), []
    if not allow_random:
        refuse_missing(path, missing)
    mean, std = _mean_and_std(path)
    options = {"size_multiple": _size_multiple(config, default=32), "license": weights_license(path)}
    return Encoder(wrap(model) if wrap else model, path, mean, std, device=device, **options)
