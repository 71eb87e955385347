"""The page of a benchmark, `report.html`: table, curves, pseudo labels beside the truth, predictions; one file.

It is written again whenever a job ends, so that there is something to look at while the others run.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data import InstanceDataset, load_dataset_rows
from ..data.dataset import Row
from ..evaluation.compare_page import draw_curves, figure_bytes
from ..evaluation.measures import shown_metrics, spelled
from ..evaluation.pages import render
from ..evaluation.predictor import load_segmenter, predict_dataset
from ..evaluation.visualize import overlay_uri
from ..files import write_text
from ..labeling.quality import precision_by_score, proposal_quality, row_keys
from ..models.errors import UserError
from ..models.thresholds import score_threshold
from ..training.build import build_data
from ..training.semantic_task import is_semantic
from .advice import advise
from .figures import curves_of, mean_text
from .plan import Job, label_folder
from .recipe import Benchmark
from .rows import labels_text, row_value, training_seconds
from .semantic import semantic_pairs
from .sources import Sources

logger = logging.getLogger(__name__)

SIDE = 480  # most pixels of an image on the page
SHOWN = 6  # images of each kind
MEASURED = 500  # images on which the quality of pseudo labels is measured


class Report:
    """Says in the log, and on the page, what has been finished since it was last asked.

    jobs: of the plan, in its order. done: folders of jobs -> what a job left there (`DONE` of `run`).
    """

    def __init__(self, benchmark: Benchmark, folder: Path, jobs: Sequence[Job], sources: Sources) -> None:
        self.benchmark, self.folder, self.jobs, self.sources = benchmark, folder, list(jobs), sources
        self._told: set[str] = set()
        self._labels: dict[str, dict[str, Any]] = {}

    def update(self, done: Sequence[Job]) -> None:
        """Writes the page again if `done`, the finished jobs, are more than before. A page that cannot be drawn is no
        reason to lose a benchmark: what was wrong is logged."""
        new = [job for job in done if job.folder not in self._told]
        if not new:
            return
        self._told |= {job.folder for job in new}
        try:
            self._write(done)
        except Exception as error:
            logger.warning("report.html could not be written: %s", error, exc_info=not isinstance(error, UserError))
        for job in new:
            logger.info("%s", self._sentence(job))

    def _sentence(self, job: Job) -> str:
        if job.row:
            row = json.loads((self.folder / job.folder / "row.json").read_text())
            numbers = ", ".join(f"{name} {mean_text([row], name)}" for name in shown_metrics(row["metrics"]))
            return f"{job.row['arm']}, seed {row['seed']}: {numbers}"
        if job.kind == "label":
            return f"Pseudo labels are there. Look at {self.folder / 'report.html'}, which grows while the rest runs."
        return f"{job.folder} is pre-trained."

    def _write(self, done: Sequence[Job]) -> None:
        finished = len(done) == len(self.jobs)
        for name in (job.label_set for job in done if job.kind == "label"):
            if name is not None and name not in self._labels:
                self._labels[name] = self._label_section(name)
        rows = [json.loads((self.folder / job.folder / "row.json").read_text()) for job in done if job.row]
        text = render(
            "benchmark",
            "report",
            name=self.benchmark.name,
            about=self.benchmark.about,
            done=len(done),
            jobs=len(self.jobs),
            advice=advise(rows) if finished else "",
            tables=[self._table(rows, name) for name in dict.fromkeys(row["segmenter"] for row in rows)],
            labels=list(self._labels.values()),
            predictions=self._predictions(done) if finished and rows else None,
        )
        write_text(self.folder / "report.html", text)

    def _table(self, rows: list[dict[str, Any]], segmenter: str) -> dict[str, Any]:
        """Lines of a segmenter in the order of the plan, and the one of best AP."""
        own = [row for row in rows if row["segmenter"] == segmenter]
        names = shown_metrics(own[0]["metrics"])
        lines = []
        for arm, count in dict.fromkeys((row["arm"], row["labels_per_class"]) for row in own):
            chosen = [row for row in own if (row["arm"], row["labels_per_class"]) == (arm, count)]
            values = [value for value in map(row_value, chosen) if value is not None]
            lines.append(
                {
                    "arm": arm + (" (class-agnostic AP)" if chosen[0]["class_agnostic"] else ""),
                    "about": self.benchmark.arms[arm].about if arm in self.benchmark.arms else "",
                    "labels": labels_text(count),
                    "numbers": [mean_text(chosen, name) for name in names],
                    "seconds": round(statistics.mean(map(training_seconds, chosen))),
                    "runs": len(chosen),
                    "value": statistics.mean(values) if values else -1.0,
                    "comparable": not chosen[0]["class_agnostic"],
                }
            )
        best = max((line for line in lines if line["comparable"]), key=lambda line: line["value"], default=None)
        curves = curves_of(own)
        several = any(len(arm.points) > 1 for arm in curves.arms)
        drawn = figure_bytes(draw_curves(curves), "svg").decode() if several else ""
        return {
            "segmenter": segmenter,
            "names": [spelled(names[0]), names[1]],
            "lines": lines,
            "best": best,
            "curves": drawn[drawn.find("<svg") :],
        }

    def _label_section(self, name: str) -> dict[str, Any]:
        """A label set: numbers, and its first images, beside the truth where that is known."""
        pseudo, truth = load_dataset_rows(self.folder / label_folder(name)), load_dataset_rows(**self.sources.unlabeled)
        section: dict[str, Any] = {"name": name, "images": len(pseudo), "quality": None, "groups": [], "pairs": []}
        section["masks"] = sum(len(row["objects"]["segmentation"]) for row in pseudo.rows)
        keys, true_keys = row_keys(pseudo, truth)
        known: dict[Any, Row] = {}
        if truth.categories:
            part = pseudo.subset(range(min(MEASURED, len(pseudo))))
            measured = proposal_quality(part, truth)  # nan, a share of nothing, is no number for people
            section["quality"] = {key: "none" if math.isnan(one) else f"{one:.2f}" for key, one in measured.items()}
            section["groups"] = precision_by_score(part, truth)
            known = dict(zip(true_keys, truth.rows, strict=True))
        for key, (index, row) in zip(keys, enumerate(pseudo.rows), strict=True):
            if index == SHOWN:
                break
            pair = [drawn(pseudo, index, row)]
            pair += [drawn(pseudo, index, known[key], truth)] if key in known else []
            section["pairs"].append(pair)
        return section

    def _predictions(self, done: Sequence[Job]) -> dict[str, Any]:
        """The first images of `val`: the truth, and what the last finished run of every arm finds, by segmenter."""
        last: dict[str, Job] = {}
        for job in done:
            if job.kind in ("finetune", "evaluate"):
                arm = (
                    job.row["arm"]
                    if len(self.benchmark.segmenters) == 1
                    else f"{job.row['segmenter']}, {job.row['arm']}"
                )
                most = last[arm].settings.data.labels_per_class if arm in last else None
                given = job.settings.data.labels_per_class
                if not isinstance(most, int) or not isinstance(given, int) or given >= most:
                    last[arm] = job
        first = next(iter(last.values()))
        _, val = build_data(first.settings)
        models = {
            arm: str(self.folder / (job.folder if job.kind == "finetune" else job.needs[0]))
            for arm, job in last.items()
        }
        if is_semantic(first.settings.model):
            arm, model = list(models.items())[-1]
            return {"names": [arm, "truth"], "lines": semantic_pairs(model, val, SHOWN, SIDE), "note": ""}
        shown = val.subset(range(min(SHOWN, len(val))))
        columns = [[drawn(shown, index, row) for index, row in enumerate(shown.rows)]]
        columns += [predicted_images(model, shown) for model in models.values()]
        return {
            "names": ["truth", *models],
            "lines": [list(line) for line in zip(*columns, strict=True)],
            "note": "Each model from its own score on, with the most labels and the last seed. ",
        }


def predicted_images(folder: str, dataset: InstanceDataset) -> list[str]:
    """The images of a dataset as data URIs, with what the model of a folder finds on them."""
    model, processor = load_segmenter(folder)
    threshold = score_threshold(model.config)
    images = []
    for index, (_, found) in enumerate(predict_dataset(model, processor, dataset, threshold=threshold, progress=False)):
        labels, scores = found["labels"].tolist(), found["scores"].tolist()
        image = dataset.load_image(index)
        images.append(overlay_uri(image, found["rle"], labels, scores, model.config.id2label, SIDE))
    return images


def drawn(dataset: InstanceDataset, index: int, row: Row, names: InstanceDataset | None = None) -> str:
    """The image of a dataset with the objects of a row. names: the dataset that the row is of, if another."""
    categories = (names or dataset).categories
    place = {category["id"]: number for number, category in enumerate(categories)}
    labels = [place[category] for category in row["objects"]["category_id"]]
    id2label = {number: category["name"] for number, category in enumerate(categories)}
    return overlay_uri(dataset.load_image(index), row["objects"]["segmentation"], labels, None, id2label, SIDE)


__all__ = ["Report", "drawn", "predicted_images"]
