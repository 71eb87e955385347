"""Labeling: which pixels become pseudo instances, and what they are called.

Importing this package is quick; a name's module is loaded when the name is used, as in `uplvp_hf` itself.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cutting.proposals import Proposals as Proposals
    from .encoders.backbone import Encoder as Encoder, load_classifier as load_classifier, load_encoder as load_encoder
    from .encoders.clip import Clip as Clip, load_clip as load_clip
    from .encoders.precomputed import PrecomputedFeatures as PrecomputedFeatures
    from .encoders.prompt_templates import read_background as read_background, read_templates as read_templates
    from .encoders.text import (
        TextEmbeddings as TextEmbeddings,
        embed_classes as embed_classes,
        load_text_embeddings as load_text_embeddings,
        read_vocabulary as read_vocabulary,
        save_text_embeddings as save_text_embeddings,
    )
    from .encoders.windows import View as View, dense_features as dense_features
    from .labelers.baselines import CenterBoxLabeler as CenterBoxLabeler, WholeImageLabeler as WholeImageLabeler
    from .labelers.boxes import BoxesLabeler as BoxesLabeler
    from .labelers.concept import ConceptLabeler as ConceptLabeler
    from .labelers.dense_clip import DenseClipLabeler as DenseClipLabeler
    from .labelers.foreground import ForegroundLabeler as ForegroundLabeler
    from .labelers.mask_file import MaskFileLabeler as MaskFileLabeler
    from .labelers.mask_generator import MaskGeneratorLabeler as MaskGeneratorLabeler
    from .labelers.maskcut import NcutLabeler as NcutLabeler
    from .labelers.plugin import PluginLabeler as PluginLabeler, load_plugin as load_plugin
    from .labelers.saliency import SaliencyLabeler as SaliencyLabeler
    from .labelers.segmenter import SegmenterLabeler as SegmenterLabeler
    from .merge import merge_stores as merge_stores
    from .naming.agnostic import AgnosticNamer as AgnosticNamer
    from .naming.class_map import read_class_map as read_class_map, resolve_class_map as resolve_class_map
    from .naming.classifier import ClassifierNamer as ClassifierNamer
    from .naming.examples import ExamplesNamer as ExamplesNamer, read_examples as read_examples
    from .naming.zero_shot import ClipZeroShotNamer as ClipZeroShotNamer
    from .part import Part as Part
    from .pipeline import LabelSummary as LabelSummary, label_images as label_images
    from .quality import proposal_quality as proposal_quality
    from .report import write_report as write_report
    from .settings import ATTENTIONS as ATTENTIONS, Cutting as Cutting, Recipe as Recipe
    from .store import StoreError as StoreError, StoreWriter as StoreWriter
    from .store_export import (
        export_coco as export_coco,
        export_parquet as export_parquet,
        store_to_dataset as store_to_dataset,
    )

_MODULES = {
    "cutting.proposals": "Proposals",
    "encoders.backbone": "Encoder load_classifier load_encoder",
    "encoders.clip": "Clip load_clip",
    "encoders.precomputed": "PrecomputedFeatures",
    "encoders.prompt_templates": "read_background read_templates",
    "encoders.text": "TextEmbeddings embed_classes load_text_embeddings read_vocabulary save_text_embeddings",
    "encoders.windows": "View dense_features",
    "labelers.baselines": "CenterBoxLabeler WholeImageLabeler",
    "labelers.boxes": "BoxesLabeler",
    "labelers.concept": "ConceptLabeler",
    "labelers.dense_clip": "DenseClipLabeler",
    "labelers.foreground": "ForegroundLabeler",
    "labelers.mask_file": "MaskFileLabeler",
    "labelers.mask_generator": "MaskGeneratorLabeler",
    "labelers.maskcut": "NcutLabeler",
    "labelers.plugin": "PluginLabeler load_plugin",
    "labelers.saliency": "SaliencyLabeler",
    "labelers.segmenter": "SegmenterLabeler",
    "naming.agnostic": "AgnosticNamer",
    "naming.class_map": "read_class_map resolve_class_map",
    "naming.classifier": "ClassifierNamer",
    "naming.examples": "ExamplesNamer read_examples",
    "naming.zero_shot": "ClipZeroShotNamer",
    "merge": "merge_stores",
    "part": "Part",
    "pipeline": "LabelSummary label_images",
    "quality": "proposal_quality",
    "report": "write_report",
    "settings": "ATTENTIONS Cutting Recipe",
    "store": "StoreError StoreWriter",
    "store_export": "export_coco export_parquet store_to_dataset",
}
_NAMES = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})
