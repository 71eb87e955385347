"""The first stage: what is in the data, and which labeled images are kept aside to decide by."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from ..benchmark.sources import image_root
from ..data import DataError, InstanceDataset, load_dataset_rows, write_coco
from ..data.check import check_dataset, format_report
from ..files import write_json, write_text
from ..training.unlabeled import same_images
from .request import Request

logger = logging.getLogger(__name__)

HELD_OUT = 0.25  # share of the labeled images that decisions are made on
MOST_FOLDS, MOST_TRIED = 3, 30  # folds, and labeled images, that mask sources are tried on
_SEED = 1  # of the cut


def prepare_parts(request: Request, folder: Path) -> dict[str, Any]:
    """Checks the data and parts it; returns what `folder/data.json` holds. Made once.

    folder/labeled: a COCO folder with the splits `train`, `all`, `val` (where that is held out) and `fold0`, `rest0`,
    ... `foldK` are labeled images that mask sources are tried on and `restK` those that name their masks meanwhile.
    folder/images.txt: the images to label, without those of the validation part.

    Raises DataError for labels that cannot be used, such as too few images to hold one out.
    """
    file = folder / "data.json"
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    labels = _read_labels(request.labels, request.label_images, request.images)
    checked = check_dataset(lambda: labels)
    logger.info("%s", format_report(checked))
    outlined = [k for k, row in enumerate(labels.rows) if row["objects"]["category_id"]]
    if len(outlined) < len(labels):
        logger.info("%d images without an object are taken to be unlabeled.", len(labels) - len(outlined))
    labels = labels.subset(outlined)
    if request.val is not None:
        val = _read_labels(request.val, request.val_images, request.images)
        labels = _without(labels, val)
        train, held = list(range(len(labels))), None
        _write_folder(folder / "val", val, {"val": list(range(len(val)))})
    else:
        train, held = held_out(labels)
        val = labels.subset(held)
    splits = {"train": train, "all": sorted([*train, *(held or [])])}
    splits |= {"val": held} if held else {}
    folds = cut_folds(train[:MOST_TRIED])
    for number, fold in enumerate(folds):
        splits |= {f"fold{number}": fold, f"rest{number}": [k for k in train if k not in fold]}
    _write_folder(folder / "labeled", labels, splits)
    count = _write_images(request.images, val, folder / "images.txt")
    found = {
        "images": count,
        "labeled": len(labels),
        "train": len(train),
        "val": len(val),
        "val_instances": sum(len(row["objects"]["category_id"]) for row in val.rows),
        "held_out": held is not None,
        "folds": len(folds),
        "classes": [entry["name"] for entry in labels.categories],
        "instances": {entry["name"]: entry["instances"] for entry in checked["classes"]},
        "broken": checked["broken"],
        "warnings": checked["warnings"],
    }
    write_json(file, found)
    return found


def _read_labels(path: str, images: str | None, fallback: str) -> InstanceDataset:
    """Labeled rows; where no image lies beside the file, their names are taken to be relative to `fallback`."""
    rows = load_dataset_rows(path, images=images, strict=False)
    if images is None and os.path.isdir(fallback) and not _any_image(rows):
        rows = load_dataset_rows(path, images=fallback, strict=False)
    if not rows.categories or not any(row["objects"]["category_id"] for row in rows.rows):
        raise DataError("holds no labeled object", file=path, remedy="Outline at least one object of each class.")
    if not _any_image(rows):
        first = rows.rows[0]["image"]
        raise DataError(
            "none of its images is there", file=path, row=str(first), remedy="Name their folder by --label-images."
        )
    return rows


def _any_image(rows: InstanceDataset) -> bool:
    return any(not isinstance(row["image"], str) or os.path.isfile(row["image"]) for row in rows.rows[:20])


def _without(labels: InstanceDataset, val: InstanceDataset) -> InstanceDataset:
    """The labels without images of the validation part."""
    shared = {index for index, _ in same_images(labels, val)}
    if shared:
        logger.warning("%d labeled images are left out, as they are validation images too.", len(shared))
    return labels.subset([k for k in range(len(labels)) if k not in shared])


def held_out(labels: InstanceDataset) -> tuple[list[int], list[int]]:
    """Indices of the images to learn from, and of those kept aside: drawn so that every class stays in the first part.

    Raises DataError where not a single image can be spared.
    """
    classes = [set(row["objects"]["category_id"]) for row in labels.rows]
    left = Counter(category for one in classes for category in one)
    wanted = max(1, round(len(labels) * HELD_OUT))
    held: list[int] = []
    for index in torch.randperm(len(labels), generator=torch.Generator().manual_seed(_SEED)).tolist():
        if len(held) < wanted and all(left[category] > 1 for category in classes[index]):
            held.append(index)
            left.subtract(classes[index])
    if not held:
        raise DataError(
            "no image can be kept aside to measure on without losing a class",
            file=labels.name,
            remedy="Label one more image of a class that is in one image only, or name labeled images by --val.",
        )
    return [k for k in range(len(labels)) if k not in held], sorted(held)


def cut_folds(indices: list[int]) -> list[list[int]]:
    """At most `MOST_FOLDS` parts of nearly equal size; one image alone is a part of its own."""
    count = min(MOST_FOLDS, len(indices))
    return [indices[number::count] for number in range(count)]


def _write_folder(folder: Path, rows: InstanceDataset, splits: dict[str, list[int]]) -> None:
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    link = folder / "images"
    if not link.is_symlink():
        link.symlink_to(image_root(rows), target_is_directory=True)
    for name, indices in splits.items():
        write_coco(rows.subset(indices), folder / "annotations" / f"{name}.json")


def _write_images(images: str, val: InstanceDataset, path: Path) -> int:
    """Writes the paths of the images to label; returns how many there are."""
    every = load_dataset_rows(images, unlabeled=True)
    kept_aside = {index for index, _ in same_images(every, val)}
    files = [row["image"] for index, row in enumerate(every.rows) if index not in kept_aside]
    if not files:
        raise DataError("holds no image but those to measure on", file=images, remedy="Add images without labels.")
    if not all(isinstance(file, str) for file in files):
        raise DataError("needs images in files", file=images)
    write_text(path, "".join(f"{os.path.abspath(str(file))}\n" for file in files))
    return len(files)
