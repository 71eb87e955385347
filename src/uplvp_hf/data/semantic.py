"""Semantic segmentation from the rows that everything else reads: one class a pixel, and augmented training samples.

Rows with a `label_map` are read from that file. Other rows are painted: their objects over "background", which becomes
a class of its own, small ones over large ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from ..models.errors import UserError
from ..models.label_maps import ignored_label
from ..models.masks import decode_segmentation
from .dataset import InstanceDataset, LazyRows, Row
from .errors import DataError
from .label_map_folder import read_ids
from .training_set import TrainingSet
from .transforms import uniform
from .window import Window

BACKGROUND = "background"
_TRIES = 10  # windows that are drawn until one shows more than one class, none of them on most of it
_MOST = 0.75
_LONGEST = 4  # an image is at most so many times longer than its canvas when it is fitted: 2048 for 512


def semantic_view(dataset: InstanceDataset) -> InstanceDataset:
    """The dataset with a class for every labeled pixel: with "background", where objects are painted over it.

    Its id is the one before the first, or behind the last where ids begin at 0.
    """
    rows = dataset.rows.bare() if isinstance(dataset.rows, LazyRows) else dataset.rows
    parts = (dataset.name, list(dataset.failures), dataset.official, dataset.manifest)
    named = [category["name"] for category in dataset.categories]
    if BACKGROUND in named or (len(rows) and "label_map" in rows[0]):
        return InstanceDataset(rows, dataset.categories, *parts)
    ids = dataset.category_ids
    free = min(ids, default=1) - 1
    categories = [{"id": free if free >= 0 else max(ids) + 1, "name": BACKGROUND}, *dataset.categories]
    return InstanceDataset(rows, categories, *parts)


def label_map(dataset: InstanceDataset, index: int) -> np.ndarray:
    """The class of every pixel of a row of a `semantic_view`, (H, W) int32, 0..K-1 in the order of the categories, or
    `ignored_label` where it is not labeled.

    Raises ImageError for a map that cannot be used, DataError for a malformed segmentation; both name the file.
    """
    row, ids = dataset[index], dataset.category_ids
    if "label_map" in row:
        labels = read_ids(row["label_map"], row, frozenset(ids))
        classes = np.full(max(ids) + 2, ignored_label(len(ids)), dtype=np.int32)  # the last one is for -1
        classes[np.array(ids)] = np.arange(len(ids))
        return classes[labels]
    return _painted(row, {category: place for place, category in enumerate(ids)}, dataset)


def _painted(row: Row, place: dict[int, int], dataset: InstanceDataset) -> np.ndarray:
    ground = next((place[c["id"]] for c in dataset.categories if c["name"] == BACKGROUND), ignored_label(len(place)))
    canvas = np.full((row["height"], row["width"]), ground, dtype=np.int32)
    objects = row["objects"]
    for k in sorted(range(len(objects["area"])), key=lambda k: -objects["area"][k]):
        try:
            mask = decode_segmentation(objects["segmentation"][k], row["height"], row["width"])
        except DataError as error:
            raise DataError(error.reason, file=row["file_name"], row=f"object {k}") from error
        canvas[mask] = place[objects["category_id"][k]]
    for region in row.get("void", ()):  # nobody said what is there: no background
        canvas[decode_segmentation(region, row["height"], row["width"])] = ignored_label(len(place))
    return canvas


class SemanticTransform:
    """One image with its label map, as DenseCLIP's recipe has it: scaled by f ~ U(scale_range) times the factor that
    fits the shorter side to `size` (the longer one to four times that), a random crop of at most `size` x `size` that
    shows more than one class if 10 draws find one, a flip, and photometric distortion.

    color_jitter: strength of the distortion, 0 to 1; 0.5 is the recipe's. Each of brightness, contrast, saturation and
    hue changes with probability one half.
    """

    def __init__(
        self, size: int, scale_range: tuple[float, float] = (0.5, 2.0), flip: float = 0.5, color_jitter: float = 0.5
    ) -> None:
        if size <= 0 or size % 32:
            raise UserError(f"size must be a positive multiple of 32, got {size}")
        self.size, self.scale_range, self.flip, self.color_jitter = size, scale_range, flip, color_jitter

    def __call__(
        self, image: Image.Image, labels: np.ndarray, ignored: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(3, h, w) uint8 and (h, w) int64, h and w at most `size`."""
        height, width = labels.shape
        fit = min(self.size / min(height, width), _LONGEST * self.size / max(height, width))
        scale = fit * uniform(generator, *self.scale_range)
        resized = max(1, round(width * scale)), max(1, round(height * scale))
        for _ in range(_TRIES):
            window = self._window(*resized, generator)
            found = _labels_in(window, labels)
            counts = np.unique(found[found != ignored], return_counts=True)[1]
            if len(counts) > 1 and counts.max() < _MOST * counts.sum():
                break
        pixels = window.pixels(image, (0, 0, 0))
        return self._distorted(pixels, generator), torch.from_numpy(found.astype(np.int64))

    def _window(self, width: int, height: int, generator: torch.Generator) -> Window:
        wide, tall = min(self.size, width), min(self.size, height)
        left = int(uniform(generator, 0, width - wide + 1))
        top = int(uniform(generator, 0, height - tall + 1))
        return Window(width, height, left, top, wide, tall, uniform(generator, 0, 1) < self.flip)

    def _distorted(self, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        strength = self.color_jitter
        changes = (
            (functional.adjust_brightness, 1, strength / 2),
            (functional.adjust_contrast, 1, strength),
            (functional.adjust_saturation, 1, strength),
            (functional.adjust_hue, 0, strength / 5),
        )
        for change, center, reach in changes:
            apply, value = uniform(generator, 0, 1) < 0.5, uniform(generator, center - reach, center + reach)
            if strength and apply:
                pixels = change(pixels, value)
        return pixels


def _labels_in(window: Window, labels: np.ndarray) -> np.ndarray:
    """The label map in a window, at the nearest source pixels."""
    height, width = labels.shape
    columns = ((window.left + np.arange(window.width) + 0.5) * (width / window.resized_width)).astype(np.int64)
    rows = ((window.top + np.arange(window.height) + 0.5) * (height / window.resized_height)).astype(np.int64)
    found = labels[rows.clip(max=height - 1)[:, None], columns.clip(max=width - 1)]
    return found[:, ::-1] if window.flip else found


class SemanticTrainingSet(TrainingSet):
    """Augmented samples of images and label maps: `pixel_values` (3, h, w), `labels` (h, w), `image_id`, `index`. The
    dataset is a `semantic_view`; other arguments and the choice of what is seen as for `TrainingSet`."""

    def __init__(
        self,
        dataset: InstanceDataset,
        transform: SemanticTransform,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        seed: int,
    ) -> None:
        super().__init__(dataset, transform, None, image_mean, image_std, seed)  # type: ignore[arg-type]
        self.ignored = ignored_label(len(dataset.categories))

    def sample(self, index: int, epoch: int) -> dict[str, Any]:
        generator = self._generator(index % len(self), epoch)
        position, image = self._open(index % len(self))
        labels = label_map(self.dataset, position)
        pixels, labels = self.transform(image, labels, self.ignored, generator)  # type: ignore[call-arg, arg-type]
        values, image_id = self.normalized(pixels), self.dataset.image_id(position)
        return {"pixel_values": values, "labels": labels, "image_id": image_id, "index": position}


def collate_semantic(samples: Sequence[dict[str, Any]], size: int, ignored: int) -> dict[str, Any]:
    """Pads samples to size x size at the right and the bottom, images with zeros and labels with `ignored`."""
    pixels = torch.zeros((len(samples), 3, size, size))
    labels = torch.full((len(samples), size, size), ignored, dtype=torch.int64)
    for index, sample in enumerate(samples):
        height, width = sample["labels"].shape
        pixels[index, :, :height, :width] = sample["pixel_values"]
        labels[index, :height, :width] = sample["labels"]
    return {"pixel_values": pixels, "labels": labels, "image_ids": [sample["image_id"] for sample in samples]}


__all__ = ["SemanticTrainingSet", "SemanticTransform", "collate_semantic", "label_map", "semantic_view"]
