"""Weights of a backbone, from a safetensors file or the Hub (`model.backbone_weights`)."""

from __future__ import annotations

import logging
from pathlib import Path

from safetensors import safe_open
from torch import nn

from ..models.errors import UserError
from .config import ConfigError

logger = logging.getLogger(__name__)


def _from_hub(repository: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, "model.safetensors"))
    except (OSError, ValueError) as error:  # what the client raises is one of these
        raise ConfigError(f"`model.backbone_weights`: hf-hub:{repository}, model.safetensors: {error}") from error


def load_backbone_weights(backbone: nn.Module, path: str) -> list[str]:
    """Loads a safetensors file into a backbone. Returns the names in the file that the backbone has no use for.

    path: the file, or hf-hub:OWNER/NAME for the model.safetensors of a repository of the Hub. Names of tensors may
    carry a prefix such as `backbone.`; every tensor of the backbone must be found, else ValueError.
    """
    file = _from_hub(path.removeprefix("hf-hub:")) if path.startswith("hf-hub:") else Path(path)
    if not file.is_file():
        raise ConfigError(f"`model.backbone_weights`: no file {path}. A repository of the Hub is hf-hub:OWNER/NAME.")
    target = getattr(backbone, "_backbone", backbone)  # timm models are wrapped
    wanted = target.state_dict()
    with safe_open(file, "pt") as archive:
        names = list(archive.keys())
        prefix = next((p for p in ("", "backbone.", "model.", "_backbone.") if p + next(iter(wanted)) in names), "")
        missing = [name for name in wanted if prefix + name not in names and not name.endswith("num_batches_tracked")]
        if missing:
            raise UserError(f"{path} lacks {len(missing)} tensors of the backbone, for example `{missing[0]}`.")
        target.load_state_dict(
            {name: archive.get_tensor(prefix + name) for name in wanted if prefix + name in names}, strict=False
        )
    unused = sorted(set(names) - {prefix + name for name in wanted})
    logger.info("Backbone weights from %s; unused there: %s", path, ", ".join(unused) or "none")
    return unused
