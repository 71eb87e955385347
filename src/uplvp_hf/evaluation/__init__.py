"""Evaluation: streaming COCO mask AP, prediction over data sets, pictures of results."""

from .coco_map import CocoMaskMap
from .predictor import (
    METRICS,
    evaluate_model,
    load_segmenter,
    match_category_ids,
    predict_dataset,
    to_coco_results,
)

__all__ = [
    "METRICS",
    "CocoMaskMap",
    "evaluate_model",
    "load_segmenter",
    "match_category_ids",
    "predict_dataset",
    "to_coco_results",
]
