"""Looks at every row of a dataset: what is broken, with file and row, and what one wants to know before training."""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from ..models.masks import rle_areas, rle_boxes, segmentation_to_rle
from .dataset import OBJECT_KEYS, InstanceDataset, Row, RowStream, load_row_image
from .errors import DataError, DataWarning, ImageError
from .ignored import ignored_labels
from .inputs import LIST_SUFFIXES
from .layouts import OFFICIAL_COUNTS
from .usage import Usage

AREAS = (32**2, 96**2)  # px: COCO's limits of small and medium objects
_BOX_OVERLAP = 0.5  # IoU below which a box is not that of its mask

Fault = dict[str, Any]


def check_dataset(
    load: Callable[[], InstanceDataset | RowStream],
    images: bool = False,
    progress: Callable[[Iterable[Row]], Iterable[Row]] = lambda rows: rows,
    source: str | None = None,
    split: str | None = None,
) -> dict[str, Any]:
    """Everything about a dataset, as JSON can hold it.

    Args:
        load: gives the dataset; what it warns of goes into the result.
        images: also open every image.
        progress: wraps the rows, such as `tqdm.tqdm`.
        source, split: what was loaded; label files in that folder which were not read are warned of.

    Returns: name, official (the published split that it says it is), images, empty_images, instances, crowds,
    classes [{id, name, images, instances, crowds}], object_sizes {small, medium, large} (pixels of the mask, COCO's
    limits, crowds aside), image_sizes {smallest, median, largest} ([width, height], by area), most_instances,
    training (what a run would use, `Usage.to_dict`), broken and warnings [{file, row, reason}]. What `load` raises
    passes through.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DataWarning)
        dataset = load()
        survey = _Survey(dataset, images)
        for index, row in enumerate(progress(_rows(dataset, survey.broken))):
            if row is not None:
                survey.add(row, index)
    for warning in caught:
        if isinstance(warning.message, DataWarning):
            found = warning.message
            survey.warnings.append({"file": found.file, "row": found.row, "reason": found.reason})
    ignored = None if source is None else ignored_labels(source, dataset, split)
    survey.warnings += [] if ignored is None else [ignored]
    return survey.result()


def _rows(dataset: InstanceDataset | RowStream, broken: list[Fault]) -> Iterator[Row | None]:
    """The rows; None for one that cannot be read, which is listed in `broken`."""
    if isinstance(dataset, RowStream):
        yield from dataset
        return
    for index in range(len(dataset)):
        try:
            yield dataset[index]
        except DataError as error:
            broken.append({"file": error.file, "row": error.row or f"row {index}", "reason": error.reason})
            yield None


class _Survey:
    """Counters over the rows seen so far; no row is kept."""

    def __init__(self, dataset: InstanceDataset | RowStream, images: bool) -> None:
        self.dataset, self.open_images = dataset, images
        self.broken: list[Fault] = list(dataset.failures)
        self.warnings: list[Fault] = []
        self.names = {category["id"]: category["name"] for category in dataset.categories}
        self.images = self.empty = self.most = 0
        self.instances: Counter[int] = Counter()
        self.crowds: Counter[int] = Counter()
        self.in_images: Counter[int] = Counter()
        self.sizes: Counter[tuple[int, int]] = Counter()
        self.areas = [0, 0, 0]
        self.seen: dict[int | str, int] = {}
        self.files: dict[str, int] = {}
        self.lengths: dict[int, dict[str, bytes | None]] = {}  # {bytes of a file: {file: its hash, once needed}}
        self.kinds: dict[str, list[Any]] = {}
        self.usage = Usage(0, names=self.names)

    def add(self, row: Row, index: int) -> None:
        where = f"row {index} (image id {row['image_id']!r})"
        self.images += 1
        self._check_names(row, index, where)
        if not (row["width"] > 0 and row["height"] > 0):
            self._break(where, f"the size of the image {row['file_name']} cannot be read")
        else:
            self.sizes[row["width"], row["height"]] += 1
            for fault in self._objects(row, where):
                self._break(where, fault)
            self.usage.add(row)
        self._compare_file(row, index, where)
        if self.open_images:
            try:
                load_row_image(row)
            except ImageError as error:
                self.broken.append({"file": error.file, "row": where, "reason": error.reason})

    def _break(self, where: str, reason: str) -> None:
        self.broken.append({"file": self.dataset.name, "row": where, "reason": reason})

    def _check_names(self, row: Row, index: int, where: str) -> None:
        if row["image_id"] in self.seen:
            self._break(where, f"the image id is also that of row {self.seen[row['image_id']]}")
        self.seen.setdefault(row["image_id"], index)
        name = row["file_name"]
        relative = os.path.normpath(name)
        if not self.dataset.name.endswith(LIST_SUFFIXES) and (os.path.isabs(name) or relative.startswith("..")):
            self._break(where, f"the file name {name!r} leads out of the folder of the images")
        if isinstance(row["image"], str):
            if row["image"] in self.files:
                reason = f"the image {name} is also that of row {self.files[row['image']]}"
                self.warnings.append({"file": self.dataset.name, "row": where, "reason": reason})
            self.files.setdefault(row["image"], index)

    def _remark(self, kind: str, where: str, example: str) -> None:
        """One more of a kind of warning, of which the report tells the number and the first."""
        self.kinds.setdefault(kind, [0, where, example])[0] += 1

    def _compare_file(self, row: Row, index: int, where: str) -> None:
        """Notes an image whose content is that of an earlier file; only files of equal length are read."""
        file = row["image"]
        if not isinstance(file, str) or not os.path.isfile(file) or self.files[file] != index:
            return
        others = self.lengths.setdefault(os.path.getsize(file), {})
        if others:
            for other, digest in others.items():
                others[other] = digest or _digest(other)
        own = _digest(file) if others else None
        double = next((other for other, digest in others.items() if digest == own), None)
        if double is not None:
            self._remark(
                "images are exact doubles of others", where, f"{row['file_name']} and {os.path.basename(double)}"
            )
        others[file] = own

    def _objects(self, row: Row, where: str) -> Iterator[str]:
        objects = row["objects"]
        count = len(objects["category_id"])
        for key in OBJECT_KEYS:
            if len(objects[key]) != count:
                yield f"{len(objects[key])} values of {key!r} for {count} objects"
                return
        self.empty += count == 0
        self.most = max(self.most, count)
        held, codes = set(), dict[tuple[Any, int, str], int]()
        for k in range(count):
            values = {key: objects[key][k] for key in OBJECT_KEYS}
            faults, rle = object_faults(values, row["height"], row["width"], self.names)
            yield from (f"object {k}: {fault}" for fault in faults)
            if faults or rle is None:
                continue
            fault = box_fault(values["bbox"], rle_boxes([rle])[0], row["height"], row["width"])
            if fault is not None:
                kind = "boxes are not those of their masks; training takes boxes from the masks"
                self._remark(kind, where, f"object {k}: {fault}")
            area, category_id = int(rle_areas([rle])[0]), values["category_id"]
            first = codes.setdefault((category_id, values["iscrowd"], rle["counts"]), k)
            if first != k:
                self._remark("objects are exact doubles of others in their image", where, f"objects {first} and {k}")
            (self.crowds if values["iscrowd"] else self.instances)[category_id] += 1
            held.add(category_id)
            if not values["iscrowd"]:
                self.areas[sum(area >= limit for limit in AREAS)] += 1
        self.in_images.update(held)

    def result(self) -> dict[str, Any]:
        official = getattr(self.dataset, "official", "")
        expected = OFFICIAL_COUNTS.get(official)
        if expected is not None and self.images != expected:
            reason = f"has {self.images} images, the published {official} has {expected}"
            self.warnings.insert(0, {"file": self.dataset.name, "row": None, "reason": reason})
        for kind, (number, where, example) in self.kinds.items():
            reason = f"{number} {kind}; the first: {example}"
            self.warnings.append({"file": self.dataset.name, "row": where, "reason": reason})
        names = Counter(self.names.values())
        for name in (name for name, number in names.items() if number > 1):
            reason = f"{names[name]} classes are called {name!r}"
            self.warnings.append({"file": self.dataset.name, "row": None, "reason": reason})
        self.usage.images, self.usage.failures = self.images, len(self.broken)
        return {
            "name": self.dataset.name,
            "official": official,
            "images": self.images,
            "empty_images": self.empty,
            "instances": sum(self.instances.values()),
            "crowds": sum(self.crowds.values()),
            "most_instances": self.most,
            "classes": [
                {"id": k, "name": name, "images": self.in_images[k], "instances": self.instances[k],
                 "crowds": self.crowds[k]}
                for k, name in self.names.items()
            ],
            "object_sizes": dict(zip(("small", "medium", "large"), self.areas)),
            "image_sizes": _spread(self.sizes),
            "training": self.usage.to_dict(),
            "broken": self.broken,
            "warnings": self.warnings,
        }  # fmt: skip


def _spread(sizes: Counter[tuple[int, int]]) -> dict[str, list[int]]:
    ordered = sorted(sizes.elements(), key=lambda size: (size[0] * size[1], size))
    if not ordered:
        return {}
    places = {"smallest": 0, "median": len(ordered) // 2, "largest": -1}
    return {name: list(ordered[place]) for name, place in places.items()}


def _digest(file: str) -> bytes:
    with open(file, "rb") as stream:
        return hashlib.sha256(stream.read()).digest()


def object_faults(
    values: dict[str, Any], height: int, width: int, known: Iterable[int]
) -> tuple[list[str], dict[str, Any] | None]:
    """(what is wrong with one object of an image, its RLE where it has one). `known`: category ids."""
    faults = []
    if values["category_id"] not in known:
        faults.append(f"category id {values['category_id']!r} is not among the classes")
    if values["iscrowd"] not in (0, 1):
        faults.append(f"iscrowd must be 0 or 1, got {values['iscrowd']!r}")
    score = values["score"]
    if not (_is_number(score) and 0 <= score <= 1):
        faults.append(f"a score lies between 0 and 1, got {score!r}")
    if not (_is_number(values["area"]) and values["area"] >= 0):
        faults.append(f"an area must be a number >= 0, got {values['area']!r}")
    try:
        rle = segmentation_to_rle(values["segmentation"], height, width)
    except DataError as error:
        return [*faults, error.reason], None
    if not rle_areas([rle])[0]:
        return [*faults, "its mask has no pixel"], None
    return faults, rle


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def box_fault(bbox: Any, mask_box: np.ndarray, height: int, width: int) -> str | None:
    """Why a box cannot be that of a mask with the box `mask_box`, or None. Nothing here reads boxes: it is a remark."""
    if not isinstance(bbox, (list, tuple)) or len(bbox) != 4 or not all(map(_is_number, bbox)):
        return f"a box must be [x, y, width, height], got {bbox!r:.60}"
    left, top, right, bottom = bbox[0], bbox[1], bbox[0] + bbox[2], bbox[1] + bbox[3]
    if min(bbox[2:]) < 0:
        return f"the box {bbox} has a negative side"
    if left < -1 or top < -1 or right > width + 1 or bottom > height + 1:  # a pixel for rounding
        return f"the box {bbox} reaches out of the {width}x{height} image"
    x, y, w, h = mask_box.tolist()
    shared = max(0, min(right, x + w) - max(left, x)) * max(0, min(bottom, y + h) - max(top, y))
    union = bbox[2] * bbox[3] + w * h - shared
    # Masks of one or two pixels: rounding alone moves the box off them.
    if max(w, h) > 2 and shared < _BOX_OVERLAP * union:
        return f"the box {bbox} is not that of its mask, {[x, y, w, h]}"
    return None


def format_report(report: dict[str, Any], shown: int = 20) -> str:
    """The report for people; at most `shown` broken rows and as many warnings."""
    lines = [f"{report['name']}" + (f" ({report['official']})" if report["official"] else "")]
    lines.append(
        f"{report['images']} images, {report['empty_images']} of them without objects; "
        f"{report['instances']} instances, {report['crowds']} crowds, at most {report['most_instances']} in an image"
    )
    if report["image_sizes"]:
        spread = (f"{name} {w}x{h}" for name, (w, h) in report["image_sizes"].items())
        lines.append(f"images: {', '.join(spread)}")
    if report["instances"]:
        small, medium, large = report["object_sizes"].values()
        lines.append(f"objects: {small} small (under 32x32 px), {medium} medium, {large} large (96x96 px and more)")
    if report["classes"]:
        width = max(len(entry["name"]) for entry in report["classes"])
        lines += ["", f"{'id':>8}  {'class':<{width}} {'images':>9} {'instances':>10} {'crowds':>7}"]
        lines += [
            f"{entry['id']:>8}  {entry['name']:<{width}} {entry['images']:>9} {entry['instances']:>10} "
            f"{entry['crowds']:>7}"
            for entry in report["classes"]
        ]
    for title, faults in (("warning", report["warnings"]), ("broken", report["broken"])):
        lines += [""] * bool(faults)
        for fault in faults[:shown]:
            where = ", ".join(str(fault[key]) for key in ("file", "row") if fault.get(key))
            lines.append(f"{title}: {where}: {fault['reason']}")
        if len(faults) > shown:
            lines.append(f"{title}: ... and {len(faults) - shown} more; --json FILE lists them all")
    lines += ["", report["training"]["summary"]]
    lines.append(f"{len(report['broken'])} broken, {len(report['warnings'])} warnings")
    return "\n".join(lines)
