"""Measures how far the outputs of an exported model are from those of the model itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..progress import with_progress
from .program import TensorModel


def check_batch(count: int, canvas: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Smooth random images (count, 3, H, W) and their masks (count, H, W) int64: the first fills the canvas, the
    others end before it, at the bottom and on the right, and are zero beyond, as an image processor leaves them."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 8, 8, generator=generator)
    pixel_values = nn.functional.interpolate(coarse, size=canvas, mode="bicubic", align_corners=False)
    pixel_values = pixel_values + 0.2 * torch.randn(count, 3, *canvas, generator=generator)
    pixel_mask = torch.ones(count, *canvas, dtype=torch.int64)
    for index in range(1, count):
        height, width = (side - side * index // (2 * count) - 3 for side in canvas)
        pixel_mask[index, height:] = 0
        pixel_mask[index, :, width:] = 0
    return pixel_values * pixel_mask[:, None], pixel_mask


@torch.no_grad()
def largest_differences(
    model: nn.Module,
    run: Callable[[Tensor, Tensor], Mapping[str, Tensor]],
    canvas: tuple[int, int],
    batches: tuple[int, ...] = (1, 3),
) -> dict[str, float]:
    """Largest |a - b| / max(1, |a|) of every output, a of `model` and b of `run`, over batches of `check_batch`.

    So small numbers are compared absolutely. For a box, |a| is its largest coordinate: two ends are found from a center
    and a side, with the rounding of these. Mask logits beside
    `roi_mask_logits` are compared as probabilities: QueryInst makes them from probabilities that are exactly zero
    outside the boxes, where logits are an arbitrary bound.
    """
    largest: dict[str, float] = {}
    reference = TensorModel(model)
    for seed, count in with_progress(list(enumerate(batches)), "comparing", True, "batches"):
        inputs = check_batch(count, canvas, seed)
        expected, found = reference(*inputs), run(*inputs)
        for name, ours in expected.items():
            theirs = found[name]
            if name == "masks_queries_logits" and "roi_mask_logits" in expected:
                ours, theirs = ours.sigmoid(), theirs.sigmoid()
            size = ours.abs().amax(-1, keepdim=True) if name == "boxes" else ours.abs()
            difference = ((ours - theirs).abs() / size.clamp(min=1)).max().item()
            largest[name] = max(largest.get(name, 0.0), difference)
    return largest


def own_rounding(model: nn.Module, canvas: tuple[int, int]) -> dict[str, float]:
    """`largest_differences` of the model from itself on images whose values are the next larger float32.

    What no export can be expected to undercut: untrained or unstable weights amplify rounding from stage to stage.
    """
    tensors = TensorModel(model)
    step = 1 + torch.finfo(torch.float32).eps
    return largest_differences(model, lambda pixel_values, pixel_mask: tensors(pixel_values * step, pixel_mask), canvas)
