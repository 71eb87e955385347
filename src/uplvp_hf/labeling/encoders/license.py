"""The license of weights, as their model card names it."""

from __future__ import annotations

import os

import yaml


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
