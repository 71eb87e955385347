"""Masks that another program wrote into a file."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ...data import DataError, InstanceDataset, Row, decode_segmentation, empty_objects, load_dataset_rows
from ...data.fields import read_categories, read_json
from ...models.errors import UserError
from ..cutting.proposals import Proposals
from ..fingerprint import fingerprint
from ..protocol import Labeler
from ..settings import MaskFileSettings


class MaskFileLabeler(Labeler):
    """Masks that another program wrote: a COCO JSON, a COCO results list, a pseudo-label store.

    dataset: the path of one of these, or an `InstanceDataset`. settings, changes: see `MaskFileSettings`.

    Crowd regions are left out. Raises DataError for a file that cannot be read; when called, for an image that is
    missing or has another size in the file.
    """

    name = "file"

    def __init__(
        self,
        dataset: str | os.PathLike[str] | InstanceDataset,
        settings: MaskFileSettings | None = None,
        **changes: Any,
    ) -> None:
        self.config = config = MaskFileSettings.of(settings, **changes)
        self._source = dataset
        self.dataset = dataset if isinstance(dataset, InstanceDataset) else read_masks(dataset, config.categories)
        self.encoder_name = f"file:{os.path.basename(os.path.normpath(self.dataset.name)) or 'rows'}"
        self.vocabulary = list(self.dataset.id2label.values())
        self._class_of = {category_id: index for index, category_id in enumerate(self.dataset.category_ids)}
        self._by_id, self._by_name, self._by_base = _indices(self.dataset.rows)
        has_sizes = not self.dataset.rows or _size(self.dataset[0]) is not None
        self.missing = config.missing or ("fail" if has_sizes else "empty")
        self._absent: set[int | str] = set()
        self._malformed: set[tuple[int, int]] = set()

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the file."""
        return fingerprint(self._source)

    @property
    def settings(self) -> dict[str, Any]:
        """For the store's header; `content` is a hash of the file."""
        return {"content": self.fingerprint, **self.config.as_dict(), "missing": self.missing}

    @property
    def notes(self) -> list[str]:
        """What the user should know after a run, one sentence each."""
        texts = []
        if self._absent:
            texts.append(f"{len(self._absent)} images are not in {self.dataset.name}: they got no masks")
        if self._malformed:
            texts.append(f"{len(self._malformed)} masks of {self.dataset.name} are malformed and were left out")
        return texts

    def find(self, row: Row) -> int | None:
        """Index of the file's image for a dataset's row, or None."""
        name, size = row["file_name"].replace(os.sep, "/"), (row["width"], row["height"])
        if self.config.match != "image_id":
            for table, key in ((self._by_name, name), (self._by_base, os.path.basename(name))):
                if table.get(key) is not None:
                    return table[key]
        if self.config.match != "file_name":
            index = self._by_id.get(row["image_id"])
            if index is not None and (self.config.match == "image_id" or _size(self.dataset[index]) in (None, size)):
                return index
        return None

    def __call__(self, images: Sequence[Image.Image], rows: Sequence[Row] | None = None) -> list[Proposals]:
        """One `Proposals` with labels an image. Raises UserError without rows."""
        if rows is None:
            raise UserError("masks of a file are looked up by the rows of the images: pass rows")
        return [self._proposals(image, row) for image, row in zip(images, rows, strict=True)]

    def locate(self, image: Image.Image, row: Row) -> int | None:
        """Index of the file's image for a dataset's row; None where the file has none and `missing` is "empty".

        Raises DataError for an image that is missing or has another size in the file.
        """
        index = self.find(row)
        if index is None:
            if self.missing == "fail":
                raise DataError(f"is not in {self.dataset.name}", file=row["file_name"])
            self._absent.add(row["image_id"])
            return None
        known = _size(self.dataset[index])
        if known not in (None, image.size):
            raise DataError(
                f"has {image.width}x{image.height} pixels, but {known[0]}x{known[1]} in {self.dataset.name}",
                file=row["file_name"],
            )
        return index

    def _proposals(self, image: Image.Image, row: Row) -> Proposals:
        size = (image.height, image.width)
        index = self.locate(image, row)
        if index is None:
            return Proposals.build([], [], size, labels=[])
        objects = self.dataset[index]["objects"]
        order = np.argsort(-np.asarray(objects["score"], dtype=np.float64), kind="stable")
        masks: list[np.ndarray] = []
        scores: list[float] = []
        labels: list[int] = []
        for k in order:
            if len(masks) == self.config.top or objects["score"][k] < self.config.min_score:
                break
            if objects["iscrowd"][k]:
                continue
            try:
                mask = decode_segmentation(objects["segmentation"][k], *size)
            except DataError:
                self._malformed.add((index, int(k)))
                continue
            if mask.sum() >= max(1, self.config.min_area):
                masks.append(mask)
                scores.append(objects["score"][k])
                labels.append(self._class_of[objects["category_id"][k]])
        return Proposals.build(masks, scores, size, labels)


def read_masks(path: str | os.PathLike[str], categories: str | None = None) -> InstanceDataset:
    """What `MaskFileLabeler` reads: anything of `load_dataset_rows`, and COCO results lists ([{"image_id",
    "category_id", "segmentation", "score"}, ...]), whose images have no names and no size.

    Raises DataError as `load_dataset_rows` does, and for entries of a results list that lack a key.
    """
    path = os.fspath(path)
    if os.path.isfile(path) and path.lower().endswith(".json"):
        with open(path, "rb") as stream:
            start = stream.read(1024).lstrip(b"\xef\xbb\xbf\xff\xfe\0 \t\r\n")  # marks of byte order, and space
        if start.startswith(b"["):
            return _read_results(path, categories)
    return load_dataset_rows(path)


def _read_results(path: str, categories: str | None) -> InstanceDataset:
    rows = rows_of_entries(path, read_json(path), "segmentation")
    content = None if categories is None else read_json(categories)
    return InstanceDataset(list(rows.values()), named_categories(rows, content, categories or path, path), path)


def rows_of_entries(path: str, entries: Any, key: str, rows: dict[Any, Row] | None = None) -> dict[Any, Row]:
    """Rows by image id, with what a list of {"image_id", "category_id", `key`, "score"} says of their objects.

    rows: of the images that there are; None: there are those that the list names. Raises DataError naming the entry.
    """
    found = {} if rows is None else rows
    needed = ("image_id", "category_id", key)
    if not isinstance(entries, list):
        raise DataError(f"its annotations are no list but {type(entries).__name__}", file=path)
    for place, entry in enumerate(entries):
        where = {"file": path, "row": f"entry {place}"}
        lacking = [name for name in needed if not isinstance(entry, dict) or name not in entry]
        if lacking:
            remedy = f"An entry has {', '.join(needed)}, and may have a score."
            raise DataError(f"has no {lacking[0]!r}", **where, remedy=remedy)
        image, score = entry["image_id"], entry.get("score", 1.0)
        if not is_number(score):
            raise DataError(f"a score must be a finite number, got {score!r:.80}", **where)
        if rows is not None and image not in rows:
            raise DataError(f"names the image {image!r}, which the file does not list", **where)
        own = Row(image="", image_id=image, file_name=str(image), objects=empty_objects())
        objects = found.setdefault(image, own)["objects"]
        values = {name: entry[name] for name in needed[1:]} | {"score": float(score)}
        for name, value in (values | {"iscrowd": int(entry.get("iscrowd", 0))}).items():
            objects[name].append(value)
    return found


def named_categories(rows: dict[Any, Row], content: Any, source: str, path: str) -> list[dict[str, Any]]:
    """The categories that the content of the COCO file `source` names; without any, those of the objects of `rows`, by
    their ids.

    Raises DataError for an object whose category is not among them.
    """
    used = sorted({number for row in rows.values() for number in row["objects"]["category_id"]})
    known = read_categories(content.get("categories", []) if isinstance(content, dict) else content or [], source)
    names = {entry["id"]: entry["name"] for entry in known} or {number: str(number) for number in used}
    unknown = [number for number in used if number not in names]
    if unknown:
        raise DataError(f"names no category {unknown[0]!r}, which {path} has", file=source)
    return [{"id": number, "name": name} for number, name in names.items()]


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and bool(np.isfinite(value))


def _size(row: Row) -> tuple[int, int] | None:
    """(width, height), or None for an image of a results list."""
    return (row["width"], row["height"]) if "width" in row else None


def _indices(rows: Sequence[Row]) -> tuple[dict, dict[str, int], dict[str, int | None]]:
    """Rows by image id, by file name, and by the last part of it: None where several share that."""
    by_id, by_name, by_base = {}, {}, {}
    for index, row in enumerate(rows):
        name = row["file_name"].replace(os.sep, "/")
        base = os.path.basename(name)
        by_id[row["image_id"]] = index
        by_name[name] = index
        by_base[base] = None if base in by_base else index
    return by_id, by_name, by_base
