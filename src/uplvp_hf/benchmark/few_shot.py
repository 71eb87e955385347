"""Few-shot benchmarks: arms that are trained on base classes, asked about novel ones with right and wrong supports.

    kind: fewshot
    name: fewshot_scenes_cpu
    data: {scenes: {train: 500, pool: 150, val: 80}, looks: 24}  # or train, pool, val with their splits
    classes: looks24
    segmenters:
      mask2former: {recipe: scenes_finetune, settings: {}}
    settings: {data.size: 128}                                   # of every training
    arms:
      prototype: {settings: {fewshot.conditioning: prototype}}
      prompts: {init: prototype, settings: {fewshot.conditioning: prompt}}
      prompts head: {same: prompts, settings: {fewshot.support_score: head}}
    shots: [1, 5]
    ask: [open, present]
    seeds: [0, 1, 2]

Every arm is trained once a seed and segmenter. `init` names the arm whose model it starts from, `same` one whose model
is asked again. Supports are drawn from `pool` with the same seed. What is finished is not repeated, and several calls
may share a folder.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..data import InstanceDataset, load_dataset_rows
from ..data.class_splits import class_split
from ..data.synthetic import LOOKS, NOVEL_LOOKS, write_scenes
from ..evaluation.few_shot import Asking, load_few_shot
from ..evaluation.few_shot_table import Questions, few_shot_rows, few_shot_table
from ..files import write_json_lines, write_text
from ..settings import ConfigError, Settings, setting
from ..training.config import TrainSettings
from .plan import training_settings
from .rows import source_revision
from .run import claim_folder, job_lock

logger = logging.getLogger(__name__)


@dataclass
class FewShotData(Settings):
    """The images: base classes are learned on `train`, supports drawn from `pool`, `val` is evaluated."""

    train: str | None = setting(None, "as `data.train` of training")
    train_split: str | None = setting(None, "as `data.train_split` of training")
    pool: str | None = setting(None, "where supports are drawn from; none: the training images")
    pool_split: str | None = setting(None, "as `train_split`")
    val: str | None = setting(None, "as `data.val` of training")
    val_split: str | None = setting(None, "as `train_split`")
    scenes: dict[str, Any] | None = setting(
        None, "counts {train, pool, val} of generated scenes of 24 looks in place of all that; no novel look in `train`"
    )


@dataclass
class FewShotSegmenter(Settings):
    """How a segmenter is trained."""

    recipe: str = setting("", "recipe of training, by name or file")
    settings: dict[str, Any] = setting({}, "section.key: value, with this segmenter")


@dataclass
class FewShotArm(Settings):
    """One way to train."""

    init: str | None = setting(None, "the arm whose model it starts from; none: as the recipe says")
    same: str | None = setting(
        None, "the arm whose model is asked again, with another `fewshot.support_score`; nothing is trained"
    )
    settings: dict[str, Any] = setting({}, "section.key: value, of this arm")
    segmenters: list[str] | None = setting(None, "only these of the benchmark's")
    seeds: list[int] | None = setting(None, "only these of the benchmark's")
    about: str = setting("", "a remark for tables")


@dataclass
class FewShotBenchmark(Settings):
    """A whole benchmark, see the head of this file."""

    kind: str = setting("fewshot", "what makes a recipe one of these", choices=("fewshot",))
    name: str = setting("", "of the benchmark")
    about: str = setting("", "what its page says at the top")
    variables: dict[str, Any] = setting({}, "what `${name}` in any text stands for; null has to be given")
    data: FewShotData = field(default_factory=FewShotData)
    classes: str = setting("looks24", "class split, or several with spaces between, each a benchmark of its own")
    segmenters: dict[str, FewShotSegmenter] = setting({}, "segmenters that every arm trains")
    arms: dict[str, FewShotArm] = setting({}, "what is compared")
    settings: dict[str, Any] = setting({}, "section.key: value, of every training")
    shots: list[int] = setting([1, 5], "supports of a class", least=1)
    ask: list[str] = setting(["open", "present"], "protocols: open, present, episodes")
    seeds: list[int] = setting([0, 1, 2], "of training and of the supports")
    base: int = setting(6, "base classes, drawn by seed, that are asked about as well", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for section in ("name", "segmenters", "arms", "seeds", "shots", "ask"):
            if not getattr(self, section):
                raise ConfigError(f"A few-shot benchmark needs `{section}`.")
        if self.data.scenes is None and not (self.data.train and self.data.val):
            raise ConfigError("`data` needs `train` and `val`, or `scenes`.")
        known: list[str] = []
        for name, arm in self.arms.items():
            for key in ("init", "same"):
                if getattr(arm, key) not in (None, *known):
                    listed = ", ".join(known) or "none"
                    raise ConfigError(
                        f"`arms.{name}.{key}`: no arm `{getattr(arm, key)}` before it; there are: {listed}."
                    )
            if arm.same is not None and set(arm.settings) != {"fewshot.support_score"}:
                raise ConfigError(f"`arms.{name}.settings` of an arm with `same` hold `fewshot.support_score` alone.")
            known.append(name)


@dataclass(frozen=True)
class FewShotJob:
    """A training with its evaluation. needs: folder of the training that it starts from, or whose model is asked again.
    settings: of the training, None where nothing is trained. score: in place of the model's own."""

    folder: str
    needs: str | None
    settings: TrainSettings | None
    record: dict[str, Any]
    score: str | None = None


def few_shot_jobs(benchmark: FewShotBenchmark, folder: Path) -> list[FewShotJob]:
    """All jobs, arm by arm, so that each comes after the one that it starts from, and the first arms are complete."""
    data = prepare_data(benchmark, folder)
    return [
        _job(benchmark, folder, data, classes, segmenter, name, seed)
        for name, arm in benchmark.arms.items()
        for classes in benchmark.classes.split()
        for seed in benchmark.seeds
        for segmenter in benchmark.segmenters
        if seed in (arm.seeds or [seed]) and segmenter in (arm.segmenters or [segmenter])
    ]


def _job(
    benchmark: FewShotBenchmark, folder: Path, data: dict[str, str], classes: str, segmenter: str, name: str, seed: int
) -> FewShotJob:
    arm, own = benchmark.arms[name], _folder(classes, segmenter, name, seed)
    record: dict[str, Any] = {"benchmark": benchmark.name, "segmenter": segmenter, "arm": name, "split": classes}
    record |= {"training_seed": seed}
    if arm.same is not None:
        needs = _folder(classes, segmenter, arm.same, seed)
        return FewShotJob(own, needs, None, record, arm.settings["fewshot.support_score"])
    recipe = benchmark.segmenters[segmenter]
    values = {**benchmark.settings, **recipe.settings, **arm.settings, **data}
    needs = None
    if arm.init is not None:
        needs = _folder(classes, segmenter, arm.init, seed)
        values |= {"model.init": str(folder / needs), "model.segmenter": None, "model.backbone_weights": None}
    values |= {"stage": "fewshot", "seed": seed, "fewshot.classes": classes}
    return FewShotJob(own, needs, training_settings(recipe.recipe, values, folder / own), record)


def _folder(classes: str, segmenter: str, name: str, seed: int) -> str:
    return f"runs/{classes}/{segmenter}/{name}/seed{seed}".replace(" ", "_").replace(":", "_")


def prepare_data(benchmark: FewShotBenchmark, folder: Path) -> dict[str, str]:
    """Makes what is to be made, once, and returns settings of training that say where the training data lies."""
    given = benchmark.data
    if given.scenes is None:
        found = {"data.train": given.train, "data.train_split": given.train_split}
        return {key: value for key, value in found.items() if value is not None}
    counts = dict(given.scenes)
    if set(counts) != {"train", "pool", "val"}:
        raise ConfigError(f"`data.scenes` holds a number for each of train, pool and val, got {counts}.")
    base = [name for name in LOOKS[24] if name not in NOVEL_LOOKS]
    for seed, name in enumerate(counts):
        place = folder / "data" / name
        with job_lock(folder / "locks" / name, wait=True):
            if not (place / "annotations" / "instances.json").is_file():
                shutil.rmtree(place, ignore_errors=True)  # what broke off: the annotations are written last
                write_scenes(place, counts[name], seed, looks=24, classes=base if name == "train" else None)
    return {"data.train": str(folder / "data" / "train")}


def _part(benchmark: FewShotBenchmark, folder: Path, part: str) -> InstanceDataset:
    """The rows of pool or val."""
    given = benchmark.data
    if given.scenes is not None:
        return load_dataset_rows(folder / "data" / part)
    if part == "pool" and given.pool is None:
        return load_dataset_rows(given.train, split=given.train_split)
    return load_dataset_rows(getattr(given, part), split=getattr(given, f"{part}_split"))


def run_few_shot_benchmark(benchmark: FewShotBenchmark, output: str, progress: bool = True) -> str:
    """Runs what is not finished yet and returns the tables as Markdown, which `results.md` holds too; `rows.jsonl` has
    one line a draw of supports, protocol, and right or wrong supports.

    Raises ConfigError when the folder holds another benchmark, and as training does.
    """
    folder = Path(output)
    claim_folder(folder, {"name": benchmark.name, "data": benchmark.data.as_dict()})
    jobs = few_shot_jobs(benchmark, folder)
    while waiting := [job for job in jobs if not _is_done(folder, job)]:
        free = [job for job in waiting if job.needs is None or (folder / job.needs / "model.safetensors").is_file()]
        if any(_try(benchmark, folder, job, progress) for job in free):
            _collect(benchmark, folder, jobs)
        else:
            time.sleep(2.0)  # others are at what these need
    return _collect(benchmark, folder, jobs)


def _is_done(folder: Path, job: FewShotJob) -> bool:
    return (folder / job.folder / "rows.jsonl").is_file()


def _try(benchmark: FewShotBenchmark, folder: Path, job: FewShotJob, progress: bool) -> bool:
    """Does a job unless another process is at it; whether it was done here."""
    from ..training.loop import train

    own = folder / job.folder
    with job_lock(folder / "locks" / job.folder.replace("/", "__")) as free:
        if not free or _is_done(folder, job):
            return False
        logger.info("%s ...", job.folder)
        if job.settings is not None and not (own / "training_summary.json").is_file():
            train(job.settings, resume=(own / "settings.json").is_file(), progress=progress)
        write_json_lines(own / "rows.jsonl", _rows(benchmark, folder, job))
        return True


def _rows(benchmark: FewShotBenchmark, folder: Path, job: FewShotJob) -> list[dict[str, Any]]:
    """All rows of a trained model."""
    own = folder / (job.folder if job.settings is not None else job.needs or "")
    summary = json.loads((own / "training_summary.json").read_text())
    pool, val = _part(benchmark, folder, "pool"), _part(benchmark, folder, "val")
    split = class_split(job.record["split"], [category["name"] for category in pool.categories], pool.name)
    facts = {key: summary[key] for key in ("steps", "seconds", "parameters", "parameters_trained", "hardware")}
    facts["novel_in_base"] = summary["settings"]["fewshot"]["novel_in_base"]
    record = {**job.record, **facts, **source_revision()}
    askings, seed = [Asking(ask) for ask in benchmark.ask], job.record["training_seed"]
    model, processor = load_few_shot(str(own))
    model.config.support_score = job.score or model.config.support_score
    order = np.random.default_rng(seed).permutation(len(split.base))[: benchmark.base].tolist()
    rows: list[dict[str, Any]] = []
    for part, names in (("novel", split.novel), ("base", [split.base[place] for place in sorted(order)])):
        if names:
            questions = Questions(names, part, benchmark.shots, [seed], askings, record=record)
            rows += few_shot_rows(model, processor, pool, val, questions)
    return rows


def _collect(benchmark: FewShotBenchmark, folder: Path, jobs: list[FewShotJob]) -> str:
    """Writes the rows and tables of what is finished."""
    done = [folder / job.folder / "rows.jsonl" for job in jobs if _is_done(folder, job)]
    rows = [json.loads(line) for file in done for line in file.read_text().splitlines()]
    if not rows:
        return ""
    write_json_lines(folder / "rows.jsonl", rows)
    parts = [f"# {benchmark.name}", benchmark.about.strip()]
    parts += ["Mask AP / AP50 in per cent, mean (deviation) over seeds of training and supports.", few_shot_page(rows)]
    arms = [f"* `{name}`: {arm.about}" for name, arm in benchmark.arms.items() if arm.about]
    text = "\n\n".join(part for part in [*parts, "\n".join(arms)] if part) + "\n"
    write_text(folder / "results.md", text)
    return text


def few_shot_page(rows: list[dict[str, Any]]) -> str:
    """The tables of rows, one a segmenter."""
    names = dict.fromkeys(row["segmenter"] for row in rows)
    own = {name: [row for row in rows if row["segmenter"] == name] for name in names}
    return "\n\n".join(f"## {name}\n\n{few_shot_table(own[name], ('arm',))}" for name in names)
