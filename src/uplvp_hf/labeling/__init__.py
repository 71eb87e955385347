"""Labeling: which pixels become pseudo instances, and what they are called."""

from .attention import ATTENTIONS, Recipe
from .baselines import CenterBoxLabeler, WholeImageLabeler
from .class_map import read_class_map, resolve_class_map
from .clip import Clip, load_clip
from .cutting import Cutting
from .dense_clip import View, dense_features
from .encoders import Encoder, load_classifier, load_encoder
from .export import export_coco, export_parquet, store_to_dataset
from .foreground import ForegroundLabeler
from .instances import Proposals
from .language_vision import DenseClipLabeler
from .namers import AgnosticNamer, ClassifierNamer, ClipZeroShotNamer
from .ncut import NcutLabeler
from .pipeline import LabelSummary, label_images
from .plugins import PluginSource, load_plugin
from .precomputed import PrecomputedFeatures
from .prompt_templates import read_background, read_templates
from .quality import proposal_quality
from .report import write_report
from .saliency import SaliencyLabeler
from .sources import MaskFileSource, MaskGeneratorSource, SegmenterSource
from .store import StoreError, StoreWriter
from .text import TextEmbeddings, embed_classes, load_text_embeddings, read_vocabulary, save_text_embeddings

__all__ = [
    "ATTENTIONS",
    "AgnosticNamer",
    "CenterBoxLabeler",
    "ClassifierNamer",
    "Clip",
    "ClipZeroShotNamer",
    "Cutting",
    "DenseClipLabeler",
    "Encoder",
    "ForegroundLabeler",
    "LabelSummary",
    "MaskFileSource",
    "MaskGeneratorSource",
    "NcutLabeler",
    "PluginSource",
    "PrecomputedFeatures",
    "Proposals",
    "Recipe",
    "SaliencyLabeler",
    "SegmenterSource",
    "StoreError",
    "StoreWriter",
    "TextEmbeddings",
    "View",
    "WholeImageLabeler",
    "dense_features",
    "embed_classes",
    "export_coco",
    "export_parquet",
    "label_images",
    "load_classifier",
    "load_clip",
    "load_encoder",
    "load_plugin",
    "load_text_embeddings",
    "proposal_quality",
    "read_background",
    "read_class_map",
    "read_templates",
    "read_vocabulary",
    "resolve_class_map",
    "save_text_embeddings",
    "store_to_dataset",
    "write_report",
]
