"""Trained models for runtimes without this library: ONNX, torch.export, transformers' own Mask2Former."""

from .check import check_batch, largest_differences
from .formats import FORMATS, export_model
from .native import to_native
from .program import TensorModel, canvas_of, trace

__all__ = [
    "FORMATS",
    "TensorModel",
    "canvas_of",
    "check_batch",
    "export_model",
    "largest_differences",
    "to_native",
    "trace",
]
