"""Crops of an image, one a mask, and naming all of them by one function."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image, ImageFilter

from ...models.masks import tight_boxes
from ..cutting.proposals import Proposals
from ..features import shortened


def crop_box(box: Sequence[float], width: int, height: int, context: float) -> tuple[int, int, int, int]:
    """A square around `box` (x1, y1, x2, y2), `context` times its longer side added all round, cut at the image."""
    x1, y1, x2, y2 = box
    half = max(x2 - x1, y2 - y1) * (0.5 + context)
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    left, top = max(0, int(x - half)), max(0, int(y - half))
    return left, top, max(left + 1, min(width, round(x + half))), max(top + 1, min(height, round(y + half)))


def mask_crops(
    image: Image.Image,
    proposals: Proposals,
    context: float,
    surroundings: str = "none",
    fill: tuple[int, int, int] = (128, 128, 128),
) -> Iterator[Image.Image]:
    """One crop a mask, made when it is asked for. `surroundings`: what becomes of the pixels outside of the mask
    ("none": they stay; "blur": gaussian, an eighth of the crop's longer side; "mean": the color `fill`)."""
    for box, mask in zip(tight_boxes(proposals.masks).tolist(), proposals.masks):
        area = crop_box(box, image.width, image.height, context)
        crop = image.crop(area)
        if surroundings != "none":
            left, top, right, bottom = area
            inside = Image.fromarray(mask[top:bottom, left:right].astype(np.uint8) * 255)
            outside = (
                crop.filter(ImageFilter.GaussianBlur(max(crop.size) / 8))
                if surroundings == "blur"
                else Image.new("RGB", crop.size, fill)
            )
            crop = Image.composite(crop, outside, inside)
        yield crop


def fill_color(mean: Sequence[float]) -> tuple[int, int, int]:
    """A network's mean color, which is zero after normalization."""
    red, green, blue = (round(255 * value) for value in mean)
    return red, green, blue


def crops_of(
    images: Sequence[Image.Image],
    proposals: Sequence[Proposals],
    context: float,
    surroundings: str,
    mean: Sequence[float],
) -> Iterator[Image.Image]:
    """The crops of all masks of several images (`mask_crops`); mean: the network's mean color, in 0..1."""
    for image, found in zip(images, proposals):
        yield from mask_crops(image, found, context, surroundings, fill_color(mean))


def name_crops(
    crops: Iterator[Image.Image],
    proposals: Sequence[Proposals],
    look: Callable[[Sequence[Image.Image]], tuple[torch.Tensor, torch.Tensor | None]],
    batch_size: int,
) -> list[Proposals]:
    """Name all masks of several images by `look(crops)`, `batch_size` crops at a time: probabilities (N, K), and
    vectors (N, D) that are kept as features, or None, which keeps what the labeler has."""
    parts = [look(batch) for batch in iter(lambda: list(itertools.islice(crops, batch_size)), [])]
    confidences, labels = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    if parts:
        confidences, labels = torch.cat([part.cpu() for part, _ in parts]).max(dim=1)
    seen = [vectors.cpu() for _, vectors in parts if vectors is not None]
    features = shortened(torch.cat(seen)) if seen else None
    named, start = [], 0
    for p in proposals:
        end = start + len(p)
        named.append(
            replace(
                p,
                labels=labels[start:end].numpy(),
                confidences=confidences[start:end].float().numpy(),
                features=p.features if features is None else features[start:end],
            )
        )
        start = end
    return named
