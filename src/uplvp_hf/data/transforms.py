"""Training augmentation: large-scale jitter, crop, flip and mild colour jitter, all drawn from one passed generator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from .rle import decode_segmentation, rle_boxes, segmentation_to_rle

_ATTEMPTS = 3


class _Window(NamedTuple):
    """A crop of the resized picture: resized size, corner and size of the crop (pixels), mirrored or not."""

    resized_width: int
    resized_height: int
    left: int
    top: int
    width: int
    height: int
    flip: bool


def _uniform(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()


class TrainTransform:
    """Large-scale jitter (Ghiasi et al. 2021, "Simple Copy-Paste", section 3) on a square canvas.

    The picture is resized by f ~ U(scale_range) times the factor that fits its longer side to `size`, cropped at random
    to at most `size` x `size`, mirrored, and jittered in brightness, contrast and saturation. Masks follow by nearest
    neighbour, taken straight from the source pixels that the crop shows.

    Args:
        size: side of the canvas in pixels, a multiple of 32.
        scale_range: (low, high) of f, positive. Two equal numbers switch the jitter off.
        flip: probability of mirroring left to right, 0 to 1.
        color_jitter: j; each of the three factors is drawn from U(1 - j, 1 + j). 0 to 1; 0 switches it off.
        min_area: instances with fewer pixels than this after the crop are dropped.

    Raises ValueError for an argument out of its range.
    """

    def __init__(
        self,
        size: int,
        scale_range: tuple[float, float] = (0.5, 1.5),
        flip: float = 0.5,
        color_jitter: float = 0.2,
        min_area: int = 16,
    ) -> None:
        if size <= 0 or size % 32:
            raise ValueError(f"size must be a positive multiple of 32, got {size}")
        if len(scale_range) != 2 or not 0 < scale_range[0] <= scale_range[1]:
            raise ValueError(f"scale_range must be two positive numbers, the lower first, got {scale_range}")
        if not 0 <= flip <= 1 or not 0 <= color_jitter <= 1:
            raise ValueError(f"flip and color_jitter must be within 0 to 1, got {flip} and {color_jitter}")
        if min_area < 1:
            raise ValueError(f"min_area must be at least 1 pixel, got {min_area}")
        self.size = size
        self.scale_range = (float(scale_range[0]), float(scale_range[1]))
        self.flip = flip
        self.color_jitter = color_jitter
        self.min_area = min_area

    def __call__(
        self, image: Image.Image, segmentations: Sequence[Any], height: int, width: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """Augment one picture.

        Args:
            image: RGB, of `width` x `height` pixels.
            segmentations: N COCO segmentations (polygons or RLE) in its frame.
            generator: the only source of randomness.

        Returns:
            pixels (3, h, w) uint8 with h, w <= size; masks (M, h, w) bool; indices of the M instances kept, ascending.
            If every instance leaves the crop, up to 3 crops are tried and then the picture stays, without instances.

        Raises ValueError when `image` has another size, DataError for a malformed segmentation.
        """
        if image.size != (width, height):
            raise ValueError(f"the picture is {image.size[0]}x{image.size[1]}, the row says {width}x{height}")
        rles = [segmentation_to_rle(segmentation, height, width) for segmentation in segmentations]
        for _ in range(_ATTEMPTS):
            window = self._draw_window(height, width, generator)
            masks, kept = self._crop_masks(rles, height, width, window)
            if kept or not rles:
                break
        pixels = self._crop_pixels(image, window)
        return self._jitter(pixels, generator), masks, kept

    def _draw_window(self, height: int, width: int, generator: torch.Generator) -> _Window:
        scale = _uniform(generator, *self.scale_range) * self.size / max(height, width)
        resized_width, resized_height = max(1, round(width * scale)), max(1, round(height * scale))
        crop_width, crop_height = min(self.size, resized_width), min(self.size, resized_height)
        # Draws come in a fixed number, so that the same seed gives the same geometry with and without colour jitter.
        left = int(_uniform(generator, 0, resized_width - crop_width + 1))
        top = int(_uniform(generator, 0, resized_height - crop_height + 1))
        flip = _uniform(generator, 0, 1) < self.flip
        return _Window(resized_width, resized_height, left, top, crop_width, crop_height, flip)

    def _crop_masks(
        self, rles: Sequence[dict[str, Any]], height: int, width: int, window: _Window
    ) -> tuple[torch.Tensor, list[int]]:
        # Nearest neighbour at pixel centres; only the pixels of the crop are ever read.
        columns = ((window.left + np.arange(window.width) + 0.5) * (width / window.resized_width)).astype(np.int64)
        rows = ((window.top + np.arange(window.height) + 0.5) * (height / window.resized_height)).astype(np.int64)
        columns, rows = columns.clip(max=width - 1), rows.clip(max=height - 1)
        boxes = rle_boxes(rles)
        seen = (boxes[:, 0] <= columns[-1]) & (boxes[:, 0] + boxes[:, 2] > columns[0])
        seen &= (boxes[:, 1] <= rows[-1]) & (boxes[:, 1] + boxes[:, 3] > rows[0])
        if window.flip:
            columns = columns[::-1]
        masks, kept = [], []
        for index in np.flatnonzero(seen).tolist():
            mask = decode_segmentation(rles[index], height, width)[rows[:, None], columns[None, :]]
            if np.count_nonzero(mask) >= self.min_area:
                masks.append(torch.from_numpy(mask))
                kept.append(index)
        stacked = torch.stack(masks) if masks else torch.zeros((0, window.height, window.width), dtype=torch.bool)
        return stacked, kept

    @staticmethod
    def _crop_pixels(image: Image.Image, window: _Window) -> torch.Tensor:
        step_x, step_y = image.width / window.resized_width, image.height / window.resized_height
        box = (
            window.left * step_x,
            window.top * step_y,
            min((window.left + window.width) * step_x, image.width),
            min((window.top + window.height) * step_y, image.height),
        )
        crop = image.resize((window.width, window.height), Image.Resampling.BILINEAR, box=box)
        if window.flip:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(crop)).permute(2, 0, 1).contiguous()

    def _jitter(self, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if self.color_jitter == 0:
            return pixels
        low, high = 1 - self.color_jitter, 1 + self.color_jitter
        pixels = functional.adjust_brightness(pixels, _uniform(generator, low, high))
        pixels = functional.adjust_contrast(pixels, _uniform(generator, low, high))
        return functional.adjust_saturation(pixels, _uniform(generator, low, high))
