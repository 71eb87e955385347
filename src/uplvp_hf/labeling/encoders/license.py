"""The license of weights, as their model card names it."""

from __future__ import annotations

import os
from pathlib import Path

import yaml


def weights_license(name_or_path: str | os.PathLike[str]) -> str | None:
    """The license that the model card (README.md) of a folder or Hub repository names, such as "apache-2.0".

    Returns None where there is no card, it names none, or it cannot be reached (offline): not known is not free.
    """
    name = os.fspath(name_or_path)
    if os.path.exists(name):
        card = Path(name) / "README.md" if os.path.isdir(name) else None
    else:
        from transformers.utils import cached_file

        found = cached_file(
            name.removeprefix("timm:").removeprefix("hf-hub:").removeprefix("hf_hub:"),
            "README.md",
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        card = None if found is None else Path(found)
    if card is None or not card.is_file():
        return None
    return _license_of_card(card.read_text(encoding="utf-8", errors="replace"))


def _license_of_card(text: str) -> str | None:
    """`license` (or `license_name`, which says more where the former is "other") of a card's YAML head."""
    start, _, rest = text.partition("---\n")
    head, end, _ = rest.partition("\n---")
    if start.strip() or not end:
        return None
    try:
        content = yaml.safe_load(head)
    except yaml.YAMLError:  # a card for people to read; its head is not ours to judge
        return None
    if not isinstance(content, dict):
        return None
    license = content.get("license")
    if license in (None, "other"):
        license = content.get("license_name", license)
    return None if license is None else str(license)
