"""From a benchmark to its jobs: what is labeled, pre-trained and fine-tuned, once each, and in which order."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..training.config import ConfigError, TrainSettings, load_settings
from .recipe import Arm, Benchmark

# Settings that say where something lies, not what it is.
PATHS = {
    "data": ("train", "train_images", "val", "val_images", "unlabeled", "unlabeled_images"),
    "model": ("init", "backbone_weights"),
}


@dataclass(frozen=True)
class Sources:
    """Where the data of a benchmark lies, as settings of training (`train`, `train_split`, ... without `data.`).

    train, val: the labeled images and those to evaluate on. unlabeled: arguments of `load_dataset_rows` for the
    images that are labeled and pre-trained on.
    """

    train: dict[str, str]
    val: dict[str, str]
    unlabeled: dict[str, str]


@dataclass
class Job:
    """Something that is done once and leaves a folder. kind: label, pretrain, finetune or evaluate.

    folder: in the output, also the job's name. needs: folders of jobs that come first. settings: of a training.
    row: what the line of results says about the job, for finetune and evaluate. label_set: name of a label set, of its
    job and of what was trained on it.
    """

    kind: str
    folder: str
    needs: tuple[str, ...] = ()
    settings: TrainSettings | None = None
    row: dict[str, Any] = field(default_factory=dict)
    label_set: str = ""

    @property
    def fingerprint(self) -> str:
        """Of what the result depends on, wherever data, weights and output lie."""
        values = {} if self.settings is None else self.settings.to_dict()
        for section, keys in PATHS.items():
            if section in values:
                values[section] = {key: value for key, value in values[section].items() if key not in keys}
        values = {**values, "output": None, "needs": [need.split("/")[-1] for need in self.needs]}
        return hashlib.sha256(json.dumps([self.kind, values], sort_keys=True).encode()).hexdigest()[:12]


def make_plan(benchmark: Benchmark, output: Path, sources: Sources) -> list[Job]:
    """All jobs, each after those that it needs; labels first, as most arms wait for them, then by the `order` of the
    arms, and seed by seed, so that an unfinished benchmark has complete seeds.

    Raises ConfigError for settings that no training takes.
    """
    jobs: dict[str, Job] = {}
    turns = itertools.product(
        sorted({arm.order for arm in benchmark.arms.values()}), benchmark.seeds, benchmark.segmenters, benchmark.arms
    )
    for order, seed, segmenter, name in turns:
        arm = benchmark.arms[name]
        if arm.order == order and seed in (arm.seeds or [seed]) and segmenter in (arm.segmenters or [segmenter]):
            for job in _arm_jobs(benchmark, output, sources, segmenter, name, arm, seed):
                jobs.setdefault(job.folder, job)
    return sorted(jobs.values(), key=lambda job: job.kind != "label")


def _arm_jobs(
    benchmark: Benchmark, output: Path, sources: Sources, segmenter: str, name: str, arm: Arm, seed: int
) -> list[Job]:
    counts = [count for count in benchmark.labels_per_class if count in (arm.labels_per_class or [count])]
    if not counts:
        return []
    jobs, needs, start = [], (), {}
    if arm.labels is not None:
        pretrain_seed = min(benchmark.seeds) if benchmark.shared_pretraining else seed
        before = _pretrain_jobs(benchmark, output, sources, segmenter, arm, pretrain_seed)
        jobs += before
        # The backbone comes with the checkpoint: weights from a file would undo what pre-training made of it.
        start = {"model.init": str(output / before[-1].folder), "model.backbone_weights": None}
        needs = (before[-1].folder,)
    said = {"benchmark": benchmark.name, "segmenter": segmenter, "arm": name, "labels": arm.labels, "seed": seed}
    if arm.steps == 0:
        folder = f"runs/{segmenter}/{name}/seed{pretrain_seed}".replace(" ", "_")
        row = {**said, "seed": pretrain_seed, "labels_per_class": 0}
        settings = _finetune_settings(benchmark, output / folder, sources, segmenter, arm, pretrain_seed, 1, start)
        return [*jobs, Job("evaluate", folder, needs, settings, row)]
    for count in counts:
        folder = f"runs/{segmenter}/{name}/{_NOT_IN_NAMES.sub('_', str(count))}_labels_seed{seed}".replace(" ", "_")
        settings = _finetune_settings(benchmark, output / folder, sources, segmenter, arm, seed, count, start)
        jobs.append(Job("finetune", folder, needs, settings, {**said, "labels_per_class": count}))
    return jobs


def _pretrain_jobs(
    benchmark: Benchmark, output: Path, sources: Sources, segmenter: str, arm: Arm, seed: int
) -> list[Job]:
    labels = benchmark.labels[arm.labels]
    jobs, needs = [], ()
    if labels.truth:
        data = {f"data.{_TRAIN_KEYS[key]}": value for key, value in sources.unlabeled.items()}
    elif labels.store is not None:
        data = {"data.train": labels.store}
    else:
        folder = label_folder(arm.labels)
        jobs.append(Job("label", folder, label_set=arm.labels))
        needs, data = (folder,), {"data.train": str(output / folder)}
    recipes = benchmark.segmenters[segmenter]
    values = {**benchmark.settings, **recipes.settings, **benchmark.pretrain, **arm.pretrain, **data}
    values |= {"seed": seed, "stage": "pretrain"}
    # Arms that describe it alike share it: the name holds what it depends on, the label set by name, not by place.
    described = {key: value for key, value in values.items() if key not in data}
    if isinstance(described.get("model.backbone_weights"), str):
        described["model.backbone_weights"] = Path(described["model.backbone_weights"]).name
    digest = hashlib.sha256(json.dumps([recipes.pretrain, arm.labels, described], sort_keys=True).encode()).hexdigest()
    folder = f"pretrain/{segmenter}_{arm.labels}_{digest[:8]}_seed{seed}".replace(" ", "_")
    settings = training_settings(recipes.pretrain, values, output / folder)
    return [*jobs, Job("pretrain", folder, needs, settings, label_set=arm.labels)]


def label_folder(name: str) -> str:
    """Where a label set that is made lies in the output."""
    return f"labels/{name}".replace(" ", "_")


_NOT_IN_NAMES = re.compile(r"[^\w.+@-]")
_UNLABELED_KEYS = {"path": "unlabeled", "split": "unlabeled_split", "images": "unlabeled_images"}
_TRAIN_KEYS = {"path": "train", "split": "train_split", "images": "train_images"}


def _finetune_settings(
    benchmark: Benchmark,
    folder: Path,
    sources: Sources,
    segmenter: str,
    arm: Arm,
    seed: int,
    count: int | str,
    start: Mapping[str, Any],
) -> TrainSettings:
    recipes = benchmark.segmenters[segmenter]
    values = {**benchmark.settings, **recipes.settings, **benchmark.finetune, **arm.finetune, **start}
    values |= {f"data.{key}": value for key, value in {**sources.train, **sources.val}.items()}
    values |= {"data.subset" if isinstance(count, str) else "data.labels_per_class": count}
    values |= {"data.split_seed": seed, "seed": seed, "stage": "finetune"}
    if arm.unlabeled:
        values |= {f"data.{_UNLABELED_KEYS[key]}": value for key, value in sources.unlabeled.items()}
    optim = training_settings(recipes.finetune, values, folder).optim
    if optim.epochs is not None:
        if arm.equal_total:
            raise ConfigError(f"`equal_total` counts steps, but {recipes.finetune} sets `optim.epochs`.")
        epochs = optim.epochs * (arm.steps or 1)
        values |= {"optim.epochs": epochs}
        values |= {"evaluation.every_epochs": epochs * min(benchmark.curve)} if benchmark.curve else {}
        return training_settings(recipes.finetune, values, folder)
    steps = optim.steps + (_usual_pretrain_steps(benchmark, segmenter) if arm.equal_total else 0)
    steps = max(1, round(steps * (arm.steps or 1)))
    values |= {"optim.steps": steps, "evaluation.at": sorted({max(1, round(steps * part)) for part in benchmark.curve})}
    return training_settings(recipes.finetune, values, folder)


def _usual_pretrain_steps(benchmark: Benchmark, segmenter: str) -> int:
    recipes = benchmark.segmenters[segmenter]
    values = {**benchmark.settings, **recipes.settings, **benchmark.pretrain, "stage": "pretrain"}
    optim = training_settings(recipes.pretrain, values, Path("unused")).optim
    if optim.epochs is not None:
        raise ConfigError(f"`equal_total` counts steps, but {recipes.pretrain} sets `optim.epochs`.")
    return optim.steps


def training_settings(recipe: str, values: Mapping[str, Any], output: Path) -> TrainSettings:
    """Settings of a training from a recipe and `section.key: value`, which goes before it."""
    words = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]
    return load_settings(recipe, words, output=str(output))
