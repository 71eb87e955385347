"""Rows as tables of the `datasets` library: images as lazily read paths, masks as RLEs, never decoded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..models.masks import segmentation_to_rle
from .coco import AS_STORED
from .dataset import OBJECT_KEYS, Row

if TYPE_CHECKING:
    import datasets
    import pyarrow

ROWS_A_TABLE = 500


def row_features(text_ids: bool, categories: Sequence[Mapping[str, Any]]) -> datasets.Features:
    """The columns: those of a row, every object's segmentation a compressed RLE, and the class of each object twice:
    `category_id` as in the annotations, `category` as a `ClassLabel` in the order of the ids."""
    import datasets

    number, integer = datasets.Value("float64"), datasets.Value("int64")
    names = [category["name"] for category in categories]
    # The names of a ClassLabel differ; categories may be called the same.
    label = datasets.ClassLabel(names=names) if len(set(names)) == len(names) else datasets.ClassLabel(len(names))
    return datasets.Features(
        {
            "image": datasets.Image(),
            "image_id": datasets.Value("string") if text_ids else integer,
            "file_name": datasets.Value("string"),
            "width": integer,
            "height": integer,
            AS_STORED: datasets.Value("bool"),
            "objects": {
                "segmentation": datasets.List({"size": datasets.List(integer), "counts": datasets.Value("string")}),
                "category_id": datasets.List(integer),
                "category": datasets.List(label),
                "bbox": datasets.List(datasets.List(number)),
                "area": datasets.List(number),
                "iscrowd": datasets.List(integer),
                "score": datasets.List(number),
            },
        }
    )


def has_text_ids(rows: Iterable[Row]) -> bool:
    """Whether image ids have to be written as text, because one of them is."""
    return any(isinstance(row["image_id"], str) for row in rows)


def row_tables(
    rows: Iterable[Row], features: datasets.Features, categories: Sequence[Mapping[str, Any]], embed: bool = False
) -> Iterator[pyarrow.Table]:
    """Tables of some rows each. embed: the contents of image files instead of their paths.

    Raises DataError for a malformed segmentation, OSError for an image file that cannot be read for `embed`.
    """
    import pyarrow

    text_ids = features["image_id"].dtype == "string"
    classes = {category["id"]: index for index, category in enumerate(categories)}
    waiting: list[dict[str, Any]] = []
    for row in rows:
        waiting.append(_entry(row, text_ids, classes, embed))
        if len(waiting) >= ROWS_A_TABLE:
            yield pyarrow.Table.from_pylist(waiting, features.arrow_schema)
            waiting = []
    yield pyarrow.Table.from_pylist(waiting, features.arrow_schema)


def _entry(row: Row, text_ids: bool, classes: dict[int, int], embed: bool) -> dict[str, Any]:
    objects = {key: row["objects"][key] for key in OBJECT_KEYS}
    objects["segmentation"] = [
        segmentation_to_rle(code, row["height"], row["width"]) for code in objects["segmentation"]
    ]
    objects["category"] = [classes[category_id] for category_id in objects["category_id"]]
    image_id = str(row["image_id"]) if text_ids else row["image_id"]
    changed = {"image": _image(row["image"], embed), "image_id": image_id, "objects": objects}
    return {**row, **changed, AS_STORED: row.get(AS_STORED, False)}


def _image(image: str | bytes | Image.Image, embed: bool) -> dict[str, Any]:
    if isinstance(image, Image.Image):
        import datasets

        return datasets.Image().encode_example(image)
    if isinstance(image, bytes):
        return {"bytes": image, "path": None}
    if embed:
        with open(image, "rb") as stream:
            return {"bytes": stream.read(), "path": os.path.basename(image)}
    return {"bytes": None, "path": os.fspath(image)}


def rows_to_dataset(rows: Iterable[Row], text_ids: bool, categories: Sequence[Mapping[str, Any]]) -> datasets.Dataset:
    """The rows as a `datasets.Dataset` in memory; see `row_features`. Raises DataError for a malformed segmentation."""
    import datasets
    import pyarrow

    features = row_features(text_ids, categories)
    table = pyarrow.concat_tables(row_tables(rows, features, categories))
    return datasets.Dataset(table, info=datasets.DatasetInfo(features=features))
