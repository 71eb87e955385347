"""Pseudo labels mixed into fine-tuning (`data.extra`), so that a few human labels add to what they taught."""

from __future__ import annotations

import json
import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from ..data import InstanceDataset, load_dataset_rows
from ..data.dataset import Row
from ..data.errors import DataError
from ..data.training_set import TrainingSet
from ..models.errors import reading
from .config import PRETRAINING, ConfigError, TrainSettings
from .unlabeled import same_images

logger = logging.getLogger(__name__)

_ROUNDING = 1e-6  # images


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

    def sample(self, index: int, epoch: int, seen_at: int | None = None) -> dict[str, Any]:
        """See `TrainingSet.sample`."""
        if index < len(self.labeled):
            return self.labeled.sample(index, epoch, seen_at)
        return self.extra.sample(index - len(self.labeled), epoch, seen_at)


def extra_count(step: int, steps: int, share: list[float], batch: int) -> int:
    """Images of a step's effective batch that are extra. share: at the first step and, if it changes, at the last."""
    first, last = share[0], share[-1]
    if first == last:  # over the steps, also small shares of small batches come to what they are
        return int((step + 1) * first * batch + _ROUNDING) - int(step * first * batch + _ROUNDING)
    now = first + (last - first) * (step / max(1, steps - 1))
    return round(now * batch)


def load_extra(settings: TrainSettings, train: InstanceDataset, val: InstanceDataset | None) -> InstanceDataset | None:
    """The rows of `data.extra` with the classes of the training data, or None.

    Classes go by name; objects of classes that the training data lacks are left out, and so are validation images and
    labeled images. Raises ConfigError where no class is shared, DataError where nothing of given rows is left.
    """
    given = settings.data.extra
    if given is None:
        return None
    if given == PRETRAINING:
        extra = _labels_of_pretraining(settings, train)
        if extra is None:
            return None
    else:
        extra = load_dataset_rows(given)
    wanted = {category["name"]: category["id"] for category in train.categories}
    ids = {c["id"]: wanted[c["name"]] for c in extra.categories if c["name"] in wanted}
    if not ids:
        raise ConfigError(
            f"`data.extra`: {extra.name} has none of the classes of `data.train` ({', '.join(wanted)}), but "
            f"{', '.join(c['name'] for c in extra.categories) or 'no class'}: label with these class names."
        )
    if len(ids) < len(wanted):
        lacking = ", ".join(name for name, identity in wanted.items() if identity not in ids.values())
        logger.warning("`data.extra` has no class %s: on its images these objects count as background.", lacking)
    rest = _without_known_images(extra.map(partial(_with_classes, ids)), train, val)
    if rest is None and given != PRETRAINING:
        raise DataError(
            "holds validation images and labeled images only", file=extra.name, remedy="Label other images."
        )
    if rest is None:
        logger.warning(
            "The labels of the pre-training are not mixed in: all images of %s are labeled or validation images.",
            extra.name,
        )
    return rest


def _labels_of_pretraining(settings: TrainSettings, train: InstanceDataset) -> InstanceDataset | None:
    """What `model.init` was pre-trained on, where that can be mixed in; None with a line of the log where not."""
    init = settings.model.init
    record = Path(init or "") / "training_summary.json"
    relabeled = settings.data.unlabeled and not settings.teacher.mix_pretraining  # the teacher labels the images anew
    if settings.stage == "pretrain" or relabeled or init is None or not record.is_file():
        return None
    with reading(str(record)):
        before = json.loads(record.read_text(encoding="utf-8"))["settings"]
    if before["stage"] != "pretrain":
        return None
    data = before["data"]
    path, why = data["train"], None
    if before["model"]["class_agnostic"]:
        why = "it was pre-trained without classes"
    elif not os.path.exists(path):
        why = f"they are no longer at {path}"
    else:
        extra = load_dataset_rows(path, **{key: data.get(f"train_{key}") for key in ("images", "split", "format")})
        lacking = sorted({c["name"] for c in train.categories} - {c["name"] for c in extra.categories})
        if not lacking:
            logger.info("Mixing in the labels of pre-training, %s (data.extra=null leaves them out).", path)
            return extra
        why = f"{path} has no class {', '.join(lacking)}, so that its images would teach that these are background"
    logger.warning(
        "The labels of the pre-training %s are not mixed into fine-tuning: %s. Set data.extra=STORE to mix in others.",
        init, why,
    )  # fmt: skip
    return None


def _without_known_images(
    extra: InstanceDataset, train: InstanceDataset, val: InstanceDataset | None
) -> InstanceDataset | None:
    """`extra`, in the categories of `train`, without the images of the other two; None where no image is left."""
    validation = {index for index, _ in same_images(extra, val)} if val else set()
    labeled = {index for index, _ in same_images(extra, train)}
    held = validation | labeled
    kept = [index for index in range(len(extra)) if index not in held]
    if not kept:
        return None
    chosen = extra.subset(kept)
    failures = list(chosen.failures)
    if validation:
        reason = f"{len(validation)} images are left out of `data.extra`, as they are validation images"
        failures.append({"file": extra.name, "row": None, "reason": reason})
    return InstanceDataset(chosen.rows, train.categories, extra.name, failures)


def _with_classes(ids: dict[int, int], row: Row) -> Row:
    objects: Any = row["objects"]
    kept = [k for k, category_id in enumerate(objects["category_id"]) if category_id in ids]
    changed: Any = {key: [values[k] for k in kept] for key, values in objects.items()}
    changed["category_id"] = [ids[category_id] for category_id in changed["category_id"]]
    return Row(**{**row, "objects": changed})
