"""Checkpoints of other code bases under our names."""

from .checkpoint_file import CheckpointError, detect_format, read_checkpoint
from .convert import convert_checkpoint
from .detectron2 import convert_detectron2_mask2former
from .knet import config_from_mmdet_knet, convert_mmdet_knet
from .mask2former import config_from_mmdet, convert_mmdet_mask2former
from .queryinst import config_from_mmdet_queryinst, convert_mmdet_queryinst
from .report import ConversionReport

__all__ = [
    "CheckpointError",
    "ConversionReport",
    "config_from_mmdet",
    "config_from_mmdet_knet",
    "config_from_mmdet_queryinst",
    "convert_checkpoint",
    "convert_detectron2_mask2former",
    "convert_mmdet_knet",
    "convert_mmdet_mask2former",
    "convert_mmdet_queryinst",
    "detect_format",
    "read_checkpoint",
]
