"""What a run does differently for a segmenter that is, or has, a ViT: its weights, and the end of masked attention."""

from __future__ import annotations

import logging

from torch import nn
from transformers import AutoModel

from ..conversion.weights_look import HUB
from ..models.errors import UserError, reading
from .config import ConfigError, TrainSettings

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
    name = path.removeprefix(HUB)
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


def fade_masks(segmenter: nn.Module, settings: TrainSettings) -> None:
    """Lets masked attention end on the way, where the segmenter has it: by default where EoMT's own runs do, and not in
    pre-training, since what is fine-tuned next needs it again. Raises ConfigError where the shares make no sense."""
    given = (settings.model.attn_mask_start, settings.model.attn_mask_end)
    if not hasattr(segmenter, "anneal_masks"):
        if given != (None, None):
            raise ConfigError(
                f"A `{segmenter.config.model_type}` has no masked attention that `model.attn_mask_*` ends."
            )
    elif given != (None, None) or settings.stage == "finetune":
        start, end = (one if one is not None else usual for one, usual in zip(given, (1 / 6, 5 / 6), strict=True))
        try:
            segmenter.anneal_masks(start, end)
        except UserError as error:
            raise ConfigError(f"`model`: {error}") from error
