"""Labeling: which pixels become pseudo instances, and what they are called."""

from .class_map import read_class_map, resolve_class_map
from .dense_clip import Clip, dense_features, load_clip
from .encoders import Encoder, load_encoder
from .export import export_coco, export_parquet, store_to_dataset
from .foreground import ForegroundLabeler
from .instances import Proposals
from .language_vision import DenseClipLabeler
from .namers import AgnosticNamer, ClassifierNamer, ClipZeroShotNamer
from .pipeline import LabelSummary, label_images
from .plugins import PluginSource, load_plugin
from .quality import proposal_quality
from .report import write_report
from .saliency import SaliencyLabeler
from .sources import MaskFileSource, MaskGeneratorSource, SegmenterSource
from .store import StoreError, StoreWriter
from .text import read_vocabulary

__all__ = [
    "AgnosticNamer",
    "ClassifierNamer",
    "Clip",
    "ClipZeroShotNamer",
    "DenseClipLabeler",
    "Encoder",
    "ForegroundLabeler",
    "LabelSummary",
    "MaskFileSource",
    "MaskGeneratorSource",
    "PluginSource",
    "Proposals",
    "SaliencyLabeler",
    "SegmenterSource",
    "StoreError",
    "StoreWriter",
    "dense_features",
    "export_coco",
    "export_parquet",
    "label_images",
    "load_clip",
    "load_encoder",
    "load_plugin",
    "proposal_quality",
    "read_class_map",
    "read_vocabulary",
    "resolve_class_map",
    "store_to_dataset",
    "write_report",
]
