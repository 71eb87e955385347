"""Instance AP of the Cityscapes benchmark, streaming.

Built after the published procedure of `evalInstanceLevelSemanticLabeling.py` (github.com/mcordts/cityscapesScripts):

* Ten overlap thresholds, .5 to .95; an overlap must be above one, not at it.
* Annotations of fewer than 100 pixels and groups (`iscrowd`: "cargroup" and the like) need not be found.
* An annotation that several detections match takes the one of highest confidence, the others are false positives.
* A detection that matches nothing is a false positive, unless its share of pixels on void, groups and small
  annotations of its class is above the threshold: then it is left out.
* AP is the area under the raw precision-recall curve, one point a distinct confidence, by the trapezoidal rule. The
  curve begins with precision 1 at recall 0, as in the package since version 2 (before, with the precision of the most
  confident detection). There are no 101 recall points, no envelope and no limit of detections as in COCO.
* AP of a class is the mean over the thresholds, AP the mean over the classes that are annotated.

The benchmark's further numbers for objects within 50 m and 100 m need depth maps and are not computed.

The Cityscapes columns of the saliency-prompt paper include AP of small, medium and large objects, which this benchmark
does not define: they are COCO's numbers on the eight classes (`CocoMaskMap`). This metric gives the number of the
benchmark's server and of papers that follow it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from .coco_map import check_image, mask_areas
from .records import ImageRecords

OVERLAPS = np.arange(0.5, 1.0, 0.05)  # as the benchmark builds them, to the bit
MIN_REGION = 100  # pixels


@dataclass
class Overlaps:
    """What is left of an image: D detections, empty ones dropped, by N annotations. Areas are pixels."""

    scores: np.ndarray  # (D,)
    labels: np.ndarray  # (D,)
    areas: np.ndarray  # (D,)
    void: np.ndarray  # (D,) pixels in common with void
    gt_labels: np.ndarray  # (N,)
    gt_areas: np.ndarray  # (N,)
    gt_group: np.ndarray  # (N,) bool
    common: np.ndarray  # (D, N) pixels in common


class CityscapesAP(ImageRecords):
    """Streaming AP of the Cityscapes benchmark, with the interface of `CocoMaskMap`."""

    def add(self, *, prediction: dict, reference: dict) -> None:
        """Adds one image. Masks are compared at once and not kept.

        Args:
            prediction: `image_id`, `scores` (N floats), `labels` (N category ids), `rle` (N COCO RLEs).
            reference: `image_id`, `category_id` (M), `segmentation` (M COCO RLEs), and optionally `iscrowd` (M, 1 for
                a group) and `void` (COCO RLEs of regions that are not judged). Areas are those of the masks.

        Raises UserError as `CocoMaskMap.add`.
        """
        self.extend({reference["image_id"]: _overlaps(prediction, reference)})

    def compute(self, *, class_agnostic: bool = False, details: bool = False) -> dict[str, Any]:
        """AP and AP50 over all images added so far, which are then forgotten.

        Args:
            class_agnostic: treat all as one class.
            details: add `details`.

        Returns:
            AP, AP50: 0 to 1, or None where no annotation counts; per_class: {category id: AP or None}, empty if class
            agnostic; details: `classes` {category id: {AP, AP50, annotations, crowds, detections}}, `class_agnostic`
            {AP, AP50}, `curves` None. Annotations are those that count; small ones are in none of the counts.
        """
        images = self.take()
        table = _table([_one_class(image) for image in images] if class_agnostic else images)
        per_class = {category: row["AP"] for category, row in table.items() if row["AP"] is not None}
        result = {**_means(table), "per_class": {} if class_agnostic else per_class}
        if details:
            agnostic = _means(table if class_agnostic else _table([_one_class(image) for image in images]))
            classes = {} if class_agnostic else table
            result["details"] = {"classes": classes, "class_agnostic": agnostic, "curves": None}
        return result


def _overlaps(prediction: dict, reference: dict) -> Overlaps:
    found, truth, group, _ = check_image(prediction, reference)
    areas = mask_areas(found)
    kept = np.flatnonzero(areas)
    found, areas = [found[k] for k in kept], areas[kept]
    void = reference.get("void") or []
    common = _common(found, areas, truth)
    return Overlaps(
        scores=np.asarray(prediction["scores"], dtype=np.float64)[kept],
        labels=np.asarray(prediction["labels"], dtype=np.int64)[kept],
        areas=areas,
        void=_common(found, areas, [coco_mask.merge(void)] if void else []).sum(1),
        gt_labels=np.asarray(reference["category_id"], dtype=np.int64),
        gt_areas=mask_areas(truth),
        gt_group=group,
        common=common,
    )


def _common(found: list[dict], areas: np.ndarray, others: list[dict]) -> np.ndarray:
    """(D, M) pixels that masks share: with a crowd, pycocotools divides them by the area of the first mask."""
    if not found or not others:
        return np.zeros((len(found), len(others)))
    shares = np.asarray(coco_mask.iou(found, others, [1] * len(others))).reshape(len(found), len(others))
    return np.rint(shares * areas[:, None])


def _one_class(image: Overlaps) -> Overlaps:
    zeros = {"labels": np.zeros_like(image.labels), "gt_labels": np.zeros_like(image.gt_labels)}
    return Overlaps(**{**vars(image), **zeros})


def _table(images: list[Overlaps]) -> dict[Any, dict[str, Any]]:
    labels = {label for image in images for label in (*image.labels.tolist(), *image.gt_labels.tolist())}
    return {category: _row([_select(image, category) for image in images]) for category in sorted(labels)}


def _select(image: Overlaps, category: int) -> Overlaps:
    rows, columns = image.labels == category, image.gt_labels == category
    chosen = {name: value[columns if name.startswith("gt_") else rows] for name, value in vars(image).items()}
    return Overlaps(**{**chosen, "common": image.common[np.ix_(rows, columns)]})


def _row(images: list[Overlaps]) -> dict[str, Any]:
    """AP, AP50 and counts of one class."""
    counted = sum(int((~p.gt_group & (p.gt_areas >= MIN_REGION)).sum()) for p in images)
    values = [_average_precision([_judge(p, threshold) for p in images], counted) for threshold in OVERLAPS]
    return {
        "AP": float(np.mean(values)) if counted else None,
        "AP50": values[0] if counted else None,
        "annotations": counted,
        "crowds": sum(int(p.gt_group.sum()) for p in images),
        "detections": sum(len(p.scores) for p in images),
    }


def _judge(image: Overlaps, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Confidences of the true and of the false positives of one class in one image."""
    union = image.areas[:, None] + image.gt_areas - image.common
    matches = image.common / union > threshold  # (D, N)
    small = image.gt_areas < MIN_REGION
    true, false = [], []
    for column in np.flatnonzero(~image.gt_group & ~small & matches.any(0)):
        confidences = np.sort(image.scores[matches[:, column]])
        true.append(confidences[-1:])
        false.append(confidences[:-1])
    # A small group counts twice, as in the benchmark's script.
    unjudged = image.void + image.common @ (image.gt_group.astype(float) + small)
    false.append(image.scores[~matches.any(1) & (unjudged / image.areas <= threshold)])
    return np.concatenate([np.zeros(0), *true]), np.concatenate(false)


def _average_precision(judged: list[tuple[np.ndarray, np.ndarray]], annotations: int) -> float:
    """Area under the curve of one point a distinct confidence, which begins at recall 0 with precision 1."""
    true, false = (np.sort(np.concatenate(scores)) for scores in zip(*judged))
    levels = np.unique(np.concatenate([true, false]))[::-1]  # most confident first
    if not annotations or not len(levels):
        return 0.0
    hits = len(true) - np.searchsorted(true, levels, side="left")
    misses = len(false) - np.searchsorted(false, levels, side="left")
    precision, recall = hits / (hits + misses), hits / annotations
    precision, recall = np.concatenate([[1.0], precision]), np.concatenate([[0.0], recall])
    return float(np.sum((precision[1:] + precision[:-1]) / 2 * np.diff(recall)))


def _means(table: dict[Any, dict[str, Any]]) -> dict[str, float | None]:
    rows = [row for row in table.values() if row["AP"] is not None]
    return {name: float(np.mean([row[name] for row in rows])) if rows else None for name in ("AP", "AP50")}
