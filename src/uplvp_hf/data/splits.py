"""Low-data splits: a few labelled pictures a class, drawn by seed."""

from __future__ import annotations

import numpy as np

from .dataset import InstanceDataset
from .errors import DataError


def sample_labels_per_class(
    dataset: InstanceDataset, per_class: int, seed: int, allow_fewer: bool = False
) -> list[int]:
    """Draw pictures so that every class is in at least `per_class` of them.

    A picture counts for every class that it holds (crowds aside) and is drawn once: exactly `per_class` times the
    number of classes when every picture holds one class, fewer when pictures are shared. Classes take turns, the rarest
    first, so that with one seed a smaller split is part of every larger one.

    Args:
        dataset: labelled rows.
        per_class: pictures a class, >= 1.
        seed: >= 0; the same seed gives the same pictures.
        allow_fewer: take all pictures of a class that has fewer, instead of raising; a class may then have none.

    Returns: sorted indices into `dataset`.
    Raises DataError when a class has fewer than `per_class` pictures and `allow_fewer` is off; ValueError when
    `per_class` is below 1.
    """
    if per_class < 1:
        raise ValueError(f"per_class must be at least 1, got {per_class}")
    if not dataset.categories:
        raise DataError("has no classes to draw labels for", file=dataset.name or None)
    classes_of = [
        {c for c, crowd in zip(row["objects"]["category_id"], row["objects"]["iscrowd"]) if not crowd}
        for row in dataset.rows
    ]
    order = np.random.default_rng(seed).permutation(len(dataset)).tolist()
    queues = {category_id: [i for i in order if category_id in classes_of[i]] for category_id in dataset.category_ids}
    for category in dataset.categories:
        available = len(queues[category["id"]])
        if available < per_class and not allow_fewer:
            raise DataError(
                f"class {category['name']!r} is in {available} pictures, {per_class} were asked for",
                file=dataset.name or None,
                remedy=f"Ask for at most {available}, or pass allow_fewer=True.",
            )
    turns = sorted(queues, key=lambda category_id: (len(queues[category_id]), category_id))
    counts = dict.fromkeys(queues, 0)
    picked: set[int] = set()
    for goal in range(1, per_class + 1):
        for category_id in turns:
            while counts[category_id] < min(goal, len(queues[category_id])):
                index = next(i for i in queues[category_id] if i not in picked)
                picked.add(index)
                for other in classes_of[index]:
                    counts[other] = counts.get(other, 0) + 1
    return sorted(picked)
