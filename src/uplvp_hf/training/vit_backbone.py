"""Loads the weights of a ViT: a whole model of transformers."""

from __future__ import annotations

import logging

from torch import nn
from transformers import AutoModel

from ..models.errors import reading
from .config import ConfigError

logger = logging.getLogger(__name__)


def wants_model(segmenter: nn.Module) -> bool:
    """Whether its ViT is one of transformers, whose weights come as a whole model."""
    backbone = getattr(segmenter.config, "backbone_config", None)
    return hasattr(segmenter, "load_encoder") and getattr(backbone, "model_type", None) != "timm_backbone"


def load_encoder(segmenter: nn.Module, path: str) -> list[str]:
    """Loads a self-supervised ViT into a segmenter that is one (`load_encoder` of its own does the rest).

    path: a folder that `AutoModel` reads, or hf-hub:OWNER/NAME. Returns the names of what was not taken. Raises
    ConfigError for what is no such model, UserError for one that does not fit.
    """
    name = path.removeprefix("hf-hub:")
    try:
        with reading(f"`model.backbone_weights`: {path}"):
            source = AutoModel.from_pretrained(name, use_safetensors=True)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"`model.backbone_weights`: {path} is no folder of a ViT of transformers, and no repository: {reason}"
        ) from error
    unused = segmenter.load_encoder(source)
    logger.info("Weights of the ViT from %s; unused there: %s", path, ", ".join(unused) or "none")
    return unused
