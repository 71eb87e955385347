"""Split manifests: a low-data split written down so that anyone can prove to have the same one.

A manifest is a JSON object:

    schema_version   1
    name             as `splits.parse_split` reads it, such as 1@10
    kind, amount, seed, stratified, allow_fewer        see `splits.SplitSpec`
    source           {"name": base name of the data, "rows": images, "sha256": hash of all their annotations}
    image_ids        the images chosen, in the order of the source
    kept             of K-shot: for each of them the positions of the objects that are kept; else null
    hash             sha256 of what was chosen: image_ids and kept
    counts           {"images", "instances"} chosen
    per_class        [{"id", "name", "images", "instances"}, ...] chosen; crowds count nowhere

The hash of the source covers, image by image and whatever their order, image id, and of each object in order
category id, iscrowd and segmentation as the reader gives them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

from ..files import write_json
from .dataset import OBJECT_KEYS, InstanceDataset, Objects, Row
from .errors import DataError
from .fields import read_json, require, require_list
from .splits import Contents, SplitSpec, classes_of, draw, parse_split

SCHEMA_VERSION = 1
FILE_NAME = "split.json"  # in the folder of a run

_KEYS = ("schema_version", "name", "kind", "amount", "seed", "stratified", "source", "image_ids", "kept", "hash")


def row_digest(row: Row) -> bytes:
    """sha256 of the image id of a row and of its objects. Whole numbers and floats of one value count as equal."""
    objects = row["objects"]
    content = [
        row["image_id"],
        [
            [k, c, plain_segmentation(s)]
            for k, c, s in zip(objects["category_id"], objects["iscrowd"], objects["segmentation"])
        ],
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).digest()


def plain_segmentation(segmentation: Any) -> Any:
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        return {"size": list(segmentation["size"]), "counts": counts if isinstance(counts, str) else list(counts)}
    return [[float(value) for value in part] for part in segmentation]


def _survey(dataset: InstanceDataset) -> tuple[Contents, str]:
    """What splits are drawn from, and the hash of all rows; every row is asked for once."""
    names = {category["id"]: category["name"] for category in dataset.categories}
    classes, digests = [], []
    for row in dataset.rows:
        classes.append(classes_of(row))
        digests.append(row_digest(row))
    return Contents(classes, names, dataset.name), hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def _chosen_hash(image_ids: Iterable[int | str], kept: list[list[int]] | None) -> str:
    return hashlib.sha256(json.dumps([list(image_ids), kept]).encode()).hexdigest()


def draw_split(dataset: InstanceDataset, spec: SplitSpec) -> dict[str, Any]:
    """The manifest of a split of a dataset.

    Every row is asked for once, for the hash. Raises DataError as `splits.draw` does.
    """
    contents, source = _survey(dataset)
    chosen = draw(contents, spec)
    shots = spec.kind == "shot"
    image_ids = [dataset.image_id(i) for i in chosen]
    kept = [list(positions or ()) for positions in chosen.values()] if shots else None
    held = [
        [c for k, c in enumerate(contents.classes[i]) if c is not None and (positions is None or k in positions)]
        for i, positions in chosen.items()
    ]
    return {
        "schema_version": SCHEMA_VERSION,
        "name": spec.name,
        "kind": spec.kind,
        "amount": int(spec.amount) if spec.amount == int(spec.amount) else spec.amount,
        "seed": spec.seed,
        "stratified": spec.stratified,
        "allow_fewer": spec.allow_fewer,
        "source": {"name": os.path.basename(dataset.name), "rows": len(dataset), "sha256": source},
        "counts": {"images": len(chosen), "instances": sum(map(len, held))},
        "per_class": [
            {
                "id": category_id,
                "name": name,
                "images": sum(category_id in classes for classes in held),
                "instances": sum(classes.count(category_id) for classes in held),
            }
            for category_id, name in contents.names.items()
        ],
        "hash": _chosen_hash(image_ids, kept),
        "image_ids": image_ids,
        "kept": kept,
    }


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A manifest file, checked. Raises DataError when it is none, of another schema version, or was changed by hand."""
    path = os.path.abspath(os.fspath(path))
    manifest = read_json(path)
    require(manifest, _KEYS, path, None)
    if manifest["schema_version"] != SCHEMA_VERSION:
        raise DataError(
            f"schema version {manifest['schema_version']!r}, this release reads {SCHEMA_VERSION}",
            file=path,
            remedy="Draw the split again with `uplvp data split`.",
        )
    require(manifest["source"], ("name", "rows", "sha256"), path, "source")
    image_ids, kept = require_list(manifest, "image_ids", path), manifest["kept"]
    if _chosen_hash(image_ids, kept) != manifest["hash"]:
        raise DataError(
            "the images listed are not those of its hash: the file was changed after it was written",
            file=path,
            remedy="Take the original manifest, or draw the split again with `uplvp data split`.",
        )
    return manifest


def write_manifest(manifest: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes a manifest in one step."""
    write_json(path, manifest)


def record_manifest(manifest: dict[str, Any] | None, folder: str | os.PathLike[str]) -> None:
    """Writes the split of a run into its folder, as `split.json`; nothing without a split.

    Raises DataError when the folder holds another split: the data changed since the run was started.
    """
    if manifest is None:
        return
    path = os.path.join(os.fspath(folder), FILE_NAME)
    if os.path.exists(path):
        before = read_manifest(path)
        if (before["hash"], before["source"]["sha256"]) != (manifest["hash"], manifest["source"]["sha256"]):
            raise DataError(
                "this run was started on another split: its training data, or the settings of the split, changed since",
                file=path,
                remedy="Restore the data, or start again in another folder.",
            )
        return
    write_manifest(manifest, path)


def apply_manifest(dataset: InstanceDataset, manifest: dict[str, Any], file: str | None = None) -> InstanceDataset:
    """The rows of a split, after the proof that they are the ones it was drawn from.

    Args:
        dataset: the source, all of it. file: of the manifest, for errors.

    The result carries the manifest. Raises DataError when the dataset is not the source of the manifest, and says
    whether images or annotations differ.
    """
    _, found = _survey(dataset)
    source = manifest["source"]
    positions = {dataset.image_id(index): index for index in range(len(dataset))}
    lacking = [image_id for image_id in manifest["image_ids"] if image_id not in positions]
    remedy = f"Give the data that the split was drawn from ({source['name']}), or draw a new one: `uplvp data split`."
    where = file or f"split {manifest['name']}"
    if len(dataset) != source["rows"] or lacking:
        reason = f"was drawn from {source['rows']} images, {dataset.name or 'this dataset'} has {len(dataset)}"
        reason += f"; it lacks {len(lacking)} of the chosen ones, such as {lacking[0]!r}" if lacking else ""
        raise DataError(reason, file=where, remedy=remedy)
    if found != source["sha256"]:
        raise DataError(
            f"the annotations or image ids of {dataset.name or 'this dataset'} are not those that the split was "
            f"drawn from: sha256 {found[:12]}..., the manifest says {source['sha256'][:12]}...",
            file=where,
            remedy=remedy,
        )
    return _take(dataset, manifest, positions)


def _take(dataset: InstanceDataset, manifest: dict[str, Any], positions: dict[int | str, int]) -> InstanceDataset:
    subset = dataset.subset([positions[image_id] for image_id in manifest["image_ids"]])
    if manifest["kept"] is not None:
        kept = dict(zip(manifest["image_ids"], manifest["kept"]))
        subset = subset.map(partial(_keep, kept))
    subset.manifest = manifest
    return subset


def _keep(kept: dict[int | str, list[int]], row: Row) -> Row:
    positions = kept[row["image_id"]]
    objects: Objects = {key: [row["objects"][key][k] for k in positions] for key in OBJECT_KEYS}
    return Row(**{**row, "objects": objects})


def take_split(
    dataset: InstanceDataset, subset: str | SplitSpec, seed: int = 0, allow_fewer: bool = False
) -> InstanceDataset:
    """The rows of a low-data split, with its manifest in `manifest`.

    Args:
        subset: the path of a manifest (ends in .json), a name such as 1@10 or 5shot (`splits.parse_split`), or a spec.
        seed: where the name has none. allow_fewer: of a name, as of `SplitSpec`.

    Raises DataError as `read_manifest`, `apply_manifest` and `draw_split` do.
    """
    if isinstance(subset, str) and subset.endswith(".json"):
        return apply_manifest(dataset, read_manifest(subset), subset)
    if isinstance(subset, str):
        subset = replace(parse_split(subset, seed), allow_fewer=allow_fewer)
    manifest = draw_split(dataset, subset)
    return _take(dataset, manifest, {dataset.image_id(index): index for index in range(len(dataset))})
