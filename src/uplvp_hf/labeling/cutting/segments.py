"""From maps of class evidence on a grid to masks in image pixels; one class is enlarged at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from .proposals import upsample_grid


@dataclass(frozen=True)
class Segment:
    """A piece of a class's area. label: index of the class. box: slices of rows and columns in the image.
    mask: (rows, columns) bool inside the box. mean, peak: of the evidence under the mask."""

    label: int
    box: tuple[slice, slice]
    mask: np.ndarray
    mean: float
    peak: float

    def full(self, size: tuple[int, int]) -> np.ndarray:
        """The mask in an image of `size` (H, W)."""
        mask = np.zeros(size, dtype=bool)
        mask[self.box] = self.mask
        return mask


def class_map(evidence: torch.Tensor, size: tuple[int, int], threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """The best class of every pixel and its evidence, where that exceeds the threshold.

    evidence: (K, h, w); size: (H, W). Returns owners (H, W) int32, -1 where no class exceeds the threshold, and values
    (H, W) float32, the winner's enlarged evidence (-inf there). Of equal classes the first one wins.
    """
    best = torch.full(size, threshold, dtype=torch.float32, device=evidence.device)
    owner = torch.full(size, -1, dtype=torch.int32, device=evidence.device)
    for label in _classes_above(evidence, threshold):
        values = upsample_grid(evidence[label], size)
        owner.masked_fill_(values > best, label)
        best = torch.fmax(best, values)
    return owner.cpu().numpy(), best.masked_fill_(owner < 0, -torch.inf).cpu().numpy()


def _classes_above(evidence: torch.Tensor, threshold: float) -> list[int]:
    """Classes that exceed the threshold somewhere; a bilinear map exceeds its cells nowhere."""
    return torch.nonzero(evidence.amax(dim=(1, 2)) > threshold)[:, 0].tolist()


def class_layers(
    evidence: torch.Tensor, size: tuple[int, int], threshold: float
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Every class on its own, so that areas of different classes may overlap: (label, area (H, W) bool, values (H, W)).
    One class is enlarged at a time; classes that exceed the threshold nowhere are left out."""
    for label in _classes_above(evidence, threshold):
        values = upsample_grid(evidence[label], size).cpu().numpy()
        yield label, values > threshold, values


def connected_segments(
    owners: np.ndarray,
    values: np.ndarray,
    min_area: int = 1,
    fill_holes: bool = False,
    labels: Collection[int] | None = None,
) -> list[Segment]:
    """4-connected pieces of every class of a class map, of at least `min_area` pixels; by class, then in reading order.

    owners: (H, W) int, -1 for none. labels: the classes to look at, None for all.
    """
    if fill_holes:
        boxes = enumerate(ndimage.find_objects(owners + 1))
        areas = ((k, box) for k, box in boxes if box is not None and (labels is None or k in labels))
        pieces = (area_segments(k, owners[box] == k, values[box], box, min_area, True) for k, box in areas)
        return [segment for group in pieces for segment in group]
    # All classes at once: pixels are joined to equal neighbors on the right and below.
    pixels = np.arange(owners.size, dtype=np.int32).reshape(owners.shape)
    right, down = owners[:, 1:] == owners[:, :-1], owners[1:] == owners[:-1]
    one = np.concatenate([pixels[:, :-1][right], pixels[:-1][down]])
    other = np.concatenate([pixels[:, 1:][right], pixels[1:][down]])
    graph = coo_array((np.ones(len(one), dtype=bool), (one, other)), shape=(owners.size, owners.size))
    count, flat = connected_components(graph, directed=False)
    owner = np.empty(count, dtype=np.int64)
    owner[flat] = owners.ravel()
    keep = (np.bincount(flat) >= min_area) & (owner >= 0)
    if labels is not None:
        keep &= np.isin(owner, list(labels))
    numbers = flat.reshape(owners.shape)
    boxes_of = ndimage.find_objects(numbers + 1)
    chosen = sorted(np.flatnonzero(keep).tolist(), key=lambda piece: owner[piece])
    return [make_segment(int(owner[k]), numbers[boxes_of[k]] == k, values[boxes_of[k]], boxes_of[k]) for k in chosen]


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
    labeled, count = ndimage.label(area)
    sizes = np.bincount(labeled.ravel(), minlength=count + 1)[1:]
    if not (sizes >= min_area).any():
        return []
    boxes = ndimage.find_objects(labeled)
    pieces = []
    for k in np.flatnonzero(sizes >= max(1, min_area)):
        inner = boxes[k]
        pieces.append(make_segment(label, labeled[inner] == k + 1, values[inner], _shift(inner, box)))
    return pieces


def make_segment(label: int, mask: np.ndarray, values: np.ndarray, box: tuple[slice, slice]) -> Segment:
    """Mean (summed in float64) and peak of the finite evidence under a mask; filled holes have none."""
    under = values[mask]
    under = under[np.isfinite(under)]
    return Segment(label, box, mask, float(under.mean(dtype=np.float64)), float(under.max()))


def _shift(inner: tuple[slice, slice], outer: tuple[slice, slice]) -> tuple[slice, slice]:
    return tuple(slice(a.start + b.start, a.stop + b.start) for a, b in zip(inner, outer))
