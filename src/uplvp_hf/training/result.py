"""What a run ends with; and the end of a run that is resumed although it has finished."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..models.errors import reading
from ..models.image_processing_uplvp import UplvpImageProcessor
from ..models.modeling_uplvp import UplvpPreTrainedModel
from .checkpoint import load_weights, newest_checkpoint, remove_folder
from .config import ConfigError, TrainSettings

if TYPE_CHECKING:
    from .task import InstanceTask

logger = logging.getLogger(__name__)

SUMMARY = "training_summary.json"


@dataclass
class TrainResult:
    """What a run ends with.

    evaluations: step -> the numbers of `evaluate_model`, and `training_seconds` up to there; seconds: training steps
    only; steps: updates up to the end, the following ones included; skipped: those left out because something was not
    finite; overflows: those left out because gradients overflowed float16, which lowers the scale of the loss;
    model_step: the step that the model is of, an earlier one than `steps` with `checkpoint.best`; losses: the total in
    the first and last line of the log.
    """

    model: UplvpPreTrainedModel
    processor: UplvpImageProcessor
    evaluations: dict[int, dict] = field(default_factory=dict)
    seconds: float = 0.0
    steps: int = 0
    skipped: int = 0
    overflows: int = 0
    model_step: int = 0
    losses: list[float] = field(default_factory=list)


def finished_result(settings: TrainSettings, task: InstanceTask, model: UplvpPreTrainedModel) -> TrainResult | None:
    """The result that lies in the output folder of a finished run, read and not changed; None where there is something
    to do. model: as it was at the start of the run; gets the weights.

    Raises ConfigError for a finished run that is to be longer and has no checkpoint to go on from.
    """
    folder = Path(settings.output)
    if not (folder / SUMMARY).is_file():
        return None
    with reading(str(folder / SUMMARY)):
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    steps = summary["settings"]["optim"]["steps"]
    longer = steps != settings.optim.steps
    if summary["steps"] < steps:  # it ended as it got no better
        longer |= summary["settings"]["evaluation"]["patience"] != settings.evaluation.patience
    if longer:
        if newest_checkpoint(folder) is None:
            raise ConfigError(
                f"{folder} has finished its {steps} steps and holds no checkpoint to go on from (a run keeps them with "
                f"`checkpoint.stay=true`): start a new run with model.init={folder}."
            )
        return None
    load_weights(folder, model)
    model.eval()
    result = TrainResult(model, task.processor(settings, model))
    result.evaluations = {int(step): metrics for step, metrics in summary["evaluations"].items()}
    result.seconds, result.steps, result.model_step = summary["seconds"], summary["steps"], summary["model_step"]
    result.skipped, result.overflows = summary["skipped_steps"], summary["overflowed_steps"]
    logger.info("%s has finished: its %d steps are done, and nothing was changed.", folder, result.steps)
    return result


def clear_leftovers(folder: Path) -> None:
    """Removes what only a run that goes on would need: checkpoints, with their optimizer's state, and best models."""
    for pattern in ("checkpoint-*", "best-*"):
        for path in folder.glob(pattern):
            if path.name.rpartition("-")[2].isdigit():
                remove_folder(path)
