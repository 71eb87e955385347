"""The column `objects` of datasets of the `datasets` library: our own export, and the forms that others publish.

Others are read when `objects` holds, as lists or as a list of structs,

    segmentation            COCO polygons or RLEs ({"size", "counts"})
    category                or category_id, label, labels: a ClassLabel, whole numbers, or text
    iscrowd (or is_crowd), score      optional

Boxes and areas are always taken from the masks: some sets have x, y, width, height, others two corners.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .coco import clean_segmentation
from .dataset import OBJECT_KEYS, Objects, empty_objects
from .errors import DataError, DataWarning
from .layouts import objects_of

if TYPE_CHECKING:
    import datasets

CATEGORIES_KEY = b"uplvp_categories"  # of the metadata of a Parquet file: the categories as JSON
_CLASS_NAMES = ("category", "category_id", "label", "labels")
_CROWD_NAMES = ("iscrowd", "is_crowd")

ReadObjects = Callable[[Any, int, int, str], Objects]  # (value of the column, height, width, place) -> objects


def find_objects(
    data: Any, features: dict[str, Any], source: str, parquet: list[str]
) -> tuple[list[dict[str, Any]], ReadObjects | None]:
    """(categories, reader of the column `objects`); ([], None) where there are no objects with masks.

    Args:
        data: the dataset; with `with_format`, so that class ids can be collected. features: of its columns.
        source: for errors. parquet: the files it comes from, whose first may hold the categories of our export.

    Warns when there are objects without masks. Raises DataError when the classes cannot be known.
    """
    fields = _fields(features.get("objects"))
    if fields is None:
        return [], None
    if {*OBJECT_KEYS, "category"} <= fields.keys() and isinstance(features["objects"], dict):
        return _own_form(fields, parquet)
    if "segmentation" not in fields:
        warnings.warn(
            f"{source}: its objects have no 'segmentation', only {sorted(fields)}; boxes are no masks, and the "
            "images are read as unlabeled",
            stacklevel=3,
        )
        return [], None
    name = next((name for name in _CLASS_NAMES if name in fields), None)
    if name is None:
        raise DataError(
            f"its objects have no class, only {sorted(fields)}",
            file=source,
            remedy=f"Name the column of classes one of {', '.join(_CLASS_NAMES)}.",
        )
    ids, categories = _classes(data, fields[name], name, source)
    crowd = next((name for name in _CROWD_NAMES if name in fields), None)
    columns = _Columns(source, name, crowd, "score" if "score" in fields else None, ids)
    return categories, columns.read


def _fields(objects: Any) -> dict[str, Any] | None:
    """{name: feature of one object} of a struct of lists or a list of structs."""
    import datasets

    kinds = (datasets.List, datasets.LargeList)
    if isinstance(objects, kinds) and isinstance(objects.feature, dict):
        return objects.feature
    if isinstance(objects, dict):
        return {name: feature.feature for name, feature in objects.items() if isinstance(feature, kinds)}
    return None


def _own_form(fields: dict[str, Any], parquet: list[str]) -> tuple[list[dict[str, Any]], ReadObjects]:
    """Of `labeling.export_parquet`: the original category ids where the file holds them, else 0, 1, ... by name."""
    stored = _stored_categories(parquet)

    def read(value: Any, height: int, width: int, where: str) -> Objects:
        objects: Objects = {key: list(value[key]) for key in OBJECT_KEYS}
        if stored is None:
            objects["category_id"] = list(value["category"])
        return objects

    return stored or [{"id": k, "name": name} for k, name in enumerate(fields["category"].names)], read


def _stored_categories(parquet: list[str]) -> list[dict[str, Any]] | None:
    """Of the first Parquet file, where our export wrote them."""
    if not parquet or not os.path.exists(parquet[0]):
        return None
    import pyarrow.parquet

    found = (pyarrow.parquet.read_schema(parquet[0]).metadata or {}).get(CATEGORIES_KEY)
    return None if found is None else json.loads(found)


def _classes(
    data: datasets.Dataset, feature: Any, name: str, source: str
) -> tuple[dict[Any, int], list[dict[str, Any]]]:
    """({value in the column: category id}, categories)."""
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        categories = [{"id": k, "name": label} for k, label in enumerate(feature.names)]
        return {k: k for k in range(len(feature.names))}, categories
    if not isinstance(data, datasets.Dataset):
        raise DataError(
            f"the classes in '{name}' have no names (they are no ClassLabel), and a stream cannot be searched for them",
            file=source,
            remedy="Load it without streaming.",
        )
    values = _values_in_use(data, name)
    if all(isinstance(value, int) for value in values):
        return {k: k for k in values}, [{"id": k, "name": str(k)} for k in values]
    return {label: k for k, label in enumerate(values)}, [{"id": k, "name": label} for k, label in enumerate(values)]


def _values_in_use(data: datasets.Dataset, name: str) -> list[Any]:
    found: set[Any] = set()
    for table in data.select_columns(["objects"]).with_format("arrow").iter(batch_size=1000):
        for row in table.column("objects").to_pylist():
            found |= set(row[name]) if isinstance(row, dict) else {entry[name] for entry in row or ()}
    return sorted(found - {None})


@dataclass(frozen=True)
class _Columns:
    """Names of the fields of a published form, and what its classes are called here."""

    source: str
    category: str
    crowd: str | None
    score: str | None
    ids: dict[Any, int]

    def read(self, value: Any, height: int, width: int, where: str) -> Objects:
        """Objects that cannot be used are left out, each with a DataWarning. Raises DataError for lists of unequal
        length, of which nobody knows what belongs together."""
        if not value or not (height and width):
            return empty_objects()
        if isinstance(value, dict):
            names = [name for name in ("segmentation", self.category, self.crowd, self.score) if name]
            lengths = {name: len(value[name]) for name in names}
            if len(set(lengths.values())) > 1:
                raise DataError(f"the lists of 'objects' are of unequal length: {lengths}", file=self.source, row=where)
            entries = [dict(zip(names, parts)) for parts in zip(*(value[name] for name in names))]
        else:
            entries = value
        kept = []
        for k, entry in enumerate(entries):
            reasons: list[str] = []
            cleaned = clean_segmentation(_segmentation(entry["segmentation"]), height, width, reasons.append)
            if entry[self.category] not in self.ids:
                reasons.append(f"the class {entry[self.category]!r} is none of the dataset")
            if cleaned is None or reasons:
                reason = f"object {k} is left out: {'; '.join(reasons)}"
                warnings.warn(DataWarning(reason, self.source, where), stacklevel=2)
                continue
            kept.append((cleaned, entry))
        crowds = [bool(self.crowd and entry[self.crowd]) for _, entry in kept]
        category_ids = [self.ids[entry[self.category]] for _, entry in kept]
        objects = objects_of([cleaned[1] for cleaned, _ in kept], category_ids, crowds)
        objects["segmentation"] = [cleaned[0] for cleaned, _ in kept]
        if self.score:
            scores = [entry[self.score] for _, entry in kept]
            objects["score"] = [1.0 if score is None else float(score) for score in scores]
        return objects


def _segmentation(value: Any) -> Any:
    """A struct column has every key in every row, so an RLE may come with other keys that are empty."""
    if isinstance(value, dict):
        return {key: part for key, part in value.items() if part is not None}
    return value
