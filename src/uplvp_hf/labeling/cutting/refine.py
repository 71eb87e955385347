"""Pixel-adaptive mask refinement (PAMR, arXiv 2005.08104): soft maps follow the image's own edges.

Every step replaces a pixel's values by a weighted mean of its neighbors'; the weights are high where colors agree.
NACLIP (arXiv 2404.08181) runs 10 steps with dilations 8 and 16 after its dense CLIP maps; those are the defaults.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from ...models.errors import UserError

NEIGHBORS = tuple((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0))
CHUNK = 8  # channels at a time, so that they stay in a CPU's cache: measured at 128 x 171 pixels


def _shifted(values: torch.Tensor, dilations: Sequence[int]) -> Iterator[torch.Tensor]:
    """Views of (B, C, H, W) moved to each of the 8 neighbors at each dilation; edge pixels are repeated outwards."""
    height, width = values.shape[-2:]
    reach = max(dilations)
    padded = F.pad(values, (reach, reach, reach, reach), mode="replicate")
    for dilation in dilations:
        for dy, dx in NEIGHBORS:
            top, left = reach + dy * dilation, reach + dx * dilation
            yield padded[..., top : top + height, left : left + width]


def local_affinity(
    pixels: torch.Tensor, dilations: Sequence[int] = (8, 16), sharpness: float = 0.1, eps: float = 1e-8
) -> torch.Tensor:
    """Weights of every pixel's neighbors, which sum to 1: (B, 3, H, W) -> (B, 8 * len(dilations), H, W).

    weight_pq = softmax_q( -mean over channels of |I_p - I_q| / (sharpness * std_p) ), std_p per channel over the pixel
    repeated once a dilation and its neighbors.
    """
    count = (len(NEIGHBORS) + 1) * len(dilations)
    mean = (sum(_shifted(pixels, dilations)) + len(dilations) * pixels) / count
    squares = sum((part - mean) ** 2 for part in _shifted(pixels, dilations)) + len(dilations) * (pixels - mean) ** 2
    scale = sharpness * (squares / (count - 1)).sqrt() + eps
    distances = [((part - pixels).abs() / scale).mean(dim=1) for part in _shifted(pixels, dilations)]
    return torch.stack(distances, dim=1).neg_().softmax(dim=1)


@torch.no_grad()
def pamr(
    pixels: torch.Tensor, maps: torch.Tensor, iterations: int = 10, dilations: Sequence[int] = (8, 16)
) -> torch.Tensor:
    """Refine soft maps.

    Args:
        pixels: (B, 3, H', W') RGB in [0, 1]; resized bilinearly to the maps' size where that differs.
        maps: (B, K, H, W) soft values of any range; every result is a convex combination of a channel's values.
        iterations: steps. dilations: distances in pixels of the eight neighbors.

    Memory beyond inputs and result is 8 * len(dilations) maps of (H, W) and a few channels' maps, whatever B, K and the
    iterations: images and channels are taken one after another. Returns (B, K, H, W) float32.
    Raises UserError for batch sizes that differ or dilations below 1.
    """
    if len(pixels) != len(maps):
        raise UserError(f"pamr: {len(pixels)} images but maps of {len(maps)}")
    if not dilations or min(dilations) < 1:
        raise UserError(f"pamr: dilations {tuple(dilations)} must be one or more distances of at least 1 pixel")
    results = torch.empty_like(maps, dtype=torch.float32)
    for image, soft, result in zip(pixels.float()[:, None], maps, results):
        if image.shape[-2:] != soft.shape[-2:]:
            image = F.interpolate(image, soft.shape[-2:], mode="bilinear", align_corners=False, antialias=True)
        weights = local_affinity(image, dilations)[0]
        for start in range(0, len(soft), CHUNK):
            values = soft[None, start : start + CHUNK].float()
            for _ in range(iterations):
                mixed = torch.zeros_like(values)
                for weight, part in zip(weights, _shifted(values, dilations)):
                    mixed.addcmul_(part, weight)
                values = mixed
            result[start : start + CHUNK] = values[0]
    return results
