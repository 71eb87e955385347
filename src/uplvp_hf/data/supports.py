"""Support sets: a few outlined objects of every class, drawn by seed and written down with hashes.

A manifest `supports.json` is a JSON object:

    schema_version   1
    kind             "support"
    shots, seed      what was asked for; seed is null of imported ones
    source           {"name", "path" relative to the manifest, "split", "rows"} of the data
    classes          [{"id", "name"}, ...]
    supports         {class name: [[image_id, position of the object in its image, sha256 of the object], ...]}
    hash             sha256 of `supports`
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..files import write_json
from .aliases import find_classes
from .dataset import InstanceDataset, Objects, Row
from .errors import DataError
from .fields import read_json, require
from .manifest import plain_segmentation

SCHEMA_VERSION = 1
LEAST_SHARE = 0.005
"""Least share of its image that a support covers (as the re-implementation of FGN that publishes its settings)."""

_KEYS = ("schema_version", "kind", "shots", "seed", "source", "classes", "supports", "hash")
Entry = tuple[int, int]  # row, object


@dataclass(frozen=True)
class SupportSet:
    """Objects of a dataset that stand for classes. entries: class name -> (row, object) of each example, in the order
    of the classes. shots: asked for. seed: of the draw, None for others."""

    dataset: InstanceDataset
    entries: dict[str, list[Entry]]
    shots: int
    seed: int | None = None
    split: str | None = field(default=None, compare=False)

    @property
    def names(self) -> list[str]:
        return list(self.entries)

    @property
    def category_ids(self) -> list[int]:
        """Ids of the classes in the dataset."""
        ids = {category["name"]: category["id"] for category in self.dataset.categories}
        return [ids[name] for name in self.entries]

    @property
    def image_ids(self) -> set[int | str]:
        """Of all images that hold a support."""
        return {self.dataset.image_id(row) for found in self.entries.values() for row, _ in found}

    @property
    def hash(self) -> str:
        """sha256 of the objects."""
        return _hash(self.as_lists())

    def as_lists(self) -> dict[str, list[list[Any]]]:
        """As a manifest holds them."""
        return {
            name: [[self.dataset.image_id(row), k, object_digest(self.dataset[row], k)] for row, k in found]
            for name, found in self.entries.items()
        }

    def fewer(self, shots: int) -> SupportSet:
        """The first `shots` examples of every class."""
        return SupportSet(self.dataset, {name: found[:shots] for name, found in self.entries.items()}, shots, self.seed)

    def only(self, names: Sequence[str]) -> SupportSet:
        """Some of the classes."""
        return SupportSet(self.dataset, {name: self.entries[name] for name in names}, self.shots, self.seed)

    def refuse_overlap(self, evaluated: InstanceDataset) -> None:
        """Raises DataError when an image that holds a support is among those that are evaluated, by its file."""
        own = {_file_of(self.dataset[row]) for found in self.entries.values() for row, _ in found} - {None}
        for index in range(len(evaluated)) if own else ():
            if _file_of(evaluated[index]) in own:
                raise DataError(
                    f"{evaluated[index]['file_name']} holds a support and would be evaluated as well",
                    file=evaluated.name or None,
                    row=f"row {index}",
                    remedy="Draw the supports from other images.",
                )


def _file_of(row: Row) -> str | None:
    return os.path.realpath(row["image"]) if isinstance(row["image"], str) else None


def object_digest(row: Row, k: int) -> str:
    """sha256 of an object: the id of its image, its class id and segmentation. Whole numbers and floats of one value
    count as equal."""
    objects = row["objects"]
    content = [row["image_id"], objects["category_id"][k], plain_segmentation(objects["segmentation"][k])]
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def instances_of(
    dataset: InstanceDataset, names: Sequence[str], least_share: float = LEAST_SHARE
) -> dict[str, list[Entry]]:
    """Every single object (no crowd) of these classes that covers at least this share of its image, in order."""
    wanted = {category["id"]: category["name"] for category in dataset.categories if category["name"] in set(names)}
    found: dict[str, list[Entry]] = {name: [] for name in names}
    for index, row in enumerate(dataset.rows):
        objects, whole = row["objects"], row["width"] * row["height"]
        for k, category in enumerate(objects["category_id"]):
            if category in wanted and not objects["iscrowd"][k] and objects["area"][k] >= least_share * whole:
                found[wanted[category]].append((index, k))
    return found


def draw_supports(
    dataset: InstanceDataset,
    names: Sequence[str],
    shots: int,
    seed: int = 0,
    least_share: float = LEAST_SHARE,
    allow_fewer: bool = False,
) -> SupportSet:
    """K examples of every class, from as many images as there are. Fewer shots of a seed are part of more, and the
    examples of a class do not depend on the other classes.

    Raises DataError for a class that has fewer, unless `allow_fewer`, and for one that has none.
    """
    if shots < 1:
        raise DataError(f"shots must be at least 1, got {shots}")
    names = find_classes(names, [category["name"] for category in dataset.categories], dataset.name or None)
    entries = {}
    for name, found in instances_of(dataset, names, least_share).items():
        if len(found) < (1 if allow_fewer else shots):
            raise DataError(
                f"class {name!r} has {len(found)} objects that can be supports, {shots} were asked for",
                file=dataset.name or None,
                remedy=f"Ask for fewer shots, or lower the least share of an image ({least_share:g}).",
            )
        order = np.random.default_rng([seed, zlib.crc32(name.encode())]).permutation(len(found)).tolist()
        first: list[int] = []
        again: list[int] = []
        seen: set[int] = set()
        for place in order:
            (again if found[place][0] in seen else first).append(place)
            seen.add(found[place][0])
        entries[name] = [found[place] for place in [*first, *again][:shots]]
    return SupportSet(dataset, entries, shots, seed)


def write_supports(supports: SupportSet, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Writes the manifest in one step, and returns it."""
    folder, lists = os.path.dirname(os.path.abspath(path)), supports.as_lists()
    name = supports.dataset.name
    content = {
        "schema_version": SCHEMA_VERSION,
        "kind": "support",
        "shots": supports.shots,
        "seed": supports.seed,
        "source": {
            "name": os.path.basename(name),
            "path": os.path.relpath(name, folder) if name else None,
            "split": supports.split,
            "rows": len(supports.dataset),
        },
        "classes": [{"id": id_, "name": own} for id_, own in zip(supports.category_ids, supports.names, strict=True)],
        "hash": _hash(lists),
        "supports": lists,
    }
    write_json(path, content)
    return content


def read_supports(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A manifest of supports, checked. Raises DataError when it is none, or was changed by hand."""
    path = os.path.abspath(os.fspath(path))
    content = read_json(path)
    if not isinstance(content, dict) or content.get("kind") != "support":
        raise DataError("is no manifest of supports", file=path, remedy="`uplvp fewshot draw` writes one.")
    require(content, _KEYS, path, None)
    if content["schema_version"] != SCHEMA_VERSION:
        raise DataError(f"has schema version {content['schema_version']}, this is {SCHEMA_VERSION}", file=path)
    if _hash(content["supports"]) != content["hash"]:
        raise DataError(
            "the supports listed are not those of its hash: the file was changed after it was written",
            file=path,
            remedy="Take the original manifest, or draw again with `uplvp fewshot draw`.",
        )
    return content


def apply_supports(dataset: InstanceDataset, content: dict[str, Any], file: str | None = None) -> SupportSet:
    """The supports of a manifest in their dataset. Raises DataError for an object that is not there, or another one."""
    positions = {dataset.image_id(index): index for index in range(len(dataset))}
    known = [category["name"] for category in dataset.categories]
    entries: dict[str, list[Entry]] = {}
    for name, listed in content["supports"].items():
        own = find_classes([name], known, dataset.name or file)[0]
        entries[own] = []
        for image_id, k, digest in listed:
            index = positions.get(image_id)
            there = index is not None and 0 <= k < len(dataset[index]["objects"]["category_id"])
            if not there or object_digest(dataset[index], k) != digest:
                what = "is not there" if not there else "is not the one that was written down"
                raise DataError(
                    f"object {k} of image {image_id!r}, a support of {name!r}, {what} in {dataset.name or 'the data'}",
                    file=file,
                    remedy=f"Give the data that the supports were drawn from ({content['source']['name']}).",
                )
            entries[own].append((index, k))
    return SupportSet(dataset, entries, content["shots"], content["seed"], content["source"].get("split"))


def keep_classes(dataset: InstanceDataset, names: Sequence[str], drop_images: bool = False) -> InstanceDataset:
    """The dataset with these classes alone. Objects of others are taken out; with `drop_images`, their images too."""
    kept = [category for category in dataset.categories if category["name"] in set(names)]
    ids = {category["id"] for category in kept}
    if drop_images:
        other = [i for i, row in enumerate(dataset.rows) if set(row["objects"]["category_id"]) - ids]
        dataset = dataset.subset(sorted(set(range(len(dataset))) - set(other)))
    found = dataset.map(_Only(ids))
    return InstanceDataset(found.rows, kept, dataset.name, list(dataset.failures), manifest=dataset.manifest)


@dataclass(frozen=True)
class _Only:
    """Takes the objects of other classes out of a row."""

    ids: set[int]

    def __call__(self, row: Row) -> Row:
        kept = [k for k, category in enumerate(row["objects"]["category_id"]) if category in self.ids]
        objects: Objects = {key: [values[k] for k in kept] for key, values in row["objects"].items()}  # type: ignore
        return Row(**{**row, "objects": objects})


def _hash(lists: dict[str, list[list[Any]]]) -> str:
    return hashlib.sha256(json.dumps(lists, sort_keys=True).encode()).hexdigest()
