"""The page of `uplvp auto`, `report.html`: what was tried, what was chosen and why, predictions beside the truth, and
what would help most next. It is written again after every stage."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from ..benchmark.report import drawn, predicted_images
from ..data import load_dataset_rows
from ..data.store_reader import read_store
from ..evaluation.pages import render
from ..files import write_text
from ..models.errors import UserError
from .advice import noise
from .estimate import in_words, minutes
from .trials import trial_folder

logger = logging.getLogger(__name__)

_SHOWN = 4  # images of a mask source
_PREDICTED = 12


def write_page(folder: Path) -> None:
    """Writes what is known so far. A page that cannot be drawn is no reason to lose a run: the fault is logged."""
    try:
        write_text(folder / "report.html", _render(folder))
    except Exception as error:
        logger.warning("report.html could not be written: %s", error, exc_info=not isinstance(error, UserError))


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _render(folder: Path) -> str:
    data, choice = _read(folder / "data" / "data.json"), _read(folder / "choice.json")
    sources, estimate = _read(folder / "sources.json"), _read(folder / "estimate.json")
    return render(
        "auto",
        "report",
        folder=folder,
        data=data,
        sources=sources and {**sources, "pairs": _masks(folder, sources)},
        estimate=estimate and {**estimate, "words": in_words(estimate)},
        took=choice and minutes(choice["seconds"]),
        choice=choice,
        noise=noise(data["val_instances"]),
        pairs=_predictions(folder, data, choice) if choice else [],
    )


def _masks(folder: Path, sources: dict[str, Any]) -> list[list[str]]:
    """First masks of the source that is taken, or of the best one, beside the truth."""
    store = trial_folder(folder / "sources", sources["chosen"] or sources["trials"][0]["name"]) / "fold0"
    if not (store / "header.json").is_file():
        return []
    ours, truth = read_store(store), load_dataset_rows(folder / "data" / "labeled", split="fold0")
    true_rows = {row["image_id"]: row for row in truth.rows}
    shown = range(min(_SHOWN, len(ours)))
    return [[drawn(ours, k, ours[k]), drawn(ours, k, true_rows[ours[k]["image_id"]], truth)] for k in shown]


def _predictions(folder: Path, data: dict[str, Any], choice: dict[str, Any]) -> list[list[str]]:
    val = load_dataset_rows(folder / "data" / ("labeled" if data["held_out"] else "val"), split="val")
    shown = val.subset(range(min(_PREDICTED, len(val))))
    ours = predicted_images(str(folder / "runs" / choice["run"]), shown)
    return [[image, drawn(shown, index, shown.rows[index])] for index, image in enumerate(ours)]
