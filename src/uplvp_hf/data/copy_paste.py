"""Simple copy-paste (Ghiasi et al. 2021): instances of one augmented image pasted onto another one, anywhere or beside
an instance of their class."""

from __future__ import annotations

import numpy as np
import torch

from .instance_masks import InstanceMasks, Patch, make_patch
from .transforms import uniform


def choose(count: int, most: int, generator: torch.Generator) -> list[int]:
    """A random subset of 0..count - 1, ascending: each with probability 1/2 (the paper says "a random subset"), of
    these the first `most`."""
    drawn = torch.rand(count, generator=generator, dtype=torch.float64) < 0.5
    return torch.nonzero(drawn).flatten().tolist()[: max(most, 0)]


def paste(
    pixels: torch.Tensor,
    masks: InstanceMasks,
    other_pixels: torch.Tensor,
    other_masks: InstanceMasks,
    min_area: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, InstanceMasks, list[int], list[int]]:
    """Puts the instances of the other image over this one, without blending.

    Where the sizes differ, the other image is moved by an offset drawn at random: anywhere within this image along
    the sides where it is smaller, cropped at random along those where it is larger. Masks below pasted pixels are cut,
    and so are their boxes. Instances cut to fewer than `min_area` pixels are dropped, pasted ones before they hide
    anything.

    Args:
        pixels, other_pixels: (3, h, w) and (3, h', w') of one type, on the host.
        masks, other_masks: N on h x w and M on h' x w'.
        generator: two numbers are drawn.

    Returns:
        pixels (3, h, w), a new tensor; masks: those kept of this image, then those pasted; indices of either,
        ascending.
    """
    left = _offset(masks.width - other_masks.width, generator)
    top = _offset(masks.height - other_masks.height, generator)
    return paste_at(pixels, masks, other_pixels, other_masks, (left, top), min_area)


def paste_at(
    pixels: torch.Tensor,
    masks: InstanceMasks,
    other_pixels: torch.Tensor,
    other_masks: InstanceMasks,
    offset: tuple[int, int],
    min_area: int,
) -> tuple[torch.Tensor, InstanceMasks, list[int], list[int]]:
    """As `paste`, with the other image moved by `offset` (to the right, down), which may be negative."""
    left, top = offset
    moved = [_moved(patch, left, top, masks.height, masks.width, min_area) for patch in other_masks.patches]
    pasted = [index for index, patch in enumerate(moved) if patch is not None]
    above = InstanceMasks(masks.height, masks.width, tuple(moved[index] for index in pasted))
    covered = above.union()
    below = [_uncovered(patch, covered, min_area) for patch in masks.patches]
    kept = [index for index, patch in enumerate(below) if patch is not None]
    result = pixels.clone()
    x1, y1 = max(left, 0), max(top, 0)
    x2, y2 = min(left + other_masks.width, masks.width), min(top + other_masks.height, masks.height)
    source = other_pixels.numpy()[:, y1 - top : y2 - top, x1 - left : x2 - left]
    np.copyto(result.numpy()[:, y1:y2, x1:x2], source, where=covered[y1:y2, x1:x2])
    patches = (*(below[index] for index in kept), *above.patches)
    return result, InstanceMasks(masks.height, masks.width, patches), kept, pasted


def _offset(room: int, generator: torch.Generator) -> int:
    """A whole number from 0 to `room`, or from `room` to 0."""
    size = int(uniform(generator, 0, abs(room) + 1))
    return size if room >= 0 else -size


def _moved(patch: Patch, left: int, top: int, height: int, width: int, min_area: int) -> Patch | None:
    """The part of an instance that lies on the canvas after moving it; None if that is too small."""
    x, y = patch.left + left, patch.top + top
    mask = patch.mask()[max(-y, 0) : max(height - y, 0), max(-x, 0) : max(width - x, 0)]
    return make_patch(mask, max(x, 0), max(y, 0)) if np.count_nonzero(mask) >= min_area else None


def _uncovered(patch: Patch, covered: np.ndarray, min_area: int) -> Patch | None:
    """What still shows of an instance; None if that is too little."""
    above = covered[patch.top : patch.top + patch.height, patch.left : patch.left + patch.width]
    if not above.any():
        return patch
    mask = patch.mask() & ~above
    return make_patch(mask, patch.left, patch.top) if np.count_nonzero(mask) >= min_area else None


def beside(anchor: Patch, patch: Patch, height: int, width: int, generator: torch.Generator) -> tuple[int, int] | None:
    """An offset (to the right, down) that puts `patch` to one side of `anchor` in an image of height x width pixels.

    Their boxes overlap by up to a third of the smaller one, so that most pairs touch or hide a part of one another. Of
    the four sides the first in random order is taken on which most of the box lies in the image; None: on no side.
    """
    sides = torch.randperm(4, generator=generator).tolist()
    common, shift = uniform(generator, 0, 1 / 3), uniform(generator, -0.25, 0.25)
    for side in sides:
        x = anchor.left + (anchor.width - patch.width) / 2 + shift * anchor.width
        y = anchor.top + (anchor.height - patch.height) / 2 + shift * anchor.height
        across, down = (common * min(getattr(anchor, key), getattr(patch, key)) for key in ("width", "height"))
        if side < 2:
            x = anchor.left + anchor.width - across if side else anchor.left - patch.width + across
        else:
            y = anchor.top + anchor.height - down if side == 3 else anchor.top - patch.height + down
        seen = max(min(x + patch.width, width) - max(x, 0), 0) * max(min(y + patch.height, height) - max(y, 0), 0)
        if seen > 0.5 * patch.width * patch.height:
            return round(x) - patch.left, round(y) - patch.top
    return None
