"""Labeling: which pixels become pseudo instances, and what they are called."""

from .encoders import Encoder, load_encoder
from .foreground import ForegroundLabeler
from .instances import Proposals
from .pipeline import LabelSummary, label_images
from .quality import proposal_quality
from .saliency import SaliencyLabeler
from .store import StoreError, StoreWriter

__all__ = [
    "Encoder",
    "ForegroundLabeler",
    "LabelSummary",
    "Proposals",
    "SaliencyLabeler",
    "StoreError",
    "StoreWriter",
    "label_images",
    "load_encoder",
    "proposal_quality",
]
