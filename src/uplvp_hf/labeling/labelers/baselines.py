"""Labelers that do not look at the image: what any other labeler has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ...data.dataset import Row
from ..cutting.proposals import Proposals
from ..protocol import Labeler
from ..settings import CenterBoxSettings


class CenterBoxLabeler(Labeler):
    """One box in the middle of every image. Class-agnostic."""

    name = "center_box"
    encoder_name = "none"
    Settings = CenterBoxSettings

    def __init__(self, settings: CenterBoxSettings | None = None, **changes: Any) -> None:
        self.config = CenterBoxSettings.of(settings, **changes)

    def __call__(self, images: Sequence[Image.Image], rows: Sequence[Row] | None = None) -> list[Proposals]:
        """One mask an image, of score 1."""
        results = []
        for image in images:
            mask = np.zeros((1, image.height, image.width), dtype=bool)
            tall, wide = (max(1, round(length * self.config.side)) for length in (image.height, image.width))
            top, left = (image.height - tall) // 2, (image.width - wide) // 2
            mask[0, top : top + tall, left : left + wide] = True
            results.append(Proposals(mask, np.ones(1, dtype=np.float32)))
        return results


class WholeImageLabeler(CenterBoxLabeler):
    """One mask over every image. Class-agnostic."""

    name = "whole_image"

    def __init__(self) -> None:
        super().__init__(side=1.0)
