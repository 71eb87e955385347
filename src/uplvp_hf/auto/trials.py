"""The second stage: which mask source finds what the few labels show, cross-validated on the labeled images."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..data import InstanceDataset, load_dataset_rows
from ..data.store_reader import read_store
from ..files import write_json
from ..labeling import label_images
from ..labeling.build import Builder, Names
from ..labeling.catalog import label_settings
from ..labeling.quality import proposal_quality
from ..models.errors import UserError
from ..settings import build_settings, merge_words
from .request import Request

logger = logging.getLogger(__name__)

BASELINE = "center box"
# A source has to beat the baseline, and this: with fewer right masks hours of training would be spent on noise.
LEAST_F1 = 0.1
_NAMES = {field.name for field in dataclasses.fields(Names)}


@dataclass(frozen=True)
class Source:
    """A way to make pseudo labels. label: the arguments of `uplvp label` by name, as `labels.NAME.label` of a
    benchmark takes them. They lack the examples where the labels at hand are to be these."""

    name: str
    label: dict[str, Any]


def candidate_sources(request: Request, backbone: dict[str, Any], classes: list[str]) -> list[Source]:
    """What can be tried with the networks and files that are named, and the baseline. backbone: arguments of
    `uplvp label` for the network that looks at images, and masks where no other does.

    Raises UserError for a source that is asked for and not among them.
    """
    named = {"namer": "examples", "examples": request.examples}
    sources = [Source(name, {"labeler": name, **backbone, **named}) for name in ("foreground", "saliency", "ncut")]
    apart = {**backbone.get("settings", {}), "labeler.split": "shape"}  # groups of objects, at their necks
    sources.insert(1, Source("foreground, split", {**sources[0].label, "settings": apart}))
    if request.clip is not None:
        clip = {"labeler": "clip", "clip": request.clip, "vocabulary": request.vocabulary or ",".join(classes)}
        sources.append(Source("clip", {**clip, "namer": "clip"}))
        sources.append(Source("clip, named by examples", {**clip, **named}))
    if request.model is not None:
        sources.append(Source("sam", {"labeler": "sam", "model": request.model, **backbone, **named}))
    if request.masks is not None:
        sources.append(Source("masks of the file", {"labeler": "file", "masks": request.masks, **backbone, **named}))
    if unknown := sorted(set(request.sources) - {source.name for source in sources}):
        known = ", ".join(source.name for source in sources)
        raise UserError(f"--sources: no mask source {unknown[0]!r} among those that are named here: {known}")
    sources = [source for source in sources if not request.sources or source.name in request.sources]
    return [*sources, Source(BASELINE, {"labeler": "center_box", **backbone, **named})]


def try_sources(
    sources: list[Source], request: Request, folder: Path, labeled: Path, folds: int, again: bool = True
) -> list[dict]:
    """One record a source, best first: name, label, error or {f1, quality, seconds_per_image, load_seconds}.

    What was measured in `folder` already is not tried again; what could not run is, if `again`.
    """
    trials = []
    for number, source in enumerate(sources, start=1):
        file = trial_folder(folder, source.name) / "trial.json"
        trial = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if not file.is_file() or (again and "error" in trial):  # perhaps for want of a network, which is there now
            logger.info("Trying mask source %d of %d, %s ...", number, len(sources), source.name)
            trial = _try(source, request, file.parent, labeled, folds)
            write_json(file, trial)
        logger.info("  %s", sentence(trial))
        trials.append(trial)
    return sorted(trials, key=lambda trial: -trial.get("f1", -1.0))


def trial_folder(folder: Path, name: str) -> Path:
    """Where a source's trial lies in the folder of all."""
    return folder / name.replace(" ", "_").replace(",", "")


def choose(trials: list[dict]) -> dict | None:
    """The source to label with, or None where none is good enough. trials: best first."""
    floor = max([LEAST_F1, *(trial["f1"] for trial in trials if trial["name"] == BASELINE and "f1" in trial)])
    good = [trial for trial in trials if trial["name"] != BASELINE and trial.get("f1", 0.0) > floor]
    return good[0] if good else None


def sentence(trial: dict) -> str:
    """A trial in words."""
    if "error" in trial:
        return f"{trial['name']} cannot run here: {trial['error']}"
    quality = trial["quality"]
    return (
        f"{trial['name']}: finds {quality['recall']:.0%} of the objects ({quality['recall_named']:.0%} with the right "
        f"class), {quality['precision_named'] or 0:.0%} of its masks are right, {trial['seconds_per_image']:.2f} s an "
        "image"
    )


def _try(source: Source, request: Request, folder: Path, labeled: Path, folds: int) -> dict[str, Any]:
    try:
        return {"name": source.name, "label": source.label, **_measure(source, request, folder, labeled, folds)}
    except (UserError, OSError, ImportError, SafetensorError) as error:
        return {"name": source.name, "label": source.label, "error": " ".join(str(error).split())[:300]}


def _measure(source: Source, request: Request, folder: Path, labeled: Path, folds: int) -> dict[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)  # what broke off
    predicted: list[Any] = []
    true: list[Any] = []
    seconds, load = 0.0, 0.0
    for number in range(folds):
        fold = load_dataset_rows(labeled, split=f"fold{number}")
        # One image alone has no others that could name its masks.
        rest = labeled / "annotations" / (f"rest{number}.json" if folds > 1 else f"fold{number}.json")
        label = source.label | ({"examples": str(rest)} if source.label.get("examples", "") is None else {})
        began = time.perf_counter()
        labeler, namer = build_source(label, request.device)
        load = time.perf_counter() - began
        store = folder / f"fold{number}"
        summary = label_images(fold, labeler, namer, store, progress=False)
        seconds += summary.seconds
        predicted += list(read_store(store).rows) if summary.done else []
        true += fold.rows
    truth = InstanceDataset(true, fold.categories, "labels")
    quality = proposal_quality(InstanceDataset(predicted, fold.categories, source.name), truth, average_precision=True)
    plain = {key: None if math.isnan(value) else round(value, 4) for key, value in quality.items()}
    found, right = plain["recall_named"] or 0.0, plain["precision_named"] or 0.0
    return {
        "f1": round(2 * found * right / (found + right), 4) if found + right else 0.0,
        "quality": plain,
        "seconds_per_image": round(seconds / len(true), 4),
        "load_seconds": round(load, 2),
    }


def build_source(label: dict[str, Any], device: str | None) -> tuple[Any, Any]:
    """Labeler and namer of arguments of `uplvp label`. Raises UserError and OSError as `Builder` does."""
    values: dict[str, Any] = {}
    for key, value in (label.get("settings") or {}).items():
        merge_words(values, [f"{key}={value}"])
    settings = build_settings(label_settings(label["labeler"], label["namer"]), values)
    given = {key: value for key, value in label.items() if key in _NAMES}
    builder = Builder(Names(**given, device=device), settings)
    return builder.labeler(), builder.namer()
