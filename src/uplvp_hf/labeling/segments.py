"""From maps of class evidence on a grid to masks in picture pixels, without enlarging every class's map.

Enlarging is bilinear with the grid covering the picture, as `instances.upsample_grid` does it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from .instances import upsample_grid


@dataclass(frozen=True)
class Segment:
    """A piece of a class's area. label: index of the class. box: slices of rows and columns in the picture.
    mask: (rows, columns) bool inside the box. mean, peak: of the evidence under the mask."""

    label: int
    box: tuple[slice, slice]
    mask: np.ndarray
    mean: float
    peak: float

    def full(self, size: tuple[int, int]) -> np.ndarray:
        """The mask in a picture of `size` (H, W)."""
        mask = np.zeros(size, dtype=bool)
        mask[self.box] = self.mask
        return mask


def _positions(length: int, cells: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """For every pixel the first of the two cells it lies between (of a row padded by one on both sides), and the share
    of the second."""
    place = (torch.arange(length, device=device) + 0.5) * (cells / length) + 0.5
    first = place.floor().clamp(0, cells)
    return first.long(), (place - first).float()


def class_map(evidence: torch.Tensor, size: tuple[int, int], threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """The best class of every pixel and its evidence, where that exceeds the threshold.

    evidence: (K, h, w); size: (H, W). Returns owners (H, W) int32, -1 where no class exceeds the threshold, and values
    (H, W) float32, the winner's enlarged evidence (-inf there).

    Between four neighbouring cells a bilinear map stays between its smallest and largest corner, so a class can win
    there only if its largest corner exceeds the threshold and reaches the best of all classes' smallest corners. Mostly
    one or two classes are left: the work grows with those, not with K.
    """
    padded = F.pad(evidence[None].float(), (1, 1, 1, 1), mode="replicate")[0]
    corners = torch.stack([padded[:, :-1, :-1], padded[:, :-1, 1:], padded[:, 1:, :-1], padded[:, 1:, 1:]])
    highest, lowest = corners.amax(dim=0), corners.amin(dim=0)  # (K, h + 1, w + 1)
    alive = ((highest > threshold) & (highest >= lowest.amax(dim=0))).flatten(1)
    cell, label = torch.nonzero(alive.T, as_tuple=True)  # by cell, then by class
    corners = corners.flatten(2)[:, label, cell]  # (4, pairs)
    counts = alive.sum(dim=0)
    offsets = counts.cumsum(dim=0) - counts

    device = evidence.device
    (iy, fy), (ix, fx) = (_positions(length, cells, device) for length, cells in zip(size, evidence.shape[1:]))
    cell_of_pixel = (iy[:, None] * (evidence.shape[2] + 1) + ix).flatten()
    candidates = counts[cell_of_pixel]
    best = torch.full((size[0] * size[1],), -torch.inf, device=device)
    owner = torch.full((size[0] * size[1],), -1, dtype=torch.int32, device=device)
    for turn in range(int(counts.max()) if len(label) else 0):
        pixels = torch.nonzero(candidates > turn)[:, 0]
        pair = offsets[cell_of_pixel[pixels]] + turn
        down, right = fy[pixels // size[1]], fx[pixels % size[1]]
        top, bottom = (torch.lerp(corners[k][pair], corners[k + 1][pair], right) for k in (0, 2))
        value = torch.lerp(top, bottom, down)
        wins = (value > best[pixels]) & (value > threshold)
        won = pixels[wins]
        best[won] = value[wins]
        owner[won] = label[pair[wins]].int()
    return owner.view(*size).cpu().numpy(), best.view(*size).cpu().numpy()


def class_layers(
    evidence: torch.Tensor, size: tuple[int, int], threshold: float
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Every class on its own, so that areas of different classes may overlap: (label, area (H, W) bool, values (H, W)).
    One class is enlarged at a time; classes that exceed the threshold nowhere are left out."""
    for label in torch.nonzero(evidence.amax(dim=(1, 2)) > threshold)[:, 0].tolist():
        values = upsample_grid(evidence[label : label + 1].float(), size)[0].cpu().numpy()
        yield label, values > threshold, values


def connected_segments(
    owners: np.ndarray, values: np.ndarray, min_area: int = 1, fill_holes: bool = False
) -> list[Segment]:
    """4-connected pieces of every class of a class map, of at least `min_area` pixels; by class, then in reading order.

    owners: (H, W) int, -1 for none. Classes with too few pixels are skipped, the others labelled inside their own box.
    """
    segments = []
    areas = np.bincount(owners.ravel() + 1)
    for label, box in enumerate(ndimage.find_objects(owners + 1)):
        if box is None or areas[label + 1] < min_area:
            continue
        segments.extend(area_segments(label, owners[box] == label, values[box], box, min_area, fill_holes))
    return segments


def area_segments(
    label: int,
    area: np.ndarray,
    values: np.ndarray,
    box: tuple[slice, slice],
    min_area: int = 1,
    fill_holes: bool = False,
) -> list[Segment]:
    """4-connected pieces of one class's area. area, values: inside `box`."""
    if fill_holes:
        area = ndimage.binary_fill_holes(area)
    labelled, count = ndimage.label(area)
    sizes = np.bincount(labelled.ravel(), minlength=count + 1)[1:]
    if not (sizes >= min_area).any():
        return []
    boxes = ndimage.find_objects(labelled)
    pieces = []
    for k in np.flatnonzero(sizes >= max(1, min_area)):
        inner = boxes[k]
        pieces.append(make_segment(label, labelled[inner] == k + 1, values[inner], _shift(inner, box)))
    return pieces


def make_segment(label: int, mask: np.ndarray, values: np.ndarray, box: tuple[slice, slice]) -> Segment:
    """Mean (summed in float64) and peak of the finite evidence under a mask; filled holes have none."""
    under = values[mask]
    under = under[np.isfinite(under)]
    return Segment(label, box, mask, float(under.mean(dtype=np.float64)), float(under.max()))


def _shift(inner: tuple[slice, slice], outer: tuple[slice, slice]) -> tuple[slice, slice]:
    return tuple(slice(a.start + b.start, a.stop + b.start) for a, b in zip(inner, outer))
