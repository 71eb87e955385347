"""What `uplvp evaluate` writes about a semantic segmenter: its classes as CSV, and a page with the best and worst
images."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from uplvp_hf.data import InstanceDataset
from uplvp_hf.files import replacing, write_text

from ..data.semantic import label_map, semantic_view
from .classes import match_category_ids
from .pages import render
from .report import MOST_FAILURES, SIDE
from .semantic import segment_dataset
from .visualize import class_colors, label_map_uri

COUNT = 6  # images of each kind on the page
CLASS_COLUMNS = ("id", "name", "IoU", "accuracy", "labeled", "predicted", "taken_for", "taken_share")


def write_semantic_classes(path: str | os.PathLike[str], metrics: Mapping[str, Any]) -> None:
    """Writes `classes` of `evaluate_semantic` as CSV, a row each; what cannot be computed is empty."""
    with replacing(path) as stream:
        writer = csv.DictWriter(stream, CLASS_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(metrics["classes"])


def best_and_worst(images: Sequence[Mapping[str, Any]], count: int) -> dict[str, list[Mapping[str, Any]]]:
    """{"best", "worst"}: at most so many images with labels each, by accuracy; none is in both."""
    rated = sorted(
        (one for one in images if one["accuracy"] is not None), key=lambda one: (-one["accuracy"], one["file_name"])
    )
    best = rated[: max(1, min(count, len(rated) // 2))]
    return {"best": best, "worst": rated[len(best) :][::-1][:count]}


def write_semantic_page(
    path: str | os.PathLike[str],
    metrics: Mapping[str, Any],
    images: Sequence[Mapping[str, Any]],
    segmenter: tuple[Any, Any],
    dataset: InstanceDataset,
    source: Mapping[str, Any],
    **options: Any,
) -> None:
    """Writes the page in one step.

    Args:
        path: of the page.
        metrics: of `evaluate_semantic`.
        images: `image_id`, `file_name`, `accuracy` and `pixels` of every image.
        segmenter: model and image processor; the images that are shown are predicted once more.
        dataset: the evaluated images.
        source: shown as settings; `model`, `data` and `split` also in the text.
        options: of `segment_dataset`, as in the evaluation; those with `swap_prompts` show the images' own prompts.
    """
    model, processor = segmenter
    groups, count = best_and_worst(images, COUNT), len(model.config.id2label)
    view = semantic_view(dataset)
    order = [view.category_ids.index(category) for category in match_category_ids(model.config, view)]
    to_model = np.full(max(count, *order) + 2, count)  # the last one is for pixels without a label
    to_model[order] = np.arange(count)
    place = {view.image_id(index): index for index in range(len(view))}
    options = {**options, "swap_prompts": False}

    def drawn(entry: Mapping[str, Any]) -> dict[str, Any]:
        text = f"{100 * entry['accuracy']:.1f} % of {entry['pixels']:,} labeled pixels are right"
        shown = {"name": entry["file_name"], "text": text, "prediction": None, "truth": None}
        one = view.subset([place[entry["image_id"]]])
        for _, _, found in segment_dataset(model, processor, one, progress=False, **options):
            image = one.load_image(0)
            true = to_model[np.minimum(label_map(one, 0), len(to_model) - 1)]
            shown["prediction"], shown["truth"] = (label_map_uri(image, ids, count, SIDE) for ids in (found, true))
        return shown

    colors = ["#" + bytes(color.round().astype(np.uint8)).hex() for color in class_colors(count)]
    classes = [{**row, "color": color} for row, color in zip(metrics["classes"], colors, strict=True)]
    titles = {"best": "Best images", "worst": "Worst images"}
    page = render(
        "evaluation",
        "semantic",
        metrics=metrics,
        classes=sorted(classes, key=lambda row: -1 if row["IoU"] is None else row["IoU"])[::-1],
        groups=[(titles[name], [drawn(entry) for entry in entries]) for name, entries in groups.items() if entries],
        failures=metrics["failures"][:MOST_FAILURES],
        source=source,
    )
    write_text(path, page)


__all__ = ["best_and_worst", "write_semantic_classes", "write_semantic_page"]
