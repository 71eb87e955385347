"""Evaluation: streaming COCO mask AP, prediction over data sets, pictures of results."""

from . import _namesake  # noqa: F401 (must come before the import of `evaluate` in coco_map)
from .coco_map import CocoMaskMap
from .predictor import (
    METRICS,
    evaluate_model,
    evaluated_classes,
    load_segmenter,
    match_category_ids,
    predict_dataset,
    to_coco_results,
)

__all__ = [
    "METRICS",
    "CocoMaskMap",
    "evaluate_model",
    "evaluated_classes",
    "load_segmenter",
    "match_category_ids",
    "predict_dataset",
    "to_coco_results",
]
