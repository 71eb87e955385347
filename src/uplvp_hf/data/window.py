"""What a training sample shows of its image: a crop of the resized, slightly turned, perhaps mirrored image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from ..models.masks import decode_columns, rle_boxes
from .instance_masks import InstanceMasks, make_patch

_Box = tuple[int, int, int, int]  # x1, y1, x2, y2, ends exclusive


class Window(NamedTuple):
    """The image is resized, turned about its center within its own frame, cropped, and mirrored, in this order.

    resized_width, resized_height, left, top, width, height: size of the resized image, corner and size of the crop
    (pixels). flip: mirrored left to right. angle: degrees, counter-clockwise; corners that nothing is turned into are
    filled, what is turned out of the frame is lost.

    Only what the crop shows is ever resized or turned. Pixels are interpolated (with antialiasing where the image
    shrinks), masks take the nearest source pixel of the same point.
    """

    resized_width: int
    resized_height: int
    left: int
    top: int
    width: int
    height: int
    flip: bool
    angle: float = 0.0

    def pixels(self, image: Image.Image, fill: tuple[int, int, int]) -> torch.Tensor:
        """(3, height, width) uint8 of an RGB image; `fill` (0..255) is the color of empty corners."""
        if self.angle:
            crop = self._turned_crop(image, fill)
        else:
            crop = self._resized(image, (self.left, self.top, self.left + self.width, self.top + self.height))
        if self.flip:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(crop)).permute(2, 0, 1).contiguous()

    def masks(
        self, rles: Sequence[dict[str, Any]], height: int, width: int, min_area: int
    ) -> tuple[InstanceMasks, list[int]]:
        """Masks in the window of RLEs of a `width` x `height` image, and the indices, ascending, of those kept: with
        at least `min_area` pixels. One source mask is decoded at a time."""
        columns = ((self.left + np.arange(self.width) + 0.5) * (width / self.resized_width)).astype(np.int64)
        rows = ((self.top + np.arange(self.height) + 0.5) * (height / self.resized_height)).astype(np.int64)
        columns, rows = columns.clip(max=width - 1), rows.clip(max=height - 1)
        patches, kept = [], []
        for index, (x, y, w, h) in enumerate(rle_boxes(rles).astype(int).tolist()):
            if w == 0:
                continue
            if self.angle:
                box = self._turned_box((x, y, x + w, y + h), height, width)
            else:  # pixel centers of the window that lie in the source box
                x1, x2 = np.searchsorted(columns, (x, x + w)).tolist()
                y1, y2 = np.searchsorted(rows, (y, y + h)).tolist()
                box = x1, y1, x2, y2
            if box[0] >= box[2] or box[1] >= box[3]:
                continue
            source = decode_columns(rles[index], x, x + w)
            if self.angle:
                mask = self._turned_mask(source[y : y + h], (x, y), (width, height), box)
            else:
                mask = source[rows[box[1] : box[3], None], columns[None, box[0] : box[2]] - x]
            if np.count_nonzero(mask) >= min_area:
                left = self.width - box[2] if self.flip else box[0]
                patches.append(make_patch(mask[:, ::-1] if self.flip else mask, left, box[1]))
                kept.append(index)
        return InstanceMasks(self.height, self.width, tuple(patches)), kept

    def _resized(self, image: Image.Image, box: _Box) -> Image.Image:
        """The pixels of `box` (in the resized image), without resizing the rest."""
        step_x, step_y = image.width / self.resized_width, image.height / self.resized_height
        source = (
            box[0] * step_x,
            box[1] * step_y,
            min(box[2] * step_x, image.width),
            min(box[3] * step_y, image.height),
        )
        return image.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.BILINEAR, box=source)

    def _turn(self) -> np.ndarray:
        """(2, 3) affine map from points of the resized image as shown to those before it was turned."""
        cosine, sine = math.cos(math.radians(self.angle)), math.sin(math.radians(self.angle))
        matrix = np.array([[cosine, -sine], [sine, cosine]])
        center = np.array([self.resized_width / 2, self.resized_height / 2])
        return np.column_stack([matrix, center - matrix @ center])

    def _turned_crop(self, image: Image.Image, fill: tuple[int, int, int]) -> Image.Image:
        turn = self._turn()
        turn[:, 2] += turn[:, :2] @ (self.left, self.top)  # from the corner of the window on
        x1, y1, x2, y2 = _bounds(turn, (0, 0, self.width, self.height))
        # Two pixels more, for interpolation; not beyond the image.
        region = max(x1 - 2, 0), max(y1 - 2, 0), min(x2 + 2, self.resized_width), min(y2 + 2, self.resized_height)
        if region[0] >= region[2] or region[1] >= region[3]:
            return Image.new("RGB", (self.width, self.height), fill)
        turn[:, 2] -= region[:2]
        return self._resized(image, region).transform(
            (self.width, self.height), Image.Transform.AFFINE, turn.ravel(), Image.Resampling.BILINEAR, fillcolor=fill
        )

    def _turned_box(self, source: tuple[float, float, float, float], height: int, width: int) -> _Box:
        """The part of the window (before mirroring) that a box of the source image may reach."""
        turn = self._turn()
        scale = np.array([self.resized_width / width, self.resized_height / height])
        inverse = turn[:, :2].T  # of a rotation
        back = np.column_stack([inverse * scale, -inverse @ turn[:, 2] - (self.left, self.top)])
        x1, y1, x2, y2 = _bounds(back, source)
        return max(x1, 0), max(y1, 0), min(x2, self.width), min(y2, self.height)

    def _turned_mask(self, source: np.ndarray, corner: tuple[int, int], size: tuple[int, int], box: _Box) -> np.ndarray:
        """(y2 - y1, x2 - x1) bool: the part `box` of the window, each pixel from the source pixel it came from.

        source: the part of a mask at `corner` (x, y) of an image of `size` (width, height); the rest is empty.
        """
        turn = self._turn()
        turn[:, 2] += turn[:, :2] @ (self.left + box[0], self.top + box[1])
        turn *= [[size[0] / self.resized_width], [size[1] / self.resized_height]]
        turn[:, 2] -= corner
        turned = Image.fromarray(source.view(np.uint8)).transform(
            (box[2] - box[0], box[3] - box[1]), Image.Transform.AFFINE, turn.ravel(), Image.Resampling.NEAREST
        )
        return np.asarray(turned).view(np.bool_)


def _bounds(affine: np.ndarray, box: tuple[float, float, float, float]) -> _Box:
    """The smallest whole box around `box` mapped by a (2, 3) affine map."""
    corners = np.array([[box[0], box[0], box[2], box[2]], [box[1], box[3], box[1], box[3]], [1, 1, 1, 1]])
    mapped = affine @ corners
    low, high = np.floor(mapped.min(axis=1)).astype(int).tolist(), np.ceil(mapped.max(axis=1)).astype(int).tolist()
    return low[0], low[1], high[0], high[1]
