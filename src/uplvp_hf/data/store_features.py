"""Features of the masks of a pseudo-label store: one frozen vector a mask, beside the rows or in a folder of its own.

    folder/features.json               what computed them
    folder/features-00000-00000.npy    those of shard rows-00000-00000: (masks, D) float16, in the order of its rows

A shard without masks has no file. Files are mapped into memory, where the system can drop what is not in use.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from .dataset import InstanceDataset
from .errors import DataError

ABOUT = "features.json"
REMEDY = "Run `uplvp label STORE --features`, which makes what is missing."


def feature_file(folder: str | os.PathLike[str], shard: str) -> str:
    """Where the features of a shard, `rows-00000-00000.jsonl`, lie in `folder`."""
    stem = os.path.basename(shard).removesuffix(".jsonl").removeprefix("rows-")
    return os.path.join(os.fspath(folder), f"features-{stem}.npy")


def read_features(folder: str | os.PathLike[str], shard: str, counts: list[int]) -> Iterator[np.ndarray]:
    """(n, D) float16 for each row of a shard, given how many masks each has. Raises DataError for a missing file and
    for one that does not fit the rows."""
    file = feature_file(folder, shard)
    total = sum(counts)
    if total == 0:
        return iter([np.zeros((0, 0), np.float16)] * len(counts))
    try:
        vectors: Any = np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise DataError("the store has no features of these masks", file=file, remedy=REMEDY) from error
    except (OSError, ValueError) as error:
        raise DataError(f"is no file of features ({error})", file=file, remedy=f"Delete it. {REMEDY}") from error
    if vectors.dtype != np.float16 or vectors.ndim != 2 or len(vectors) != total:
        raise DataError(
            f"holds {vectors.dtype} of shape {vectors.shape}, {os.path.basename(shard)} has {total} masks",
            file=file,
            remedy=f"Delete it. {REMEDY}",
        )
    if not np.isfinite(vectors).all():
        raise DataError("holds numbers that are not finite", file=file, remedy=f"Delete it. {REMEDY}")
    ends = np.cumsum(counts)
    return (vectors[end - count : end] for end, count in zip(ends, counts))


def feature_width(dataset: InstanceDataset) -> int:
    """Width of the vectors of all masks, 0 where there is no mask. Raises DataError where they have several."""
    widths = {len(vector) for row in dataset.rows for vector in row["objects"]["features"]}
    if len(widths) > 1:
        raise DataError(
            f"the features of its masks have {' and '.join(map(str, sorted(widths)))} channels",
            file=dataset.name or None,
            remedy="Two networks computed them. Delete features-*.npy, and run `uplvp label STORE --features`.",
        )
    return widths.pop() if widths else 0
