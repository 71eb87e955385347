"""`uplvp auto`: the stages one after the other. What a stage has finished is not done again by a second call."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from ..benchmark.plan import Job, Sources, make_plan
from ..benchmark.recipe import Benchmark, load_benchmark
from ..benchmark.rows import read_rows
from ..benchmark.run import run_benchmark
from ..files import new_folder, only_run, write_json, write_text
from ..models.errors import UserError
from ..training.loop import train
from .advice import advise
from .estimate import in_words, make_estimate
from .page import write_page
from .parts import prepare_parts
from .request import Request
from .starts import Start, possible_starts
from .trials import candidate_sources, choose, sentence, try_sources

logger = logging.getLogger(__name__)

PLAIN, PRETRAINED, HALF = "no pre-training", "pre-trained", "half the labels"
LABELS = "chosen"
_LEAST_HALVED = 6  # labeled images; half of fewer says nothing


def run_auto(request: Request, output: str, progress: bool = True) -> dict[str, Any]:
    """Runs what is not finished yet, and returns what `choice.json` in `output` holds.

    `output` then has `model/`, for `uplvp predict`, `export` and `push`, `report.html`, and a folder a stage.
    Raises UserError for arguments and data that cannot be used, and as `run_benchmark` and `train` do.
    """
    folder = Path(output)
    with only_run(folder):
        request.claim(folder)
        return _Auto(request, folder, progress).go()


@dataclass
class _Auto:
    request: Request
    folder: Path
    progress: bool

    def go(self) -> dict[str, Any]:
        try:
            data = prepare_parts(self.request, self.folder / "data")
        except (UserError, OSError):
            self.request.release(self.folder)  # nothing was begun: the folder takes the mended arguments
            raise
        logger.info(
            "%d labeled images (%d objects of %d classes): %d to learn from, %d to decide by. %d images to label.",
            data["labeled"], sum(data["instances"].values()), len(data["classes"]), data["train"], data["val"],
            data["images"],
        )  # fmt: skip
        write_page(self.folder)
        benchmark, jobs = self._decide(data)
        run_benchmark(benchmark, str(self.folder / "runs"), progress=self.progress)
        choice = self._choose(data, jobs)
        self._refit(data, jobs, choice)
        write_page(self.folder)
        return choice

    def _decide(self, data: dict[str, Any]) -> tuple[Benchmark, list[Job]]:
        """Source, start and estimate; the strongest start that can be loaded and fits into memory."""
        chosen = self._source(data)
        file, recipe = self.folder / "estimate.json", self.folder / "benchmark.yaml"
        if file.is_file():
            benchmark = load_benchmark(str(recipe), self.request.words)
            logger.info("%s in all, as estimated before.", in_words(json.loads(file.read_text())))
            return benchmark, self._plan(benchmark)
        faults = []
        for name, start in possible_starts(self.request).items():
            write_text(recipe, yaml.safe_dump(self._recipe(data, chosen, name, start), sort_keys=False))
            benchmark = load_benchmark(str(recipe), self.request.words)
            jobs = self._plan(benchmark)
            try:
                estimate = make_estimate(
                    jobs, data["held_out"], chosen, data["images"], str(self.folder / "data" / "labeled")
                )
            except (torch.OutOfMemoryError, OSError, UserError) as error:
                faults.append(f"{name}: {' '.join(str(error).split())[:300]}")
                logger.warning("Start %s cannot be used here: %s", name, faults[-1])
                continue
            write_json(file, {**estimate, "start": name, "about": start.about, "faults": faults})
            logger.info("Training starts from %s.\n%s from here on.", start.about, in_words(estimate))
            write_page(self.folder)
            return benchmark, jobs
        raise UserError(f"nothing to start from: {'; '.join(faults)}")

    def _source(self, data: dict[str, Any]) -> dict | None:
        backbone = next(iter(reversed(possible_starts(self.request).values()))).backbone
        sources = candidate_sources(self.request, backbone, data["classes"])
        labeled = self.folder / "data" / "labeled"
        open_still = not (self.folder / "estimate.json").is_file()
        trials = try_sources(sources, self.request, self.folder / "sources", labeled, data["folds"], open_still)
        chosen = choose(trials)
        if chosen is None:
            logger.warning("No mask source is good enough: nothing is labeled or pre-trained.")
        else:
            logger.info("Masks come from %s", sentence(chosen))
        write_json(self.folder / "sources.json", {"trials": trials, "chosen": chosen and chosen["name"]})
        write_page(self.folder)
        return chosen

    def _recipe(self, data: dict[str, Any], chosen: dict | None, name: str, start: Start) -> dict[str, Any]:
        """The benchmark that decides: with and without pre-training, and with half of the labels."""
        base = self.folder.resolve() / "data"
        val = base / ("labeled" if data["held_out"] else "val")
        better = {"labels": LABELS} if chosen else {}
        arms: dict[str, Any] = {PLAIN: {"labels_per_class": ["100%"]}}
        arms |= {PRETRAINED: {**better, "labels_per_class": ["100%"]}} if chosen else {}
        halved = data["train"] >= _LEAST_HALVED
        arms |= {HALF: {**better, "labels_per_class": ["50%strat"]}} if halved else {}
        content: dict[str, Any] = {
            "name": "auto",
            "data": {
                "train": str(base / "labeled"),
                "train_split": "train",
                "val": str(val),
                "val_split": "val",
                "unlabeled": str(base / "images.txt"),
            },
            "segmenters": {name: {**dict(zip(("pretrain", "finetune"), start.recipes)), "settings": start.settings}},
            "arms": arms,
            "labels_per_class": ["100%", *(["50%strat"] if halved else [])],
            "seeds": [self.request.seed],
            "curve": [0.5],
        }
        if chosen is not None:
            label = dict(chosen["label"])
            if label.get("examples", "") is None:
                label["examples"] = str(base / "labeled" / "annotations" / "train.json")
            content["labels"] = {LABELS: {"label": label}}
        return content

    def _plan(self, benchmark: Benchmark) -> list[Job]:
        given = benchmark.data
        train = {"train": str(given.train), "train_split": str(given.train_split)}
        val = {"val": str(given.val), "val_split": str(given.val_split)}
        return make_plan(benchmark, self.folder / "runs", Sources(train, val, {"path": str(given.unlabeled)}))

    def _choose(self, data: dict[str, Any], jobs: list[Job]) -> dict[str, Any]:
        """The arm of better AP on the images kept aside; of equal ones the pre-trained one."""
        rows = {row["arm"]: row for row in read_rows(self.folder / "runs" / "rows.jsonl")}
        arms = [arm for arm in (PRETRAINED, PLAIN) if arm in rows]
        best = max(arms, key=lambda arm: rows[arm]["metrics"]["AP"] or 0.0)
        job = next(job for job in jobs if job.row.get("arm") == best)
        results = {
            arm: {"metrics": row["metrics"], "curve": row["curve"], "findings": row.get("findings")}
            for arm, row in rows.items()
        }
        choice = {"arm": best, "run": job.folder, "results": results, "advice": advise(data, rows, best)}
        # Labeling and pre-training are shared by all arms that have them.
        once = {row["pretrain"]["seconds"] + row["label"]["seconds"] for row in rows.values() if row["pretrain"]}
        choice["seconds"] = sum(row["finetune"]["seconds"] for row in rows.values()) + sum(once)
        write_json(self.folder / "choice.json", choice)
        logger.info(
            "%s is taken: AP %s on the images kept aside.", best,
            ", ".join(f"{100 * (rows[arm]['metrics']['AP'] or 0):.1f} ({arm})" for arm in arms),
        )  # fmt: skip
        return choice

    def _refit(self, data: dict[str, Any], jobs: list[Job], choice: dict[str, Any]) -> None:
        """`model/`: the chosen arm, trained once more on all labels where a part of them was held out."""
        if (self.folder / "model" / "config.json").is_file():
            return
        trained = self.folder / "runs" / choice["run"]
        if data["held_out"]:
            given = next(job.settings for job in jobs if job.folder == choice["run"])
            assert given is not None
            trained = self.folder / "refit"
            settings = dataclasses.replace(
                given,
                output=str(trained),
                data=dataclasses.replace(given.data, train_split="all", val=None, val_split=None),
                evaluation=dataclasses.replace(given.evaluation, at=[], every=0, every_epochs=None),
            )
            logger.info("Training on all %d labeled images ...", data["labeled"])
            if not (trained / "training_summary.json").is_file():
                train(settings, resume=(trained / "settings.json").is_file(), progress=self.progress)
        with new_folder(self.folder / "model") as draft:
            shutil.copytree(trained, draft, dirs_exist_ok=True, ignore=shutil.ignore_patterns("checkpoint-*", ".lock"))
            _carry_threshold(self.folder / "runs" / choice["run"] / "config.json", draft / "config.json")


def _carry_threshold(measured: Path, config: Path) -> None:
    """The score from which on instances are shown was measured on the images kept aside; the last training had none."""
    found = json.loads(measured.read_text(encoding="utf-8")).get("default_threshold")
    content = json.loads(config.read_text(encoding="utf-8"))
    if found is not None and content.get("default_threshold") is None:
        write_json(config, {**content, "default_threshold": found})
