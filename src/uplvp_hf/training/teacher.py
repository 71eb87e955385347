"""Teacher-student fine-tuning: unlabeled images go on working after the first labels are known.

The teacher is the moving average of the weights that are trained (`ema.py`), so it costs no second network. In every
step after the burn-in it looks at a weak view of some unlabeled images. What it is sure of becomes pseudo instances,
which are cut to the student's strong view of the same images, and the student trains on them in one more micro-batch:

    labeled micro-batches ->  losses                                                       \\
    weak view -> teacher  ->  pseudo instances -> strong view -> losses, times a weight    -> one update -> average

Pseudo instances are labels like any others to the loop; the sources are named in `teacher_settings.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..data.usage import MIN_AREA
from ..data.views import UnlabeledViews, seen_from
from ..models.pseudo_targets import PseudoTargets
from .config import TrainSettings
from .pseudo_labels import ClassThresholds, PseudoInstances, find_pseudo_instances
from .pseudo_quality import PseudoStatistics
from .stream import make_unlabeled_loader
from .weights import RunWeights

logger = logging.getLogger(__name__)


def unlabeled_batches(teacher: Teacher | None, start: int) -> Callable[[int], list[dict[str, Any]]]:
    """step -> its pseudo-labeled micro-batches, for the steps from `start` on, in order; none without a teacher."""
    if teacher is None:
        return lambda step: []
    teacher.start(start)
    return teacher.batches


class Teacher:
    """Makes one micro-batch of pseudo-labeled images a step.

    Its state, beside the average, is small: how often each class was found, the sums of the log, and for how many steps
    nothing was found. The images of a step depend on the step alone.
    """

    def __init__(
        self, settings: TrainSettings, accelerator: Accelerator, weights: RunWeights, views: UnlabeledViews
    ) -> None:
        self.settings, self.own, self.accelerator = settings, settings.teacher, accelerator
        self.weights, self.views = weights, views
        names = weights.plain.config.id2label
        self.thresholds = ClassThresholds(self.own, len(names))
        self.statistics = PseudoStatistics(accelerator, views.dataset if self.own.measure else None, names)
        self._stream: Iterator[dict[str, Any]] = iter(())
        self._in_vain = 0  # steps in a row without a pseudo instance

    def start(self, step: int) -> None:
        """Goes on after `step` updates."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        self._stream = iter(make_unlabeled_loader(self.views, self.settings, step, rank, world))

    def weight(self, step: int) -> float:
        """Of a pseudo instance in update `step` (0-based); 0 during the burn-in."""
        after = step - self.own.burn_in + 1
        return self.own.weight * max(0.0, min(1.0, after / (self.own.ramp + 1)))

    def batches(self, step: int) -> list[dict[str, Any]]:
        """The pseudo-labeled micro-batch of update `step`; none during the burn-in. All processes call it.

        The model is in evaluation mode afterwards.
        """
        if step < self.own.burn_in:
            return []
        views = next(self._stream)
        found = self._find(views["weak"])
        self._note(step, views, found)
        return [self._student_batch(step, views, found)]

    @torch.no_grad()
    def _find(self, weak: dict[str, Tensor]) -> list[PseudoInstances]:
        """What the average finds in a batch of weak views."""
        model, average = self.weights.plain, self.weights.average
        assert average is not None
        inputs = {name: value.to(self.accelerator.device, non_blocking=True) for name, value in weak.items()}
        model.eval()
        with average.applied(), self.accelerator.autocast():
            outputs = model(**inputs)
        pixel_mask, thresholds = weak["pixel_mask"], self.thresholds.values()
        sizes = zip(pixel_mask[:, :, 0].sum(1).tolist(), pixel_mask[:, 0].sum(1).tolist(), strict=True)
        return [find_pseudo_instances(outputs, index, size, thresholds, self.own) for index, size in enumerate(sizes)]

    def _student_batch(self, step: int, views: dict[str, Any], found: list[PseudoInstances]) -> dict[str, Any]:
        """The strong views with the pseudo instances that they show, as a batch of `collate`."""
        canvas = views["strong"]["pixel_values"].shape[-2:]
        batch: dict[str, Any] = {
            **views["strong"], "image_ids": views["image_ids"], "weight": self.weight(step),
            "mask_labels": [], "class_labels": [], "prompt_scores": [],
        }  # fmt: skip
        qualities, probabilities = [], []
        unsure = torch.zeros((len(found), *canvas), dtype=torch.bool)
        for index, ((weak, strong), own) in enumerate(zip(views["windows"], found, strict=True)):
            window, size = seen_from(strong, weak), (weak.height, weak.width)
            masks, shown = window.masks(own.rles, *size, MIN_AREA)
            batch["mask_labels"].append(masks.on_canvas(*canvas))
            batch["class_labels"].append(own.labels[shown])
            batch["prompt_scores"].append(own.scores[shown])
            qualities.append(own.qualities[shown])
            probabilities.append(own.probabilities[shown])
            doubtful, _ = window.masks(own.unsure, *size, 1)
            region = torch.from_numpy(doubtful.union() & ~masks.union())
            unsure[index, : window.height, : window.width] = region
        batch["pseudo"] = PseudoTargets(
            qualities if self.own.weigh_masks else None,
            probabilities if self.own.soft_classes else None,
            unsure if self.own.ignore == "unsure" else None,
            self.own.ignore != "all",
        )
        return batch

    def _note(self, step: int, views: dict[str, Any], found: list[PseudoInstances]) -> None:
        """Counts what was found, and warns when that is nothing for long."""
        self.statistics.add(views, found)
        counts = torch.zeros(len(self.thresholds.counts), dtype=torch.float64)
        for own in found:
            counts += torch.bincount(own.labels, minlength=len(counts))
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.reduce(counts.float().to(self.accelerator.device), "sum").cpu().double()
        self.thresholds.update(counts)
        self._in_vain = 0 if counts.sum() > 0 else self._in_vain + 1
        if self._in_vain == self.own.patience and self.own.patience and self.accelerator.is_main_process:
            logger.warning(
                "The teacher has found no pseudo instance in %d steps (up to step %d): the unlabeled images only teach "
                "where nothing is. Lower teacher.class_threshold (now %g) or teacher.mask_threshold (now %g), or raise "
                "teacher.burn_in (now %d steps), so that it knows the classes before it is asked.",
                self._in_vain, step + 1, self.own.class_threshold, self.own.mask_threshold, self.own.burn_in,
            )  # fmt: skip

    @property
    def failures(self) -> list[dict[str, Any]]:
        """Unlabeled images that could not be used."""
        return [*self.views.dataset.failures, *self.views.failures]

    def report(self) -> dict[str, float]:
        """Number and quality of the pseudo instances since the last report. All processes call it."""
        return self.statistics.take()

    def state(self) -> dict[str, Any]:
        """What `load` restores. All processes call it."""
        return {
            "counts": self.thresholds.counts.tolist(),
            "in_vain": self._in_vain,
            "statistics": self.statistics.state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.thresholds.counts = torch.tensor(state["counts"], dtype=torch.float64)
        self._in_vain = state["in_vain"]
        self.statistics.load(state["statistics"])
