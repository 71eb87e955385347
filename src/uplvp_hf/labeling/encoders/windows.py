"""Dense CLIP: similarity of every place in an image with class names, by sliding windows over any image size.

`attention` says what the last block does, `clip` how patches get into the text space. Images are resized so that one
side is near `image_size`, cut into overlapping windows, and the maps of the windows averaged where they overlap.
Windows of all images of a call share batches, whatever the images' sizes.

Published settings (shorter side, window, stride in pixels; OpenAI's ViT-B/16): SCLIP 336, 224, 112; ClearCLIP 448, 448,
224; ProxyCLIP 336, 336, 112.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from PIL import Image

from ...models.errors import UserError
from ..settings import Recipe
from .attention import Layout, run_blocks
from .backbone import Encoder
from .clip import Clip

MAX_ASPECT = 16  # longer over shorter side up to which an image is looked at at full size


@dataclass(frozen=True)
class View:
    """How an image is looked at.

    image_size: pixels of its `side` ("shorter" or "longer"). window, stride: pixels; window None: the whole image at
    once; stride None: half a window. Raises UserError for an unknown side or sizes below 1.
    """

    image_size: int
    side: str = "shorter"
    window: int | None = None
    stride: int | None = None

    def __post_init__(self) -> None:
        if self.side not in ("shorter", "longer"):
            raise UserError(f"side {self.side!r} is unknown; use 'shorter' or 'longer'")
        sizes = {"image_size": self.image_size, "window": self.window, "stride": self.stride}
        for name, value in sizes.items():
            if value is not None and value < 1:
                raise UserError(f"{name} {value} must be at least 1 pixel")


@torch.inference_mode()
def dense_features(
    clip: Clip, pixels: torch.Tensor, recipe: Recipe | None = None, guide: Encoder | None = None
) -> torch.Tensor:
    """Unit-length patch features in the text space.

    Args:
        pixels: (B, 3, H, W) normalized for `clip`, sides multiples of the patch size; position embeddings are resized.
        recipe: the last block, default naclip. guide: the other backbone of "proxy" (its last map is used).

    Returns (B, D, H / patch, W / patch) float32, for proxy on the guide's grid. Raises UserError for sides that do not
    fit, and for proxy without a guide.
    """
    recipe = recipe or Recipe()
    patch = clip.patch_size
    height, width = pixels.shape[-2:]
    if height % patch or width % patch:
        raise UserError(f"a {height}x{width} input is not a whole number of {patch}-pixel patches")
    other = None
    if recipe.attention == "proxy" and guide is not None:
        other = guide_features(guide, clip, pixels)
    layout = Layout((height // patch, width // patch), clip.prefix, other)
    tokens, grid = run_blocks(clip.vision.encoder.layers, clip.embed(pixels), layout, recipe)
    return F.normalize(clip.project(tokens).float(), dim=-1).transpose(1, 2).unflatten(2, grid)


def guide_features(guide: Encoder, clip: Clip, pixels: torch.Tensor) -> torch.Tensor:
    """The last map of another backbone for images normalized for `clip`: (B, 3, H, W) -> (B, C, h, w) float32.

    Sides are rounded to what the backbone takes: its patch size, 32 pixels when it has none.
    Raises UserError for a backbone whose cells do not lie on the grid (`Encoder.shift`).
    """
    if guide.shift:
        raise UserError(f"{guide.name}: cells are shifted against the image; the proxy guide needs a ViT such as DINO")
    to_clip = torch.tensor([clip.image_mean, clip.image_std], device=pixels.device).view(2, 1, 3, 1, 1)
    to_guide = torch.tensor([guide.image_mean, guide.image_std], device=pixels.device).view(2, 1, 3, 1, 1)
    pixels = (pixels.float() * to_clip[1] + to_clip[0] - to_guide[0]) / to_guide[1]
    multiple = _input_multiple(guide)
    size = [max(1, round(side / multiple)) * multiple for side in pixels.shape[-2:]]
    if size != list(pixels.shape[-2:]):
        pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False)
    return guide(pixels).maps[-1].float()


def _input_multiple(guide: Encoder) -> int:
    """Pixels that the sides of a backbone's input are a multiple of."""
    size = getattr(getattr(guide.model, "config", None), "patch_size", None)  # transformers
    if size is None:
        size = getattr(getattr(guide.model, "patch_embed", None), "patch_size", None)  # timm
    if isinstance(size, (tuple, list)):
        size = math.lcm(*size)
    return size if isinstance(size, int) else 32


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Left edges of windows that cover `length`; the last one ends at the border."""
    last = max(0, length - window)
    return [*range(0, last, stride), last]


def working_size(width: int, height: int, image_size: int, side: str, patch: int) -> tuple[int, int]:
    """(height, width) of the resized image: `side` ("shorter" or "longer") near `image_size`, whole patches.

    The longer side is at most `MAX_ASPECT` times `image_size`: a strip of 5000 x 2 pixels would otherwise become
    hundreds of thousands of pixels long.
    """
    reference = min(width, height) if side == "shorter" else max(width, height)
    scale = min(image_size / reference, MAX_ASPECT * image_size / max(width, height))
    return tuple(max(patch, round(length * scale / patch) * patch) for length in (height, width))


@dataclass
class _Group:
    """Images of one working size. members: their places in the batch. places: (top, left) of the windows, pixels.
    total: (B, C, h, w) sum of the windows' maps, `cell` pixels a cell; made by the first window."""

    members: list[int]
    pixels: torch.Tensor
    window: tuple[int, int]
    places: list[tuple[int, int]]
    cell: int = 0
    total: torch.Tensor | None = field(default=None, repr=False)


@torch.inference_mode()
def dense_grids(
    clip: Clip,
    images: Sequence[Image.Image],
    vectors: torch.Tensor | None,
    view: View,
    recipe: Recipe | None = None,
    guide: Encoder | None = None,
    window_batch: int = 32,
) -> list[torch.Tensor]:
    """Windowed maps of images of any size.

    vectors: (T, D) unit text vectors: cosine similarity of every place with each. None: the features themselves, the
    mean of the windows' unit vectors, whose product with a text vector equals its averaged similarity.
    window_batch: windows a forward pass; memory grows with it, whatever the number of images.

    Returns one (T or D, h, w) float32 map an image. Cells are gcd(stride, patch) pixels wide, so that a stride finer
    than a patch gives a finer map; for proxy the largest part of that which is no wider than the guide's cells.
    """
    patch = clip.patch_size
    window = None if view.window is None else max(patch, view.window // patch * patch)
    stride = patch if window is None else view.stride or max(1, window // 2)
    groups = _group_by_size(clip, images, view, window, stride)
    base = math.gcd(stride, patch)
    for runs in _batches(groups, window_batch):
        pixels = torch.cat([_cut(group, place, first, last) for group, place, first, last in runs])
        maps = dense_features(clip, pixels, recipe, guide)
        coarse = pixels.shape[-1] / maps.shape[-1]
        if vectors is not None:
            maps = torch.einsum("td,bdhw->bthw", vectors.to(maps), maps)
        cell = _cell(base, coarse)
        size = pixels.shape[-2] // cell, pixels.shape[-1] // cell
        if size != maps.shape[-2:]:
            maps = F.interpolate(maps, size, mode="bilinear", align_corners=False)
        _add(runs, maps, cell)
    results: list[torch.Tensor] = [torch.empty(0)] * len(images)
    for group in groups:
        for member, total in zip(group.members, group.total / _coverage(group)):
            results[member] = total
    return results


def _group_by_size(
    clip: Clip, images: Sequence[Image.Image], view: View, window: int | None, stride: int
) -> list[_Group]:
    sizes: dict[tuple[int, int], list[int]] = {}
    for number, image in enumerate(images):
        size = working_size(*image.size, view.image_size, view.side, clip.patch_size)
        sizes.setdefault(size, []).append(number)
    groups = []
    for (height, width), members in sizes.items():
        tall, wide = (height, width) if window is None else (min(window, height), min(window, width))
        places = [
            (top, left) for top in window_starts(height, tall, stride) for left in window_starts(width, wide, stride)
        ]
        pixels = clip.pixels([images[number] for number in members], (height, width))
        groups.append(_Group(members, pixels, (tall, wide), places))
    return groups


_Run = tuple[_Group, tuple[int, int], int, int]  # images first..last of a group at one place


def _batches(groups: Sequence[_Group], size: int) -> Iterator[list[_Run]]:
    """At most `size` windows of one shape at a time, as runs of neighboring images at the same place."""
    shapes: dict[tuple[int, int], list[_Group]] = {}
    for group in groups:
        shapes.setdefault(group.window, []).append(group)
    for alike in shapes.values():
        runs: list[_Run] = []
        room = size
        for group, place in ((one, place) for one in alike for place in one.places):
            first = 0
            while first < len(group.members):
                last = min(len(group.members), first + room)
                runs.append((group, place, first, last))
                room -= last - first
                first = last
                if not room:
                    yield runs
                    runs, room = [], size
        if runs:
            yield runs


def _cut(group: _Group, place: tuple[int, int], first: int, last: int) -> torch.Tensor:
    (top, left), (tall, wide) = place, group.window
    return group.pixels[first:last, :, top : top + tall, left : left + wide]


def _cell(base: int, coarse: float) -> int:
    """The largest divisor of `base` that is no wider than a cell of `coarse` pixels."""
    return max(divisor for divisor in range(1, base + 1) if base % divisor == 0 and (divisor <= coarse or divisor == 1))


def _add(runs: Sequence[_Run], maps: torch.Tensor, cell: int) -> None:
    """Add the maps of a batch where they belong: one addition a run, not one a window."""
    start, (tall, wide) = 0, maps.shape[-2:]
    for group, (top, left), first, last in runs:
        if group.total is None:
            height, width = (side // cell for side in group.pixels.shape[-2:])
            group.cell = cell
            group.total = maps.new_zeros(len(group.members), maps.shape[1], height, width)
        top, left = top // cell, left // cell
        group.total[first:last, :, top : top + tall, left : left + wide] += maps[start : start + last - first]
        start += last - first


def _coverage(group: _Group) -> torch.Tensor:
    """How many windows cover each cell: (h, w)."""
    count = torch.zeros(group.total.shape[-2:])
    tall, wide = (side // group.cell for side in group.window)
    for top, left in group.places:
        top, left = top // group.cell, left // group.cell
        count[top : top + tall, left : left + wide] += 1
    return count.to(group.total.device)
