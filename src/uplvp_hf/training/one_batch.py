"""Trains on one batch over and over: if the loss does not fall, then labels, loss or learning rates are wrong."""

from __future__ import annotations

import dataclasses
import logging

from .config import EvaluationSettings, TrainSettings

logger = logging.getLogger(__name__)

# The fall of the loss to expect: matching changes for a while, and every decoder layer has its own terms.
EXPECTED_FALL = 0.8


def on_one_batch(settings: TrainSettings) -> TrainSettings:
    """The settings without augmentation, evaluation and checkpoints."""
    edges = settings.data.short_edges
    data = dataclasses.replace(
        settings.data, scale_range=[1.0, 1.0], short_edges=edges and edges[-1:], flip=0.0, color_jitter=0.0, rotate=0.0,
        copy_paste=0.0, side_by_side=0.0, val=None, unlabeled=None, extra=None,
    )  # fmt: skip
    checkpoint = dataclasses.replace(settings.checkpoint, every=0, best=False)
    return dataclasses.replace(settings, data=data, evaluation=EvaluationSettings(), checkpoint=checkpoint)


def describe_one_batch(image_ids: list, settings: TrainSettings) -> None:
    """Logs what the run trains on and what to expect."""
    logger.info(
        "Every step trains on the same %d images (%s), without augmentation. The loss should fall by more than "
        "%d %% within a few hundred steps; if it does not, look at the masks of these images, then raise optim.lr "
        "(now %g), then lower data.size.",
        len(image_ids), ", ".join(map(str, image_ids[:8])) + (", ..." if len(image_ids) > 8 else ""),
        round(100 * EXPECTED_FALL), settings.optim.lr,
    )  # fmt: skip


def report_one_batch(first: float, last: float) -> None:
    """Says how far the loss fell, as a warning when that is less than expected."""
    fall = 1 - last / first
    level = logging.INFO if fall > EXPECTED_FALL else logging.WARNING
    logger.log(level, "The loss went from %.2f to %.2f (%+.0f %%).", first, last, -100 * fall)
