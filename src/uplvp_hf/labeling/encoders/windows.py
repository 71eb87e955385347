"""Dense CLIP: similarity of every place in an image with class names, by sliding windows over any image size.

`attention` says what the last block does, `clip` how patches get into the text space. Images are resized so that one
side is near `image_size`, cut into overlapping windows, and the maps of the windows averaged where they overlap.
Windows of all images of a call share batches, whatever the images' sizes.

Published settings (shorter side, window, stride in pixels; OpenAI's ViT-B/16): SCLIP 336, 224, 112; ClearCLIP 448, 448,
224; ProxyCLIP 336, 336, 112.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from PIL import Image

from ...models.errors import UserError
from ..settings import Recipe
from .attention import Layout, run_blocks
from .backbone import Encoder
from .clip import Clip
from .pixels import Size, group_by_size

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
    means, stds = (
        torch.tensor(values, device=pixels.device).view(2, 1, 3, 1, 1)
        for values in ((clip.image_mean, guide.image_mean), (clip.image_std, guide.image_std))
    )
    pixels = (pixels.float() * stds[0] + means[0] - means[1]) / stds[1]
    multiple = guide.size_multiple
    size = [max(1, round(side / multiple)) * multiple for side in pixels.shape[-2:]]
    if size != list(pixels.shape[-2:]):
        pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False)
    return guide(pixels)[-1].float()


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
class _Image:
    """pixels: (3, H, W) at the working size. total, count: (C, h, w) sum of the windows' maps and (h, w) number of
    windows over each cell, `cell` pixels a cell; made by the first window."""

    pixels: torch.Tensor
    cell: int = 0
    total: torch.Tensor | None = field(default=None, repr=False)
    count: torch.Tensor | None = field(default=None, repr=False)

    def add(self, values: torch.Tensor, place: tuple[int, int], cell: int) -> None:
        """Adds the map of the window whose corner lies at `place` (top, left), in pixels."""
        if self.total is None or self.count is None:
            height, width = (side // cell for side in self.pixels.shape[-2:])
            self.total, self.count = values.new_zeros(len(values), height, width), values.new_zeros(height, width)
        top, left = (side // cell for side in place)
        tall, wide = values.shape[1:]
        self.total[:, top : top + tall, left : left + wide] += values
        self.count[top : top + tall, left : left + wide] += 1


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
    resized = [_Image(pixels) for pixels in _resized(clip, images, view)]
    shapes: dict[tuple[int, int], list[tuple[_Image, tuple[int, int]]]] = {}
    for one in resized:
        height, width = one.pixels.shape[-2:]
        tall, wide = (height, width) if window is None else (min(window, height), min(window, width))
        places = itertools.product(window_starts(height, tall, stride), window_starts(width, wide, stride))
        shapes.setdefault((tall, wide), []).extend((one, place) for place in places)
    base = math.gcd(stride, patch)
    for (tall, wide), windows in shapes.items():
        for start in range(0, len(windows), window_batch):
            batch = windows[start : start + window_batch]
            pixels = torch.stack([one.pixels[:, top : top + tall, left : left + wide] for one, (top, left) in batch])
            maps = dense_features(clip, pixels, recipe, guide)
            coarse = wide / maps.shape[-1]
            if vectors is not None:
                maps = torch.einsum("td,bdhw->bthw", vectors.to(maps), maps)
            # The largest divisor of `base` that is no wider than a cell of the map.
            cell = max(size for size in range(1, base + 1) if base % size == 0 and (size <= coarse or size == 1))
            if (tall // cell, wide // cell) != maps.shape[-2:]:
                maps = F.interpolate(maps, (tall // cell, wide // cell), mode="bilinear", align_corners=False)
            for (one, place), values in zip(batch, maps):
                one.add(values, place, cell)
    return [one.total / one.count for one in resized]


def _resized(clip: Clip, images: Sequence[Image.Image], view: View) -> list[torch.Tensor]:
    """(3, H, W) of each image at its working size; images of one size are normalized together."""
    results = [torch.empty(0)] * len(images)

    def fit(width: int, height: int, image_size: int) -> Size:
        return working_size(width, height, image_size, view.side, clip.patch_size)

    for size, members in group_by_size(images, view.image_size, fit).items():
        for member, pixels in zip(members, clip.pixels([images[k] for k in members], size)):
            results[member] = pixels
    return results
