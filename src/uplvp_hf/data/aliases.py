"""Class names that differ between datasets: the six classes that Pascal VOC and COCO spell differently."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from .errors import DataError

VOC_TO_COCO = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}
VOC_CLASSES: tuple[str, ...] = (
    "airplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table", "dog",
    "horse", "motorcycle", "person", "potted plant", "sheep", "couch", "train", "tv",
)  # fmt: skip
"""The 20 classes of Pascal VOC in the order of its class list, by COCO's names."""


def canonical(name: str) -> str:
    """One spelling of a class name for all datasets: lower case, COCO's word where VOC has another."""
    plain = " ".join(name.casefold().split())
    return VOC_TO_COCO.get(plain, plain)


def find_classes(wanted: Sequence[str], known: Sequence[str], file: str | None = None) -> list[str]:
    """The names in `known` that `wanted` mean, in the order of `wanted`. Raises DataError, naming the nearest, for one
    that is not there. An equal spelling goes before another one of the same class."""
    spellings = {canonical(name): name for name in reversed(known)} | {name: name for name in known}
    found = []
    for name in wanted:
        match = spellings.get(name) or spellings.get(canonical(name))
        if match is None:
            near = difflib.get_close_matches(canonical(name), spellings, n=1)
            hint = f"Did you mean {spellings[near[0]]!r}?" if near else f"There are: {', '.join(known[:12]) or 'none'}."
            raise DataError(f"no class {name!r}", file=file, remedy=hint)
        found.append(match)
    return found
