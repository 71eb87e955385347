"""Which share of fine-tuning keeps the labels of pre-training (`data.extra_share` unless it is given): the better the
pre-trained model does on the labeled images, whose labels it has not seen, the larger."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..data import InstanceDataset
from ..files import write_json
from .config import PRETRAINING, TrainSettings

logger = logging.getLogger(__name__)

RECORD = "extra_share.json"  # in the output, so that a resumed run goes on with the same share
MOST = 0.5
"""Largest share, and the one of labels that `model.init` was not pre-trained on (`data.extra=STORE`)."""
NOTHING_BELOW = 0.25
"""AP50 on the labeled images at which nothing is mixed in any more."""
_IMAGES = 100  # labeled images that are looked at


def share_of(ap50: float) -> float:
    """Share of the images of a step, 0 to 0.5, by the AP50 (0 to 1) of the pre-trained model on the labeled images.

    A straight line from 0.25 on, drawn through what was measured at two places (docs/results.md, "Fine-tuning that
    keeps what it starts from"): on one, with rough pseudo labels, mixing them in cost some points; on the other, with
    good ones, fine-tuning without them lost what they had taught.
    """
    return min(MOST, max(0.0, ap50 - NOTHING_BELOW))


def with_share(
    settings: TrainSettings,
    task: Any,
    accelerator: Accelerator,
    model: Any,
    train: InstanceDataset,
    resume: bool,
    progress: bool,
) -> TrainSettings:
    """The settings with `data.extra_share` filled in. It is recorded in the output, and read there with `resume`. To be
    called by all processes, with the model as `model.init` has it."""
    if settings.data.extra_share is not None:
        return settings
    if settings.data.extra != PRETRAINING or settings.model.class_head == "new":
        return _with(settings, MOST)  # nobody has seen these labels, or nobody knows their classes
    record = Path(settings.output) / RECORD
    if resume and record.is_file():
        return _with(settings, json.loads(record.read_text(encoding="utf-8"))["share"])
    rows = train.subset(range(min(_IMAGES, len(train))))
    place = next(model.parameters()).device
    with torch.random.fork_rng(devices=[]):
        model.to(accelerator.device)
        found = task.evaluate(model, task.processor(settings, model), rows, settings, progress)
        model.to(place)
    ap50 = found["AP50"] or 0.0
    share = round(share_of(ap50), 2)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(record, {"share": share, "ap50": ap50, "images": len(rows)})
        logger.info(
            "The pre-trained model has AP50 %.1f on %d labeled images, so %.0f %% of the images of a step come with "
            "the labels of pre-training (data.extra_share; data.extra=null for none).",
            100 * ap50, len(rows), 100 * share,
        )  # fmt: skip
    return _with(settings, share)


def _with(settings: TrainSettings, share: float) -> TrainSettings:
    return dataclasses.replace(settings, data=dataclasses.replace(settings.data, extra_share=[share]))
