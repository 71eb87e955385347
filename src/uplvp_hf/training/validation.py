"""Evaluation during training: when, on which weights, and with what consequences (best model, early end)."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from tqdm.auto import tqdm

from ..data import InstanceDataset
from ..evaluation.findings import storable_threshold
from ..evaluation.measures import main_metric, shown_metrics
from ..files import write_json
from ..models.image_processing_uplvp import UplvpImageProcessor
from ..models.modeling_uplvp import UplvpPreTrainedModel
from .checkpoint import list_checkpoints, load_weights, new_folder, remove_folder
from .config import TrainSettings
from .optim import images_per_step
from .task import InstanceTask
from .weights import RunWeights

if TYPE_CHECKING:
    from .result import TrainResult

logger = logging.getLogger(__name__)


class Validation:
    """Evaluates a run on the rows of `data.val`; `evaluations` of its methods: step -> metrics, so far.

    Without rows nothing is evaluated, with a warning when the settings say when to.
    """

    def __init__(
        self,
        settings: TrainSettings,
        task: InstanceTask,
        accelerator: Accelerator,
        processor: UplvpImageProcessor,
        rows: InstanceDataset | None,
        images: int,
        progress: bool,
    ):
        self.settings, self.task, self.accelerator, self.processor = settings, task, accelerator, processor
        self.rows, self.progress, self.output = rows, progress, Path(settings.output)
        self.steps = evaluation_steps(settings, images, accelerator.num_processes) if rows is not None else set()
        wanted = settings.evaluation
        if rows is None and (wanted.at or wanted.every or wanted.every_epochs) and accelerator.is_main_process:
            logger.warning("`data.val` is not set: nothing is evaluated, whatever the settings of `evaluation` say.")

    def run(self, step: int, weights: RunWeights, result: TrainResult) -> dict:
        """Evaluates after `step`, adds the metrics to `result` and keeps the model if it is the best so far."""
        with weights.in_use() as model:
            metrics = {**self._evaluate(model), "training_seconds": round(result.seconds, 3)}
            result.evaluations[step] = metrics
            best = self.settings.checkpoint.best and best_step(result.evaluations) == step
            if best and self.accelerator.is_main_process:
                self._keep(step, model, metrics)
                self.prune(result.evaluations)
        if self.accelerator.is_main_process:
            tqdm.write(f"{self.output.name}, step {step}: {shown(metrics)}")
        return metrics

    def _evaluate(self, model: UplvpPreTrainedModel) -> dict:
        """Every process predicts its share of the images, and all get the numbers."""
        return self.task.evaluate(model, self.processor, self.rows, self.settings, self.progress)

    def is_exhausted(self, evaluations: dict[int, dict]) -> bool:
        """Whether none of the last `evaluation.patience` evaluations improved the best AP."""
        patience = self.settings.evaluation.patience
        since = sum(step > best_step(evaluations) for step in evaluations)
        return bool(patience) and since >= patience

    def start(self, step: int) -> None:
        """Drops best models that a stopped run found after `step`, from which this run continues."""
        if self.accelerator.is_main_process:
            for found, folder in self._kept().items():
                if found > step:
                    remove_folder(folder)

    def prune(self, evaluations: dict[int, dict]) -> None:
        """Removes best models that were surpassed, unless a checkpoint goes back to the time before that."""
        steps = [int(path.name.rsplit("-", 1)[1]) for path in list_checkpoints(self.output)]
        upto = [{k: v for k, v in evaluations.items() if k <= step} for step in steps]
        needed = {best_step(some) for some in (*upto, evaluations) if some}
        for step, folder in self._kept().items():
            if step not in needed:
                remove_folder(folder)

    def best(self) -> tuple[int, Path] | None:
        """Step and folder of the best model that was kept."""
        kept = self._kept()
        scores = {step: json.loads((folder / "best.json").read_text())["AP"] for step, folder in kept.items()}
        if not self.settings.checkpoint.best or not kept:
            return None
        step = max(scores, key=lambda step: (scores[step], -step))
        return step, kept[step]

    def choose(self, model: UplvpPreTrainedModel, result: TrainResult) -> None:
        """Sets `model_step` of the result: the last step, or that of the best model, whose weights are then loaded.

        The model gets the score threshold of that evaluation.
        """
        best = self.best()
        result.model_step = result.steps if best is None else best[0]
        if best is not None:
            load_weights(best[1], model)
        measured = store_threshold(model.config, result.evaluations.get(result.model_step))
        if measured is not None and self.accelerator.is_main_process:
            logger.info("Instances are shown from a score of %.2f on: the best F1 on `data.val`.", measured)

    def _keep(self, step: int, model: UplvpPreTrainedModel, metrics: dict) -> None:
        with new_folder(self.output / f"best-{step}") as draft:
            store_threshold(model.config, metrics)
            model.save_pretrained(draft)
            self.processor.save_pretrained(draft)
            write_json(draft / "best.json", {"step": step, "AP": _score(metrics)})

    def _kept(self) -> dict[int, Path]:
        folders = [path for path in self.output.glob("best-*") if path.name[5:].isdigit()]
        return {int(path.name[5:]): path for path in folders}


def evaluation_steps(settings: TrainSettings, images: int, processes: int) -> set[int]:
    """Steps after which to evaluate: those named, every so many, every so many epochs, and the last one."""
    evaluation, last = settings.evaluation, settings.optim.steps
    steps = {*evaluation.at, last}
    if evaluation.every:
        steps.update(range(evaluation.every, last + 1, evaluation.every))
    if evaluation.every_epochs:
        apart = evaluation.every_epochs * images / images_per_step(settings.optim, processes)
        steps.update(max(round(k * apart), 1) for k in range(1, int(last / apart) + 1))
    return {step for step in steps if step <= last}


def store_threshold(config: Any, metrics: dict | None) -> float | None:
    """Lets a configuration keep the score of best F1 of an evaluation, and gives it; None where there is none.

    One that a model started with is forgotten: it was measured on other weights.
    """
    measured = storable_threshold((metrics or {}).get("findings"))
    if hasattr(config, "default_threshold"):
        config.default_threshold = measured
    return measured


def best_step(evaluations: dict[int, dict]) -> int:
    """The step with the best AP; the first of equal ones."""
    return max(evaluations, key=lambda step: (_score(evaluations[step]), -step))


def shown(metrics: dict) -> str:
    """AP and AP50, or mIoU and aAcc, in per cent, as they are printed; a dash where there was nothing to find."""
    numbers = ((key, metrics[key]) for key in shown_metrics(metrics))
    return "  ".join(f"{key} {'-' if value is None else f'{100 * value:.1f}'}" for key, value in numbers)


def _score(metrics: dict) -> float:
    """AP, or mIoU of a semantic segmenter."""
    value = metrics[main_metric(metrics)]
    return -1.0 if value is None else value
