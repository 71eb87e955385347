"""Images of any shape as batches of pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image

Size = tuple[int, int]  # (height, width) in pixels


def images_to_pixels(
    images: Sequence[Image.Image],
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    device: str | torch.device = "cpu",
) -> torch.Tensor:
    """Bilinear (antialiased) resize to `size` (height, width), scale to [0, 1], normalize: (B, 3, H, W) float32.

    Bytes travel to the device; the arithmetic happens there. The memory format is channels last.
    """
    resized = np.stack([np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR)) for image in images])
    pixels = torch.from_numpy(resized).to(device).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (mean, std))
    return (pixels - mean) / std


def fit_longest(width: int, height: int, longest: int, multiple: int = 32) -> tuple[int, int]:
    """(height, width) with the longer side about `longest`, each rounded to a multiple (at least one), so that the
    grid of a strided network covers the image exactly."""
    scale = longest / max(width, height)
    return tuple(max(multiple, round(side * scale / multiple) * multiple) for side in (height, width))


def group_by_size(
    images: Sequence[Image.Image], longest: int, fit: Callable[[int, int, int], tuple[int, int]] = fit_longest
) -> dict[tuple[int, int], list[int]]:
    """Indices of the images by the (height, width) they are resized to, so that each group is one batch.

    fit: (width, height, longest) -> (height, width), such as `Encoder.fit`.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for index, image in enumerate(images):
        groups.setdefault(fit(*image.size, longest), []).append(index)
    return groups
