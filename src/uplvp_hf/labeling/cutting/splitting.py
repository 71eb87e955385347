"""Masks that may hold several objects, taken apart where their features change or where their shape has a neck."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage

from .normalized_cut import split_by_ncut
from .proposals import upsample_grid

LEVELS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # of the largest inscribed radius, at which a mask is eroded


def on_grid(masks: Sequence[np.ndarray], grid: tuple[int, int]) -> torch.Tensor:
    """Masks (H, W) at the centers of the cells of a grid (h, w) -> (N, h, w) bool."""
    height, width = masks[0].shape
    rows = ((np.arange(grid[0]) + 0.5) * height / grid[0]).astype(int)
    columns = ((np.arange(grid[1]) + 0.5) * width / grid[1]).astype(int)
    return torch.from_numpy(np.stack([mask[np.ix_(rows, columns)] for mask in masks]))


def owners(parts: Sequence[torch.Tensor], size: tuple[int, int], offset: float = 0.0) -> np.ndarray:
    """Which of the parts (h, w) is strongest at every pixel when they are enlarged to `size`: (H, W) int."""
    return upsample_grid(torch.stack(list(parts)).float(), size, offset).argmax(dim=0).cpu().numpy()


def split_by_features(
    mask: np.ndarray,
    features: torch.Tensor,
    max_parts: int,
    tau: float,
    max_ncut: float,
    offset: float = 0.0,
) -> list[np.ndarray]:
    """Parts (H, W) bool of a mask along the normalized cuts of its features (C, h, w), centered on their mean.

    offset: of the cells, as `upsample_grid` takes it. The rest is as for `split_by_ncut`.
    """
    cells = on_grid([mask], tuple(features.shape[-2:])).to(features.device)
    (parts,) = split_by_ncut(features, cells, max_parts, tau, max_ncut=max_ncut, center=True)
    if len(parts) < 2:
        return [mask]
    owner = owners(parts, mask.shape, offset)
    return [part for number in range(len(parts)) if (part := mask & (owner == number)).any()]


def split_by_shape(mask: np.ndarray, max_parts: int, neck: float) -> list[np.ndarray]:
    """Parts (H, W) bool of a mask that are joined by necks, largest first.

    The mask is eroded by shares of its largest inscribed radius. Where it falls into pieces whose own radii are so
    large that the neck between them is at most `neck` of either (0 to 1), these are the seeds; the level with most
    pieces counts, up to `max_parts`. A pixel goes to the nearest seed.
    """
    radius = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    best, count = None, 1
    for level in LEVELS:
        pieces, found = ndimage.label(radius > level * radius.max())
        peaks = ndimage.maximum(radius, pieces, range(1, found + 1)) if found else []
        kept = [k + 1 for k in np.argsort(peaks)[::-1] if level * radius.max() <= neck * peaks[k]][:max_parts]
        if len(kept) > count:
            best, count = np.where(np.isin(pieces, kept), pieces, 0), len(kept)
    if best is None:
        return [mask]
    place = ndimage.distance_transform_edt(best == 0, return_distances=False, return_indices=True)
    owner = np.where(mask, best[tuple(place)], 0)
    parts = [owner == number for number in np.unique(owner[owner > 0])]
    return sorted(parts, key=lambda part: -int(part.sum()))
