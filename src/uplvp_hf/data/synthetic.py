"""Synthetic scenes with exact instance masks: colored, plain or striped shapes on textured backgrounds.

They let every stage of the library run in seconds without a download. A class is told apart by its look (its hue, plain
or striped) and by its shape, because a small contrastive model learns shape alone slowly; of two classes that share a
hue it mixes up the patches, which cuts dense pseudo masks apart.

    scene = make_scene(seed=0)                      # {"image", "masks", "labels", "caption"}
    write_scenes("runs/scenes", count=200, seed=0)  # a COCO folder; its images/ is a folder of unlabeled images
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
from PIL import Image

from ..models.errors import UserError
from ..models.masks import encode_masks
from . import drawing
from .coco import write_coco
from .crowds import fill
from .dataset import Row, RowStream
from .layouts import objects_of

BACKGROUND = "background"
"""Caption of an image without an object."""

MIN_VISIBLE_AREA = 40
"""px. An instance never shows fewer pixels."""

MIN_VISIBLE_FRACTION = 0.25
"""Least visible share of the area an instance would have without occlusion and without the image's border."""

_HUES = {  # degrees: center, largest jitter
    "red": (0, 8),
    "orange": (30, 6),
    "yellow": (56, 6),
    "green": (122, 15),
    "teal": (177, 10),
    "blue": (222, 10),
    "purple": (270, 10),
    "pink": (324, 10),
}
# A world with more classes than a small network can learn by heart: twelve hues, plain and striped.
_MANY_HUES = {
    name: (30.0 * place, 8.0)
    for place, name in enumerate(
        ("crimson", "amber", "lemon", "lime", "jade", "mint", "cyan", "azure", "indigo", "violet", "magenta", "rose")
    )
}
_NOVEL_HUES = ("lime", "azure", "rose")
_OFF_HUES = (84.0, 297.0)  # lime and magenta, with jitter at least 7 degrees from every class: vivid clutter


@dataclass(frozen=True)
class _Look:
    hue: str
    striped: bool
    shape: str

    @property
    def name(self) -> str:
        return " ".join([self.hue, *(["striped"] if self.striped else []), self.shape])


_LOOKS = (
    _Look("red", True, "star"),
    _Look("orange", False, "disc"),
    _Look("yellow", True, "triangle"),
    _Look("green", False, "cross"),
    _Look("teal", True, "square"),
    _Look("blue", False, "heart"),
    _Look("purple", True, "ring"),
    _Look("pink", False, "hexagon"),
)

CLASSES: tuple[str, ...] = tuple(look.name for look in _LOOKS)
"""Class names by label: "red striped star", "orange disc", ... COCO category ids are the label plus one."""

_SHAPES = tuple(look.shape for look in _LOOKS)
_MANY_LOOKS = tuple(
    _Look(hue, striped, _SHAPES[(3 * place + 4 * striped) % len(_SHAPES)])
    for striped in (False, True)
    for place, hue in enumerate(_MANY_HUES)
)
_WORLDS = {8: _LOOKS, 24: _MANY_LOOKS}

LOOKS: dict[int, tuple[str, ...]] = {count: tuple(look.name for look in looks) for count, looks in _WORLDS.items()}
"""Class names of the world of 8 looks (`CLASSES`) and of that of 24: 12 hues, plain and striped, over 8 shapes."""

NOVEL_LOOKS: tuple[str, ...] = tuple(look.name for look in _MANY_LOOKS if look.hue in _NOVEL_HUES)
"""Six of the 24 looks, whose three hues no other look has: held out in few-shot experiments."""


class Scene(TypedDict):
    image: Image.Image  # RGB, size x size
    masks: np.ndarray  # (N, size, size) bool, visible pixels, disjoint
    labels: list[int]  # N indices into CLASSES
    caption: str


class ObjectCrop(TypedDict):
    image: Image.Image  # RGB, size x size
    mask: np.ndarray  # (size, size) bool, visible pixels of the object; empty for background
    label: int  # index into CLASSES, -1 for background
    caption: str  # the class name, or "background"


def make_scene(
    seed: int,
    size: int = 128,
    min_objects: int = 1,
    max_objects: int = 5,
    looks: int = 8,
    classes: Sequence[str] | None = None,
    cast: float = 0.0,
    crowded: bool = False,
) -> Scene:
    """One image of `min_objects` to `max_objects` objects that may hide one another, with unlabeled clutter.

    Args:
        seed: non-negative; equal arguments give equal pixels.
        size: side of the image in px, at least 48.
        cast: colored light: each of red, green and blue is multiplied by a number of its own from `1 - cast` to
            `1 + cast`, from 0 (white light) to below 1. With 0.55 a name's hue says little where the rest of the image
            is not looked at. Everything else is that of the same seed without it.
        min_objects, max_objects: range of the number of objects. A crowded image gets fewer than the number drawn
            from it (an object that would hide another one too much is not painted), never fewer than `min_objects`.
        looks: 8 or 24, see `LOOKS`. classes: names of the looks that are shown; None: all.
        crowded: objects come in groups of two to four of one class, each touching another one or covering a part of it.

    Returns:
        image (RGB), masks (N, size, size) bool of visible pixels, disjoint, in order of painting, labels (N) indices
        into `LOOKS[looks]`, caption such as "an orange disc and two teal squares", or "background" without objects.
        Every instance shows at least `MIN_VISIBLE_AREA` px and `MIN_VISIBLE_FRACTION` of its full area.

    Raises:
        UserError: for a size below 48, numbers of objects that are not 0 <= min_objects <= max_objects <= 12, looks or
            classes that there are not, and a cast that is not from 0 to below 1.
        RuntimeError: if `min_objects` objects do not fit, which takes many objects on a small image.
    """
    _check_size(size, least=48)
    if not 0 <= min_objects <= max_objects <= 12:
        raise UserError(
            f"need 0 <= min_objects <= max_objects <= 12, got min_objects={min_objects}, max_objects={max_objects}"
        )
    if not 0 <= cast < 1:
        raise UserError(f"cast must be from 0 to below 1, got {cast}")
    labels = _labels_of(looks, classes)
    rng = np.random.default_rng([seed, 0])
    canvas = _Canvas(rng, size, looks=_WORLDS[looks])
    for _ in range(rng.integers(1, 7)):
        canvas.add_clutter()
    wanted = int(rng.integers(min_objects, max_objects + 1))
    fill(canvas, wanted, min_objects, labels, crowded)
    if len(canvas.labels) < min_objects:
        raise RuntimeError(
            f"seed {seed}: {min_objects} objects do not fit on {size} x {size} px; lower min_objects or raise size"
        )
    if rng.random() < 0.3:
        canvas.add_clutter(front=True)
    return {
        "image": canvas.render(drawing.light(seed, cast)),
        "masks": canvas.masks(),
        "labels": list(canvas.labels),
        "caption": _scene_caption(canvas.labels, canvas.looks),
    }


def make_object_crop(seed: int, size: int = 64) -> ObjectCrop:
    """One object with its caption, framed as a sliding window or a cropped box would frame it, or pure background.

    One crop in five is background (texture and clutter only); the others show one object whole, off-center, or zoomed
    in so that the border cuts it, one in four of them with a smaller part of another object beside it. One in ten
    backgrounds is a flat color, as in a crop whose background was blanked.

    Args:
        seed: non-negative; equal arguments give equal pixels. Crops and scenes of equal seed are unrelated.
        size: side in px, at least 32.

    Returns:
        image (RGB), mask (size, size) bool, label (index into `CLASSES` or -1), caption (class name or "background").

    Raises:
        UserError: for a size below 32.
    """
    _check_size(size, least=32)
    rng = np.random.default_rng([seed, 1])
    canvas = _Canvas(rng, size, flat=rng.random() < 0.1)
    for _ in range(rng.integers(0, 4)):
        canvas.add_clutter()
    if rng.random() < 0.2:
        return {"image": canvas.render(), "mask": np.zeros((size, size), bool), "label": -1, "caption": BACKGROUND}
    label = int(rng.integers(len(CLASSES)))
    neighbor = int(rng.integers(len(CLASSES))) if rng.random() < 0.25 else None
    if neighbor is not None:
        angle = rng.uniform(0, 2 * math.pi)
        center = size * (0.5 + 0.55 * np.array([math.cos(angle), math.sin(angle)]))
        canvas.add_object(neighbor, center, rng.uniform(0.12, 0.25) * size)
    beside = canvas.as_clutter()
    center, radius = _framing(rng, size)
    # A zoomed or shifted object may show a ring's hole, or less than its neighbor: then it is put in the middle.
    if not canvas.add_object(
        label, center, radius, accept=lambda mask: mask.sum() >= max(0.06 * size**2, 2 * (beside & ~mask).sum())
    ):
        canvas.add_object(label, np.full(2, size / 2), 0.45 * size)
    mask = canvas.owner > 0
    return {"image": canvas.render(), "mask": mask, "label": label, "caption": CLASSES[label]}


def write_scenes(
    folder: str | os.PathLike,
    count: int,
    seed: int,
    size: int = 128,
    looks: int = 8,
    classes: Sequence[str] | None = None,
    cast: float = 0.0,
    crowded: bool = False,
) -> Path:
    """Write `count` scenes as a COCO dataset, return its folder. Settings: see `make_scene`; crowded: 2 to 8 objects.

    `folder/images/000001.png` ... and `folder/annotations/instances.json` (ids from 1, compressed RLE masks). The
    folder is a labeled dataset, `folder/images` the same images without labels. Images of different seeds differ.
    The annotations are written last, in one step, so a folder that has them is complete. looks, classes: as of
    `make_scene`; the categories are all looks, whichever are shown.

    Raises:
        UserError: for a count below 1, and as `make_scene`.
        FileExistsError: when the folder already holds images or annotations.
    """
    if count < 1:
        raise UserError(f"count must be at least 1, got {count}")
    _labels_of(looks, classes)
    folder = Path(folder)
    images_dir, target = folder / "images", folder / "annotations" / "instances.json"
    if target.exists() or (images_dir.is_dir() and any(images_dir.iterdir())):
        raise FileExistsError(f"{folder} already holds images or annotations; choose another folder or empty it")
    images_dir.mkdir(parents=True, exist_ok=True)
    objects_of_one = {"min_objects": 2, "max_objects": 8, "crowded": True} if crowded else {}

    def rows() -> Iterator[Row]:
        for index in range(count):
            scene = make_scene(_nth_seed(seed, index), size, looks=looks, classes=classes, cast=cast, **objects_of_one)
            file = images_dir / f"{index + 1:06d}.png"
            scene["image"].save(file, compress_level=3)
            category_ids = [label + 1 for label in scene["labels"]]
            objects = objects_of(encode_masks(scene["masks"]), category_ids, [False] * len(category_ids))
            sides = {"width": size, "height": size}
            yield Row(image=str(file), image_id=index + 1, file_name=file.name, **sides, objects=objects)

    write_coco(RowStream(rows, [{"id": label + 1, "name": name} for label, name in enumerate(LOOKS[looks])]), target)
    return folder


class _Canvas:
    """An image under construction: float RGB pixels and, for each pixel, which object is on top (0: none)."""

    def __init__(
        self, rng: np.random.Generator, size: int, flat: bool = False, looks: tuple[_Look, ...] = _LOOKS
    ) -> None:
        self.rng, self.size, self.looks = rng, size, looks
        self.labels: list[int] = []
        self.full_areas: list[float] = []
        self.owner = np.zeros((size, size), np.int16)
        self.pixels = drawing.background(rng, size, flat)  # (H, W, 3) float32 in [0, 1]

    def as_clutter(self) -> np.ndarray:
        """Stop tracking the objects painted so far; returns the (H, W) bool pixels they show."""
        shown = self.owner > 0
        self.labels, self.full_areas, self.owner = [], [], np.zeros_like(self.owner)
        return shown

    def masks(self) -> np.ndarray:
        return self.owner[None] == np.arange(1, len(self.labels) + 1, dtype=np.int16)[:, None, None]

    def add_object(self, label: int, center: np.ndarray, radius: float, accept=lambda mask: True) -> bool:
        """Paint an object unless it, or one under it, would then show too little. `accept` sees its visible mask."""
        look, rng = self.looks[label], self.rng
        aspect, angle = math.exp(rng.uniform(-0.22, 0.22)), rng.uniform(0, 2 * math.pi)
        outlines = [drawing.placed(part, center, radius, aspect, angle) for part in drawing.outlines(look.shape, rng)]
        alpha = drawing.coverage(self.size, outlines)
        mask = alpha >= 0.5
        owner = np.where(mask, np.int16(len(self.labels) + 1), self.owner)
        full_areas = [
            *self.full_areas,
            drawing.polygon_area(outlines[0]) - sum(map(drawing.polygon_area, outlines[1:])),
        ]
        if not self._all_visible(owner, full_areas) or not accept(mask):
            return False
        self._blend(alpha, self._object_texture(look, radius))
        self.owner, self.full_areas = owner, full_areas
        self.labels.append(label)
        return True

    def add_clutter(self, front: bool = False) -> None:
        """Paint an unlabeled piece: a bar, an ellipse or a random polygon. In front it may hide parts of objects."""
        rng, size = self.rng, self.size
        kind = "bar" if front else rng.choice(["bar", "ellipse", "polygon"])
        if kind == "bar":
            length, width = rng.uniform(0.15, 0.7) * size, rng.uniform(1.0, 3.5)
            unit = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [length, width] / 2
        else:
            corners = 24 if kind == "ellipse" else int(rng.integers(3, 7))
            spread = 1.0 if kind == "ellipse" else rng.uniform(0.5, 1.0, corners)
            unit = drawing.circle(corners) * np.reshape(spread, (-1, 1)) * rng.uniform(3.0, 0.14 * size + 3, 2)
        alpha = drawing.coverage(
            size, [drawing.placed(unit, rng.uniform(0, 1, 2) * size, 1.0, 1.0, rng.uniform(0, 2 * math.pi))]
        )
        owner = np.where(alpha >= 0.5, np.int16(0), self.owner)
        if front and not self._all_visible(owner, self.full_areas):
            return
        if not front and rng.random() < 0.12 and self.looks is _LOOKS:  # 24 looks leave no hue for vivid clutter
            color = drawing.rgb(
                rng.choice(_OFF_HUES) + rng.uniform(-10, 10), rng.uniform(0.4, 0.8), rng.uniform(0.4, 0.9)
            )
        else:
            color = drawing.muted(rng)
        self._blend(alpha, color * (0.85 + 0.3 * drawing.smooth_noise(rng, size, 10.0)[..., None]))
        self.owner = owner

    def render(self, color: np.ndarray | float = 1.0) -> Image.Image:
        """The image under uneven light of a color (3,), with sensor-like grain."""
        rng, size = self.rng, self.size
        light = rng.uniform(0.85, 1.0) + rng.uniform(0.0, 0.25) * drawing.smooth_noise(rng, size, 0.6 * size)
        grain = rng.standard_normal((size, size, 1), dtype=np.float32) * np.float32(rng.uniform(0.005, 0.04))
        lit = self.pixels * light[..., None].astype(np.float32) * np.float32(color) + grain
        return Image.fromarray((lit.clip(0, 1) * 255 + 0.5).astype(np.uint8))

    def _all_visible(self, owner: np.ndarray, full_areas: list[float]) -> bool:
        areas = np.bincount(owner.ravel(), minlength=len(full_areas) + 1)[1:]
        return bool(np.all(areas >= np.maximum(MIN_VISIBLE_AREA, MIN_VISIBLE_FRACTION * np.array(full_areas))))

    def _blend(self, alpha: np.ndarray, texture: np.ndarray) -> None:
        self.pixels += alpha[..., None] * (texture.astype(np.float32) - self.pixels)

    def _object_texture(self, look: _Look, radius: float) -> np.ndarray:
        rng, (hue, jitter) = self.rng, (_HUES | _MANY_HUES)[look.hue]
        hue, saturation, value = (hue + rng.uniform(-jitter, jitter), rng.uniform(0.55, 0.95), rng.uniform(0.6, 0.95))
        color = drawing.rgb(hue, saturation, value)
        shade = 1 + rng.uniform(0.05, 0.3) * (drawing.gradient(rng, self.size) - 0.5)
        if look.striped:
            pale = rng.random() < 0.6
            other = drawing.rgb(hue, 0.15 * saturation, 0.95) if pale else drawing.rgb(hue, saturation, 0.3 * value)
            period = max(5.0, rng.uniform(0.4, 0.65) * radius)
            wave = 0.5 + 1.5 * np.sin(2 * np.pi * drawing.ramp(rng, self.size) / period + rng.uniform(0, 2 * np.pi))
            color = color + wave.clip(0, 1)[..., None] * (other - color)
        return color * shade[..., None]


def _framing(rng: np.random.Generator, size: int) -> tuple[np.ndarray, float]:
    """Center and radius in px of the object of a crop: whole (50 %), off-center (30 %) or zoomed in (20 %)."""
    kind = rng.random()
    if kind < 0.5:
        return rng.uniform(0.4, 0.6, 2) * size, rng.uniform(0.22, 0.55) * size
    if kind < 0.8:
        return rng.uniform(0.1, 0.9, 2) * size, rng.uniform(0.18, 0.45) * size
    return rng.uniform(0.15, 0.85, 2) * size, rng.uniform(0.55, 0.9) * size


def _labels_of(looks: int, classes: Sequence[str] | None) -> list[int]:
    """The labels of the classes that are shown. Raises UserError for what there is not."""
    if looks not in LOOKS:
        raise UserError(f"looks must be one of {', '.join(map(str, LOOKS))}, got {looks}")
    names = LOOKS[looks]
    unknown = [name for name in classes or () if name not in names]
    if unknown or (classes is not None and not classes):
        raise UserError(f"no look {unknown[:1]}; there are: {', '.join(names)}")
    return [label for label, name in enumerate(names) if classes is None or name in classes]


def _scene_caption(labels: list[int], looks: tuple[_Look, ...]) -> str:
    if not labels:
        return BACKGROUND
    numbers = ("", "a", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
    plural = {"cross": "crosses"}
    parts = []
    for label in dict.fromkeys(labels):
        look, times = looks[label], labels.count(label)
        noun = look.shape if times == 1 else plural.get(look.shape, look.shape + "s")
        number = "an" if times == 1 and look.name[0] in "aeiou" else numbers[times]
        parts.append(f"{number} {look.name.removesuffix(look.shape)}{noun}")
    return " and ".join(parts)


def _nth_seed(seed: int, index: int) -> int:
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0])


def _check_size(size: int, least: int) -> None:
    if size < least:
        raise UserError(f"size must be at least {least} px, got {size}")
