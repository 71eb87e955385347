"""Rows of results: one JSON object a run, with everything that is needed to judge or repeat it."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..evaluation.measures import main_metric
from ..evaluation.predictor import METRICS, evaluate_model, load_segmenter
from ..files import write_json_lines
from ..models.errors import UserError, reading
from ..models.thresholds import SCORE_THRESHOLD
from ..training.build import build_data
from ..training.config import TrainSettings
from ..training.semantic_task import is_semantic
from . import semantic
from .activations import query_activations, spread
from .plan import PATHS, Job, label_folder

QUERY_MAPS = "query_maps.safetensors"  # `query_activations` of a run
_DIGITS = 5  # of AP: more than any difference that counts


def make_row(folder: Path, job: Job) -> dict[str, Any]:
    """The row of a finished fine-tuning, or of a pre-trained model that is evaluated here as it is."""
    own = folder / job.folder
    before = [json.loads((folder / need / "training_summary.json").read_text()) for need in job.needs]
    _, val = build_data(job.settings)
    if is_semantic(job.settings.model):
        summary = json.loads((own / "training_summary.json").read_text())
        found = _numbers(summary["evaluations"], semantic.METRICS)
        return _row(folder, job, before, summary, len(val), found | semantic.control_metrics(own, val))
    if job.kind == "finetune":
        summary = json.loads((own / "training_summary.json").read_text())
        evaluations, model_folder = summary["evaluations"], own
        model, processor = load_segmenter(str(model_folder))
    else:
        model, processor = load_segmenter(str(folder / job.needs[0]))
        agnostic = before[0]["settings"]["model"]["class_agnostic"]
        options = {"class_agnostic": agnostic, "at_score": SCORE_THRESHOLD, "progress": False}
        metrics = evaluate_model(model, processor, val, **options)
        summary, evaluations = None, {"0": metrics | {"class_agnostic": agnostic}}
    maps = query_activations(model, processor, val)
    own.mkdir(parents=True, exist_ok=True)
    save_file({"maps": maps}, own / QUERY_MAPS)
    found = _numbers(evaluations, METRICS) | {"query_spread": spread(maps)}
    return _row(folder, job, before, summary, len(val), found)


def _numbers(evaluations: dict[str, dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Of the last evaluation these numbers and those of its classes; the first one of each evaluation, by step."""
    last = evaluations[max(evaluations, key=int)]
    agnostic = {"class_agnostic": last["class_agnostic"]} if "class_agnostic" in last else {}
    return {
        "metrics": {name: _rounded(last[name]) for name in names},
        "per_class": {name: _rounded(value) for name, value in last["per_class"].items()},
        "curve": {step: _rounded(metrics[names[0]]) for step, metrics in evaluations.items()},
        "findings": _findings(last),
        **agnostic,
    }


def _row(
    folder: Path,
    job: Job,
    before: list[dict[str, Any]],
    summary: dict[str, Any] | None,
    images: int,
    found: dict[str, Any],
) -> dict[str, Any]:
    """A row of what was found, and of how it was made: trainings before it, its own, and the evaluated images."""
    return {
        **job.row,
        "fingerprint": job.fingerprint,
        "class_agnostic": job.settings.evaluation.class_agnostic,
        **found,
        "pseudo": _pseudo_curve(folder / job.folder / "log.jsonl"),
        "label": label_record(folder, job.row["labels"]),
        "pretrain": _stage(before[0]) if before else None,
        "finetune": _stage(summary) if summary else None,
        "images": {"train": summary["images"] if summary else 0, "val": images},
        "parameters": before[0]["parameters"] if summary is None else summary["parameters"],
        "hardware": (summary or before[0])["hardware"],
        **source_revision(),
    }


def _pseudo_curve(log: Path) -> dict[str, dict[str, float]] | None:
    """Number and quality of the pseudo instances by step, as a training with a teacher logs them; else None."""
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    found = {
        str(line["step"]): {key.removeprefix("pseudo_"): round(line[key], 4) for key in line if "pseudo_" in key}
        for line in lines
    }
    return {step: values for step, values in found.items() if values} or None


def _findings(metrics: dict[str, Any]) -> dict[str, Any] | None:
    """What is true at a score of .5 and at the best one (`Findings.compute`), rounded; None of an older training."""
    found = metrics.get("findings")

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list) else _rounded_number(value)

    return found and {"best_threshold": found["best_threshold"], "at": plain(found["at"])}


def _rounded_number(value: Any) -> Any:
    return round(value, _DIGITS) if isinstance(value, float) else value


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, _DIGITS)


def _stage(summary: dict[str, Any]) -> dict[str, Any]:
    """Steps, seconds and settings (those that are not the defaults, without paths) of a training."""
    settings, usual = summary["settings"], TrainSettings().to_dict()
    changed: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            changed |= {f"{key}.{name}": item for name, item in value.items() if item != usual[key].get(name)}
        elif value != usual[key]:
            changed[key] = value
    for path in ("output", *(f"{section}.{name}" for section, names in PATHS.items() for name in names)):
        changed.pop(path, None)
    mixed = {"extra_share": summary["extra_share"]} if summary.get("extra_share") else {}
    return {
        **mixed,
        "steps": settings["optim"]["steps"],
        "seconds": summary["seconds"],
        "images": summary["images"],
        "settings": changed,
    }


def training_seconds(row: dict[str, Any]) -> float:
    """Of pre-training and fine-tuning of a run."""
    return sum(row[stage]["seconds"] for stage in ("pretrain", "finetune") if row[stage])


def label_record(folder: Path, name: str | None) -> dict[str, Any] | None:
    """How a label set was made: words of `uplvp label` without paths, seconds; None where it was not made here."""
    if name is None or not (file := folder / label_folder(name) / "finished.json").is_file():
        return None
    record = json.loads(file.read_text())
    words = [Path(word).name if os.sep in word else word for word in record["command"]]
    return {"command": " ".join(words), "seconds": record["seconds"]}


@cache
def source_revision() -> dict[str, Any]:
    """Version of the library, and the git revision of its source where it is a repository (`+` where changed)."""
    from .. import __version__

    file = Path(__file__)

    def git(*words: str) -> str | None:
        try:
            return subprocess.run(
                ["git", "-C", str(file.parent), *words], capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):  # no git, or no repository
            return None

    # An installed copy may lie in a repository of someone else's.
    revision = git("rev-parse", "--short=12", "HEAD") if git("ls-files", "--error-unmatch", file.name) else None
    if revision and git("status", "--porcelain", "--untracked-files=no"):
        revision += "+"
    return {"version": __version__, "revision": revision}


def write_rows(folder: Path, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Collects the rows of all finished runs into `rows.jsonl`, those of the plan first and in its order."""
    planned = [folder / job.folder / "row.json" for job in jobs if job.row]
    files = dict.fromkeys([*(file for file in planned if file.is_file()), *sorted(folder.glob("runs/*/*/*/row.json"))])
    rows = [json.loads(file.read_text()) for file in files]
    write_json_lines(folder / "rows.jsonl", rows)
    return rows


def read_query_maps(folder: Path, jobs: Sequence[Job]) -> dict[str, dict[str, torch.Tensor]]:
    """segmenter -> arm -> maps (Q, h, w) of the first finished run of each arm, in the order of the plan."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for job in jobs:
        file = folder / job.folder / QUERY_MAPS
        if job.row and file.is_file():
            found.setdefault(job.row["segmenter"], {}).setdefault(job.row["arm"], load_file(file)["maps"])
    return found


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a file; raises ValueError naming the line that is none."""
    rows = []
    with reading(str(path)):
        lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            metric = main_metric(row["metrics"])
            if not isinstance(row["metrics"][metric], float | None) or not isinstance(row["segmenter"], str):
                raise UserError(f"{metric} is no number")
            rows.append(row)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number}: no row of a benchmark ({error})") from error
    return rows


def row_metric(rows: Sequence[dict[str, Any]]) -> str:
    """The number that rows of one segmenter are compared by."""
    return main_metric(rows[0]["metrics"]) if rows else "AP"


def row_value(row: dict[str, Any]) -> float | None:
    """That number of a row, 0 to 1, or None."""
    return row["metrics"][main_metric(row["metrics"])]


def label_counts(rows: Sequence[dict[str, Any]]) -> list[int | str]:
    """What the runs were fine-tuned on, numbers of labels first, without the 0 of runs that were not."""
    found = {row["labels_per_class"] for row in rows} - {0}
    return sorted(found, key=lambda count: (isinstance(count, str), count))


def labels_text(count: int | str) -> str:
    """`10 labels a class`, `split 1@5`, or `no label`."""
    if count == 0:
        return "no label"
    return f"split {count}" if isinstance(count, str) else f"{count} labels a class"


def percent_text(values: Sequence[float | None]) -> str:
    """`39.9 (1.4)`: mean and standard deviation (n - 1) in per cent, of the values that there are; `-` for none."""
    found = [100 * value for value in values if value is not None]
    if not found:
        return "-"
    spread = f" ({statistics.stdev(found):.1f})" if len(found) > 1 else ""
    return f"{statistics.mean(found):.1f}{spread}"
