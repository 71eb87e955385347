"""Label files that lie in a dataset's folder and were not read, so that nobody wonders where their objects are."""

from __future__ import annotations

import os
from typing import Any

from .coco_files import has_image_suffix, looks_like_coco, walk_files
from .dataset import InstanceDataset, RowStream

_MOST = 20_000  # files that are looked at
_SUFFIXES = (".json", ".xml", ".csv", ".txt", ".mat")


def ignored_labels(folder: str, dataset: InstanceDataset | RowStream, split: str | None) -> dict[str, Any] | None:
    """A warning of `check_dataset` about them, or None.

    folder: that the dataset was read from. split: what was chosen; the files of the other splits are then left alone.
    Only COCO files and plain images are looked at: other formats have many files, all of which their readers know. A
    text file is taken for labels where an image has its name, as YOLO's have; a JSON also where it looks like COCO's.
    """
    read = os.path.abspath(dataset.name)
    if not os.path.isdir(folder) or not (read.endswith(".json") or read == os.path.abspath(folder)):
        return None
    if dataset.categories and not read.endswith(".json"):
        return None
    files = [file for _, file in zip(range(_MOST), walk_files(os.path.abspath(folder)))]
    images = {_stem(file) for file in files if has_image_suffix(file)}
    found = []
    for file in sorted(files):
        suffix = os.path.splitext(file)[1].lower()
        if suffix not in _SUFFIXES or file == read or os.path.basename(file).startswith("."):
            continue
        named = _stem(file) in images
        coco = suffix == ".json" and split is None and looks_like_coco(file)
        if named or coco or suffix in (".xml", ".csv", ".mat"):
            found.append(os.path.relpath(file, folder))
    if not found:
        return None
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    reason = f"label files that were not read: {', '.join(found[:3])}{more}; choose others by --split or --format"
    return {"file": folder, "row": None, "reason": reason}


def _stem(file: str) -> str:
    return os.path.splitext(os.path.basename(file))[0]
