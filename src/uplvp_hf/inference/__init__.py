"""Predicting: a model called on pictures, files, folders, addresses; large pictures in tiles; exported models."""

from .instances import Instances
from .onnx_runtime import OnnxSegmenter
from .predictor import Predictor, load, load_model, predict_rows
from .sources import find_pictures
from .tiles import Tiles

__all__ = [
    "Instances",
    "OnnxSegmenter",
    "Predictor",
    "Tiles",
    "find_pictures",
    "load",
    "load_model",
    "predict_rows",
]
