"""Labeling: which pixels become pseudo instances, and what they are called.

Importing this package is quick; a name's module is loaded when the name is used, as in `uplvp_hf` itself.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cutting.proposals import Proposals as Proposals
    from .encoders.backbone import Encoder as Encoder
    from .encoders.backbone import load_classifier as load_classifier
    from .encoders.backbone import load_encoder as load_encoder
    from .encoders.clip import Clip as Clip
    from .encoders.clip import load_clip as load_clip
    from .encoders.precomputed import PrecomputedFeatures as PrecomputedFeatures
    from .encoders.prompt_templates import read_background as read_background
    from .encoders.prompt_templates import read_templates as read_templates
    from .encoders.text import TextEmbeddings as TextEmbeddings
    from .encoders.text import embed_classes as embed_classes
    from .encoders.text import load_text_embeddings as load_text_embeddings
    from .encoders.text import read_vocabulary as read_vocabulary
    from .encoders.text import save_text_embeddings as save_text_embeddings
    from .encoders.windows import View as View
    from .encoders.windows import dense_features as dense_features
    from .labelers.baselines import CenterBoxLabeler as CenterBoxLabeler
    from .labelers.baselines import WholeImageLabeler as WholeImageLabeler
    from .labelers.boxes import BoxesLabeler as BoxesLabeler
    from .labelers.concept import ConceptLabeler as ConceptLabeler
    from .labelers.dense_clip import DenseClipLabeler as DenseClipLabeler
    from .labelers.foreground import ForegroundLabeler as ForegroundLabeler
    from .labelers.mask_file import MaskFileLabeler as MaskFileLabeler
    from .labelers.mask_generator import MaskGeneratorLabeler as MaskGeneratorLabeler
    from .labelers.maskcut import NcutLabeler as NcutLabeler
    from .labelers.plugin import PluginLabeler as PluginLabeler
    from .labelers.plugin import load_plugin as load_plugin
    from .labelers.saliency import SaliencyLabeler as SaliencyLabeler
    from .labelers.segmenter import SegmenterLabeler as SegmenterLabeler
    from .naming.agnostic import AgnosticNamer as AgnosticNamer
    from .naming.class_map import read_class_map as read_class_map
    from .naming.class_map import resolve_class_map as resolve_class_map
    from .naming.classifier import ClassifierNamer as ClassifierNamer
    from .naming.examples import ExamplesNamer as ExamplesNamer
    from .naming.examples import read_examples as read_examples
    from .naming.zero_shot import ClipZeroShotNamer as ClipZeroShotNamer
    from .pipeline import LabelSummary as LabelSummary
    from .pipeline import label_images as label_images
    from .quality import proposal_quality as proposal_quality
    from .report import write_report as write_report
    from .settings import ATTENTIONS as ATTENTIONS
    from .settings import Cutting as Cutting
    from .settings import Recipe as Recipe
    from .store import StoreError as StoreError
    from .store import StoreWriter as StoreWriter
    from .store_export import export_coco as export_coco
    from .store_export import export_parquet as export_parquet
    from .store_export import store_to_dataset as store_to_dataset

_NAMES = {
    "ATTENTIONS": "settings",
    "AgnosticNamer": "naming.agnostic",
    "BoxesLabeler": "labelers.boxes",
    "CenterBoxLabeler": "labelers.baselines",
    "ClassifierNamer": "naming.classifier",
    "Clip": "encoders.clip",
    "ClipZeroShotNamer": "naming.zero_shot",
    "ConceptLabeler": "labelers.concept",
    "Cutting": "settings",
    "DenseClipLabeler": "labelers.dense_clip",
    "Encoder": "encoders.backbone",
    "ExamplesNamer": "naming.examples",
    "ForegroundLabeler": "labelers.foreground",
    "LabelSummary": "pipeline",
    "MaskFileLabeler": "labelers.mask_file",
    "MaskGeneratorLabeler": "labelers.mask_generator",
    "NcutLabeler": "labelers.maskcut",
    "PluginLabeler": "labelers.plugin",
    "PrecomputedFeatures": "encoders.precomputed",
    "Proposals": "cutting.proposals",
    "Recipe": "settings",
    "SaliencyLabeler": "labelers.saliency",
    "SegmenterLabeler": "labelers.segmenter",
    "StoreError": "store",
    "StoreWriter": "store",
    "TextEmbeddings": "encoders.text",
    "View": "encoders.windows",
    "WholeImageLabeler": "labelers.baselines",
    "dense_features": "encoders.windows",
    "embed_classes": "encoders.text",
    "export_coco": "store_export",
    "export_parquet": "store_export",
    "label_images": "pipeline",
    "load_classifier": "encoders.backbone",
    "load_clip": "encoders.clip",
    "load_encoder": "encoders.backbone",
    "load_plugin": "labelers.plugin",
    "load_text_embeddings": "encoders.text",
    "proposal_quality": "quality",
    "read_background": "encoders.prompt_templates",
    "read_class_map": "naming.class_map",
    "read_examples": "naming.examples",
    "read_templates": "encoders.prompt_templates",
    "read_vocabulary": "encoders.text",
    "resolve_class_map": "naming.class_map",
    "save_text_embeddings": "encoders.text",
    "store_to_dataset": "store_export",
    "write_report": "report",
}
__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})
