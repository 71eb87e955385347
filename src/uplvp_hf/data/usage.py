"""What training will really use of a dataset: images, objects, classes, and what is left out for which reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ..models.masks import rle_areas, segmentation_to_rle
from .dataset import InstanceDataset, LazyRows, Row
from .errors import DataError

MIN_AREA = 16  # px; `TrainTransform` drops instances that are smaller after the crop
_LOOKED_AT = 64  # of rows whose masks are made when they are asked for
CROWDS = "crowds (iscrowd = 1)"


@dataclass
class Usage:
    """Counts over the rows that were looked at: all, or of rows that are made when asked for some.

    images: rows of the dataset. empty: images without an object to learn, which are background for training.
    objects: that are trained on, by category id. left_out: {reason: number of objects}. source_images: of the dataset
    that the rows are a low-data split of, else None. failures: files and objects that could not be read.
    """

    images: int
    looked_at: int = 0
    empty: int = 0
    objects: Counter[int] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    names: dict[int, str] = field(default_factory=dict)
    source_images: int | None = None
    failures: int = 0

    def add(self, row: Row, size: int | None = None, max_instances: int | None = None) -> None:
        """Counts a row. size: longer side in training, pixels; None: as the image is."""
        objects, kept = row["objects"], []
        scale = size / max(row["width"], row["height"], 1) if size else 1.0
        for k, category_id in enumerate(objects["category_id"]):
            if objects["iscrowd"][k]:
                self.left_out[CROWDS] += 1
            elif size and _area(row, k, MIN_AREA / scale**2) * scale**2 < MIN_AREA:
                self.left_out[f"smaller than {MIN_AREA} px at the training size of {size} px"] += 1
            else:
                kept.append(category_id)
        if max_instances is not None and len(kept) > max_instances:
            self.left_out[f"beyond the {max_instances} best of an image (data.max_instances)"] += (
                len(kept) - max_instances
            )
            kept = kept[:max_instances]
        self.looked_at += 1
        self.empty += not kept
        self.objects.update(kept)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "summary": str(self),
            "images": self.images,
            "looked_at": self.looked_at,
            "objects": self.objects.total(),
            "classes": len(self.objects),
            "images_without_objects": self.empty,
            "classes_without_objects": self.classes_without_objects,
            "left_out": dict(self.left_out),
        }

    @property
    def classes_without_objects(self) -> list[str]:
        """Names of the classes that no object shows."""
        return [name for category_id, name in self.names.items() if category_id not in self.objects]

    def __str__(self) -> str:
        """One sentence of what is used, one of what is not."""
        seen = "" if self.looked_at == self.images else f" (counted in {self.looked_at} of them)"
        of = f" of {self.source_images}" if self.source_images is not None else ""
        used = f"{self.images}{of} images, {self.objects.total()} objects of {len(self.objects)} classes{seen}"
        without = [f"{count} objects: {reason}" for reason, count in self.left_out.items()]
        without += [f"{self.failures} files or objects that cannot be read"] * bool(self.failures)
        notes = [f"Left out are {'; '.join(without)}."] if without else []
        if self.empty:
            notes.append(f"{self.empty} images have no object and are background.")
        absent = self.classes_without_objects
        if absent:
            listed = ", ".join(map(repr, absent[:8])) + (", ..." if len(absent) > 8 else "")
            notes.append(f"No object shows {listed}.")
        return " ".join([f"Training uses {used}.", *notes])

    def refuse_nothing(self, name: str) -> None:
        """Raises DataError where all rows were looked at and none has an object to learn."""
        if self.objects or self.looked_at < self.images:
            return
        crowds = self.left_out[CROWDS]
        remedy = "Label the images first (`uplvp label`), or give another file."
        if crowds:
            remedy = "If each is one object, as CVAT writes brush masks, set data.crowds_as_objects=true."
        elif self.left_out:
            remedy = "Raise data.size."
        raise DataError(f"there is nothing to learn: {self}", file=name or None, remedy=remedy)


def _area(row: Row, k: int, doubtful: float) -> float:
    """Pixels of an object: as the row says, or counted where that is less than `doubtful`."""
    area = row["objects"]["area"][k]
    if area >= doubtful:
        return area
    try:
        return float(
            rle_areas([segmentation_to_rle(row["objects"]["segmentation"][k], row["height"], row["width"])])[0]
        )
    except DataError:
        return 0.0


def training_usage(dataset: InstanceDataset, size: int | None = None, max_instances: int | None = None) -> Usage:
    """What training with these settings uses of a dataset; of rows that are made when asked for 64 are looked at."""
    names = {category["id"]: category["name"] for category in dataset.categories}
    source = dataset.manifest["source"]["rows"] if dataset.manifest else None
    usage = Usage(len(dataset), names=names, source_images=source, failures=len(dataset.failures))
    step = max(1, len(dataset) // _LOOKED_AT) if isinstance(dataset.rows, LazyRows) else 1
    for index in range(0, len(dataset), step):
        usage.add(dataset[index], size, max_instances)
    return usage


def crowds_as_objects(dataset: InstanceDataset) -> InstanceDataset:
    """The same rows with every crowd as one object, for files in which `iscrowd` only says that a mask is an RLE."""
    changed = dataset.map(_no_crowds)
    changed.official = ""
    return changed


def _no_crowds(row: Row) -> Row:
    objects = {**row["objects"], "iscrowd": [0] * len(row["objects"]["iscrowd"])}
    return Row(**{**row, "objects": objects})
