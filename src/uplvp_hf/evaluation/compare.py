"""Runs side by side: arms over seeds, mean and deviation at every evaluation, and what the arms differ in."""

from __future__ import annotations

import json
import os
import re
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .measures import main_metric
from .runs import CompareError, Run, read_run

LONGEST_NAME = 48  # letters of an arm's name that is made of settings
# Settings that say how a run is kept, shown or repeated, not what is trained.
_BOOKKEEPING = {
    "seed", "output", "log_every", "tracker", "fsdp", "data.split_seed", "data.workers", "optim.max_skipped",
    "checkpoint.every", "checkpoint.keep", "evaluation.at", "evaluation.every", "evaluation.every_epochs",
    "evaluation.batch_size", "evaluation.backend", "data.val", "data.val_split", "data.val_images", "data.val_format",
}  # fmt: skip
# Settings that say which labeled images were trained on.
_TRAINED_ON = ("data.train", "data.train_split", "data.subset", "data.labels_per_class")


@dataclass
class Point:
    """An evaluation that all runs of an arm have. x: mean place on the axis; values: one a run, in their order."""

    step: int
    x: float
    values: list[float]

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the runs, divided by n - 1; None for a single run."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass
class Arm:
    """Runs that differ in their seeds only. points: in the order of the steps; end: of the models that they left."""

    name: str
    runs: list[Run]
    points: list[Point] = field(default_factory=list)
    end: Point | None = None
    differences: dict[str, Any] = field(default_factory=dict)


@dataclass
class Comparison:
    """Arms on one axis. metric: as `evaluate_model` names it; notes: what a reader has to know, one sentence each."""

    arms: list[Arm]
    metric: str
    axis: str
    notes: list[str]

    def common(self) -> list[list[Point]]:
        """Evaluations at places that all arms share: one point an arm, by place. Places are shared when they are less
        than half a step apart, as an evaluation can only follow a whole step."""
        first, *others = self.arms
        rows = []
        for point in first.points:
            row = [point, *(_nearest(arm.points, point.x) for arm in others)]
            apart = 1e-9 if self.axis == "steps" else max(_step_size(arm, self.axis) for arm in self.arms) / 2
            if all(other is not None and abs(other.x - point.x) <= apart for other in row):
                rows.append(row)
        return rows

    def reached(self, arm: Arm) -> float | None:
        """Place at which the mean of `arm` first is at least the first arm's end; None if it never is."""
        goal = self.arms[0].end
        return next((point.x for point in arm.points if goal is not None and point.mean >= goal.mean), None)


def compare_runs(
    folders: Sequence[str | os.PathLike[str]] = (),
    arms: Mapping[str, Sequence[str | os.PathLike[str]]] | None = None,
    metric: str | None = None,
    axis: str = "epochs",
    force: bool = False,
) -> Comparison:
    """Reads runs and groups them: `folders` by their settings, all but seeds; `arms` as given, by name.

    metric: by default mask AP, or mIoU of semantic segmenters.

    Raises CompareError for a folder without a run or evaluation, a run given twice, runs evaluated by different
    metrics (COCO's AP, that of Cityscapes, mIoU), two runs of an arm with the same seeds, and, unless `force`, runs
    that were evaluated on different data.
    """
    groups = _group([read_run(folder) for folder in folders])
    named = {name: [read_run(folder) for folder in chosen] for name, chosen in (arms or {}).items()}
    if not groups and not named:
        raise CompareError("No runs to compare.")
    every = [run for group in (*groups, *named.values()) for run in group]
    places = [run.folder.resolve() for run in every]
    if twice := [run.folder for run, place in zip(every, places) if places.count(place) > 1]:
        raise CompareError(f"{twice[0]} is given twice.")
    _check_metrics(every)
    found = [Arm(name, runs) for name, runs in zip(_names(groups), groups)]
    found += [Arm(name, runs) for name, runs in named.items()]
    names = [arm.name for arm in found]
    if len(set(names)) < len(names):
        raise CompareError(f"Two arms have the name {next(name for name in names if names.count(name) > 1)!r}.")
    for arm in found:
        arm.runs.sort(key=lambda run: [(value is None, str(value).zfill(12)) for value in run.replicate])
        _check_replicates(arm)
    for arm, differences in zip(found, _differences([arm.runs[0] for arm in found])):
        arm.differences = differences
    if metric is None:
        metric = main_metric(every[0].evaluations[max(every[0].evaluations)])
    notes = _evaluation_notes(found, force)
    for arm in found:
        notes += _fill(arm, metric, axis)
    notes += [*_mixture_notes(found), *_seed_notes(found), *_split_notes(found)]
    return Comparison(found, metric, axis, notes)


def _identity(run: Run) -> dict[str, Any]:
    """Settings that make the arm: without bookkeeping, and with `*` for the run's own seed inside names."""
    found = {}
    for key, value in run.settings.items():
        if key in _BOOKKEEPING or (key == "optim.steps" and run.settings.get("optim.epochs") is not None):
            continue
        if key == "data.subset" and value is not None:
            value = re.sub(r"^\d+@", "*@", str(value))
        if isinstance(value, str):
            value = re.sub(rf"(seed[-_=]?){run.seed}(?!\d)", r"\1*", value)
        found[key] = value
    return found


def _group(runs: Sequence[Run]) -> list[list[Run]]:
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[json.dumps(_identity(run), sort_keys=True)].append(run)
    return list(groups.values())


def _differences(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Of each run, the settings that not all share; what a run has no setting of is None."""
    identities = [_identity(run) for run in runs]
    keys = sorted({key for identity in identities for key in identity})
    unlike = [key for key in keys if len({json.dumps(identity.get(key)) for identity in identities}) > 1]
    return [{key: identity.get(key) for key in unlike} for identity in identities]


def _names(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Of each group, what it has otherwise than the others; the name of its folders where that is long or nothing."""
    differences = _differences([group[0] for group in groups])
    names = [_name(one) for one in differences]
    if all(names) and len(set(names)) == len(names) and max(map(len, names), default=0) <= LONGEST_NAME:
        return names
    stems = [re.sub(r"[-_]?seed[-_=]?\d+", "", group[0].folder.name) or group[0].folder.name for group in groups]
    return stems if len(set(stems)) == len(stems) else [str(group[0].folder) for group in groups]


def _name(differences: Mapping[str, Any]) -> str:
    """`lr=0.001, init=pretrain`; settings that are not set are named only where nothing else is."""
    given = {key: value for key, value in differences.items() if value is not None} or differences
    return ", ".join(f"{key.rpartition('.')[2]}={short(value)}" for key, value in given.items())


def short(value: Any) -> str:
    """A setting for people: of a path its last part, nothing as a dash."""
    if value is None:
        return "-"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    parts = [part for part in text.split("/") if part]
    if len(parts) < 2:
        return text
    generic = parts[-1] in ("model.safetensors", "pytorch_model.bin")
    return parts[-2] if generic else parts[-1]


def _check_replicates(arm: Arm) -> None:
    seen: dict[tuple, Path] = {}
    for run in arm.runs:
        if run.replicate in seen:
            raise CompareError(
                f"{seen[run.replicate]} and {run.folder} have the same settings and the same seed {run.seed}: counted "
                "as two they would make the deviation too small. Leave one out, or name arms with --arm NAME=GLOB."
            )
        seen[run.replicate] = run.folder


def _check_metrics(runs: Sequence[Run]) -> None:
    """Numbers of one name, such as AP, that are computed differently do not compare, forced or not."""
    found: dict[str, str] = {}
    for run in runs:
        for numbers in run.evaluations.values():
            found.setdefault(numbers.get("metric", "mIoU" if "mIoU" in numbers else "coco"), str(run.folder))
    if len(found) > 1:
        raise CompareError(
            f"The runs were evaluated by different metrics: {_listed(found)}. Evaluate all with one `--metric`."
        )


def _fill(arm: Arm, metric: str, axis: str) -> list[str]:
    """Points and end of an arm. Returns notes about what not all of its runs have."""
    notes = []
    curves = [
        {step: one[metric] for step, one in run.evaluations.items() if one.get(metric) is not None} for run in arm.runs
    ]
    for run, curve in zip(arm.runs, curves):
        if not curve:
            raise CompareError(f"{run.folder} has no {metric}; it has {', '.join(_metrics(run))}.")
    shared = sorted(set.intersection(*map(set, curves)))
    for step in shared:
        xs = [run.x(step, axis) for run in arm.runs]
        arm.points.append(Point(step, statistics.mean(xs), [curve[step] for curve in curves]))
    partial = sorted(set.union(*map(set, curves)) - set(shared))
    if partial:
        steps = ", ".join(map(str, partial[:5])) + (", ..." if len(partial) > 5 else "")
        notes.append(
            f"{arm.name}: left out are evaluations that not all of its {len(arm.runs)} runs have (steps {steps})."
        )
    ended = [run for run in arm.runs if run.end is not None and run.end.get(metric) is not None]
    if ended:
        xs = [run.x(max(run.evaluations), axis) for run in ended]
        last = max(max(run.evaluations) for run in ended)
        arm.end = Point(last, statistics.mean(xs), [run.end[metric] for run in ended])
    if len(ended) < len(arm.runs):
        left = ", ".join(str(run.folder) for run in arm.runs if run not in ended)
        notes.append(f"{arm.name}: not finished and not part of the end: {left}.")
    return notes


def _metrics(run: Run) -> list[str]:
    numbers = next(iter(run.evaluations.values()))
    return [key for key, value in numbers.items() if isinstance(value, float) and key.startswith(("A", "m", "aAcc"))]


def _nearest(points: Sequence[Point], x: float) -> Point | None:
    return min(points, key=lambda point: abs(point.x - x), default=None)


def _step_size(arm: Arm, axis: str) -> float:
    return max(run.x(1, axis) for run in arm.runs)


def _evaluation_notes(arms: Sequence[Arm], force: bool) -> list[str]:
    """Refuses, or with `force` notes, runs that were evaluated on different data."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for run in (run for arm in arms for run in arm.runs):
        for key, value in _evaluated_on(run).items():
            if value is not None:
                found[key].setdefault(str(value), str(run.folder))
    unlike = {key: values for key, values in found.items() if len(values) > 1}
    if not unlike:
        return []
    text = "; ".join(f"{key}: {_listed(values)}" for key, values in unlike.items())
    if not force:
        raise CompareError(f"The runs were not evaluated on the same data. {text}. Use --force to compare them anyway.")
    return [f"Not evaluated on the same data, so the numbers do not compare: {text}."]


def _evaluated_on(run: Run) -> dict[str, Any]:
    """What an evaluation was made on, as far as it is recorded."""
    get, last = run.settings.get, run.evaluations[max(run.evaluations)]
    return {
        "data": os.path.abspath(str(get("data.val"))) if get("data.val") is not None else None,
        "split": get("data.val_split"),
        "classes ignored": bool(get("evaluation.class_agnostic") or get("model.class_agnostic")),
        "images": last.get("num_images"),
        "instances": last.get("num_instances"),
    }


def _seed_notes(arms: Sequence[Arm]) -> list[str]:
    everywhere = {run.replicate for arm in arms for run in arm.runs}
    notes = []
    for arm in arms:
        lacking = everywhere - {run.replicate for run in arm.runs}
        if lacking:
            seeds = ", ".join(sorted({_replicate_text(one) for one in lacking}))
            notes.append(f"{arm.name}: no run with {seeds}, which other arms have.")
    return notes


def _replicate_text(replicate: tuple) -> str:
    seed, split_seed, fold = replicate
    extra = f" on fold {fold}" if fold else f" (split_seed {split_seed})" if split_seed not in (None, seed) else ""
    return f"seed {seed}{extra}"


def _split_notes(arms: Sequence[Arm]) -> list[str]:
    """Arms that were trained on different labeled images."""
    notes = []
    for key in _TRAINED_ON:
        values = {short(_identity(arm.runs[0]).get(key)): arm.name for arm in arms}
        if len(values) > 1:
            notes.append(f"The arms were trained on different data, {key}: {_listed(values)}.")
    drawn: dict[tuple, dict[str, str]] = defaultdict(dict)
    for arm in arms:
        for run in arm.runs:
            if run.split or run.images:
                drawn[run.replicate][f"split {run.split[:8]}" if run.split else f"{run.images} images"] = arm.name
    for replicate, splits in drawn.items():
        if len(splits) > 1 and not notes:
            seeds = _replicate_text(replicate)
            notes.append(f"The arms were trained on different labeled images at {seeds}: {_listed(splits)}.")
    return notes


def _listed(values: Mapping[str, str]) -> str:
    return ", ".join(f"{value} ({name})" for value, name in values.items())


def _mixture_notes(arms: Sequence[Arm]) -> list[str]:
    """Arms given by name whose runs differ in more than their seeds."""
    notes = []
    for arm in arms:
        unlike = _differences(arm.runs)[0]
        if unlike:
            notes.append(f"{arm.name}: its runs differ in more than their seeds: {', '.join(unlike)}.")
    return notes
