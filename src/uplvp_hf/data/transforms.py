"""Training augmentation of one image: large-scale jitter or multi-scale resizing, small rotation, flip and mild
color jitter, all drawn from one passed generator. Copy-paste of two images: `copy_paste.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from typing import Any

import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from ..models.errors import UserError
from ..models.masks import segmentation_to_rle
from ..settings import Settings, setting
from .instance_masks import InstanceMasks
from .usage import MIN_AREA
from .window import Window

_ATTEMPTS = 3
IMAGENET_MEAN = (124, 116, 104)  # of RGB in 0..255


def uniform(generator: torch.Generator, low: float, high: float) -> float:
    """One number from U(low, high), in double precision."""
    return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()


@dataclass
class TrainTransform(Settings):
    """One image with its masks, resized, turned, cropped, mirrored and jittered in color.

    Resizing is large-scale jitter (Ghiasi et al. 2021, "Simple Copy-Paste", section 3): by f ~ U(scale_range) times the
    factor that fits the longer side to `size`, then a random crop of at most `size` x `size`. With `short_edges` it is
    multi-scale resizing instead, without a crop. Raises UserError for an argument out of its range.
    """

    size: int = setting(MISSING, "side of the crop in pixels; not used with `short_edges`", least=32)
    scale_range: tuple[float, float] = setting((0.5, 1.5), "(low, high) of f; two equal numbers: no jitter", above=0)
    flip: float = setting(0.5, "probability of mirroring left to right", least=0, most=1)
    color_jitter: float = setting(
        0.2, "j: brightness, contrast and saturation are each scaled by U(1 - j, 1 + j); 0: not", least=0, most=1
    )
    min_area: int = setting(MIN_AREA, "instances with fewer pixels after the crop are dropped", least=1)
    short_edges: Sequence[int] | None = setting(
        None, "the shorter side is drawn from the whole numbers low to high, or is one number; none: jitter", least=1
    )
    longest_edge: int | None = setting(
        None, "most pixels of the longer side, for which the shorter one shrinks too; none: no limit", least=1
    )
    keep_ratio: bool = setting(True, "false: every image becomes `longest_edge` wide and the drawn edge high")
    rotate: float = setting(
        0.0, "degrees: the resized image is turned by U(-rotate, rotate) about its center", least=0, most=45
    )
    rotate_probability: float = setting(0.5, "of turning at all", least=0, most=1)
    fill: tuple[int, int, int] = setting(IMAGENET_MEAN, "RGB of what a turned image leaves empty", least=0, most=255)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.scale_range) != 2 or self.scale_range[0] > self.scale_range[1]:
            raise UserError(f"scale_range must be two positive numbers, the lower first, got {self.scale_range}")
        _check_edges(self.short_edges, self.longest_edge, self.keep_ratio)
        self.short_edges = None if self.short_edges is None else (self.short_edges[0], self.short_edges[-1])

    def __call__(
        self, image: Image.Image, segmentations: Sequence[Any], height: int, width: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, InstanceMasks, list[int]]:
        """Augment one image.

        Args:
            image: RGB, of `width` x `height` pixels.
            segmentations: N COCO segmentations (polygons or RLE) in its frame.
            generator: the only source of randomness.

        Returns:
            pixels (3, h, w) uint8, with h, w <= size unless `short_edges` are given; M masks of h x w; indices of the
            M instances kept, ascending. If every instance leaves the crop, up to 3 crops are tried and then the
            image stays, without instances.

        Raises UserError when `image` has another size, DataError for a malformed segmentation.
        """
        if image.size != (width, height):
            raise UserError(f"the image is {image.size[0]}x{image.size[1]}, the row says {width}x{height}")
        window, masks, kept = self.cut(segmentations, height, width, generator)
        return self._jitter(window.pixels(image, self.fill), generator), masks, kept

    def cut(
        self, segmentations: Sequence[Any], height: int, width: int, generator: torch.Generator
    ) -> tuple[Window, InstanceMasks, list[int]]:
        """What the augmentation does to all but the pixels: the window, the masks in it, and which they are."""
        rles = [segmentation_to_rle(segmentation, height, width) for segmentation in segmentations]
        for _ in range(_ATTEMPTS):
            window = self.draw_window(height, width, generator)
            masks, kept = window.masks(rles, height, width, self.min_area)
            if kept or not rles:
                break
        return window, masks, kept

    def draw_window(self, height: int, width: int, generator: torch.Generator) -> Window:
        """What a sample shows of an image of this size."""
        # Draws come in a fixed number, so that the same seed gives the same geometry with and without color jitter.
        resized_width, resized_height = self._draw_size(height, width, generator)
        most = self.size if self.short_edges is None else max(resized_width, resized_height)
        crop_width, crop_height = min(most, resized_width), min(most, resized_height)
        left = int(uniform(generator, 0, resized_width - crop_width + 1))
        top = int(uniform(generator, 0, resized_height - crop_height + 1))
        flip = uniform(generator, 0, 1) < self.flip
        angle = 0.0
        if self.rotate:
            turned = uniform(generator, 0, 1) < self.rotate_probability
            angle = uniform(generator, -self.rotate, self.rotate) * turned
        return Window(resized_width, resized_height, left, top, crop_width, crop_height, flip, angle)

    def _draw_size(self, height: int, width: int, generator: torch.Generator) -> tuple[int, int]:
        """(width, height) that the image is resized to, from one random number."""
        if self.short_edges is None:
            scale = uniform(generator, *self.scale_range) * self.size / max(height, width)
        else:
            low, high = self.short_edges
            edge = int(uniform(generator, low, high + 1))
            if not self.keep_ratio:
                return self.longest_edge, edge
            scale = edge / min(height, width)
            if self.longest_edge is not None:
                scale = min(scale, self.longest_edge / max(height, width))
        return max(1, round(width * scale)), max(1, round(height * scale))

    def _jitter(self, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if self.color_jitter == 0:
            return pixels
        low, high = 1 - self.color_jitter, 1 + self.color_jitter
        pixels = functional.adjust_brightness(pixels, uniform(generator, low, high))
        pixels = functional.adjust_contrast(pixels, uniform(generator, low, high))
        return functional.adjust_saturation(pixels, uniform(generator, low, high))


def _check_edges(short_edges: Sequence[int] | None, longest_edge: int | None, keep_ratio: bool) -> None:
    """Raises UserError unless the three fit together, see `TrainTransform`."""
    if short_edges is None:
        if longest_edge is not None or not keep_ratio:
            raise UserError("longest_edge and keep_ratio=False belong to short_edges, which is not given")
        return
    if len(short_edges) not in (1, 2) or short_edges[0] > short_edges[-1]:
        raise UserError(f"short_edges must be one or two positive numbers, the lower first, got {short_edges}")
    if longest_edge is None:
        if not keep_ratio:
            raise UserError("keep_ratio=False needs longest_edge, the width of every image")
    elif keep_ratio and longest_edge < short_edges[-1]:
        raise UserError(f"longest_edge must be at least as long as short_edges {short_edges}, got {longest_edge}")
