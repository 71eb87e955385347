"""COCO mask AP by an evaluator chosen by name: our streaming one, pycocotools, or a faster library.

All give the same numbers to the last bit (tests/evaluation/test_backends.py). The libraries want the masks of the whole
dataset at once, as run lengths: some 100 bytes to a few kilobytes a mask. hotcoco (Rust) comes with
`pip install uplvp_hf[fast_eval]`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import warnings
from typing import Any

import numpy as np

from ..models.errors import UserError
from .coco_map import AREA_RANGES, NAMES, CocoMaskMap, Curves, Image, check_image, mask_areas
from .records import ImageRecords

BACKENDS = ("streaming", "pycocotools", "hotcoco")
FASTEST = ("hotcoco", "streaming")
"""Order of preference of "fastest"; pycocotools was slower than streaming in scripts/benchmark_evaluate.py."""


def resolve_backend(name: str) -> str:
    """The backend itself, "fastest" replaced by the first installed one of `FASTEST`.

    Raises UserError for an unknown name, or a package that is not installed.
    """
    if name == "fastest":
        return next(backend for backend in FASTEST if _installed(backend))
    if name not in BACKENDS:
        raise UserError(f"There is no evaluation backend {name!r}, only {', '.join(BACKENDS)} and fastest.")
    if not _installed(name):
        raise UserError(f"The evaluation backend {name!r} is not installed: pip install uplvp_hf[fast_eval]")
    return name


def _installed(backend: str) -> bool:
    return backend == "streaming" or importlib.util.find_spec(backend) is not None


def make_evaluator(
    backend: str = "streaming", metric: str = "coco", across_classes: bool = True
) -> CocoMaskMap | ImageRecords:
    """A fresh evaluator, with `add`, `records`, `extend` and `compute` as `CocoMaskMap` has them.

    Args:
        backend: one of `BACKENDS`, or "fastest".
        metric: "coco", or "cityscapes" for the AP of the Cityscapes benchmark, which only is streamed.
        across_classes: whether class-agnostic numbers or details will be asked for. Without, streaming is faster.

    Raises UserError as `resolve_backend`, and for an unknown metric or one that the backend does not have.
    """
    if metric == "cityscapes":
        from .cityscapes_ap import CityscapesAP

        if backend not in ("streaming", "fastest"):
            raise UserError(f"The backend {backend!r} has no Cityscapes AP; leave it at streaming.")
        return CityscapesAP()
    if metric != "coco":
        raise UserError(f"There is no metric {metric!r}, only coco and cityscapes.")
    backend = resolve_backend(backend)
    if backend != "streaming":
        return LibraryMap(backend)
    evaluator = CocoMaskMap()
    evaluator.across_classes = across_classes
    return evaluator


class LibraryMap(ImageRecords):
    """COCO mask AP by pycocotools or hotcoco, with the interface of `CocoMaskMap`."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend

    def add(self, *, prediction: dict, reference: dict) -> None:
        """Keeps the run lengths of one image. Raises UserError as `CocoMaskMap.add`."""
        found, truth, crowd, areas = check_image(prediction, reference)
        record = {
            "found": found,
            "scores": [float(score) for score in prediction["scores"]],
            "labels": [int(label) for label in prediction["labels"]],
            "truth": truth,
            "gt_labels": [int(label) for label in reference["category_id"]],
            "crowd": crowd.astype(int).tolist(),
            "areas": areas.tolist(),
        }
        self.extend({reference["image_id"]: record})

    def compute(self, *, class_agnostic: bool = False, details: bool = False) -> dict[str, Any]:
        """As `CocoMaskMap.compute`."""
        records = self.take()  # the libraries know whole numbers as image ids only
        stats, curves = self._run(records, class_agnostic)
        result: dict[str, Any] = {**stats, "per_class": {} if class_agnostic else curves.per_class()}
        if details:
            result["details"] = {
                "classes": {} if class_agnostic else curves.table([_counts(record) for record in records]),
                "class_agnostic": stats if class_agnostic else self._run(records, True)[0],
                "curves": curves.mean_curves(),
            }
        return result

    def _run(self, records: list[dict[str, list]], class_agnostic: bool) -> tuple[dict[str, float | None], Curves]:
        truth, results = _as_coco(records)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.filterwarnings("ignore", message="hotcoco: use_cats")  # it is what class-agnostic means
            evaluator = self._evaluator(truth, results)
            evaluator.params.useCats = int(not class_agnostic)
            evaluator.evaluate()
            evaluator.accumulate()
            evaluator.summarize()
        stats = [float(value) for value in np.asarray(evaluator.stats)[: len(NAMES)]]
        summary = {name: None if value == -1 else value for name, value in zip(NAMES, stats, strict=True)}
        return summary, _curves(evaluator.eval, truth["categories"], records, class_agnostic)

    def _evaluator(self, truth: dict[str, list], results: list[dict[str, Any]]) -> Any:
        if self.backend == "pycocotools":
            from pycocotools.coco import COCO
            from pycocotools.cocoeval import COCOeval

            ours, theirs = _indexed(COCO, truth), _indexed(COCO, {**truth, "annotations": results})
            return COCOeval(ours, theirs, "segm")
        import hotcoco

        return hotcoco.COCOeval(hotcoco.COCO(truth), hotcoco.COCO({**truth, "annotations": results}), "segm")


def _indexed(kind: type, content: dict[str, list]) -> Any:
    coco = kind()  # from a file only
    coco.dataset = content
    coco.createIndex()
    return coco


def _as_coco(records: list[dict[str, list]]) -> tuple[dict[str, list], list[dict[str, Any]]]:
    """The truth as a COCO file has it, and the detections as `loadRes` prepares them: the area is that of the mask."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image_id, record in enumerate(records, 1):
        masks = [*record["truth"], *record["found"]]
        height, width = masks[0]["size"] if masks else (1, 1)
        images.append({"id": image_id, "height": int(height), "width": int(width)})
        for mask, label, crowd, area in zip(record["truth"], record["gt_labels"], record["crowd"], record["areas"]):
            entry = {"id": len(annotations) + 1, "image_id": image_id, "category_id": label, "segmentation": dict(mask)}
            annotations.append({**entry, "bbox": [0.0] * 4, "iscrowd": crowd, "area": area})
        areas = mask_areas(record["found"]).tolist()
        for mask, label, score, area in zip(record["found"], record["labels"], record["scores"], areas):
            entry = {"id": len(results) + 1, "image_id": image_id, "category_id": label, "segmentation": dict(mask)}
            results.append({**entry, "bbox": [0.0] * 4, "iscrowd": 0, "area": area, "score": score})
    labels = {label for record in records for label in (*record["gt_labels"], *record["labels"])}
    categories = [{"id": label, "name": str(label)} for label in sorted(labels)]
    return {"images": images, "annotations": annotations, "categories": categories}, results


def _curves(
    found: dict[str, Any], categories: list[dict[str, Any]], records: list[dict[str, list]], class_agnostic: bool
) -> Curves:
    """The arrays of a library, precision (T, R, K, A, M) and recall (T, K, A, M), without classes never annotated."""
    annotated = {label for record in records for label in record["gt_labels"]}
    kept = [k for k, category in enumerate(categories) if category["id"] in annotated]
    names = [categories[k]["id"] for k in kept]
    kept, names = ([0], [0]) if class_agnostic else (kept, names)
    precision, recall = np.asarray(found["precision"])[:, :, kept], np.asarray(found["recall"])[:, kept]
    # Contiguous, as ours: the order of the memory decides the last bit of a mean.
    by_area = {name: np.ascontiguousarray(precision[:, :, :, a, 2]) for a, name in enumerate(AREA_RANGES)}
    recalls = {name: recall[:, :, a, 2] for a, name in enumerate(AREA_RANGES)}
    return Curves(names, by_area, {**recalls, 1: recall[:, :, 0, 0], 10: recall[:, :, 0, 1]})


def _counts(record: dict[str, list]) -> Image:
    """An image for `Curves.table`, which only counts."""
    empty = np.zeros(0)
    labels, gt_labels = (np.asarray(record[name], dtype=np.int64) for name in ("labels", "gt_labels"))
    return Image(empty, labels, empty, gt_labels, empty, np.asarray(record["crowd"], dtype=bool), empty)
