"""From maps of class evidence on a grid to masks in image pixels, without enlarging every class's map.

Enlarging is bilinear with the grid covering the image, as `instances.upsample_grid` does it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from .proposals import upsample_grid

# Below this share of places that still have a class to try, picking their pixels out is faster than trying all.
DENSE_SHARE = 0.15
# Evidence of a class that a place does not have: interpolates without NaN, loses against everything.
NOWHERE = -1e30


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

    Between four neighboring cells a bilinear map stays between its smallest and largest corner, so a class can win
    there only if its largest corner exceeds the threshold and reaches the best of all classes' smallest corners. Mostly
    few classes are left: the work grows with those, not with K.
    """
    device = evidence.device
    padded = F.pad(evidence[None].float(), (1, 1, 1, 1), mode="replicate")[0]
    corners = torch.stack([padded[:, :-1, :-1], padded[:, :-1, 1:], padded[:, 1:, :-1], padded[:, 1:, 1:]])
    highest, lowest = corners.amax(dim=0), corners.amin(dim=0)  # (K, h + 1, w + 1)
    alive = ((highest > threshold) & (highest >= lowest.amax(dim=0))).flatten(1)
    corners = corners.flatten(2)
    place, label = torch.nonzero(alive.T, as_tuple=True)  # by place between cells, then by class
    counts = alive.sum(dim=0)
    offsets = counts.cumsum(dim=0) - counts
    (iy, fy), (ix, fx) = (_positions(length, cells, device) for length, cells in zip(size, evidence.shape[1:]))
    between = (evidence.shape[1] + 1, evidence.shape[2] + 1)

    best = torch.full(size, -torch.inf, device=device)
    winner = torch.zeros(size, dtype=torch.int64, device=device)  # which of its place's classes a pixel belongs to
    turns = torch.bincount(counts).flip(0).cumsum(0).flip(0)[1:].tolist()  # places with more than 0, 1, ... classes
    dense = sum(places > DENSE_SHARE * len(counts) for places in turns)
    columns = torch.arange(between[1], device=device)[:, None] == ix  # (w + 1, W)
    left, right = torch.where(columns, 1 - fx, 0.0), torch.where(columns, fx, 0.0)
    for turn in range(dense):  # the turn-th class of every place, all pixels at once
        pair = (offsets + turn).clamp_max(len(label) - 1)
        corner = torch.where(counts > turn, corners[:, label[pair], place[pair]], NOWHERE)
        corner = corner.view(4, *between)[:, iy]  # (4, H, w + 1)
        sides = (torch.lerp(corner[k], corner[k + 2], fy[:, None]) for k in (0, 1))
        value = next(sides) @ left + next(sides) @ right
        winner = torch.where(value > best, turn, winner) if turn else winner
        best = torch.maximum(best, value)
    home = (iy[:, None] * between[1] + ix).view(-1)
    if dense < len(turns):  # further classes of the few places that have them
        rest = range(dense, len(turns))
        _contest(corners, place, label, counts, offsets, home, (fy, fx), rest, best.view(-1), winner.view(-1))
    owner = torch.full(size, -1, dtype=torch.int32, device=device)
    if len(label):
        above = best > threshold
        winners = (offsets[home] + winner.view(-1)).clamp_max(len(label) - 1)
        owner = torch.where(above, label.int()[winners].view(size), owner)
        best = torch.where(above, best, -torch.inf)
    return owner.cpu().numpy(), best.cpu().numpy()


def _contest(corners, place, label, counts, offsets, home, shares, turns, best, winner) -> None:
    """Turns of `class_map` that concern few pixels, which are picked out; `best` and `winner` are changed in place."""
    width = len(shares[1])
    pixels = torch.nonzero((counts > turns[0])[home])[:, 0]
    home, down, right = home[pixels], shares[0][pixels // width], shares[1][pixels % width]
    for turn in turns:
        if turn > turns[0]:
            keep = torch.nonzero((counts > turn)[home])[:, 0]
            pixels, home, down, right = pixels[keep], home[keep], down[keep], right[keep]
        pair = offsets[home] + turn
        corner = corners[:, label[pair], place[pair]]
        value = torch.lerp(torch.lerp(corner[0], corner[2], down), torch.lerp(corner[1], corner[3], down), right)
        better = value > best[pixels]
        pixels_won = pixels[better]
        best[pixels_won] = value[better]
        winner[pixels_won] = turn


def class_layers(
    evidence: torch.Tensor, size: tuple[int, int], threshold: float
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Every class on its own, so that areas of different classes may overlap: (label, area (H, W) bool, values (H, W)).
    One class is enlarged at a time; classes that exceed the threshold nowhere are left out."""
    for label in torch.nonzero(evidence.amax(dim=(1, 2)) > threshold)[:, 0].tolist():
        values = upsample_grid(evidence[label : label + 1].float(), size)[0].cpu().numpy()
        yield label, values > threshold, values


def connected_segments(
    owners: np.ndarray,
    values: np.ndarray,
    min_area: int = 1,
    fill_holes: bool = False,
    labels: Collection[int] | None = None,
) -> list[Segment]:
    """4-connected pieces of every class of a class map, of at least `min_area` pixels; by class, then in reading order.

    owners: (H, W) int, -1 for none. labels: the classes to look at, None for all. All classes are labeled at once, by
    their runs along the rows.
    """
    if fill_holes:
        boxes = enumerate(ndimage.find_objects(owners + 1))
        areas = ((k, box) for k, box in boxes if box is not None and (labels is None or k in labels))
        pieces = (area_segments(k, owners[box] == k, values[box], box, min_area, True) for k, box in areas)
        return [segment for group in pieces for segment in group]
    runs = label_runs(owners)
    areas = np.bincount(runs.piece, runs.stops - runs.starts)
    first = np.unique(runs.piece, return_index=True)[1]  # the run in which each piece begins
    keep = (areas >= min_area) & (runs.owners[first] >= 0)
    if labels is not None:
        keep &= np.isin(runs.owners[first], list(labels))
    order = np.argsort(runs.piece, kind="stable")
    bounds = np.searchsorted(runs.piece[order], np.arange(len(areas) + 1))
    chosen = sorted(np.flatnonzero(keep), key=lambda piece: (runs.owners[first[piece]], first[piece]))
    segments = []
    for piece in chosen:
        mask, box = runs.paint(order[bounds[piece] : bounds[piece + 1]], owners.shape[1])
        segments.append(make_segment(int(runs.owners[first[piece]]), mask, values[box], box))
    return segments


@dataclass(frozen=True)
class Runs:
    """Stretches of equal owners along the rows of a map, in reading order. starts, stops: in the flattened map.
    owners: of each. piece: number of the 4-connected piece that each belongs to."""

    starts: np.ndarray
    stops: np.ndarray
    owners: np.ndarray
    piece: np.ndarray

    def paint(self, members: np.ndarray, width: int) -> tuple[np.ndarray, tuple[slice, slice]]:
        """The mask of some runs within its box, and the box, in a map of that width."""
        rows, left = np.divmod(self.starts[members], width)
        right = left + self.stops[members] - self.starts[members]
        box = slice(int(rows.min()), int(rows.max()) + 1), slice(int(left.min()), int(right.max()))
        edges = np.zeros((box[0].stop - box[0].start, box[1].stop - box[1].start + 1), dtype=np.int8)
        edges[rows - box[0].start, left - box[1].start] += 1  # runs of a piece never touch within a row
        edges[rows - box[0].start, right - box[1].start] -= 1
        return edges.cumsum(axis=1, dtype=np.int8)[:, :-1].astype(bool), box


def label_runs(owners: np.ndarray) -> Runs:
    """Runs of a (H, W) int map and the 4-connected pieces they form with equal neighbors above and below."""
    width = owners.shape[1]
    flat = owners.ravel()
    begins = np.empty(flat.size, dtype=bool)
    np.not_equal(flat[1:], flat[:-1], out=begins[1:])
    begins[::width] = True
    starts = np.flatnonzero(begins)
    stops = np.append(starts[1:], flat.size)
    names = flat[starts]
    # The runs of the next row that lie under each run are neighbors in the list: from `low` to `high`.
    low = np.searchsorted(stops, starts + width, side="right")
    high = np.searchsorted(starts, np.minimum(stops + width, flat.size), side="left")
    count = np.maximum(high - low, 0)
    upper = np.repeat(np.arange(len(starts)), count)
    lower = np.arange(len(upper)) - np.repeat(count.cumsum() - count, count) + low[upper]
    same = names[upper] == names[lower]
    graph = coo_array((np.ones(same.sum(), dtype=bool), (upper[same], lower[same])), shape=(len(starts), len(starts)))
    return Runs(starts, stops, names, connected_components(graph, directed=False)[1])


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
