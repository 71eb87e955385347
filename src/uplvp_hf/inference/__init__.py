"""Prediction on images, files, folders and addresses, in tiles for large images, with trained or exported models."""

from .instances import Instances
from .onnx_runtime import OnnxSegmenter
from .predictor import Predictor, load, load_model, predict_rows
from .sources import find_images
from .tiles import Tiles

__all__ = [
    "Instances",
    "OnnxSegmenter",
    "Predictor",
    "Tiles",
    "find_images",
    "load",
    "load_model",
    "predict_rows",
]
