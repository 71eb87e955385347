"""Reading a pseudo-label store: `header.json` and shards of one row a line."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Iterator
from typing import Any

from .dataset import OBJECT_KEYS, InstanceDataset, Row, RowStream
from .errors import DataError
from .fields import image_identifier, inside, read_categories, read_json, require, require_list, whole_number
from .store_features import read_features

SCHEMA_VERSION = 1
FINISHED = "complete.json"
HEADER_KEYS = ("schema_version", "labeler", "settings", "settings_hash", "categories")
_SHARD = re.compile(r"rows-\d{5}-\d{5,}\.jsonl")
_FAILURES = re.compile(r"failures(-\d{5})?\.jsonl")


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The header of the store in folder `path`. Raises DataError when it is missing, incomplete, of another schema."""
    file = os.path.join(os.path.abspath(os.fspath(path)), "header.json")
    header = read_json(file)
    require(header, HEADER_KEYS, file, None)
    if header["schema_version"] != SCHEMA_VERSION:
        raise DataError(
            f"schema version {header['schema_version']!r}, this release reads {SCHEMA_VERSION}",
            file=file,
            remedy="Label the images again, or read it with the release that wrote it.",
        )
    return header


def shard_files(path: str | os.PathLike[str]) -> list[str]:
    """The finished shards of the store in folder `path`, sorted; temporary files are left out."""
    path = os.path.abspath(os.fspath(path))
    return [os.path.join(path, name) for name in sorted(os.listdir(path)) if _SHARD.fullmatch(name)]


def read_failures(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The images that could not be labeled, of all the processes that write or wrote into the store in `path`."""
    path = os.path.abspath(os.fspath(path))
    entries: dict[str, dict[str, Any]] = {}
    # Last those of processes that still write or were killed: they are newer than what was merged into failures.jsonl.
    for name in sorted(os.listdir(path), key=lambda name: (name != "failures.jsonl", name)):
        if _FAILURES.fullmatch(name):
            entries |= {entry["file"]: entry for _, entry in _lines(os.path.join(path, name))}
    return list(entries.values())


def _lines(file: str) -> list[tuple[str, Any]]:
    entries = []
    try:
        with open(file, encoding="utf-8") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    entries.append((f"line {number}", json.loads(line)))
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", file=file) from error
    except ValueError as error:
        raise DataError(
            f"is not valid JSON ({error})",
            file=file,
            row=f"line {len(entries) + 1}",
            remedy="Delete this shard; labeling again makes its rows.",
        ) from error
    return entries


def _check_objects(objects: Any, known: set[int], size: list[int], file: str, where: str) -> None:
    require(objects, OBJECT_KEYS, file, where)
    count = len(require_list(objects, "category_id", file, where))
    for key in OBJECT_KEYS:
        if len(require_list(objects, key, file, where)) != count:
            raise DataError(f"{len(objects[key])} values of {key!r} for {count} objects", file=file, row=where)
    for category_id in objects["category_id"]:
        if category_id not in known:
            raise DataError(f"category id {category_id!r} is not in the header", file=file, row=where)
    for segmentation in objects["segmentation"]:
        if isinstance(segmentation, dict) and segmentation.get("size") != size:
            raise DataError(
                f"an RLE has size {segmentation.get('size')}, its image (height, width) {size}", file=file, row=where
            )
    for score in objects["score"]:
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
            raise DataError(f"a score must be a finite number, got {score!r}", file=file, row=where)


def _mask_count(entry: Any) -> int:
    """Masks of a line of a shard, which may be faulty."""
    try:
        return len(entry["objects"]["category_id"])
    except (KeyError, TypeError):
        return 0


def _read_row(entry: Any, image_root: str | None, known: set[int], file: str, where: str) -> Row:
    require(entry, ("image", "image_id", "file_name", "width", "height", "objects"), file, where)
    image_id = image_identifier(entry, "image_id", file, where)
    where = f"{where} (image id {image_id!r})"
    image = entry["image"]
    if not isinstance(image, str) or not os.path.isabs(image):
        if image_root is None:
            raise DataError(
                f"the image {image!r} is a relative path, and the header has no 'image_root'", file=file, row=where
            )
        image = inside(image_root, image, file, where)
    width = whole_number(entry, "width", file, where, minimum=1)
    height = whole_number(entry, "height", file, where, minimum=1)
    _check_objects(entry["objects"], known, [height, width], file, where)
    objects = {key: entry["objects"][key] for key in OBJECT_KEYS}
    row = Row(image=image, image_id=image_id, file_name=entry["file_name"], width=width, height=height, objects=objects)
    if entry.get("as_stored") is True:
        row["as_stored"] = True
    return row


def read_store(
    path: str | os.PathLike[str],
    images: str | os.PathLike[str] | None = None,
    strict: bool = True,
    features: str | os.PathLike[str] | None = None,
) -> InstanceDataset:
    """Read a pseudo-label store.

    Args:
        path: a folder with `header.json` and shards `rows-00000-00000.jsonl`; other files are left alone.
        images: the folder that relative image paths start from; None: the header's `image_root`, which, if it is
            relative itself, starts from `path`.
        strict: False lists rows that are faulty in `failures` and goes on, where otherwise the first raises; a line
            that is not JSON raises all the same.
        features: a folder with features of the masks (`store_features`), such as `path` itself; objects then have
            them. None leaves them out.

    The dataset has the categories of the header, and what the files `failures*.jsonl` list as `failures`.
    Raises DataError, naming file and line, for a bad header, no rows, lines that are not JSON, missing keys, lists of
    unequal length, unknown categories, RLEs of another size than the image, an image id in two rows, and features that
    are missing or do not fit.
    """
    stream = stream_store(path, images, strict, features)
    rows = list(stream)
    # A run that was killed has had no time to strike out the images that it labeled at its second attempt.
    labeled = {row["image"] for row in rows} | {row["file_name"] for row in rows}
    failures = [entry for entry in stream.failures if entry["file"] not in labeled]
    return InstanceDataset(rows, stream.categories, stream.name, failures)


def stream_store(
    path: str | os.PathLike[str],
    images: str | os.PathLike[str] | None = None,
    strict: bool = True,
    features: str | os.PathLike[str] | None = None,
) -> RowStream:
    """As `read_store`, with one shard in memory at a time; errors of the rows are met when they are reached."""
    path = os.path.abspath(os.fspath(path))
    header = read_header(path)
    categories = read_categories(header["categories"], os.path.join(path, "header.json"))
    known = {category["id"] for category in categories}
    root = os.fspath(images) if images is not None else header.get("image_root")
    image_root = None if root is None else os.path.join(path, root) if images is None else os.path.abspath(root)
    failures = read_failures(path)
    faults = None if strict else failures
    return RowStream(lambda: _rows(path, image_root, known, faults, features), categories, path, failures)


def _rows(
    path: str,
    image_root: str | None,
    known: set[int],
    faults: list[dict[str, Any]] | None,
    features: str | os.PathLike[str] | None,
) -> Iterator[Row]:
    """faults: list for those of single rows; None: the first is raised."""
    seen: dict[int | str, str] = {}
    for file in shard_files(path):
        lines = _lines(file)
        vectors: Iterator[Any] = itertools.repeat(None)
        if features is not None:
            vectors = read_features(features, file, [_mask_count(entry) for _, entry in lines])
        for (where, entry), own in zip(lines, vectors):
            try:
                row = _read_row(entry, image_root, known, file, where)
                if own is not None:
                    row["objects"]["features"] = list(own)
            except DataError as error:
                if faults is None:
                    raise
                faults.append({"file": file, "row": error.row or where, "reason": error.reason})
                continue
            if row["image_id"] in seen:
                raise DataError(
                    f"image id {row['image_id']!r} is also in {seen[row['image_id']]}",
                    file=file,
                    row=where,
                    remedy="Two runs wrote into one store; keep one of the two shards.",
                )
            seen[row["image_id"]] = f"{os.path.basename(file)}, {where}"
            yield row
    if not seen:
        raise DataError("holds no finished rows", file=path, remedy="Let the labeling run to its end.")
