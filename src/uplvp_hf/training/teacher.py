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
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator

from ..data import InstanceDataset
from ..data.views import UnlabeledViews
from .config import TrainSettings
from .pseudo_labels import ClassThresholds, PseudoInstances, find_pseudo_instances, instances_an_image
from .pseudo_quality import PseudoStatistics
from .stream import make_unlabeled_loader
from .student_batch import lessons_of, student_batch
from .teacher_page import TeacherPage
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
        self,
        settings: TrainSettings,
        accelerator: Accelerator,
        weights: RunWeights,
        views: UnlabeledViews,
        labeled: InstanceDataset,
    ) -> None:
        self.settings, self.own, self.accelerator = settings, settings.teacher, accelerator
        self.weights, self.views = weights, views
        names, steps = weights.plain.config.id2label, settings.optim.steps
        self.burn_in, self.ramp = self.own.burn_in_of(steps), self.own.ramp_of(steps)
        self.thresholds = ClassThresholds(self.own, instances_an_image(labeled, len(names)))
        self.statistics = PseudoStatistics(accelerator, views.dataset if self.own.measure else None, names)
        self.page = TeacherPage(settings.output, settings.data, names)
        self._stream: Iterator[dict[str, Any]] = iter(())
        self._in_vain = 0  # steps in a row without a pseudo instance

    def start(self, step: int) -> None:
        """Goes on after `step` updates."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        self._stream = iter(make_unlabeled_loader(self.views, self.settings, step, rank, world))

    def weight(self, step: int) -> float:
        """Of a pseudo instance in update `step` (0-based); 0 during the burn-in."""
        after = step - self.burn_in + 1
        return self.own.weight * max(0.0, min(1.0, after / (self.ramp + 1)))

    def batches(self, step: int) -> list[dict[str, Any]]:
        """The pseudo-labeled micro-batch of update `step`; none during the burn-in. All processes call it.

        The model is in evaluation mode afterwards.
        """
        if step < self.burn_in:
            return []
        views = next(self._stream)
        found = self._find(views["weak"])
        lessons = lessons_of(views, found, self.settings, step, self.accelerator.process_index)
        batch = student_batch(views, lessons, self.settings, self.weight(step))
        if self.own.draw_every and (step - self.burn_in) % self.own.draw_every == 0:
            own = self._find(batch, averaged=False)  # all processes, as the weights may be spread
            if self.accelerator.is_main_process:
                self.page.add(step, views, found, lessons, own)
        self._note(step, views, found)
        return [batch]

    @torch.no_grad()
    def _find(self, view: dict[str, Any], averaged: bool = True) -> list[PseudoInstances]:
        """What the average, or the student itself, finds in a batch of views."""
        model, average = self.weights.plain, self.weights.average
        assert average is not None
        inputs = {name: view[name].to(self.accelerator.device) for name in ("pixel_values", "pixel_mask")}
        model.eval()
        with average.applied() if averaged else nullcontext(), self.accelerator.autocast():
            outputs = model(**inputs)
        pixel_mask, thresholds = view["pixel_mask"], self.thresholds.values()
        sizes = zip(pixel_mask[:, :, 0].sum(1).tolist(), pixel_mask[:, 0].sum(1).tolist(), strict=True)
        return [find_pseudo_instances(outputs, index, size, thresholds, self.own) for index, size in enumerate(sizes)]

    def _note(self, step: int, views: dict[str, Any], found: list[PseudoInstances]) -> None:
        """Counts what was found, and warns when that is nothing for long."""
        self.statistics.add(views, found)
        seen = self.thresholds.seen(found)
        if self.accelerator.num_processes > 1:
            seen = self.accelerator.reduce(seen.float().to(self.accelerator.device), "sum").cpu().double()
        self.thresholds.update(seen, len(found) * self.accelerator.num_processes)
        self._in_vain = 0 if seen[:, 0].sum() > 0 else self._in_vain + 1
        if self._in_vain == self.own.patience and self.own.patience and self.accelerator.is_main_process:
            logger.warning(
                "The teacher has found no pseudo instance in %d steps (up to step %d): the unlabeled images only teach "
                "where nothing is. Lower teacher.class_threshold (now %g) with teacher.class_floor (now %g) or "
                "teacher.mask_threshold (now %g), or raise teacher.burn_in (now %d steps), so that it knows the "
                "classes before it is asked.",
                self._in_vain, step + 1, self.own.class_threshold, self.own.class_floor, self.own.mask_threshold,
                self.burn_in,
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
            "thresholds": self.thresholds.state(),
            "in_vain": self._in_vain,
            "statistics": self.statistics.state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.thresholds.load(state["thresholds"])
        self._in_vain = state["in_vain"]
        self.statistics.load(state["statistics"])
