"""Frozen image-text encoders of transformers: CLIP, SigLIP and SigLIP 2, with what is needed to look at their patches.

How a patch gets into the text space (`Clip.project`):

    CLIP     post_layernorm, then visual_projection: what the model does to its class token, done to a patch token.
    SigLIP   There is no class token; a probe attends over the patches and an MLP follows. A patch's feature is what
             that head would return if the probe attended to this patch alone: value and output projection of its
             attention, then y + MLP(LayerNorm(y)), patch by patch. This is the counterpart of MaskCLIP's edit of CLIP
             ResNets' attention pool.

All last-block recipes of `attention` need only q, k, v, an output projection and the patch grid, so they run on both.
The published numbers are CLIP's alone, and none of the recipes has been measured on a trained SigLIP with this code:
treat them there as an experiment. SigLIP scores pairs by a sigmoid; softmax probabilities over its cosines (background
names, denoising, namers) rank classes but are not its own probabilities.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from ...models.errors import UserError, reading
from ...models.image_processing_base_uplvp import stored_settings
from .pixels import images_to_pixels
from .text import encode_texts
from .weights import refuse_missing, weights_license

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)
RECOMMENDED_FILE = "labeling.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# model_type -> class with both towers, class of the image tower alone, mean, std. Fixed-size SigLIP 2 checkpoints call
# themselves "siglip"; "siglip2" are those with packed patches of any size (NaFlex).
FAMILIES = {
    "clip": ("CLIPModel", "CLIPVisionModelWithProjection", OPENAI_MEAN, OPENAI_STD),
    "siglip": ("SiglipModel", "SiglipVisionModel", SIGLIP_MEAN, SIGLIP_STD),
    "siglip2": ("Siglip2Model", "Siglip2VisionModel", SIGLIP_MEAN, SIGLIP_STD),
}


@dataclass(frozen=True)
class Clip:
    """A frozen image-text model with its tokenizer and what its images look like.

    model: CLIPModel, SiglipModel, Siglip2Model, or their image tower alone (then `tokenizer` is None).
    license: of the weights, as their model card names it; None: not known.
    recommended: settings of the labeler that suit this encoder, from `labeling.json` beside it; see `load_clip`.
    """

    model: nn.Module
    tokenizer: Any
    name: str
    image_mean: tuple[float, ...] = OPENAI_MEAN
    image_std: tuple[float, ...] = OPENAI_STD
    license: str | None = None
    recommended: Mapping[str, Any] = field(default_factory=dict)

    @property
    def vision(self) -> nn.Module:
        """The image transformer: embeddings, encoder.layers, post_layernorm."""
        return getattr(self.model, "vision_model", self.model)

    @property
    def image_size(self) -> int:
        """Side in pixels of the square images that the position table was trained for."""
        config = self.vision.config
        if hasattr(config, "image_size"):
            return config.image_size
        return round(config.num_patches**0.5) * config.patch_size  # NaFlex

    @property
    def patch_size(self) -> int:
        """Side of a square patch in pixels."""
        return self.vision.config.patch_size

    @property
    def prefix(self) -> int:
        """Tokens in front of the patches: CLIP's class token, or none."""
        return int(hasattr(self.vision.embeddings, "class_embedding"))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def dimension(self) -> int:
        """Length of an embedding in the text space."""
        projection = getattr(self.model, "visual_projection", None)
        return self.vision.config.hidden_size if projection is None else projection.out_features

    def pixels(self, images: Sequence[Image.Image], size: tuple[int, int]) -> torch.Tensor:
        """Stretch images to `size` (height, width) and normalize: (B, 3, H, W) float32 on the model's device."""
        return images_to_pixels(images, size, self.image_mean, self.image_std, self.device)

    @torch.inference_mode()
    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Whole-image embeddings, not normalized: (B, 3, S, S) of `image_size` -> (B, D) float32."""
        return self._embedding(self._look(pixels))

    @torch.inference_mode()
    def encode_patches(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Patch features of the image tower, and whole-image embeddings from the same pass.

        pixels: (B, 3, H, W), normalized, sides multiples of the patch size. Returns (B, C, H / patch, W / patch), the
        tower's own width C, not projected into the text space, and (B, D); both float32.
        """
        output = self._look(pixels)
        grid = pixels.shape[-2] // self.patch_size, pixels.shape[-1] // self.patch_size
        patches = output.last_hidden_state[:, self.prefix :]
        return patches.transpose(1, 2).unflatten(2, grid).float(), self._embedding(output)

    def _look(self, pixels: torch.Tensor) -> Any:
        if self._packed:
            patches, mask, shapes = self._pack(pixels)
            return self.vision(patches, pixel_attention_mask=mask, spatial_shapes=shapes)
        return self.vision(pixels, interpolate_pos_encoding=True)

    def _embedding(self, output: Any) -> torch.Tensor:
        projection = getattr(self.model, "visual_projection", None)
        pooled = output.pooler_output
        return (pooled if projection is None else projection(pooled)).float()

    @torch.inference_mode()
    def encode_texts(self, prompts: Sequence[str], batch_size: int = 256) -> torch.Tensor:
        """Embeddings of prompts, not normalized: (N, D) float32. Raises UserError without a text tower."""
        if self.tokenizer is None or not hasattr(self.model, "text_model"):
            raise UserError(f"{self.name} was loaded without its text tower; give precomputed text embeddings")
        return encode_texts(self.model, self.tokenizer, prompts, batch_size)

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """Input tokens of the first block: (B, 3, H, W), whole patches -> (B, prefix + h * w, C).

        The position table is resized to the grid, non-square included, by the model's own rule (bicubic; NaFlex:
        bilinear).
        """
        if self._packed:
            patches, _, shapes = self._pack(pixels)
            return self.vision.embeddings(patches, shapes)
        tokens = self.vision.embeddings(pixels, interpolate_pos_encoding=True)
        norm = getattr(self.vision, "pre_layrnorm", None)  # transformers' spelling
        return tokens if norm is None else norm(tokens)

    def project(self, tokens: torch.Tensor) -> torch.Tensor:
        """Patch tokens after the last block into the text space (module docstring): (B, N, C) -> (B, N, D)."""
        tokens = self.vision.post_layernorm(tokens)
        projection = getattr(self.model, "visual_projection", None)
        if projection is not None:
            return projection(tokens)
        head = self.vision.head
        pool, width = head.attention, head.attention.embed_dim
        values = F.linear(tokens, pool.in_proj_weight[2 * width :], pool.in_proj_bias[2 * width :])
        pooled = pool.out_proj(values)
        return pooled + head.mlp(head.layernorm(pooled))

    @property
    def _packed(self) -> bool:
        return isinstance(self.vision.embeddings.patch_embedding, nn.Linear)

    def _pack(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Patches (B, h * w, p * p * 3) as SigLIP 2 reads them, their mask, and their grids (B, 2)."""
        size = self.patch_size
        batch, _, height, width = pixels.shape
        grid = pixels.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # (B, 3, h, p, w, p)
        patches = grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        shapes = torch.tensor([[height // size, width // size]] * batch, device=pixels.device)
        return patches, torch.ones(patches.shape[:2], dtype=torch.int64, device=pixels.device), shapes


def load_clip(
    name_or_path: str,
    device: str | torch.device = "cpu",
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    dtype: torch.dtype | str | None = None,
    text_tower: bool = True,
) -> Clip:
    """A CLIP, SigLIP or SigLIP 2 model of transformers, frozen, with its tokenizer, by folder or hub id.

    dtype: "float32" (default), "bfloat16" or "float16"; similarities are float32 whatever it is.
    text_tower: False loads the image tower alone, for precomputed text embeddings.
    Mean and standard deviation: the arguments, else the preprocessor configuration beside the model, else the family's.
    A file `labeling.json` beside the model, a mapping of names to values, holds settings of the dense labeler that were
    measured to suit this encoder; `DenseClipLabeler` takes them where it is given nothing.
    Raises UserError when it is another kind of model, its checkpoint lacks tensors, or `labeling.json` is no mapping;
    OSError when it cannot be found.
    """
    import transformers

    model, kind = _load_towers(name_or_path, dtype, text_tower)
    with reading(str(name_or_path)):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name_or_path) if text_tower else None
    stored = stored_settings(name_or_path)
    *_, family_mean, family_std = FAMILIES[kind]
    clip = Clip(
        model.to(device),
        tokenizer,
        str(name_or_path),
        tuple(image_mean or stored.get("image_mean") or family_mean),
        tuple(image_std or stored.get("image_std") or family_std),
        weights_license(name_or_path),
        _read_recommended(name_or_path),
    )
    if kind != "clip" and not hasattr(clip.vision, "head"):
        raise UserError(f"{name_or_path} has no pooling head (vision_use_head false): its patches have no text space")
    return clip


def _load_towers(name_or_path: str, dtype: torch.dtype | str | None, text_tower: bool) -> tuple[Any, str]:
    """Both towers, or the image tower alone, frozen; and which of the FAMILIES they are of."""
    import transformers

    with reading(str(name_or_path)):
        config = transformers.AutoConfig.from_pretrained(name_or_path)
    kind = config.model_type.removesuffix("_vision_model")
    if kind not in FAMILIES:
        raise UserError(
            f"{name_or_path} is a {kind} model; the clip labeler reads {', '.join(FAMILIES)} (for other encoders, give "
            "precomputed features and text embeddings)"
        )
    both, vision_only, *_ = FAMILIES[kind]
    if text_tower and not hasattr(config, "text_config"):
        raise UserError(f"{name_or_path} has no text tower; load it with text_tower=False")
    if not text_tower and hasattr(config, "vision_config"):
        # transformers reads the vision configuration's own projection_dim, which checkpoints leave at its default.
        width = getattr(config, "projection_dim", None)
        config = config.vision_config
        if width is not None:
            config.projection_dim = width
    loader = getattr(transformers, both if text_tower else vision_only)
    model, info = loader.from_pretrained(name_or_path, config=config, output_loading_info=True, dtype=_dtype(dtype))
    refuse_missing(name_or_path, info["missing_keys"])
    return model.eval().requires_grad_(False), kind


def _dtype(value: torch.dtype | str | None) -> torch.dtype:
    found: Any = torch.float32 if value is None else DTYPES.get(str(value), value)
    if found not in DTYPES.values():
        raise UserError(f"dtype {value!r} is unknown; use one of {', '.join(DTYPES)}")
    return found


def _find_file(name_or_path: str, file: str) -> str | None:
    """Path of a file of a model folder or hub repository, or None where it has none."""
    if os.path.isdir(name_or_path):
        path = os.path.join(name_or_path, file)
        return path if os.path.isfile(path) else None
    from transformers.utils import cached_file

    return cached_file(name_or_path, file, _raise_exceptions_for_missing_entries=False)


def _read_recommended(name_or_path: str) -> dict[str, Any]:
    path = _find_file(name_or_path, RECOMMENDED_FILE)
    if path is None:
        return {}
    try:
        with open(path, encoding="utf-8") as stream:
            content = json.load(stream)
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must map settings of the labeler to values, got a {type(content).__name__}")
    return content
