"""The output folder of a run: which run it belongs to, and with which settings it may be resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import Accelerator

from ..data.training_set import TrainingSet
from ..files import write_json
from ..models.errors import reading
from .config import ConfigError, TrainSettings
from .mixture import MixedSamples
from .share import RECORD as SHARE_RECORD

if TYPE_CHECKING:
    from .result import TrainResult

# Settings that may differ when a run is resumed: they do not change what an update does. The sizes of batches may as
# long as the effective batch stays, which is checked when a checkpoint is loaded.
_FREE = (
    "evaluation.", "checkpoint.", "data.val", "data.workers", "log_every", "gradients_every", "tracker", "fsdp",
    "teacher.draw_every", "optim.max_skipped", "optim.batch_size", "optim.accumulation",
)  # fmt: skip
_LENGTH = ("optim.steps", "optim.epochs")


def check_output(settings: TrainSettings, resume: bool) -> None:
    """Raises ConfigError unless the output folder is free, or holds this very run and `resume` is on."""
    output = Path(settings.output)
    record = output / "settings.json"
    if not record.is_file():
        if (output / "config.json").is_file():
            raise ConfigError(f"{output} holds a model that no run of ours wrote: choose another output.")
        return
    if not resume:
        raise ConfigError(
            f"{output} already holds a run. Continue it with --resume, or choose another output or remove it."
        )
    with reading(str(record), "Choose another output, or remove it."):
        before = _filled(json.loads(record.read_text()), _record(TrainSettings()))
    changed = [text for key, text in _differences(before, _record(settings)) if not _may_change(key, settings)]
    if changed:
        length = any(text.startswith(_LENGTH) for text in changed)
        hint = " A run can be given another length only with optim.schedule=constant." if length else ""
        raise ConfigError(f"{output} was started with other settings: {'; '.join(sorted(changed))}.{hint}")


def claim_output(settings: TrainSettings, accelerator: Accelerator) -> None:
    """Makes the output folder this run's own."""
    accelerator.wait_for_everyone()  # until all have checked it
    if accelerator.is_main_process:
        write_json(Path(settings.output) / "settings.json", _record(settings))
    accelerator.wait_for_everyone()


def summary(settings: TrainSettings, result: TrainResult, samples: TrainingSet | MixedSamples, machine: str) -> dict:
    """What `training_summary.json` holds. machine: see `launch.hardware`."""
    model, evaluations = result.model, result.evaluations
    extra: dict = {}
    given = settings.to_dict()
    if isinstance(samples, MixedSamples):
        extra = {"extra_images": len(samples.extra), "extra_share": settings.data.extra_share}
        if (Path(settings.output) / SHARE_RECORD).is_file():  # it was found, not given
            given["data"]["extra_share"] = None
    return {
        "stage": settings.stage,
        "settings": given,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "parameters_trained": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        "images": len(samples),
        **extra,
        "hardware": machine,
        "seconds": round(result.seconds, 1),
        "steps": result.steps,
        "skipped_steps": result.skipped,
        "overflowed_steps": result.overflows,
        "model_step": result.model_step,
        "transfer": str(model.transfer_report) if model.transfer_report else None,
        "metrics": evaluations.get(result.model_step),
        "evaluations": {str(step): metrics for step, metrics in evaluations.items()},
    }


def _may_change(key: str, settings: TrainSettings) -> bool:
    return key.startswith(_FREE) or (key in _LENGTH and settings.optim.schedule == "constant")


def _record(settings: TrainSettings) -> dict:
    return {key: value for key, value in settings.to_dict().items() if key != "output"}


def _filled(record: dict, defaults: dict) -> dict:
    """Completes an older record with the settings that were added since, at their defaults."""
    merged = {**defaults, **record}
    for key, value in defaults.items():
        if isinstance(value, dict) and isinstance(record.get(key), dict):
            merged[key] = {**value, **record[key]}
    return merged


def _differences(before: dict, after: dict, prefix: str = "") -> list[tuple[str, str]]:
    """(key, text) for every setting that differs."""
    found = []
    for key in {**before, **after}:
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append((f"{prefix}{key}", f"{prefix}{key} was {old!r}, now {new!r}"))
    return found
