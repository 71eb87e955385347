"""What AP hides: which score to show detections from, whether scores are honest, and whether neighbors are told apart.

`find` compares the detections of an image with its annotations once, for every score threshold; `Findings` adds images
up. Everything is counted within a class, or with `class_agnostic` whatever the class, at an IoU of .5:

* A detection is a hit when it finds an annotation that no better detection has found (best score first, each to the
  best annotation that is left, as in COCO's evaluation). One that is no hit and lies by half on a crowd does not count.
* It is a repeat when it would have been a hit, had the annotation not been found before.
* It is a merge when it covers at least half of each of two annotations.
* An annotation is merged when it is not found and a merge covers half of it; it is split when it is not found and two
  detections, neither of which overlaps the other by half, lie inside it by half and have a tenth of it each.

Annotations that lie in one another can make a right detection of the larger one a merge.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from ..models.thresholds import SCORE_THRESHOLD
from .coco_map import Image, mask_areas

MATCH = 0.5  # least IoU of a hit
COVERED = 0.5  # least share of an annotation in a merge, and of a piece inside its annotation
PIECE = 0.1  # least share of the annotation that is a piece
MOST_PIECES = 20  # looked at for an annotation, the best first
FLOOR = 0.05  # scores below count in no calibration: query segmenters give a hundred of them in every image
LEAST_ANNOTATIONS = 20  # from which on a best threshold is more than chance
GRID = np.round(np.arange(101) / 100, 2)  # score thresholds
GROUPS = {"1": (1, 1), "2": (2, 2), "3 to 5": (3, 5), "6 or more": (6, 10**9), "2 or more": (2, 10**9)}
"""By number of annotations of an image, without crowds; the last group holds the three before it."""


@dataclass(frozen=True)
class ImageFindings:
    """One image: D detections, best first, and N annotations that are no crowds."""

    scores: np.ndarray  # (D,)
    hits: np.ndarray  # (D,) bool
    ignored: np.ndarray  # (D,) bool
    repeats: np.ndarray  # (D,) bool
    merges: np.ndarray  # (D,) bool
    found: np.ndarray  # (N,) score of the detection that found it; -inf: none
    merged: np.ndarray  # (N,) best score of a merge that covers it
    split: np.ndarray  # (N,) score from which on two pieces of it are detected


def find(
    image: Image, prediction: Mapping[str, Any], reference: Mapping[str, Any], class_agnostic: bool = False
) -> ImageFindings:
    """Compares the detections of one image with its annotations.

    Args:
        image: `coco_map.compare` of the other two, which are as `CocoMaskMap.add` takes them.
    """
    order, real = np.argsort(-image.scores, kind="stable"), ~image.gt_crowd
    ious = image.ious if class_agnostic else np.where(image.labels[:, None] == image.gt_labels, image.ious, 0.0)
    ious, scores, areas = ious[order], image.scores[order], image.areas[order]
    on_crowd = (ious[:, image.gt_crowd] >= MATCH).any(1)
    ious = ious[:, real]
    truth = mask_areas([rle for rle, kept in zip(reference["segmentation"], real) if kept])
    hits, found = np.zeros(len(scores), dtype=bool), np.full(len(truth), -np.inf)
    for detection in np.flatnonzero((ious >= MATCH).any(1)):
        free = np.where(np.isneginf(found), ious[detection], 0.0)
        if free.max() >= MATCH:
            found[free.argmax()], hits[detection] = scores[detection], True
    common = _common(ious, areas[:, None], truth)
    covered = common >= COVERED * truth
    merges = covered.sum(1) >= 2
    pieces = (common >= COVERED * areas[:, None]) & (common >= PIECE * truth) & (ious < MATCH)
    rles = [prediction["rle"][place] for place in order]
    return ImageFindings(
        scores, hits, ~hits & on_crowd, ~hits & (ious >= MATCH).any(1), merges, found,
        np.where(covered & merges[:, None], scores[:, None], -np.inf).max(0, initial=-np.inf),
        np.array([_second_piece(np.flatnonzero(own)[:MOST_PIECES], rles, scores, areas) for own in pieces.T]),
    )  # fmt: skip


def _common(ious: np.ndarray, areas: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Pixels in common of masks with these areas and IoUs: whole numbers, so that nothing is lost to rounding."""
    return np.rint(ious * (areas + others) / (1 + ious))


def _second_piece(places: np.ndarray, rles: list[dict], scores: np.ndarray, areas: np.ndarray) -> float:
    """The best score of a piece that does not overlap the first one by half of the smaller one; -inf: none."""
    if len(places) < 2:
        return -np.inf
    ious = coco_mask.iou([rles[places[0]]], [rles[place] for place in places[1:]], [0] * (len(places) - 1))[0]
    first, others = areas[places[0]], areas[places[1:]]
    apart = _common(ious, first, others) < COVERED * np.minimum(first, others)
    return float(scores[places[1:]][apart].max(initial=-np.inf))


def storable_threshold(findings: Mapping[str, Any] | None) -> float | None:
    """The best threshold of `Findings.compute`, None where it was chosen on fewer than `LEAST_ANNOTATIONS` objects."""
    if findings is None or findings["annotations"] < LEAST_ANNOTATIONS:
        return None
    return findings["best_threshold"]


class Findings:
    """Adds up the findings of images; those of several processes are put together with `extend`."""

    def __init__(self, class_agnostic: bool = False) -> None:
        self.class_agnostic = class_agnostic
        self.images: list[ImageFindings] = []

    def add(self, image: Image, prediction: Mapping[str, Any], reference: Mapping[str, Any]) -> None:
        self.images.append(find(image, prediction, reference, self.class_agnostic))

    def extend(self, images: list[ImageFindings]) -> None:
        self.images += images

    def compute(self, threshold: float = SCORE_THRESHOLD) -> dict[str, Any]:
        """The numbers of all images.

        Returns:
            best_threshold: of the largest F1 on a grid of hundredths, in the middle of equal ones; None where nothing
                is found. annotations: how many, without crowds.
            at: what is true at a score threshold (`_at`): of `threshold`, and of the best one if there is one.
            curve: a list each of `threshold`, `precision`, `recall`, `f1` and `detections`.
            calibration: see `_calibration`.
        """
        counted = self._counted()
        curve = _curve(*counted)
        f1 = np.array(curve["f1"])
        equal = np.flatnonzero(f1 == f1.max())
        best = float(GRID[equal[len(equal) // 2]]) if f1.max() > 0 else None
        thresholds = [threshold] if best is None else [threshold, best]
        return {
            "best_threshold": best,
            "annotations": counted[2],
            "at": [self._at(one, *counted) for one in thresholds],
            "curve": curve,
            "calibration": _calibration(*counted[:2]),
        }

    def _counted(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Scores, ascending, and hits of all detections that count, and the number of annotations."""
        parts = [(image.scores[~image.ignored], image.hits[~image.ignored]) for image in self.images]
        scores, hits = (np.concatenate([np.zeros(0), *(part[k] for part in parts)]) for k in (0, 1))
        order = np.lexsort((hits, scores))  # the same sums to the last bit, whatever the order of the images
        return scores[order], hits[order].astype(bool), sum(len(image.found) for image in self.images)

    def _at(self, threshold: float, scores: np.ndarray, hits: np.ndarray, annotations: int) -> dict[str, Any]:
        """What is true of the detections that score at least `threshold`.

        `threshold`, `precision`, `recall`, `f1` (0 to 1); `detections`, `repeats`, `merges` (how many);
        `by_objects`: a row for each of `GROUPS` that has images: `objects`, `images`, `annotations`, and the shares of
        its annotations that are `found`, `merged` and `split`.
        """
        kept = scores >= threshold
        right, detections = int(hits[kept].sum()), int(kept.sum())
        chosen = {
            name: sum(int((getattr(image, name) & (image.scores >= threshold)).sum()) for image in self.images)
            for name in ("repeats", "merges")
        }
        groups = [_group(self.images, name, limits, threshold) for name, limits in GROUPS.items()]
        return {
            "threshold": threshold,
            "precision": _share([right], detections)[0],
            "recall": _share([right], annotations)[0],
            "f1": _share([2 * right], detections + annotations)[0],
            "detections": detections,
            **chosen,
            "by_objects": [group for group in groups if group["images"]],
        }


def _curve(scores: np.ndarray, hits: np.ndarray, annotations: int) -> dict[str, list[float]]:
    """Precision, recall and F1 on `GRID`."""
    first = np.searchsorted(scores, GRID)  # of the detections from a threshold on
    right = np.concatenate([hits[::-1].cumsum()[::-1], [0]])[first]
    detections = len(scores) - first
    return {
        "threshold": GRID.tolist(),
        "precision": _share(right, detections),
        "recall": _share(right, annotations),
        "f1": _share(2 * right, detections + annotations),
        "detections": detections.tolist(),
    }


def _calibration(scores: np.ndarray, hits: np.ndarray) -> dict[str, Any]:
    """`bins`: a row for each tenth of the scores that has detections: `low`, `detections`, `score` (mean) and
    `precision`; `error`: the mean distance of the two, weighted by detections. Scores from `FLOOR` on."""
    scores, hits = scores[scores >= FLOOR], hits[scores >= FLOOR]
    place = np.minimum((scores * 10).astype(int), 9)
    bins = []
    for number in np.unique(place).tolist():
        own = place == number
        score, precision = float(scores[own].mean()), float(hits[own].mean())
        bins.append({"low": number / 10, "detections": int(own.sum()), "score": score, "precision": precision})
    distances = [row["detections"] * abs(row["score"] - row["precision"]) for row in bins]
    return {"bins": bins, "error": sum(distances) / len(scores) if len(scores) else None}


def _group(images: list[ImageFindings], name: str, limits: tuple[int, int], threshold: float) -> dict[str, Any]:
    chosen = [image for image in images if limits[0] <= len(image.found) <= limits[1]]
    found, merged, split = (
        np.concatenate([getattr(image, which) for image in chosen] or [np.zeros(0)]) >= threshold
        for which in ("found", "merged", "split")
    )
    shares = {"found": found, "merged": merged & ~found, "split": split & ~found}
    counted = {which: float(own.mean()) if len(own) else None for which, own in shares.items()}
    return {"objects": name, "images": len(chosen), "annotations": len(found), **counted}


def _share(part: Any, whole: Any) -> list[float]:
    """part / whole, 0 where that is 0 / 0."""
    part, whole = np.broadcast_arrays(np.asarray(part, dtype=float), np.asarray(whole, dtype=float))
    return np.divide(part, whole, out=np.zeros(part.shape), where=whole > 0).tolist()
