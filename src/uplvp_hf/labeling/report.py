"""One self-contained HTML page about a pseudo-label store: counts, distributions, examples, agreement with truth."""

from __future__ import annotations

import math
import os
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from ..data import DataError, ImageError, InstanceDataset, Row, load_dataset_rows, open_image
from ..data.store_reader import read_failures, read_header, read_store, shard_files, stream_store
from ..files import write_text
from .quality import proposal_quality, row_keys
from .signs import Signs
from .store import flatten

SCORE_EDGES = np.linspace(0, 1, 21)
AREA_EDGES = 10.0 ** np.linspace(-4, 0, 17)  # shares of the image
MOST_INSTANCES = 20  # last bar: so many or more
SIDE = 560  # px, longer side of an example
MOST_FAILURES = 100  # listed; the rest is counted


@dataclass
class Statistics:
    """Of the rows of a store. Grows by two numbers an image, so that a store of millions of images fits.

    image_scores: mean score of each image's instances, NaN without any, in the order of the rows.
    """

    images: int = 0
    instances: int = 0
    image_scores: array = field(default_factory=lambda: array("f"))
    per_image: Counter[int] = field(default_factory=Counter)
    per_class: Counter[int] = field(default_factory=Counter)
    images_with_class: Counter[int] = field(default_factory=Counter)
    class_score: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    class_area: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    scores: np.ndarray = field(default_factory=lambda: np.zeros(len(SCORE_EDGES) - 1, np.int64))
    areas: np.ndarray = field(default_factory=lambda: np.zeros(len(AREA_EDGES) - 1, np.int64))

    def add(self, row: Row) -> None:
        """Counts one row."""
        objects = row["objects"]
        scores = np.asarray(objects["score"], dtype=np.float64)
        shares = np.asarray(objects["area"], dtype=np.float64) / (row["width"] * row["height"])
        self.images += 1
        self.instances += len(scores)
        self.image_scores.append(float(scores.mean()) if len(scores) else math.nan)
        self.per_image[min(len(scores), MOST_INSTANCES)] += 1
        self.images_with_class.update(set(objects["category_id"]))
        for category_id, score, share in zip(objects["category_id"], scores.tolist(), shares.tolist()):
            self.per_class[category_id] += 1
            self.class_score[category_id] += score
            self.class_area[category_id] += share
        self.scores += np.histogram(scores.clip(0, 1), SCORE_EDGES)[0]
        self.areas += np.histogram(shares.clip(AREA_EDGES[0], 1), AREA_EDGES)[0]

    def examples(self, count: int) -> dict[str, list[int]]:
        """Numbers of the rows of best, median and worst mean score, `count` of each, no row twice; and of images
        without instances, spread over the store."""
        scores = np.frombuffer(self.image_scores, dtype=np.float32) if self.images else np.zeros(0, np.float32)
        order = np.argsort(-scores, kind="stable")[: int((~np.isnan(scores)).sum())]  # NaN is sorted to the end
        taken = min(count, math.ceil(len(order) / 3))
        best, worst = order[:taken], order[taken:][::-1][:taken][::-1]
        between = order[taken : len(order) - len(worst)]
        start = max(0, (len(between) - taken) // 2)
        empty = np.nonzero(np.isnan(scores))[0]
        spread = empty[np.linspace(0, len(empty) - 1, min(count, len(empty))).astype(int)] if len(empty) else empty
        groups = {"best": best, "median": between[start : start + taken], "worst": worst, "empty": spread}
        return {name: [int(number) for number in numbers] for name, numbers in groups.items()}


def write_report(
    store: str | os.PathLike[str],
    path: str | os.PathLike[str],
    truth: str | os.PathLike[str] | InstanceDataset | None = None,
    examples: int = 6,
    other: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Writes the page in one step, and returns its numbers (plain values; what cannot be computed is None).

    Args:
        store: folder of a store; it may be unfinished, or hold no image at all.
        path: of the page.
        truth: true instances of the same images, anything that `load_dataset_rows` reads. Adds recall and precision
            at IoU .5, mean best IoU and AP, without and with classes, and draws the truth beside the examples.
        other: labels of the same images by another source, such as a second store. Low agreement is a sign that one
            of the two fails.
        examples: images of best, median and worst mean score to show, and of those without instances.

    The numbers hold `signs`, sentences that say why the source may be failing, which the page shows first.
    Without `truth` and `other`, memory holds one shard and eight numbers an image; with them, the rows of both sides.
    Raises DataError for a store or truth that cannot be read, or that share no image; OSError for the page.
    """
    header = read_header(store)
    if truth is not None and not isinstance(truth, InstanceDataset):
        truth = load_dataset_rows(truth)
    statistics, signs = Statistics(), Signs()
    failed = {str(entry["file"]): entry for entry in read_failures(store)}
    for row in _rows(store):
        statistics.add(row)
        signs.add(row)
        for name in (row["image"], row["file_name"]):  # a killed run did not strike out what it labeled in the end
            failed.pop(name, None)
    failures = list(failed.values())
    numbers = _numbers(statistics, failures, header)
    compared = (truth is not None or other is not None) and statistics.images
    stored = read_store(store) if compared else None
    numbers["quality"] = None if truth is None or stored is None else _quality(stored, truth)
    numbers["agreement"] = None if other is None or stored is None else _agreement(stored, load_dataset_rows(other))
    names = {category["id"]: category["name"] for category in header["categories"]}
    numbers["signs"] = signs.texts(statistics.per_image, statistics.per_class, names, numbers["agreement"])
    chosen = statistics.examples(examples)
    true_rows = {} if truth is None or stored is None else _truth_of(stored, truth, chosen)
    images = _draw_examples(store, header, chosen, true_rows, truth)
    write_text(path, _page(store, header, statistics, numbers, failures, chosen, images))
    return numbers


def _rows(store: str | os.PathLike[str]) -> Iterator[Row]:
    return iter(stream_store(store)) if shard_files(store) else iter(())


def _numbers(statistics: Statistics, failures: list[dict], header: Mapping[str, Any]) -> dict[str, Any]:
    classes = []
    for category in header["categories"]:
        key = category["id"]
        count = statistics.per_class[key]
        entry = {"name": category["name"], "instances": count, "images": statistics.images_with_class[key]}
        entry["mean_score"] = statistics.class_score[key] / count if count else None
        entry["mean_area"] = statistics.class_area[key] / count if count else None
        classes.append(entry)
    return {
        "done": statistics.images,
        "failed": len(failures),
        "empty": statistics.per_image[0],
        "instances": statistics.instances,
        "instances_per_image": statistics.instances / statistics.images if statistics.images else None,
        "classes": classes,
    }


def _quality(stored: InstanceDataset, truth: InstanceDataset) -> dict[str, float | None]:
    values = proposal_quality(stored, truth, average_precision=True)
    return {name: None if math.isnan(value) else value for name, value in values.items()}


def _agreement(stored: InstanceDataset, other: InstanceDataset) -> float | None:
    """Mean best IoU between both, over the masks of either side, whatever their classes."""
    found = proposal_quality(stored, other)
    mean = (found["mean_best_iou"] + found["mean_best_iou_of_proposals"]) / 2
    return None if math.isnan(mean) else mean


def _draw_examples(
    store: str | os.PathLike[str],
    header: Mapping[str, Any],
    chosen: Mapping[str, Sequence[int]],
    true_rows: Mapping[int, Row],
    truth: InstanceDataset | None,
) -> dict[int, dict[str, Any]]:
    """Overlay, caption and the truth's overlay of the chosen rows, by number: a second pass over the store."""
    wanted = {number for numbers in chosen.values() for number in numbers}
    categories = sorted(header["categories"], key=lambda category: category["id"])
    drawn: dict[int, dict[str, Any]] = {}
    for number, row in enumerate(_rows(store)):
        if len(drawn) == len(wanted):
            break
        if number not in wanted:
            continue
        scores = row["objects"]["score"]
        masks = "1 mask" if len(scores) == 1 else f"{len(scores)} masks"
        text = f"{masks}, mean score {np.mean(scores):.2f}" if scores else "no mask"
        entry = {"name": row["file_name"], "text": text, "overlay": None, "truth": None}
        try:
            image = open_image(row["image"], (row["width"], row["height"]))
            entry["overlay"] = overlay(image, row, categories)
            if number in true_rows:
                entry["truth"] = overlay(image, true_rows[number], truth.categories, scored=False)
        except (ImageError, DataError) as error:
            entry["text"] += f" ({error.reason})"
        drawn[number] = entry
    return drawn


def _truth_of(stored: InstanceDataset, truth: InstanceDataset, chosen: Mapping[str, Sequence[int]]) -> dict[int, Row]:
    """The true rows of the chosen ones, by number."""
    keys, true_keys = row_keys(stored, truth)
    places = {key: place for place, key in enumerate(true_keys)}
    wanted = [number for numbers in chosen.values() for number in numbers]
    return {number: truth[places[keys[number]]] for number in wanted if keys[number] in places}


def overlay(image: Image.Image, row: Row, categories: Sequence[Mapping[str, Any]], scored: bool = True) -> str:
    """The row's instances drawn over its image, as a data URI; masks are decoded one at a time."""
    # Loads its fonts and the metric; a report is the only part of labeling that draws.
    from ..evaluation.visualize import overlay_uri

    objects = row["objects"]
    places = {category["id"]: place for place, category in enumerate(categories)}
    labels = [places[category_id] for category_id in objects["category_id"]]
    names = {place: category["name"] for place, category in enumerate(categories)}
    return overlay_uri(image, objects["segmentation"], labels, objects["score"] if scored else None, names, SIDE)


def _page(
    store: str | os.PathLike[str],
    header: Mapping[str, Any],
    statistics: Statistics,
    numbers: Mapping[str, Any],
    failures: Sequence[Mapping[str, Any]],
    chosen: Mapping[str, Sequence[int]],
    images: Mapping[int, Mapping[str, Any]],
) -> str:
    from ..evaluation.pages import render  # a report is the only part of labeling that needs it

    titles = {
        "best": "Best mean score",
        "median": "Median",
        "worst": "Worst mean score",
        "empty": "Images without any mask",
    }
    return render(
        "labeling",
        "report",
        store=os.path.abspath(store),
        header=header,
        settings=[(name, _text(value)) for name, value in flatten(header["settings"]).items()],
        numbers=numbers,
        charts=_charts(statistics),
        reasons=Counter(str(failure["reason"]) for failure in failures).most_common(10),
        failures=failures[:MOST_FAILURES],
        groups=[(titles[name], [images[n] for n in chosen[name]]) for name in titles if chosen[name]],
        side=SIDE,
    )


def _charts(statistics: Statistics) -> str:
    """Histograms of instances, scores and areas, as SVG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    from ..evaluation.compare_page import figure_svg

    figure = Figure(figsize=(12, 2.4), layout="constrained")
    instances, scores, areas = figure.subplots(1, 3)
    instances.bar(range(MOST_INSTANCES + 1), [statistics.per_image[k] for k in range(MOST_INSTANCES + 1)])
    instances.set(title="Instances an image", ylabel="images")
    instances.set_xticks(range(0, MOST_INSTANCES + 1, 5))
    instances.set_xticklabels([*map(str, range(0, MOST_INSTANCES, 5)), f"{MOST_INSTANCES}+"])
    scores.stairs(statistics.scores, SCORE_EDGES, fill=True)
    scores.set(title="Score of an instance", ylabel="instances")
    areas.stairs(statistics.areas, AREA_EDGES, fill=True)
    areas.set(title="Area, share of the image", ylabel="instances", xscale="log")
    areas.xaxis.set_major_formatter(PercentFormatter(1.0))
    return figure_svg(figure)


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
