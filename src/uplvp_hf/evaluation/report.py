"""One self-contained HTML page about an evaluation, and its classes as a CSV table."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from uplvp_hf.data import DataError, ImageError, InstanceDataset
from uplvp_hf.files import replacing, write_text

from .compare_page import figure_svg
from .examples import Examples
from .pages import render
from .visualize import overlay_uri

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE = 560  # px, longer side of an example
MOST_FAILURES = 100  # listed; the rest is counted
CLASS_COLUMNS = ("id", "name", "AP", "AP50", "AP75", "AR100", "annotations", "crowds", "detections")


def write_class_table(path: str | os.PathLike[str], metrics: Mapping[str, Any]) -> None:
    """Writes the classes of `evaluate_model(details=True)` as CSV, a row each; what cannot be computed is empty."""
    with replacing(path) as stream:
        writer = csv.DictWriter(stream, CLASS_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(metrics["details"]["classes"])


def write_evaluation_page(
    path: str | os.PathLike[str],
    metrics: Mapping[str, Any],
    examples: Examples,
    dataset: InstanceDataset,
    names: Mapping[int, str],
    source: Mapping[str, Any],
) -> None:
    """Writes the page in one step.

    Args:
        path: of the page.
        metrics: of `evaluate_model(details=True)`.
        examples: filled with the same predictions and references.
        dataset: the evaluated images.
        names: of the labels of the predictions.
        source: shown as settings; `model`, `data`, `split` and `metric` also in the text.

    Raises OSError when it cannot be written.
    """
    groups, places, curves = examples.groups(), {}, metrics["details"]["curves"]
    wanted = {entry["image_id"] for entries in groups.values() for entry in entries}
    for index in range(len(dataset)):
        if dataset.image_id(index) in wanted:
            places[dataset.image_id(index)] = index
    titles = {"best": "Best images", "worst": "Worst images"}
    page = render(
        "evaluation",
        "evaluation",
        metrics=metrics,
        names=[name for name in metrics["details"]["class_agnostic"] if name in metrics],
        classes=sorted(metrics["details"]["classes"], key=lambda row: -1 if row["AP"] is None else row["AP"])[::-1],
        curves=curves and figure_svg(draw_precision(curves)),
        findings=metrics["findings"],
        scores=figure_svg(draw_scores(metrics["findings"])),
        examples=examples,
        seen=any(entry["rle"] for entries in groups.values() for entry in entries),
        groups=[
            (titles[name], [_drawn(entry, places[entry["image_id"]], dataset, names) for entry in entries])
            for name, entries in groups.items()
            if entries
        ],
        failures=metrics["failures"][:MOST_FAILURES],
        source=source,
    )
    write_text(path, page)


def _drawn(entry: Mapping[str, Any], index: int, dataset: InstanceDataset, names: Mapping[int, str]) -> dict[str, Any]:
    """Prediction and truth over the image, with a caption."""
    row, quality = dataset[index], entry["quality"]
    counts = f"{quality.annotations} annotated, {quality.detections} detected, {quality.matched} matched"
    text = f"quality {quality.value:.2f}: {counts}"
    drawn = {"name": row["file_name"], "text": text, "prediction": None, "truth": None}
    objects, true_names = row["objects"], {category["id"]: category["name"] for category in dataset.categories}
    try:
        image = dataset.load_image(index)
        drawn["prediction"] = overlay_uri(image, entry["rle"], entry["labels"], entry["scores"], names, SIDE)
        drawn["truth"] = overlay_uri(image, objects["segmentation"], objects["category_id"], None, true_names, SIDE)
    except (ImageError, DataError) as error:  # the file was replaced since it was evaluated
        drawn["text"] += f" ({error.reason})"
    return drawn


def draw_precision(curves: Mapping[str, Any]) -> Figure:
    """Precision against recall: the mean over the IoU thresholds, and two of them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 3.4), layout="constrained")
    axes = figure.subplots()
    for key, title in (("mean", "mean of IoU .50 to .95"), ("0.50", "IoU .50"), ("0.75", "IoU .75")):
        axes.plot(curves["recall"], curves["precision"][key], label=title)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def draw_scores(findings: Mapping[str, Any]) -> Figure:
    """Left: precision, recall and F1 against the least score. Right: how often detections of a score are right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    curve, bins = findings["curve"], findings["calibration"]["bins"]
    for name in ("precision", "recall", "f1"):
        left.plot(curve["threshold"], curve[name], label=name.replace("f1", "F1"))
    for at, style in zip(findings["at"], (":", "--")):
        left.axvline(at["threshold"], color="#666", linestyle=style, linewidth=1)
    left.set(xlabel="least score", xlim=(0, 1), ylim=(0, 1))
    left.legend(fontsize=8)
    right.plot([0, 1], [0, 1], color="#999", linestyle=":", linewidth=1)
    right.bar([row["low"] + 0.05 for row in bins], [row["precision"] for row in bins], width=0.09, alpha=0.8)
    right.plot([row["score"] for row in bins], [row["precision"] for row in bins], "o", color="#222", markersize=4)
    right.set(xlabel="score", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure
