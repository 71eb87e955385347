"""Rows in, training samples out: one augmented image with its masks, the same for a given (seed, epoch, index)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from ..models.errors import UserError
from .copy_paste import beside, choose, paste, paste_at
from .dataset import InstanceDataset, LazyRows, Objects, Row
from .errors import DataError, ImageError
from .instance_masks import InstanceMasks
from .store_features import feature_width
from .transforms import TrainTransform, uniform

logger = logging.getLogger(__name__)

_MAX_CONSECUTIVE_FAILURES = 10
_PARTNERS = 20  # images looked at for one with a class of this one


class _Object(NamedTuple):
    """What a sample keeps of a mask, whatever becomes of the mask."""

    label: int
    score: float
    feature: np.ndarray | None = None


class TrainingSet(torch.utils.data.Dataset):
    """Map-style dataset of augmented samples.

    Args:
        dataset: the rows.
        transform: called as `TrainTransform` is.
        label_map: {original category id: class 0..K-1}, or None: every instance gets class 0 (class-agnostic).
        image_mean, image_std: three numbers each, for pixels scaled to 0..1.
        seed: >= 0. A sample depends on (seed, epoch, index) only, never on the worker that makes it.
        max_instances: the best by score are kept, ties in the order of the row. Pasted ones fill up what is left.
        skip_crowd: leave out instances with iscrowd = 1, whose masks cover several objects.
        features: whether samples have `kernel_targets`, the vectors of their masks (`store_features`).
        copy_paste: probability, 0 to 1, that a random half of the instances of another image, drawn from all and
            augmented in the same way, is pasted over this one (see `paste`).
        side_by_side: probability, 0 to 1, that an instance of another image is pasted beside one of its class (see
            `beside`), so that few labels show neighbors too. Where no other image with such a class is found, it is
            one of this image, augmented once more.

    Raises DataError when there are no rows, or when a category in use is not in `label_map`.
    """

    def __init__(
        self,
        dataset: InstanceDataset,
        transform: TrainTransform,
        label_map: dict[int, int] | None,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        seed: int,
        max_instances: int = 100,
        skip_crowd: bool = True,
        copy_paste: float = 0.0,
        side_by_side: float = 0.0,
        features: bool = False,
    ) -> None:
        if len(dataset) == 0:
            raise DataError("there are no images to train on", file=dataset.name or None)
        if seed < 0:
            raise UserError(f"seed must be >= 0, got {seed}")
        if max_instances < 1:
            raise UserError(f"max_instances must be >= 1, got {max_instances}")
        for name, share in (("copy_paste", copy_paste), ("side_by_side", side_by_side)):
            if not 0 <= share <= 1:
                raise UserError(f"{name} must be within 0 to 1, got {share}")
        if len(image_mean) != 3 or len(image_std) != 3 or min(image_std) <= 0:
            raise UserError(f"image_mean and image_std must be 3 numbers, std positive; got {image_mean}, {image_std}")
        self.dataset = dataset
        self.transform = transform
        self.label_map = label_map
        self.mean = torch.tensor(image_mean, dtype=torch.float32).view(3, 1, 1)
        self.std = torch.tensor(image_std, dtype=torch.float32).view(3, 1, 1)
        self.seed = seed
        self.max_instances = max_instances
        self.skip_crowd = skip_crowd
        self.copy_paste, self.side_by_side = copy_paste, side_by_side
        self.features, self.feature_width = features, feature_width(dataset) if features else 0
        # Shared memory: the failures of worker processes come back.
        self._failed = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()
        self._reasons: dict[int, str] = {}
        self._check_label_map()

    def _check_label_map(self) -> None:
        if self.label_map is None:
            return
        if isinstance(self.dataset.rows, LazyRows) and self.label_map.keys() >= set(self.dataset.category_ids):
            return  # readers give no other categories, and to make every row here could take minutes
        for index, row in enumerate(self.dataset.rows):
            for category_id in row["objects"]["category_id"]:
                if category_id not in self.label_map:
                    raise DataError(
                        f"category id {category_id} has no class in the label map {self.label_map}",
                        file=self.dataset.name or None,
                        row=f"row {index} ({row['file_name']})",
                        remedy="Give the model every category of the data, or leave these objects out.",
                    )

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def failures(self) -> list[dict[str, str]]:
        """[{"file", "row", "reason"}, ...] of the images met so far, in any worker, that could not be opened."""
        failures = []
        for index in torch.nonzero(self._failed).flatten().tolist():
            if index not in self._reasons:  # it failed in a worker, which kept the reason; ask again
                try:
                    self.dataset.load_image(index)
                except ImageError as error:
                    self._reasons[index] = error.reason
                else:
                    self._reasons[index] = "could not be opened during training, can be opened now"
            row = self.dataset[index]
            file = row["image"] if isinstance(row["image"], str) else row["file_name"]
            failures.append({"file": file, "row": f"row {index}", "reason": self._reasons[index]})
        return failures

    def _generator(self, index: int, epoch: int) -> torch.Generator:
        state = np.random.SeedSequence([self.seed, epoch, index]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0]) >> 1)

    def _open(self, index: int) -> tuple[int, Image.Image]:
        """The image at `index`, or the next one that can be opened."""
        for step in range(min(_MAX_CONSECUTIVE_FAILURES + 1, len(self))):
            position = (index + step) % len(self)
            try:
                return position, self.dataset.load_image(position)
            except ImageError as error:
                if not self._failed[position]:
                    logger.warning("skipped: %s", error)
                self._failed[position] = True
                self._reasons[position] = error.reason
                last = error
        raise DataError(
            f"no image of rows {index} to {position} can be opened; the last: {last}",
            file=self.dataset.name or None,
            remedy="Check the image folder.",
        ) from last

    def _choose(self, row: Row) -> list[int]:
        objects = row["objects"]
        chosen = [k for k, crowd in enumerate(objects["iscrowd"]) if not (crowd and self.skip_crowd)]
        best = sorted(chosen, key=lambda k: -objects["score"][k])[: self.max_instances]
        return sorted(best)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The sample at `index` in the first epoch. See `sample`."""
        return self.sample(index, 0)

    def sample(self, index: int, epoch: int, seen_at: int | None = None) -> dict[str, Any]:
        """One sample as augmented in `epoch`, with h and w as the transform says:

        pixel_values (3, h, w) float32 normalized; mask_labels, `InstanceMasks` of N masks of h x w, `.dense()` is
        (N, h, w) bool; class_labels (N,) int64; prompt_scores (N,) float32, 0 to 1; with `features`, kernel_targets
        (N, D) float32; image_id; index of the row used, which is a later one than asked for when images cannot be
        opened. seen_at: that row, where it is known from an earlier call: no image is opened then, and pixel_values
        are zeros. Raises DataError when more than 10 images in a row cannot be opened, IndexError beyond the end.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} images")
        generator = self._generator(index % len(self), epoch)
        position, pixels, masks, objects = self._augmented(index % len(self), generator, seen_at)
        if self.copy_paste and uniform(generator, 0, 1) < self.copy_paste:
            pixels, masks, objects = self._pasted(pixels, masks, objects, generator)
        if self.side_by_side and uniform(generator, 0, 1) < self.side_by_side:
            pixels, masks, objects = self._with_neighbor(index % len(self), pixels, masks, objects, generator)
        unseen = torch.zeros(()).expand(3, masks.height, masks.width)
        sample = {
            "pixel_values": unseen if pixels is None else self.normalized(pixels),
            "mask_labels": masks,
            "class_labels": torch.tensor([one.label for one in objects], dtype=torch.int64),
            "prompt_scores": torch.tensor([one.score for one in objects], dtype=torch.float32),
            "image_id": self.dataset.image_id(position),
            "index": position,
        }
        if self.features:
            vectors = np.asarray([one.feature for one in objects], dtype=np.float32)
            sample["kernel_targets"] = torch.from_numpy(vectors.reshape(len(objects), self.feature_width))
        return sample

    def normalized(self, pixels: torch.Tensor) -> torch.Tensor:
        """(3, h, w) bytes as float32, less the mean, over the deviation."""
        # In place, because a float image takes four times the memory of its bytes.
        return pixels.to(torch.float32).div_(255).sub_(self.mean).div_(self.std)

    def _augmented(
        self, index: int, generator: torch.Generator, seen_at: int | None = None
    ) -> tuple[int, torch.Tensor | None, InstanceMasks, list[_Object]]:
        """The row used, pixels (None with `seen_at`), masks, and what is known of each mask."""
        position, image = self._open(index) if seen_at is None else (seen_at, None)
        row = self.dataset[position]
        chosen = self._choose(row)
        segmentations = [row["objects"]["segmentation"][k] for k in chosen]
        try:
            if image is None:
                _, masks, kept = self.transform.cut(segmentations, row["height"], row["width"], generator)
                pixels = None
            else:
                pixels, masks, kept = self.transform(image, segmentations, row["height"], row["width"], generator)
        except DataError as error:
            raise DataError(error.reason, file=row["file_name"], row=f"row {position}") from error
        objects = row["objects"]
        return position, pixels, masks, [self._object(objects, chosen[k]) for k in kept]

    def _object(self, objects: Objects, k: int) -> _Object:
        label = 0 if self.label_map is None else self.label_map[objects["category_id"][k]]
        return _Object(label, objects["score"][k], objects["features"][k] if self.features else None)

    def _pasted(
        self, pixels: torch.Tensor, masks: InstanceMasks, objects: list[_Object], generator: torch.Generator
    ) -> tuple[torch.Tensor, InstanceMasks, list[_Object]]:
        """An image with instances of another one over it; the two may be the same by chance."""
        partner = int(uniform(generator, 0, len(self)))
        _, other_pixels, other_masks, other_objects = self._augmented(partner, generator)
        chosen = choose(len(other_masks), self.max_instances - len(masks), generator)
        pixels, masks, kept, pasted = paste(
            pixels, masks, other_pixels, other_masks.select(chosen), self.transform.min_area, generator
        )
        return pixels, masks, [objects[k] for k in kept] + [other_objects[chosen[k]] for k in pasted]

    def _with_neighbor(
        self,
        index: int,
        pixels: torch.Tensor,
        masks: InstanceMasks,
        objects: list[_Object],
        generator: torch.Generator,
    ) -> tuple[torch.Tensor, InstanceMasks, list[_Object]]:
        """An image with one more instance, beside one of its class."""
        if not 0 < len(masks) < self.max_instances:
            return pixels, masks, objects
        partner = self._partner(index, {one.label for one in objects}, generator)
        _, other_pixels, other_masks, other_objects = self._augmented(partner, generator)
        pairs = [(k, j) for k, a in enumerate(objects) for j, b in enumerate(other_objects) if a.label == b.label]
        if not pairs:  # the crop lost them
            return pixels, masks, objects
        anchor, chosen = pairs[int(uniform(generator, 0, len(pairs)))]
        place = beside(masks.patches[anchor], other_masks.patches[chosen], masks.height, masks.width, generator)
        if place is None:
            return pixels, masks, objects
        one = other_masks.select([chosen])
        pixels, masks, kept, pasted = paste_at(pixels, masks, other_pixels, one, place, self.transform.min_area)
        return pixels, masks, [objects[k] for k in kept] + [other_objects[chosen] for _ in pasted]

    def _partner(self, index: int, labels: set[int], generator: torch.Generator) -> int:
        """An image that has one of these classes: the first of a few drawn at random, else the one at `index`."""
        for _ in range(_PARTNERS):
            partner = int(uniform(generator, 0, len(self)))
            row = self.dataset[partner]
            if any(self._object(row["objects"], k).label in labels for k in self._choose(row)):
                return partner
        return index
