"""Which stores fit together, and which are not finished."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol

from .part import described
from .store import LABELS_DEPEND_ON, StoreError, header_difference

LONGEST = 300  # characters of a difference that are shown: vocabularies and calibrations may be long


class Looked(Protocol):
    """What `missing` asks of a store."""

    header: dict[str, Any]
    failures: list[dict[str, Any]]
    finished: int | None
    images: int


def check_headers(stores: Sequence[tuple[str, dict[str, Any]]], image_root: Any = None) -> dict[str, Any]:
    """The header of the merged store, which is that of a run over all images.

    stores: names and headers. image_root: in place of what the headers say. Raises StoreError, with both stores, the
    setting and both values, where labels that are to stand side by side were made in different ways.
    """
    name, first = stores[0]
    for other, header in stores[1:]:
        where = f"in {name}", f"in {other}"
        lines = header_difference(first, header, where, (*LABELS_DEPEND_ON, "state"))
        if not lines and first["settings_hash"] != header["settings_hash"]:
            raise StoreError(f"{name} and {other} have different settings_hash: one of the headers was edited by hand")
        if lines:
            shown = "; ".join(line if len(line) <= LONGEST else _shortened(line, where) for line in lines)
            advice = ""
            if all(line.startswith("state") for line in lines):
                advice = f". Label {other} again with run.calibration={name}"
            raise StoreError(f"{name} and {other} were labeled with other settings ({shown}){advice}")
        if image_root is None and first.get("image_root") != header.get("image_root"):
            raise StoreError(
                f"image_root: {first.get('image_root')!r} in {name}, {header.get('image_root')!r} in {other}; say "
                "where the images are now, run.image_root=FOLDER"
            )
    _check_parts([(name, header) for name, header in stores if header.get("part")])
    licenses = list(dict.fromkeys(header.get("license") for _, header in stores if header.get("license")))
    if len(licenses) > 1:
        raise StoreError(f"the stores name different licenses of the same weights: {', '.join(licenses)}")
    sizes = {header.get("batch_size") for _, header in stores}
    merged = {key: value for key, value in first.items() if key != "part"}
    root = merged.get("image_root") if image_root is None else os.path.abspath(image_root)
    found = {"license": licenses[0] if licenses else None, "image_root": root}
    return merged | found | {"batch_size": sizes.pop() if len(sizes) == 1 else None}


def _check_parts(parts: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Raises StoreError unless parts are those of one dataset, cut in the same way."""
    for (name, first), (other, header) in pairwise(parts):
        old, new = first["part"], header["part"]
        if any(old[key] != new[key] for key in ("of", "limit", "images")):
            raise StoreError(
                f"{name} is for {described(old)}, {other} for {described(new)}: these parts do not fit together"
            )
        if old["ids"] != new["ids"]:
            raise StoreError(f"{name} and {other} are parts of different images: the lists of image ids differ")
        if first["batch_size"] != header["batch_size"]:
            raise StoreError(
                f"run.batch_size: {first['batch_size']} in {name}, {header['batch_size']} in {other}; parts consist of "
                "whole batches and do not fit together"
            )


def _shortened(line: str, where: tuple[str, str]) -> str:
    """Both values cut, both places whole."""
    key, _, rest = line.partition(": ")
    before, _, after = rest.partition(f" {where[0]}, ")
    after = after.removesuffix(f" {where[1]}")
    differ = next((k for k, (one, two) in enumerate(zip(before, after)) if one != two), 0)
    start = max(0, differ - 20)
    cut = [f"{'...' if start else ''}{value[start : start + 60]}..." for value in (before, after)]
    return f"{key}: {cut[0]} {where[0]}, {cut[1]} {where[1]}"


def missing(name: str, store: Looked) -> list[str]:
    """What an unfinished store lacks, in a sentence; nothing for a finished one."""
    part = store.header.get("part")
    again = "run `uplvp label` again" if part is None else f"run `--shard {part['number']}/{part['of']}` again"
    expected = (part or {}).get("own") if store.finished is None else store.finished
    absent = 0 if expected is None else expected - store.images - len(store.failures)
    if absent > 0:
        return [f"{name} is not finished: {absent} of its {expected} images have no row and no failure; {again}"]
    if store.finished is None:
        return [f"{name} is not finished: it has {store.images} images, and its run did not come to an end; {again}"]
    return []
