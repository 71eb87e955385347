"""How good a model is on each image, and the best and worst of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from ..models.thresholds import SCORE_THRESHOLD
from .coco_map import Image, compare

MATCH = 0.5  # least IoU of a match


@dataclass(frozen=True)
class Quality:
    """value: 0 to 1, or None for an image with neither annotations nor detections. matched, detections, annotations:
    how many; crowds, and detections on them, are left out."""

    value: float | None
    matched: int
    detections: int
    annotations: int


def image_quality(image: Image, threshold: float, class_agnostic: bool = False) -> Quality:
    """Panoptic quality of one image: 2 x sum of the IoUs of the matches / (detections + annotations).

    That is the F-score of the matches times their mean IoU. A match has an IoU of at least .5 and, unless
    `class_agnostic`, one class; matches are chosen for the largest sum of IoUs. A detection that matches nothing and
    lies by half on a crowd of its class is left out.

    Args:
        image: as `coco_map.compare` gives it.
        threshold: detections of a lower score are left out, 0 to 1.
    """
    kept = image.scores >= threshold
    ious = image.ious[kept]
    if not class_agnostic:
        ious = np.where(image.labels[kept, None] == image.gt_labels, ious, 0.0)
    on_crowd = (ious[:, image.gt_crowd] >= MATCH).any(1)
    ious = ious[:, ~image.gt_crowd]
    ious = np.where(ious >= MATCH, ious, 0.0)
    rows, columns = linear_sum_assignment(ious, maximize=True)
    chosen = ious[rows, columns]
    matched = np.zeros(len(ious), dtype=bool)
    matched[rows] = chosen > 0
    detections, annotations = int((matched | ~on_crowd).sum()), ious.shape[1]
    value = 2 * float(chosen.sum()) / (detections + annotations) if detections + annotations else None
    return Quality(value, int(matched.sum()), detections, annotations)


class Examples:
    """The images of best and of worst quality, a bounded number of each.

    Args:
        count: most images of each kind.
        threshold: detections of a lower score are neither counted nor kept.
        class_agnostic: as for `image_quality`.
    """

    def __init__(self, count: int = 6, threshold: float = SCORE_THRESHOLD, class_agnostic: bool = False) -> None:
        self.count, self.threshold, self.class_agnostic = count, threshold, class_agnostic
        self.rated = 0  # images with a quality
        self._best: list[dict[str, Any]] = []
        self._worst: list[dict[str, Any]] = []

    def add(self, prediction: dict[str, Any], reference: dict[str, Any]) -> None:
        """One image, as `CocoMaskMap.add` takes it."""
        quality = image_quality(compare(prediction, reference), self.threshold, self.class_agnostic)
        if quality.value is None:
            return
        self.rated += 1
        kept = [k for k, score in enumerate(prediction["scores"]) if score >= self.threshold]
        entry = {"image_id": prediction["image_id"], "quality": quality}
        entry |= {name: [prediction[name][k] for k in kept] for name in ("scores", "labels", "rle")}
        self._keep([entry], [entry])

    def merge(self, other: Examples) -> None:
        """Adds those of another process."""
        self.rated += other.rated
        self._keep(other._best, other._worst)

    def _keep(self, best: list[dict[str, Any]], worst: list[dict[str, Any]]) -> None:
        """Of equal ones an order that does not depend on the processes."""

        def place(entry: dict[str, Any]) -> tuple[float, str]:
            return -entry["quality"].value, str(entry["image_id"])

        self._best = sorted([*self._best, *best], key=place)[: self.count]
        self._worst = sorted([*self._worst, *worst], key=place, reverse=True)[: self.count]

    def groups(self) -> dict[str, list[dict[str, Any]]]:
        """{"best", "worst"}: entries of `image_id`, `quality`, `scores`, `labels`, `rle`; no image is in both."""
        best = self._best[: max(1, self.rated // 2)]
        taken = {entry["image_id"] for entry in best}
        return {"best": best, "worst": [entry for entry in self._worst if entry["image_id"] not in taken]}
