"""Folders of images and label maps: ADE20K's scene parsing as published, or any two folders side by side.

    ROOT/images/[SPLIT/]NAME.jpg        ROOT/annotations/[SPLIT/]NAME.png     one class id a pixel, 8 or 16 bits
    ROOT/classes.txt                    "bear" a line: ids 0, 1, ...; or "7 bear": the id in front
    ROOT/objectInfo150.txt              ADE20K's own list in its place: ids from 1 on, 0 is "other"

The categories are the ids in the maps themselves, so nothing is ever "reduced by one". Pixels that are no category (0
where no class has that id, 255, 65535) are not labeled. A row has one object a class, made when it is asked for, and
the path of its map under `label_map`, which semantic segmentation reads in its place.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..models.masks import encode_masks, rle_areas, rle_boxes
from .coco_files import has_image_suffix, walk_files
from .dataset import InstanceDataset, LazyRows, Objects, Row, empty_objects
from .errors import DataError, ImageError
from .fields import read_lines
from .inputs import rows_of_files
from .label_map_files import ADE_MAP, load_ids

CLASS_LISTS = ("classes.txt", "objectInfo150.txt")
UNLABELED = (0, 255, 65535)
_MAP_SUFFIXES = (".png", ".tif", ".tiff", ".npy")


def is_label_map_folder(path: str) -> bool:
    """Whether a folder has images, annotations and a list of classes, and its annotations are no JSON (COCO's)."""
    listed = any(os.path.isfile(os.path.join(path, name)) for name in CLASS_LISTS)
    annotations = os.path.join(path, "annotations")
    if not listed or not os.path.isdir(os.path.join(path, "images")) or not os.path.isdir(annotations):
        return False
    return not any(name.lower().endswith(".json") for name in os.listdir(annotations))


def read_label_map_folder(path: str, split: str | None = None, unlabeled: bool = False) -> InstanceDataset:
    """The images of a folder, or of `images/SPLIT` in it, with a map of the same name for each.

    Raises DataError for a folder without images or class names, a split that is not there, an image without a map.
    """
    splits = sorted(entry.name for entry in os.scandir(os.path.join(path, "images")) if entry.is_dir())
    if split is None and splits and not any(map(has_image_suffix, os.listdir(os.path.join(path, "images")))):
        raise DataError(f"has the splits {', '.join(splits)}", file=path, remedy="Choose one (split=..., --split).")
    if split is not None and split not in splits:
        raise DataError(f"has no images/{split}", file=path, remedy=f"There is: {', '.join(splits) or 'no split'}.")
    images, maps = (os.path.join(path, name, split or "") for name in ("images", "annotations"))
    files = sorted(file for file in walk_files(images) if has_image_suffix(file))
    names = [os.path.relpath(file, images).replace(os.sep, "/") for file in files]
    rows, failures = rows_of_files(files, names, [f"image {index}" for index in range(len(files))])
    if not rows:
        raise DataError("holds no images", file=images)
    categories = read_classes(path)
    if unlabeled:
        return InstanceDataset(rows, categories, path, failures)
    return label_map_dataset(path, rows, [_map_of(maps, row["file_name"]) for row in rows], categories, failures)


def label_map_dataset(
    path: str, rows: list[Row], maps: list[str], categories: list[dict], failures: list[dict]
) -> InstanceDataset:
    """Rows with a file of their pixels' classes each, as a dataset whose objects are made when they are asked for."""
    read = _Reader(rows, maps, frozenset(category["id"] for category in categories))
    lazy = LazyRows(read, partial(_identify, rows), range(len(rows)))
    return InstanceDataset(lazy, categories, path, failures)


def _map_of(folder: str, name: str) -> str:
    stem = os.path.join(folder, os.path.splitext(name)[0])
    for suffix in _MAP_SUFFIXES:
        if os.path.isfile(stem + suffix):
            return stem + suffix
    raise DataError("no label map", file=stem + _MAP_SUFFIXES[0], remedy="Every image needs one, or remove the image.")


def _identify(rows: list[Row], index: int) -> int | str:
    return rows[index]["image_id"]


@dataclass
class _Reader:
    """Makes a row with its objects, or with the file of its map alone (`bare`)."""

    rows: list[Row]
    maps: list[str]
    ids: frozenset[int]

    def __call__(self, index: int) -> Row:
        row = self.bare(index)
        return Row(**{**row, "objects": _objects(read_ids(row["label_map"], row, self.ids))})

    def bare(self, index: int) -> Row:
        return Row(**{**self.rows[index], "label_map": self.maps[index]})


def read_ids(file: str, row: Row, ids: frozenset[int]) -> np.ndarray:
    """The class id of every pixel (H, W) int32, -1 where there is none.

    Raises ImageError, naming file and value, for a map of another size than its image, and for an id that is no class.
    """
    labels = load_ids(file)
    if labels.shape != (row["height"], row["width"]):
        raise ImageError(
            f"the label map is {labels.shape[1]}x{labels.shape[0]} (width x height), its image "
            f"{row['width']}x{row['height']}",
            file=file, remedy="They must have the same size.",
        )  # fmt: skip
    present = np.unique(labels)
    wrong = [int(value) for value in present if int(value) not in ids and int(value) not in UNLABELED]
    if wrong and not file.endswith(ADE_MAP):  # ADE20K-Full names thousands of things, of which some are classes
        raise ImageError(
            f"holds the id {wrong[0]}, which is no class", file=file,
            remedy="Add it to the list of classes; pixels that do not count are 0 (if no class is), 255 or 65535.",
        )  # fmt: skip
    for value in set(present.tolist()) - ids:
        labels[labels == value] = -1
    return labels


def _objects(labels: np.ndarray) -> Objects:
    present = [int(value) for value in np.unique(labels) if value >= 0]
    if not present:
        return empty_objects()
    rles = encode_masks(np.stack([labels == value for value in present]))
    boxes, count = rle_boxes(rles).tolist(), len(present)
    return Objects(
        segmentation=rles, category_id=present, bbox=boxes, area=[float(area) for area in rle_areas(rles)],
        iscrowd=[0] * count, score=[1.0] * count,
    )  # fmt: skip


def read_classes(path: str) -> list[dict]:
    """The categories of a folder. Raises DataError for a list without names, and for two classes of one id."""
    file = next((os.path.join(path, name) for name in CLASS_LISTS if os.path.isfile(os.path.join(path, name))), None)
    if file is None:
        raise DataError(f"has no {CLASS_LISTS[0]}", file=path, remedy="Write one class name a line.")
    lines = [text for _, text in read_lines(file)]
    if file.endswith("objectInfo150.txt"):  # a head, then columns, the first being the id, the last the synonyms
        columns = [line.split("\t") for line in lines[1:]]
        if any(not entry[0].strip().isdecimal() for entry in columns):
            raise DataError("is no list of ADE20K: a line does not begin with a number", file=file)
        found = [(int(entry[0]), entry[-1].split(",")[0].strip()) for entry in columns]
    else:
        numbered = [re.fullmatch(r"(\d+)[\s:]+(.+)", line) for line in lines]
        if all(numbered):
            found = [(int(match[1]), match[2].strip()) for match in numbered if match]
        else:
            found = list(enumerate(lines))
    if not found:
        raise DataError("holds no class names", file=file)
    return [{"id": number, "name": name} for number, name in found]
