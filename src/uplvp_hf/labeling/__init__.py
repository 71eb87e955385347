"""Labeling: which pixels become pseudo instances, and what they are called."""

from .cutting.cut import Cutting
from .cutting.proposals import Proposals
from .encoders.attention import ATTENTIONS, Recipe
from .encoders.backbone import Encoder, load_classifier, load_encoder
from .encoders.clip import Clip, load_clip
from .encoders.precomputed import PrecomputedFeatures
from .encoders.prompt_templates import read_background, read_templates
from .encoders.text import TextEmbeddings, embed_classes, load_text_embeddings, read_vocabulary, save_text_embeddings
from .encoders.windows import View, dense_features
from .labelers.baselines import CenterBoxLabeler, WholeImageLabeler
from .labelers.dense_clip import DenseClipLabeler
from .labelers.foreground import ForegroundLabeler
from .labelers.mask_file import MaskFileLabeler
from .labelers.mask_generator import MaskGeneratorLabeler
from .labelers.maskcut import NcutLabeler
from .labelers.plugin import PluginLabeler, load_plugin
from .labelers.saliency import SaliencyLabeler
from .labelers.segmenter import SegmenterLabeler
from .naming.agnostic import AgnosticNamer
from .naming.class_map import read_class_map, resolve_class_map
from .naming.classifier import ClassifierNamer
from .naming.zero_shot import ClipZeroShotNamer
from .pipeline import LabelSummary, label_images
from .quality import proposal_quality
from .report import write_report
from .store import StoreError, StoreWriter
from .store_export import export_coco, export_parquet, store_to_dataset

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
    "MaskFileLabeler",
    "MaskGeneratorLabeler",
    "NcutLabeler",
    "PluginLabeler",
    "PrecomputedFeatures",
    "Proposals",
    "Recipe",
    "SaliencyLabeler",
    "SegmenterLabeler",
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
