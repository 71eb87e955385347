"""Dense CLIP: patch features that live in the text space, from any transformers CLIPModel, by editing its last block.

Sources of the recipes: MaskCLIP (arXiv 2112.01071), ClearCLIP (2407.12442), NACLIP (2404.08181). x is the input of the
last block, h = LayerNorm1(x), q, k, v its projections, O the output projection, s = head_dim ** -0.5:

    vanilla    the block as it is
    maskclip   attention replaced by the identity, residual and FFN kept
    clearclip  softmax(s q q^T), no residual, no FFN
    naclip     softmax(s k k^T + scale * G), G_ij = exp(-|p_i - p_j|^2 / (2 sigma^2)) among patches; no residual, no FFN
    identity   O(v), no residual, no FFN

Then post_layernorm, visual_projection and normalisation for every patch.

The default is naclip with NACLIP's own sigma 5 (patches) and scale 1. Published for OpenAI's CLIP ViT-B/16 (ClearCLIP
paper, table 2, mean mIoU of five data sets): identity 29.5, clearclip 37.5. No real
CLIP has been measured with this code. A very small CLIP can prefer attention closer to the identity: the demo's is used
with scale 5 and sigma 1.5. Naming each mask by zero-shot on its crop (`namers`) is surer than the class of the map.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from .encoders import pictures_to_pixels

ATTENTIONS = ("vanilla", "maskclip", "clearclip", "naclip", "identity")
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Clip:
    """A frozen CLIPModel with its tokenizer and what its pictures look like. image_size, patch_size: pixels, square."""

    model: nn.Module
    tokenizer: Any
    name: str
    image_mean: tuple[float, ...] = OPENAI_MEAN
    image_std: tuple[float, ...] = OPENAI_STD

    @property
    def image_size(self) -> int:
        return self.model.config.vision_config.image_size

    @property
    def patch_size(self) -> int:
        return self.model.config.vision_config.patch_size

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def pixels(self, images: Sequence[Image.Image], size: tuple[int, int]) -> torch.Tensor:
        """Stretch pictures to `size` (height, width) and normalise: (B, 3, H, W) in the model's dtype."""
        pixels = pictures_to_pixels(images, size, self.image_mean, self.image_std)
        return pixels.to(self.device, next(self.model.parameters()).dtype)


def load_clip(
    name_or_path: str,
    device: str | torch.device = "cpu",
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
) -> Clip:
    """A transformers CLIPModel, frozen, with its tokenizer, by folder or hub id.

    Mean and standard deviation: the arguments, else the preprocessor configuration beside the model, else OpenAI's.
    Raises ValueError when it is no CLIP model, or its checkpoint lacks tensors; OSError when it cannot be found.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, CLIPModel

    config = AutoConfig.from_pretrained(name_or_path)
    if config.model_type != "clip":
        raise ValueError(f"{name_or_path} is a {config.model_type} model; the clip labeler reads CLIP models")
    extra = {} if dtype is None else {"dtype": dtype}
    model, info = CLIPModel.from_pretrained(name_or_path, output_loading_info=True, **extra)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"{name_or_path}: {len(missing)} tensors are not in the checkpoint, such as {missing[:3]}")
    tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    if (image_mean is None or image_std is None) and _has_preprocessor(name_or_path):
        processor = AutoImageProcessor.from_pretrained(name_or_path)
        image_mean = image_mean or processor.image_mean
        image_std = image_std or processor.image_std
    model = model.eval().requires_grad_(False).to(device)
    mean, std = tuple(image_mean or OPENAI_MEAN), tuple(image_std or OPENAI_STD)
    return Clip(model, tokenizer, str(name_or_path), mean, std)


def _has_preprocessor(name_or_path: str) -> bool:
    files = ("preprocessor_config.json", "processor_config.json")
    if os.path.isdir(name_or_path):
        return any(os.path.isfile(os.path.join(name_or_path, file)) for file in files)
    from transformers.utils import cached_file

    return any(
        cached_file(name_or_path, file, _raise_exceptions_for_missing_entries=False) is not None for file in files
    )


def gaussian_bias(height: int, width: int, sigma: float, scale: float = 1.0) -> torch.Tensor:
    """NACLIP's additive attention bias with a class token in front: (1 + h*w, 1 + h*w), zero for the class token."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    points = torch.stack([y.flatten(), x.flatten()], dim=1).float()
    bias = torch.zeros(1 + height * width, 1 + height * width)
    bias[1:, 1:] = scale * torch.exp(-(torch.cdist(points, points) ** 2) / (2 * sigma**2))
    return bias


def edited_block(
    block: nn.Module, x: torch.Tensor, attention: str, grid: tuple[int, int], sigma: float = 5.0, scale: float = 1.0
) -> torch.Tensor:
    """The last encoder block with another attention (module docstring): x (B, 1 + h*w, C) -> (B, 1 + h*w, C)."""
    layer = block.self_attn
    h = block.layer_norm1(x)

    def heads(projection: nn.Module) -> torch.Tensor:  # (B, T, C) -> (B, heads, T, head_dim)
        return projection(h).unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)

    if attention in ("maskclip", "identity"):
        mixed = layer.v_proj(h)
    elif attention in ("clearclip", "naclip"):
        same = heads(layer.q_proj if attention == "clearclip" else layer.k_proj)
        bias = None
        if attention == "naclip":
            bias = gaussian_bias(*grid, sigma, scale).to(x.device, x.dtype)
        mixed = F.scaled_dot_product_attention(same, same, heads(layer.v_proj), attn_mask=bias, scale=layer.scale)
        mixed = mixed.transpose(1, 2).flatten(2)
    else:
        raise ValueError(f"attention {attention!r} is unknown; use one of {', '.join(ATTENTIONS)}")
    out = layer.out_proj(mixed)
    if attention == "maskclip":
        out = x + out
        out = out + block.mlp(block.layer_norm2(out))
    return out


@torch.inference_mode()
def dense_features(
    model: nn.Module, pixels: torch.Tensor, attention: str = "naclip", sigma: float = 5.0, scale: float = 1.0
) -> torch.Tensor:
    """Unit-length patch features in CLIP's text space.

    Args:
        model: a transformers CLIPModel or CLIPVisionModelWithProjection.
        pixels: (B, 3, H, W) normalised, sides multiples of the patch size; position embeddings are interpolated.
        attention: see the module docstring. sigma: patches. scale: of the gaussian; both are read by naclip alone.

    Returns (B, D, H / patch, W / patch) float32. Raises ValueError for an unknown attention or sides that do not fit.
    """
    if attention not in ATTENTIONS:
        raise ValueError(f"attention {attention!r} is unknown; use one of {', '.join(ATTENTIONS)}")
    vision = getattr(model, "vision_model", model)
    patch = vision.config.patch_size
    height, width = pixels.shape[-2:]
    if height % patch or width % patch:
        raise ValueError(f"a {height}x{width} input is not a whole number of {patch}-pixel patches")
    grid = height // patch, width // patch
    output = vision(pixels, output_hidden_states=True, interpolate_pos_encoding=True)
    if attention == "vanilla":
        tokens = output.last_hidden_state
    else:
        tokens = edited_block(vision.encoder.layers[-1], output.hidden_states[-2], attention, grid, sigma, scale)
    projected = model.visual_projection(vision.post_layernorm(tokens[:, 1:]))
    return F.normalize(projected.float(), dim=-1).transpose(1, 2).unflatten(2, grid)


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Left edges of windows that cover `length`; the last one ends at the border."""
    last = max(0, length - window)
    return [*range(0, last, stride), last]


def working_size(width: int, height: int, image_size: int, side: str, patch: int) -> tuple[int, int]:
    """(height, width) of the resized picture: `side` ("shorter" or "longer") near `image_size`, whole patches."""
    reference = min(width, height) if side == "shorter" else max(width, height)
    scale = image_size / reference
    return tuple(max(patch, round(length * scale / patch) * patch) for length in (height, width))


@torch.inference_mode()
def similarity_grids(
    clip: Clip,
    images: Sequence[Image.Image],
    vectors: torch.Tensor,
    image_size: int,
    side: str = "shorter",
    window: int | None = None,
    stride: int | None = None,
    window_batch: int = 32,
    **recipe: Any,
) -> list[torch.Tensor]:
    """Cosine similarity of every place in every picture with every text vector (T, D).

    Pictures are resized (`working_size`), cut into windows of `window` pixels every `stride` pixels (None: no windows,
    and half a window), and the similarities of overlapping windows averaged. Windows of all pictures share batches of
    `window_batch`. Returns one (T, h, w) float32 map a picture; cells are gcd(stride, patch) pixels wide, so that a
    stride finer than a patch gives a finer map. Further arguments go to `dense_features`.
    """
    patch = clip.patch_size
    window = None if window is None else max(patch, window // patch * patch)
    step = stride or (window or patch) // 2 or 1
    cell = math.gcd(step, patch) if window is not None else patch
    sums, counts, jobs = [], [], []
    for number, image in enumerate(images):
        height, width = working_size(*image.size, image_size, side, patch)
        pixels = clip.pixels([image], (height, width))[0]
        tall, wide = (height, width) if window is None else (min(window, height), min(window, width))
        sums.append(torch.zeros(len(vectors), height // cell, width // cell, device=clip.device))
        counts.append(torch.zeros(height // cell, width // cell, device=clip.device))
        for top in window_starts(height, tall, step):
            for left in window_starts(width, wide, step):
                jobs.append((number, top // cell, left // cell, pixels[:, top : top + tall, left : left + wide]))
    for batch in _same_shape_batches(jobs, window_batch):
        features = dense_features(clip.model, torch.stack([job[3] for job in batch]), **recipe)
        maps = torch.einsum("td,bdhw->bthw", vectors.to(features), features)
        if cell != patch:
            maps = F.interpolate(maps, scale_factor=patch // cell, mode="bilinear", align_corners=False)
        tall, wide = maps.shape[-2:]
        for (number, top, left, _), part in zip(batch, maps):
            sums[number][:, top : top + tall, left : left + wide] += part
            counts[number][top : top + tall, left : left + wide] += 1
    return [total / count for total, count in zip(sums, counts)]


def _same_shape_batches(jobs: Sequence[tuple], size: int) -> list[list[tuple]]:
    groups: dict[torch.Size, list[tuple]] = {}
    for job in jobs:
        groups.setdefault(job[3].shape, []).append(job)
    return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]
