"""Loading frozen networks of transformers by folder or Hub id, and the license of their weights."""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch
import yaml

from ...models.errors import UserError, reading


def weights_license(name_or_path: str | os.PathLike[str]) -> str | None:
    """The license that the model card (README.md) of a folder or Hub repository names, such as "apache-2.0"; where that
    is "other", its `license_name`, which says more.

    Returns None where there is no card, it names none, or it cannot be reached (offline): not known is not free.
    """
    from huggingface_hub import metadata_load
    from transformers.utils import cached_file

    name = os.fspath(name_or_path)
    if os.path.exists(name):
        card = os.path.join(name, "README.md")
    else:
        card = cached_file(
            name.removeprefix("timm:").removeprefix("hf-hub:").removeprefix("hf_hub:"),
            "README.md",
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    if card is None or not os.path.isfile(card):
        return None
    try:
        content = metadata_load(card) or {}
    except (yaml.YAMLError, ValueError):  # a card for people to read; its head is not ours to judge
        return None
    license = content.get("license")
    if license in (None, "other"):
        license = content.get("license_name", license)
    return None if license is None else str(license)


def model_type(name: str, known: Container[str], otherwise: str) -> str:
    """The `model_type` of a folder or Hub id. Raises UserError for a type that is not `known`, ending in `otherwise`,
    and OSError where there is no such model."""
    from transformers import AutoConfig

    with reading(str(name)):
        kind = AutoConfig.from_pretrained(name).model_type
    if kind not in known:
        raise UserError(f"{name} is a {kind} model, {otherwise}")
    return kind


def load_frozen(loader: Any, name: str, device: str | torch.device, dtype: torch.dtype | None) -> Any:
    """What `loader.from_pretrained` gives, frozen, on the device; dtype None: as stored. Raises UserError for a
    checkpoint without some of the tensors."""
    extra = {} if dtype is None else {"dtype": dtype}
    model, info = loader.from_pretrained(name, output_loading_info=True, **extra)
    refuse_missing(name, info["missing_keys"])
    return model.eval().requires_grad_(False).to(device)


def refuse_missing(name: str, missing: Iterable[str]) -> None:
    """Raises UserError for a checkpoint without some of the tensors: they would be random."""
    missing = sorted(missing)
    if missing:
        raise UserError(
            f"{name}: {len(missing)} tensors are not in the checkpoint, such as {', '.join(missing[:3])}; they would "
            "be random. Name a complete checkpoint of this architecture"
        )


def licenses_of(labeler: Any, namer: Any = None) -> dict[str, str]:
    """{network: license of its weights}, whose terms the labels may come under, as far as the model cards say."""
    used = {labeler.encoder_name: getattr(labeler, "license", None)}
    network = getattr(namer, "clip", None) or getattr(namer, "encoder", None)
    if network is not None:
        used[network.name] = getattr(network, "license", None)
    return {name: license for name, license in used.items() if license is not None}


def join_licenses(licenses: Mapping[str, str]) -> str | None:
    """Of several networks, as one line; None where none is known."""
    return ", ".join(f"{license} ({name})" for name, license in licenses.items()) or None
