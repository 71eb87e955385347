"""Checkpoints of other code bases under our names."""

from .mask2former import config_from_mmdet, convert_mmdet_mask2former

__all__ = ["config_from_mmdet", "convert_mmdet_mask2former"]
