"""Evaluation: COCO and Cityscapes mask AP, prediction over datasets, images and pages of results."""

from . import _namesake  # noqa: F401 (must come before the import of `evaluate` in coco_map)
from .backends import BACKENDS, make_evaluator
from .cityscapes_ap import CityscapesAP
from .classes import evaluated_classes, match_category_ids
from .coco_map import CocoMaskMap
from .entries import as_prediction, as_reference, to_coco_results
from .findings import Findings
from .predictor import METRICS, evaluate_model, load_segmenter, predict_dataset

__all__ = [
    "BACKENDS",
    "METRICS",
    "CityscapesAP",
    "CocoMaskMap",
    "Findings",
    "as_prediction",
    "as_reference",
    "evaluate_model",
    "evaluated_classes",
    "load_segmenter",
    "make_evaluator",
    "match_category_ids",
    "predict_dataset",
    "to_coco_results",
]
