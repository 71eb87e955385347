"""Reading a run's folder: its settings, its evaluations, and where on an axis they lie."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..models.errors import UserError

X_AXES = {"epochs": "passes over the training images", "steps": "optimizer steps", "seconds": "seconds of training"}


class CompareError(UserError):
    """Runs that cannot be compared, or are no runs."""


@dataclass
class Run:
    """A training run, or what `uplvp evaluate` wrote about one.

    evaluations: step -> numbers of `evaluate_model` (0 to 1). end: the numbers of the model that the run left, None
    for an unfinished run. settings: by full key (`optim.lr`). epochs_a_step: passes over the training images that a
    step is, seconds: of all training steps; both None where they are not recorded. split: hash of the labeled images
    that were drawn (`split.json`), None where all were taken.
    """

    folder: Path
    settings: dict[str, Any]
    evaluations: dict[int, dict[str, Any]]
    end: dict[str, Any] | None
    epochs_a_step: float | None = None
    seconds: float | None = None
    images: int | None = None
    split: str | None = None

    @property
    def seed(self) -> Any:
        return self.settings.get("seed")

    @property
    def replicate(self) -> tuple:
        """What tells the repetitions of an arm apart: the seeds of training and of the split."""
        fold = re.match(r"(\d+)@", str(self.settings.get("data.subset")))
        split_seed = self.settings.get("data.split_seed")
        return self.seed, self.seed if split_seed is None else split_seed, fold and fold[1]

    def x(self, step: int, axis: str) -> float:
        """Place of `step` on an axis of `X_AXES`. Seconds count training alone: those recorded with an evaluation, else
        in proportion to the steps."""
        if axis == "steps":
            return float(step)
        last = max(self.evaluations)
        if axis == "seconds" and "training_seconds" in self.evaluations.get(step, {}):
            return self.evaluations[step]["training_seconds"]
        factor = self.epochs_a_step if axis == "epochs" else self.seconds and self.seconds / last
        if factor is None:
            raise CompareError(f"{self.folder} does not record its {axis} (is it finished?): choose --x steps.")
        return step * factor


def read_run(folder: str | os.PathLike[str]) -> Run:
    """A run from its folder: `training_summary.json` of a finished one, `settings.json` and `log.jsonl` of an
    unfinished one, or the `metrics.json` that `uplvp evaluate --output` wrote.

    Raises CompareError naming the folder and the remedy when it holds none of these or no evaluation.
    """
    folder = Path(folder)
    readers = {"training_summary.json": _finished, "settings.json": _unfinished, "metrics.json": _evaluated}
    reader = next((reader for name, reader in readers.items() if (folder / name).is_file()), None)
    if not folder.is_dir():
        raise CompareError(f"{folder}: no such folder.")
    if reader is None:
        inside = sorted(path.parent.name for path in folder.glob("*/training_summary.json"))
        hint = f" Its subfolders do: {', '.join(inside[:3])}; pass {folder}/*." if inside else ""
        raise CompareError(f"{folder} holds no run and no metrics.json of `uplvp evaluate`.{hint}")
    try:
        run = reader(folder)
    except KeyError as error:
        raise CompareError(
            f"{folder} does not record {error}: another version wrote it, or another program."
        ) from error
    if not run.evaluations:
        raise CompareError(f"{folder} was never evaluated: set `data.val`, or run `uplvp evaluate` on it.")
    return run


def _finished(folder: Path) -> Run:
    summary = _json(folder / "training_summary.json")
    evaluations = {int(step): numbers for step, numbers in summary.get("evaluations", {}).items()}
    settings, images = _flat(summary["settings"]), summary["images"]
    processes = int(summary["hardware"].split(" x ")[0])
    a_step = settings["optim.batch_size"] * settings["optim.accumulation"] * processes
    end = summary.get("metrics") or evaluations.get(max(evaluations, default=0))
    return Run(folder, settings, evaluations, end, a_step / images, summary["seconds"], images, _split(folder))


def _unfinished(folder: Path) -> Run:
    evaluations = {}
    for line in _lines(folder / "log.jsonl"):
        numbers = {key.removeprefix("val_"): value for key, value in line.items() if key.startswith("val_")}
        if numbers:
            evaluations[int(line["step"])] = numbers
    seconds = evaluations[max(evaluations)].get("training_seconds") if evaluations else None
    settings = _flat(_json(folder / "settings.json"))
    return Run(folder, settings, evaluations, None, seconds=seconds, split=_split(folder))


def _split(folder: Path) -> str | None:
    path = folder / "split.json"
    return _json(path)["hash"] if path.is_file() else None


def _evaluated(folder: Path) -> Run:
    """Numbers of `uplvp evaluate`; settings and axis of the run that trained the model, where it is at hand."""
    numbers = _json(folder / "metrics.json")
    trained = Path(str(numbers.get("model")))
    if not (trained / "training_summary.json").is_file():
        settings = {
            "model.init": numbers.get("model"),
            "evaluation.class_agnostic": bool(numbers.get("class_agnostic")),
        }
        run = Run(folder, settings, {0: numbers}, numbers)
    else:
        run = _finished(trained)
        last = max(run.evaluations, default=run.settings["optim.steps"])
        run.folder, run.evaluations, run.end = folder, {last: numbers}, numbers
        run.settings["evaluation.class_agnostic"] = bool(numbers.get("class_agnostic"))
    run.settings |= {"data.val": numbers.get("data"), "data.val_split": numbers.get("split"), "data.val_images": None}
    return run


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CompareError(f"{path} is not valid JSON: {error}") from error


def _lines(path: Path) -> Iterable[dict]:
    """Complete lines of a log that may still be written."""
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.endswith("}"):
                yield json.loads(line)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in settings.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value})
    return flat
