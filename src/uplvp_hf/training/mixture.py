"""Pseudo labels mixed into fine-tuning (`data.extra`), so that a few human labels add to what they taught."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from torch.utils.data import Dataset

from ..data import InstanceDataset, load_dataset_rows
from ..data.dataset import Row
from ..data.errors import DataError
from ..data.training_set import TrainingSet
from .config import ConfigError, DataSettings


class MixedSamples(Dataset):
    """Labeled samples, and behind them the extra ones: index len(self) is the first of these.

    `len`, `dataset` and an epoch are those of the labeled images.
    """

    def __init__(self, labeled: TrainingSet, extra: TrainingSet) -> None:
        self.labeled, self.extra, self.dataset = labeled, extra, labeled.dataset

    def __len__(self) -> int:
        return len(self.labeled)

    @property
    def failures(self) -> list[dict[str, str]]:
        """Images of both parts that could not be used."""
        return [*self.labeled.failures, *self.extra.dataset.failures, *self.extra.failures]

    def sample(self, index: int, epoch: int) -> dict[str, Any]:
        """See `TrainingSet.sample`."""
        if index < len(self.labeled):
            return self.labeled.sample(index, epoch)
        return self.extra.sample(index - len(self.labeled), epoch)


def extra_count(step: int, steps: int, share: list[float], batch: int) -> int:
    """Images of a step's effective batch that are extra. share: at the first step and, if it changes, at the last."""
    first, last = share[0], share[-1]
    now = first + (last - first) * (step / max(1, steps - 1))
    return round(now * batch)


def load_extra(settings: DataSettings, train: InstanceDataset, val: InstanceDataset | None) -> InstanceDataset | None:
    """The rows of `data.extra` with the classes of the training data, or None.

    Classes go by name; objects of classes that the training data lacks are left out, and so are validation images.
    Raises ConfigError where no class is shared, DataError where nothing is left.
    """
    if settings.extra is None:
        return None
    extra = load_dataset_rows(settings.extra)
    wanted = {category["name"]: category["id"] for category in train.categories}
    ids = {c["id"]: wanted[c["name"]] for c in extra.categories if c["name"] in wanted}
    if not ids:
        raise ConfigError(
            f"`data.extra`: {settings.extra} has none of the classes of `data.train` ({', '.join(wanted)}), but "
            f"{', '.join(c['name'] for c in extra.categories) or 'no class'}: label with these class names."
        )
    held_out = {os.path.realpath(row["image"]) for row in val.rows if isinstance(row["image"], str)} if val else set()
    kept = [
        index
        for index, row in enumerate(extra.rows)
        if not (isinstance(row["image"], str) and os.path.realpath(row["image"]) in held_out)
    ]
    if not kept:
        raise DataError("holds validation images only", file=settings.extra, remedy="Label other images.")
    chosen = extra.subset(kept).map(partial(_with_classes, ids))
    failures = list(chosen.failures)
    if len(kept) < len(extra):
        reason = f"{len(extra) - len(kept)} images are left out of `data.extra`, as they are validation images"
        failures.append({"file": settings.extra, "row": None, "reason": reason})
    return InstanceDataset(chosen.rows, train.categories, extra.name, failures)


def _with_classes(ids: dict[int, int], row: Row) -> Row:
    objects: Any = row["objects"]
    kept = [k for k, category_id in enumerate(objects["category_id"]) if category_id in ids]
    changed: Any = {key: [values[k] for k in kept] for key, values in objects.items()}
    changed["category_id"] = [ids[category_id] for category_id in changed["category_id"]]
    return Row(**{**row, "objects": changed})
