"""Large images in overlapping windows: where the windows are, and which pieces in them are one instance.

All masks are run lengths: no mask of the image's size is ever decoded, whatever the number of instances. As SAHI
(arXiv 2202.06934) cuts images; the merging is our own, because masks say more than boxes: two windows saw the same
instance when their masks agree where both of them looked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask

from uplvp_hf.data import rle_areas, rle_boxes

from ..models.errors import UserError

Window = tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels, ends exclusive


@dataclass(frozen=True)
class Tiles:
    """How an image is cut, and what counts as one instance.

    size: side of the square windows in pixels of the image; one that fits into it is not cut. overlap: least share
    of the side that neighbors have in common; objects up to that size are seen whole by one window at least. full:
    the whole image, scaled down as usual, is one more window, for objects larger than a few windows. agreement:
    least intersection over union of two masks of one class, within both windows, that makes them one instance.
    contained: a piece that its window cut off is left out when this share of it lies in another instance of its class.

    Raises UserError for values out of range.
    """

    size: int
    overlap: float = 0.2
    full: bool = False
    agreement: float = 0.5
    contained: float = 0.7

    def __post_init__(self) -> None:
        if self.size < 32:
            raise UserError(f"tiles of {self.size} pixels are too small: at least 32.")
        if not 0 < self.overlap < 0.9:
            raise UserError(f"an overlap of {self.overlap} is not between 0 and 0.9; both excluded.")
        if not 0 < self.agreement <= 1 or not 0 < self.contained <= 1:
            raise UserError(f"agreement {self.agreement} and contained {self.contained} must be above 0, at most 1.")

    def windows(self, width: int, height: int) -> list[Window]:
        """Windows that cover the image, row by row; the whole image alone where it fits into one, and last where
        `full` says so."""
        columns, rows = self._starts(width), self._starts(height)
        whole = (0, 0, width, height)
        if len(columns) == len(rows) == 1:
            return [whole]
        windows = [(x, y, min(x + self.size, width), min(y + self.size, height)) for y in rows for x in columns]
        return [*windows, whole] if self.full else windows

    def _starts(self, length: int) -> list[int]:
        """Start positions, evenly spread, the last window flush with the end."""
        if length <= self.size:
            return [0]
        step = max(1, math.floor(self.size * (1 - self.overlap)))
        count = math.ceil((length - self.size) / step) + 1
        return [round(k * (length - self.size) / (count - 1)) for k in range(count)]


@dataclass
class _Piece:
    """What one window found. box: x1, y1, x2, y2 around the mask; own: the box to report (the model's own box, moved);
    cut: whether the mask reaches an end of the window that is none of the image."""

    window: Window
    label: int
    score: float
    rle: dict[str, Any]
    box: tuple[float, ...]
    own: list[float]
    cut: bool
    areas: dict[Window, int] = field(default_factory=dict)

    def area_in(self, window: Window, width: int, height: int) -> int:
        """Pixels of the mask inside another window of the image."""
        if window not in self.areas:
            self.areas[window] = _area(_intersection(self.rle, _window_rle(window, width, height)))
        return self.areas[window]


def place_rle(rle: dict[str, Any], window: Window, width: int, height: int) -> dict[str, Any]:
    """Converts the run lengths of a window into those of the image (width, height) that it was cut from."""
    x1, y1, x2, y2 = window
    if (x2 - x1, y2 - y1) == (width, height):
        return rle
    columns = coco_mask.decode(_packed(rle)).T  # (w, h): down the columns, as run lengths go
    edges = np.zeros((columns.shape[0], columns.shape[1] + 2), dtype=np.int8)
    edges[:, 1:-1] = columns
    column, row = np.nonzero(np.diff(edges, axis=1))  # starts and ends by turns
    places = (column.astype(np.int64) + x1) * height + row + y1
    starts, ends = places[::2], places[1::2]
    joined = np.flatnonzero(starts[1:] == ends[:-1])  # a run over the end of a column of a window of full height
    starts, ends = np.delete(starts, joined + 1), np.delete(ends, joined)
    marks = np.stack([starts, ends], 1).ravel()
    counts = np.diff(marks, prepend=0, append=width * height).tolist()
    if counts[-1] == 0 and len(counts) > 1:  # as an encoder writes it
        counts.pop()
    packed = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return {"size": [height, width], "counts": packed["counts"].decode("ascii")}


def merge_windows(
    found: Sequence[tuple[Window, dict[str, Any]]], width: int, height: int, tiles: Tiles
) -> dict[str, Any]:
    """Merges the results of the windows of one image, each in its window's pixels, into one result for the image.

    found: (window, {"scores", "labels", "boxes", "rle"}) as `predict_dataset` yields them. Masks of one instance are
    united, and it gets their best score and the box around them; an instance of one piece keeps its box, moved.
    Returns the same keys, best first.
    """
    pieces = [piece for window, result in found for piece in _pieces(window, result, width, height)]
    groups = _grouped(pieces, width, height, tiles.agreement)
    merged = [_united([pieces[index] for index in group]) for group in groups]
    merged = _without_contained(merged, tiles.contained)
    merged.sort(key=lambda piece: -piece.score)  # stable
    return {
        "scores": torch.tensor([piece.score for piece in merged], dtype=torch.float32),
        "labels": torch.tensor([piece.label for piece in merged], dtype=torch.int64),
        "boxes": torch.tensor([piece.own for piece in merged], dtype=torch.float32).reshape(-1, 4),
        "rle": [piece.rle for piece in merged],
    }


def _pieces(window: Window, result: dict[str, Any], width: int, height: int) -> list[_Piece]:
    x1, y1, x2, y2 = window
    rles = [place_rle(rle, window, width, height) for rle in result["rle"]]
    # Masks may end a pixel or two before the end of what the model saw.
    slack = max(2, round(0.005 * max(x2 - x1, y2 - y1)))
    pieces = []
    for rle, box, own, score, label in zip(
        rles, rle_boxes(rles).tolist(), result["boxes"].tolist(), result["scores"].tolist(), result["labels"].tolist()
    ):
        box = (box[0], box[1], box[0] + box[2], box[1] + box[3])
        cut = (
            (x1 > 0 and box[0] < x1 + slack)
            or (y1 > 0 and box[1] < y1 + slack)
            or (x2 < width and box[2] > x2 - slack)
            or (y2 < height and box[3] > y2 - slack)
        )
        moved = [own[0] + x1, own[1] + y1, own[2] + x1, own[3] + y1]
        pieces.append(_Piece(window, label, score, rle, box, moved, cut))
    return pieces


def _grouped(pieces: list[_Piece], width: int, height: int, agreement: float) -> list[list[int]]:
    """Groups pieces that are one instance, transitively over agreeing pairs; the best piece comes first."""
    leader = list(range(len(pieces)))

    def find(index: int) -> int:
        while leader[index] != index:
            leader[index] = leader[leader[index]]
            index = leader[index]
        return index

    for first, second in _neighbors(pieces):
        if find(first) != find(second) and _agree(pieces[first], pieces[second], width, height, agreement):
            leader[find(second)] = find(first)
    groups: dict[int, list[int]] = {}
    for index in sorted(range(len(pieces)), key=lambda k: -pieces[k].score):
        groups.setdefault(find(index), []).append(index)
    return list(groups.values())


def _neighbors(pieces: list[_Piece]) -> list[tuple[int, int]]:
    """Pairs of one class in two windows whose boxes meet."""
    if not pieces:
        return []
    boxes = np.array([piece.box for piece in pieces])
    labels = np.array([piece.label for piece in pieces])
    pairs = []
    for index, piece in enumerate(pieces[:-1]):
        after = boxes[index + 1 :]
        meets = (labels[index + 1 :] == piece.label) & (after[:, :2] < boxes[index, 2:]).all(1)
        meets &= (after[:, 2:] > boxes[index, :2]).all(1)
        others = (index + 1 + np.flatnonzero(meets)).tolist()
        pairs += [(index, other) for other in others if pieces[other].window != piece.window]
    return pairs


def _agree(first: _Piece, second: _Piece, width: int, height: int, agreement: float) -> bool:
    """Whether two masks agree within the part that both windows saw, which holds their whole intersection."""
    seen = first.area_in(second.window, width, height) + second.area_in(first.window, width, height)

    def enough(both: float) -> bool:
        return both > 0 and both >= agreement * (seen - both)

    # The boxes bound where the masks meet: most pairs end here, before any mask is looked at.
    sides = [min(first.box[k + 2], second.box[k + 2]) - max(first.box[k], second.box[k]) for k in (0, 1)]
    return enough(sides[0] * sides[1]) and enough(_area(_intersection(first.rle, second.rle)))


def _united(pieces: list[_Piece]) -> _Piece:
    """The instance of a group, best piece first."""
    best = pieces[0]
    if len(pieces) == 1:
        return best
    packed = coco_mask.merge([_packed(piece.rle) for piece in pieces])
    rle = {"size": best.rle["size"], "counts": packed["counts"].decode("ascii")}
    x, y, wide, high = rle_boxes([rle])[0].tolist()
    box = (x, y, x + wide, y + high)
    return _Piece(best.window, best.label, best.score, rle, box, list(box), all(piece.cut for piece in pieces))


def _without_contained(pieces: list[_Piece], share: float) -> list[_Piece]:
    """Leaves out pieces that a window cut off and that lie in a larger instance of their class."""
    areas = rle_areas([piece.rle for piece in pieces])
    left_out: set[int] = set()
    for first, second in _neighbors(pieces):
        small, large = (first, second) if areas[first] <= areas[second] else (second, first)
        if pieces[small].cut and small not in left_out and large not in left_out:
            inside = _area(_intersection(pieces[small].rle, pieces[large].rle))
            if inside >= share * areas[small]:
                left_out.add(small)
    return [piece for index, piece in enumerate(pieces) if index not in left_out]


def _packed(rle: dict[str, Any]) -> dict[str, Any]:
    return {"size": rle["size"], "counts": rle["counts"].encode("ascii")}


def _area(packed: dict[str, Any]) -> int:
    return int(coco_mask.area(packed))


def _intersection(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    return coco_mask.merge([_packed(first), _packed(second)], intersect=True)


@lru_cache(maxsize=256)  # asked for by every piece that reaches into it
def _window_rle(window: Window, width: int, height: int) -> dict[str, Any]:
    x1, y1, x2, y2 = window
    return place_rle(_full_rle(x2 - x1, y2 - y1), window, width, height)


def _full_rle(width: int, height: int) -> dict[str, Any]:
    packed = coco_mask.frPyObjects({"size": [height, width], "counts": [0, width * height]}, height, width)
    return {"size": [height, width], "counts": packed["counts"].decode("ascii")}
