"""Mask values on a coarse grid -> masks of another size, bilinearly, as bool tensors or straight as COCO run lengths.

Shared by the image processors. Copied to the Hub beside the weights: no other module of the library is imported.

What is inside is decided by sign: values above zero belong to the mask. `resized_mask` is the plain way: it computes
every pixel. `mask_flips` gives the same bits and computes few of them: run lengths go down the columns, and between two
rows of cells an interpolated column is a straight line, so the mask can begin or end at most once in between. Columns
are therefore interpolated on the rows of cells only (a seventh of the pixels for a mask of 144 rows on an image of
1080), and pixels only where the sign changes. Both sum `a * (1 - t) + b * t`, whose sign is that of `a` and `b` where
they agree, and which moves monotonously with t where they do not, in floating point too; and both look only at the
window of a mask.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Logits beyond it are cut off, so that infinite ones cannot make 0 * inf; far outside what sigmoids distinguish.
LARGEST_VALUE = 1e4
# Pixels of a mask computed at once, in whole rows: 16 MB of float32 a temporary.
PIXELS_PER_BAND = 2**22


class Axis(NamedTuple):
    """One side of a resampling: pixel p of the target is cells[low[p]] * (1 - share[p]) + cells[high[p]] * share[p].

    low, high: (target,) int64, not decreasing. share: (target,) float32 in 0..1.
    """

    low: np.ndarray
    high: np.ndarray
    share: np.ndarray


class Window(NamedTuple):
    """Cells that a mask occupies, first and last, and the pixels that they can reach, first and one after the last."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    top: int
    bottom: int
    left: int
    right: int


def resampling_axis(cells: int, source: float, target: int, stride: float) -> Axis:
    """Pixel centers of a side of `target` pixels among the centers of `cells` cells.

    The cells are `stride` source pixels wide each and start where the image starts; the image is `source` pixels
    long, which need not be the end of a cell. Beyond the outermost centers the outermost cells go on (as in
    `torch.nn.functional.interpolate` without `align_corners`).
    """
    place = (np.arange(target) + 0.5) * (source / target / stride) - 0.5
    place = place.clip(0, cells - 1)
    low = np.floor(place).astype(np.int64)
    return Axis(low, np.minimum(low + 1, cells - 1), (place - low).astype(np.float32))


def signed_values(values: Tensor, bound: float) -> Tensor:
    """(..., h, w) of any floating type -> float32, above zero inside the mask, where `values` exceed `bound`."""
    return (values.float().clamp(-LARGEST_VALUE, LARGEST_VALUE) - bound).clamp(-LARGEST_VALUE, LARGEST_VALUE)


def mask_windows(values: Tensor, rows: Axis, columns: Axis) -> list[Window | None]:
    """The window of every mask in (n, h, w), None where it has no cell. One transfer to the host."""
    inside = values > 0
    spans = []
    for occupied in (inside.any(2), inside.any(1)):  # rows (n, h), columns (n, w)
        length = occupied.shape[1]
        occupied = occupied.to(torch.uint8)
        spans += [occupied.argmax(1), length - 1 - occupied.flip(1).argmax(1)]
    found = torch.stack([inside.flatten(1).any(1), *spans], 1).tolist()
    return [
        Window((first, last), (start, end), *_reach(rows, first, last), *_reach(columns, start, end)) if any_ else None
        for any_, first, last, start, end in found
    ]


def _reach(axis: Axis, first: int, last: int) -> tuple[int, int]:
    """Pixels with a neighbor among the cells first..last: from the first, to one after the last."""
    start = np.searchsorted(axis.low, first - 1, "left")
    return int(start), int(np.searchsorted(axis.low, last, "right"))


def _cells(axis: Axis, first: int, last: int) -> tuple[int, int]:
    """The cells first..last and one more on either side, as a slice."""
    return max(first - 1, 0), min(last + 2, int(axis.high[-1]) + 1)


def resized_mask(
    values: Tensor, window: Window | None, rows: tuple[Tensor, ...], columns: tuple[Tensor, ...]
) -> Tensor:
    """(h, w) float32 -> bool of the target size. Every pixel of the window is computed.

    rows, columns: the parts of the two `Axis` as tensors on the device of `values`.
    """
    mask = torch.zeros((len(rows[0]), len(columns[0])), dtype=torch.bool, device=values.device)
    if window is None or window.top >= window.bottom or window.left >= window.right:
        return mask
    across = interpolated(values, columns, window.left, window.right, 1)  # (h, width of the window)
    band = max(1, PIXELS_PER_BAND // across.shape[1])
    for start in range(window.top, window.bottom, band):
        end = min(start + band, window.bottom)
        mask[start:end, window.left : window.right] = interpolated(across, rows, start, end, 0) > 0
    return mask


def interpolated(values: Tensor, axis: tuple[Tensor, ...], start: int, end: int, dim: int) -> Tensor:
    """Pixels start..end of `axis`, its parts as tensors, along dimension `dim` of (..., h, w)."""
    low, high, share = (part[start:end] for part in axis)
    share = share if dim == values.dim() - 1 else share[:, None]
    return values.index_select(dim, low).mul_(1 - share).add_(values.index_select(dim, high).mul_(share))


def mask_flips(values: np.ndarray, window: Window | None, rows: Axis, columns: Axis) -> np.ndarray:
    """(h, w) float32 -> where the mask begins and ends, down the columns: positions column * height + row, increasing.

    The bits of `resized_mask`, by the short way; see the top of this file.
    """
    if window is None or window.top >= window.bottom or window.left >= window.right:
        return np.zeros(0, dtype=np.int64)
    height = len(rows.low)
    top, bottom = _cells(rows, *window.rows)
    left, right = _cells(columns, *window.columns)
    grid = np.ascontiguousarray(values[top:bottom, left:right].T)
    part = slice(window.left, window.right)
    share = columns.share[part, None]
    across = grid[columns.low[part] - left] * (1 - share)  # (columns of pixels, rows of cells)
    across += grid[columns.high[part] - left] * share
    column, knot = _sign_changes(across)
    inner = knot < across.shape[1] - 1
    position = (window.left + column + 1) * height  # where a column ends and the next begins
    crossing = _crossings(across, column[inner], knot[inner], top, rows)
    position[inner] += crossing - height
    return _odd(position[position < height * len(columns.low)])


def _sign_changes(across: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(column, row of cells) after which the sign changes, going down column after column, from and to outside."""
    inside = np.zeros(across.size + 2, dtype=bool)
    np.greater(across, 0, out=inside[1:-1].reshape(across.shape))
    return np.divmod(np.flatnonzero(inside[1:] != inside[:-1]) - 1, across.shape[1])


def _crossings(across: np.ndarray, column: np.ndarray, knot: np.ndarray, top: int, rows: Axis) -> np.ndarray:
    """First row of pixels below a sign change between the cells `knot` and `knot + 1` of a column."""
    above, below = across[column, knot], across[column, knot + 1]
    first = np.searchsorted(rows.low, knot + top, "left")
    count = np.searchsorted(rows.low, knot + top, "right") - first
    row = first.copy()
    for step in range(int(count.max(initial=0))):
        share = rows.share[np.minimum(first + step, len(rows.low) - 1)]
        value = above * (1 - share) + below * share
        row += ((value > 0) == (above > 0)) & (step < count)
    return row


def _odd(position: np.ndarray) -> np.ndarray:
    """Of equal neighbors an odd number leaves one, an even number none: a run without a pixel is no run."""
    if not (position[1:] == position[:-1]).any():
        return position
    unique, count = np.unique(position, return_counts=True)
    return unique[count % 2 == 1]


def window_flips(mask: np.ndarray, top: int, left: int, size: tuple[int, int]) -> np.ndarray:
    """As `mask_flips`, of a bool mask (h, w) that lies at (top, left) of an image of `size` (height, width)."""
    height, width = size
    inside = np.zeros((mask.shape[1], height), dtype=bool)
    inside[:, top : top + mask.shape[0]] = mask.T
    inside = np.concatenate([[False], inside.ravel(), [False]])
    position = np.flatnonzero(inside[1:] != inside[:-1]) + left * height
    return position[position < height * width]


def resized_masks(values: Tensor, rows: Axis, columns: Axis) -> Iterator[Tensor]:
    """(n, h, w) -> the n masks (H, W) one after the other, see `resized_mask`."""
    down, across = (tuple(torch.from_numpy(part).to(values.device) for part in axis) for axis in (rows, columns))
    for value, window in zip(values, mask_windows(values, rows, columns), strict=True):
        yield resized_mask(value, window, down, across)


def resized_flips(values: Tensor, rows: Axis, columns: Axis) -> Iterator[np.ndarray]:
    """(n, h, w) -> the n masks one after the other, see `mask_flips`. One transfer to the host."""
    values = values.cpu()
    for value, window in zip(values.numpy(), mask_windows(values, rows, columns), strict=True):
        yield mask_flips(value, window, rows, columns)
