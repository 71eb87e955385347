"""How a backbone was shown its images while it was trained: mean, deviation, padding, from its own configuration."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
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
    or as its metadata `pretrained_cfg`; a folder of a model of transformers; or hf-hub:OWNER/NAME, a repository of
    either. timm's `pretrained_cfg` has `mean` and `std`; `pad_type` in it or beside it, or an architecture of timm's
    tf_ family, says how images were padded. transformers' `preprocessor_config.json` has `image_mean` and `image_std`.
    Raises UserError for a configuration that is not JSON or holds no numbers, and where the Hub cannot be reached.
    """
    for content, source in _configurations(weights):
        own = content.get("pretrained_cfg", content)
        if not isinstance(own, Mapping):
            continue
        found = [own.get(key, own.get(f"image_{key}")) for key in ("mean", "std")]
        if None in found:
            continue
        mean, std = (_three(value, key, source) for key, value in zip(("mean", "std"), found, strict=True))
        architecture = str(content.get("architecture") or own.get("architecture") or "")
        usual = "same" if architecture.startswith("tf_") else ""
        return Look(mean, std, str(own.get("pad_type") or content.get("pad_type") or usual), source)
    return None


def _configurations(weights: str) -> Iterator[tuple[dict[str, Any], str]]:
    """(content, where it is from) of the files that may say it."""
    names = ("config.json", "preprocessor_config.json")
    if weights.startswith(HUB):
        for name in names:
            yield from _on_the_hub(weights.removeprefix(HUB), name)
    elif Path(weights).is_dir():
        for file in (Path(weights) / name for name in names):
            if file.is_file():
                yield _parsed(file.read_text(encoding="utf-8"), str(file)), str(file)
    else:
        yield from _beside(Path(weights))


def _three(value: Any, key: str, source: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(one) for one in value)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != 3:
        raise UserError(f"{source}: `{key}` must be three numbers, got {value!r}.")
    return numbers


def _beside(file: Path) -> Iterator[tuple[dict[str, Any], str]]:
    config = file.with_suffix(".json")
    if config.is_file():
        yield _parsed(config.read_text(encoding="utf-8"), str(config)), str(config)
        return
    try:
        with safe_open(file, "pt") as archive:
            text = (archive.metadata() or {}).get("pretrained_cfg")
    except (OSError, SafetensorError):  # whoever loads the weights says so
        return
    if text is not None:
        yield _parsed(text, str(file)), f"the metadata of {file}"


def _on_the_hub(repository: str, name: str) -> Iterator[tuple[dict[str, Any], str]]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        file = hf_hub_download(repository, name)
    except EntryNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise UserError(f"{HUB}{repository}, {name}: {error}") from error
    source = f"{name} of {repository}"
    yield _parsed(Path(file).read_text(encoding="utf-8"), source), source


def _parsed(text: str, source: str) -> dict[str, Any]:
    with reading(source):
        content = json.loads(text)
    if not isinstance(content, dict):
        raise UserError(f"{source}: a JSON object is needed.")
    return content
