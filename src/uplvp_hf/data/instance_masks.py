"""The masks of one sample in little memory, until the model needs them dense.

200 dense bool masks of 1024 x 1024 pixels take 210 MB, as float 839 MB. Here an instance is the run-length code of its
bounding box: 0.06 MB for 200 instances of 16 to 400 pixels, 0.25 MB where all are of 400 to 1000 pixels (bit-packed
boxes: 0.5 and 6.6 MB; `scripts/benchmark_data.py`). Runs go along rows, unlike COCO's, so that neither coding nor
decoding transposes a mask.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from pycocotools import mask as coco_mask

from ..models.errors import UserError


class Patch(NamedTuple):
    """One instance: its tight box on the canvas (pixels), and the run-length code of the mask inside."""

    left: int
    top: int
    width: int
    height: int
    counts: bytes

    def mask(self) -> np.ndarray:
        """(height, width) bool."""
        return coco_mask.decode({"size": [self.width, self.height], "counts": self.counts}).T.view(np.bool_)


def make_patch(mask: np.ndarray, left: int = 0, top: int = 0) -> Patch | None:
    """A (h, w) bool mask with its corner at `left`, `top` of the canvas, cut to its tight box; None if it is empty."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if len(columns) == 0:
        return None
    tight = np.ascontiguousarray(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    # The transposed view of row-major memory is the column-major image that pycocotools asks for.
    code = coco_mask.encode(tight.view(np.uint8).T)
    height, width = tight.shape
    return Patch(left + int(columns[0]), top + int(rows[0]), width, height, code["counts"])


@dataclass(frozen=True)
class InstanceMasks:
    """N masks on a canvas of `height` x `width` pixels; they may overlap. Small, immutable, equal by value, picklable.

    patches: one an instance, within the canvas.
    """

    height: int
    width: int
    patches: tuple[Patch, ...] = ()

    @classmethod
    def from_dense(cls, masks: np.ndarray | torch.Tensor) -> InstanceMasks:
        """From (N, height, width) bool masks. Raises UserError for an empty one."""
        patches = [make_patch(np.asarray(mask)) for mask in masks]
        if None in patches:
            raise UserError(f"mask {patches.index(None)} of {len(patches)} is empty")
        return cls(masks.shape[1], masks.shape[2], tuple(patches))

    def __len__(self) -> int:
        return len(self.patches)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N, height, width), that of `dense()`."""
        return len(self.patches), self.height, self.width

    @property
    def boxes(self) -> np.ndarray:
        """(N, 4) int64 tight boxes x1, y1, x2, y2 in pixels, ends exclusive."""
        corners = [(p.left, p.top, p.left + p.width, p.top + p.height) for p in self.patches]
        return np.array(corners, dtype=np.int64).reshape(-1, 4)

    @property
    def nbytes(self) -> int:
        """Size of the codes and boxes, without what Python's objects add (about 250 bytes an instance)."""
        return sum(len(patch.counts) + 4 * 8 for patch in self.patches)

    def select(self, indices: Iterable[int]) -> InstanceMasks:
        """The instances at `indices`, in that order."""
        return InstanceMasks(self.height, self.width, tuple(self.patches[index] for index in indices))

    def on_canvas(self, height: int, width: int) -> InstanceMasks:
        """The same masks with the canvas extended at the bottom and the right. Raises UserError for a smaller one."""
        if height < self.height or width < self.width:
            raise UserError(f"masks of {self.height}x{self.width} pixels do not fit a canvas of {height}x{width}")
        return InstanceMasks(height, width, self.patches)

    def dense(self) -> torch.Tensor:
        """(N, height, width) bool: N bytes a pixel, so make it late and drop it soon."""
        masks = torch.zeros(self.shape, dtype=torch.bool)
        filled = masks.numpy()
        for mask, patch in zip(filled, self.patches):
            mask[patch.top : patch.top + patch.height, patch.left : patch.left + patch.width] = patch.mask()
        return masks

    def union(self) -> np.ndarray:
        """(height, width) bool: the pixels of any instance."""
        covered = np.zeros((self.height, self.width), dtype=bool)
        for patch in self.patches:
            window = covered[patch.top : patch.top + patch.height, patch.left : patch.left + patch.width]
            window |= patch.mask()
        return covered
