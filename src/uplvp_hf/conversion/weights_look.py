"""How a backbone was shown its images while it was trained: mean, deviation, padding, from its own configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..models.errors import UserError, reading

HUB = "hf-hub:"


@dataclass(frozen=True)
class Look:
    """image_mean, image_std: of RGB scaled to 0..1. pad_type: "same" for TensorFlow's padding, else "". source: the
    file that says so."""

    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    pad_type: str
    source: str


def weights_look(weights: str) -> Look | None:
    """What the configuration of weights says; None where there is none.

    weights: a safetensors file, with timm's `config.json` beside it under its own name (`x.json` for `x.safetensors`),
    or as its metadata `pretrained_cfg`; or hf-hub:OWNER/NAME, a repository of timm. Its `pretrained_cfg` has `mean` and
    `std`; `pad_type` in it or beside it, or an architecture of timm's tf_ family, says how images were padded.
    Raises UserError for a configuration that is not JSON or holds no numbers.
    """
    found = _on_the_hub(weights.removeprefix(HUB)) if weights.startswith(HUB) else _beside(Path(weights))
    if found is None:
        return None
    content, source = found
    own = content.get("pretrained_cfg", content)
    if not isinstance(own, Mapping) or "mean" not in own or "std" not in own:
        return None
    mean, std = (_three(own[key], key, source) for key in ("mean", "std"))
    architecture = str(content.get("architecture") or own.get("architecture") or "")
    usual = "same" if architecture.startswith("tf_") else ""
    return Look(mean, std, str(own.get("pad_type") or content.get("pad_type") or usual), source)


def _three(value: Any, key: str, source: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(one) for one in value)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != 3:
        raise UserError(f"{source}: `{key}` must be three numbers, got {value!r}.")
    return numbers


def _beside(file: Path) -> tuple[dict[str, Any], str] | None:
    config = file.with_suffix(".json")
    if config.is_file():
        return _parsed(config.read_text(encoding="utf-8"), str(config)), str(config)
    try:
        with safe_open(file, "pt") as archive:
            text = (archive.metadata() or {}).get("pretrained_cfg")
    except (OSError, SafetensorError):  # whoever loads the weights says so
        return None
    return None if text is None else (_parsed(text, str(file)), f"the metadata of {file}")


def _on_the_hub(repository: str) -> tuple[dict[str, Any], str] | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        file = hf_hub_download(repository, "config.json")
    except EntryNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{HUB}{repository}, config.json: {error}") from error
    source = f"config.json of {repository}"
    return _parsed(Path(file).read_text(encoding="utf-8"), source), source


def _parsed(text: str, source: str) -> dict[str, Any]:
    with reading(source):
        content = json.loads(text)
    if not isinstance(content, dict):
        raise UserError(f"{source}: a JSON object is needed.")
    return content
