"""One name for all masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from ..cutting.proposals import Proposals
from ..protocol import AGNOSTIC_NAME


class AgnosticNamer:
    """Drops what the labeler may know: all masks are of the one class "object"."""

    name = "none"
    names: tuple[str, ...] = (AGNOSTIC_NAME,)
    settings: Mapping[str, Any] = {}

    def __call__(self, images: Sequence[Image.Image], proposals: Sequence[Proposals]) -> list[Proposals]:
        """Labels become None."""
        return [replace(p, labels=None, confidences=None) for p in proposals]
