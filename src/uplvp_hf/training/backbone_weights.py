"""Weights of a backbone from a file or the Hub, and that it is shown images as it was trained to see them."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from ..conversion.weights_look import HUB, Look, weights_look
from ..models.errors import UserError, reading
from .config import ConfigError, ModelSettings, TrainSettings

logger = logging.getLogger(__name__)

_CLOSE = 1e-3  # of a mean or deviation


def own_look(model: ModelSettings) -> Look | None:
    """What the configuration of `model.backbone_weights` says, or None, as where `model.init` brings a backbone."""
    if model.backbone_weights is None or model.init is not None:
        return None
    try:
        return weights_look(model.backbone_weights)
    except UserError as error:
        raise ConfigError(f"`model.backbone_weights`: {error}") from error


def with_own_padding(settings: TrainSettings, look: Look | None) -> TrainSettings:
    """Sets the padding of a timm backbone to what its weights were trained with.

    Raises ConfigError where the settings ask for another.
    """
    segmenter = settings.model.segmenter or {}
    backbone = segmenter.get("backbone_config") or {}
    if look is None or backbone.get("model_type") != "timm_backbone" or settings.model.init is not None:
        return settings
    name, given = str(backbone.get("backbone")), dict(backbone.get("timm_kwargs") or {})
    family = "same" if name.startswith("tf_") else ""  # these pad so by themselves
    if "pad_type" in given and (given["pad_type"] or "") != look.pad_type:
        raise ConfigError(
            f"`model.segmenter.backbone_config.timm_kwargs.pad_type` is {given['pad_type']!r}, but the weights were "
            f"trained with {look.pad_type or 'symmetric padding'!r} ({look.source}): leave the setting out."
        )
    if look.pad_type == family or "pad_type" in given:
        return settings
    if not look.pad_type:
        raise ConfigError(f"{name} pads as TensorFlow does, but {look.source} is of weights that were trained without.")
    backbone = {**backbone, "timm_kwargs": {**given, "pad_type": look.pad_type}}
    model = dataclasses.replace(settings.model, segmenter={**segmenter, "backbone_config": backbone})
    return dataclasses.replace(settings, model=model)


def check_given(key: str, given: list[float] | None, look: Look | None) -> None:
    """Raises ConfigError for a mean or deviation that is not the one of the backbone's weights."""
    if given is None or look is None:
        return
    own = getattr(look, key)
    if not close(given, own):
        raise ConfigError(
            f"`data.{key}` is {given}, but the backbone was trained with {list(own)} ({look.source}): leave the "
            "setting out."
        )


def refuse_other_look(settings: TrainSettings) -> None:
    """Raises ConfigError where the labels were made by this backbone, shown its images otherwise than here: then masks
    lie beside what the network sees, by half a cell of the coarsest map for another padding."""
    backbone = ((settings.model.segmenter or {}).get("backbone_config") or {}).get("backbone")
    for store in (settings.data.train, settings.data.extra):
        header = Path(store or "") / "header.json"
        if backbone is None or not header.is_file():
            continue
        with reading(str(header)):
            look = json.loads(header.read_text(encoding="utf-8")).get("look")
        if not look or _architecture(look["network"]) != _architecture(backbone):
            continue
        here = _look_of(settings)
        for key, value in here.items():
            before = look[key]
            same = before == value if isinstance(value, str) else close(before, value)
            if not same:
                raise ConfigError(
                    f"The labels of {store} were made by {look['network']} with {key} {before or 'symmetric'!r}, but "
                    f"this run shows its {backbone} images with {value or 'symmetric'!r}: give both the same weights."
                )


def _look_of(settings: TrainSettings) -> dict[str, Any]:
    backbone = (settings.model.segmenter or {})["backbone_config"]
    pad_type = (backbone.get("timm_kwargs") or {}).get("pad_type") or ""
    if str(backbone["backbone"]).startswith("tf_"):
        pad_type = "same"
    return {"image_mean": settings.data.image_mean, "image_std": settings.data.image_std, "pad_type": pad_type}


def close(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two means, or deviations, are the same but for rounding."""
    return all(abs(a - b) <= _CLOSE for a, b in zip(one, other, strict=True))


def _architecture(name: str) -> str:
    """timm:hf-hub:timm/mobilenetv2_100.ra_in1k -> mobilenetv2_100"""
    return name.rpartition(":")[2].rpartition("/")[2].partition(".")[0]


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
    file = _from_hub(path.removeprefix(HUB)) if path.startswith(HUB) else Path(path)
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
