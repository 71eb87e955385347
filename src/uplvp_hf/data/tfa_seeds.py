"""The public few-shot seeds of TFA (arXiv 2003.06957) as support sets: cocosplit/seedN/full_box_{K}shot_{class}_*.json.

Each file is a COCO JSON of one class that holds K instances; fewer shots of a seed are part of more. The instances are
looked up in the COCO annotations that the seeds were drawn from, so that supports have masks and hashes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from .aliases import canonical, find_classes
from .dataset import InstanceDataset
from .errors import DataError
from .fields import read_json, require, require_list
from .supports import Entry, SupportSet

_FILE = re.compile(r"full_box_(\d+)shot_(.+)_[^_]+\.json")
_CLOSE = 0.51  # pixels that a box may differ by, as files round


def read_tfa_seed(
    folder: str | os.PathLike[str], shots: int, dataset: InstanceDataset, names: Sequence[str] | None = None
) -> SupportSet:
    """The K instances of every class of a seed, in `dataset`.

    names: classes that are wanted, as the dataset spells them; None: all that the folder has files of. Raises DataError
    for a folder without files of so many shots, a class without a file, and an instance that the dataset does not have.
    """
    files = _files(folder, shots)
    known = [category["name"] for category in dataset.categories]
    wanted = find_classes(list(files), known, os.fspath(folder)) if names is None else list(names)
    lacking = [name for name in wanted if canonical(name) not in files]
    if lacking:
        raise DataError(f"has no file of {shots} shots of class {lacking[0]!r}", file=folder)
    positions = {dataset.image_id(index): index for index in range(len(dataset))}
    ids = {category["name"]: category["id"] for category in dataset.categories}
    entries = {name: _instances(files[canonical(name)], ids[name], dataset, positions) for name in wanted}
    return SupportSet(dataset, entries, shots)


def _files(folder: str | os.PathLike[str], shots: int) -> dict[str, Path]:
    """Class by its canonical name -> file."""
    found: dict[str, Path] = {}
    others: set[int] = set()
    for path in sorted(Path(folder).glob("*.json")):
        match = _FILE.fullmatch(path.name)
        if match and int(match[1]) == shots:
            found[canonical(match[2].replace("_", " "))] = path
        elif match:
            others.add(int(match[1]))
    if not found:
        there = f"there are {', '.join(map(str, sorted(others)))}" if others else "the folder has no such file"
        raise DataError(
            f"no full_box_{shots}shot_CLASS_*.json: {there}", file=folder, remedy="Give the folder of one seed of TFA."
        )
    return found


def _instances(path: Path, category: int, dataset: InstanceDataset, positions: dict[int | str, int]) -> list[Entry]:
    content, file = read_json(os.fspath(path)), os.fspath(path)
    entries: list[Entry] = []
    for number, annotation in enumerate(require_list(content, "annotations", file)):
        row = f"annotations[{number}]"
        require(annotation, ("image_id", "bbox"), file, row)
        index = positions.get(annotation["image_id"])
        if index is None:
            raise DataError(
                f"image {annotation['image_id']!r} is not in {dataset.name or 'the data'}", file=file, row=row
            )
        objects = dataset[index]["objects"]
        match = [
            k
            for k, box in enumerate(objects["bbox"])
            if objects["category_id"][k] == category
            and all(abs(a - b) < _CLOSE for a, b in zip(box, annotation["bbox"], strict=True))
        ]
        if not match:
            raise DataError(
                f"image {annotation['image_id']!r} of {dataset.name or 'the data'} has no such object "
                f"(box {annotation['bbox']})",
                file=file,
                row=row,
                remedy="Give the COCO annotations that the seeds were drawn from (2014, or 2017).",
            )
        entries.append((index, match[0]))
    return entries
