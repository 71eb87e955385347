"""An image classifier names the masks; its classes are mapped to the user's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from ...models.errors import UserError
from ..cutting.proposals import Proposals
from ..encoders.backbone import Encoder
from ..encoders.pixels import group_by_size
from ..settings import ClassifierSettings
from .class_map import read_class_map, resolve_class_map
from .crops import crops_of, name_crops


class ClassifierNamer:
    """An image classifier whose classes are mapped to the user's.

    encoder: with a classifier head. settings, changes: see `ClassifierSettings`; `class_map` has to be given.

    Raises UserError for an encoder without classifier, and as `read_class_map` and `resolve_class_map` do.
    """

    name = "classifier"

    def __init__(self, encoder: Encoder, settings: ClassifierSettings | None = None, **changes: Any) -> None:
        if not encoder.num_classes:
            raise UserError(f"{encoder.name} has no classifier head to name classes with; load classifier weights")
        self.config = config = ClassifierSettings.of(settings, **changes)
        class_map = read_class_map(config.class_map)
        self.encoder = encoder
        self.class_map = resolve_class_map(class_map, encoder.num_classes, encoder.id2label, encoder.name)
        self.names = list(class_map)
        weights = torch.zeros(encoder.num_classes, len(self.names))
        for column, name in enumerate(self.names):
            weights[self.class_map[name], column] = 1
        self._members = weights.to(encoder.device)

    @property
    def settings(self) -> dict[str, Any]:
        """For the store's header."""
        crop = () if self.config.mode == "crop" else ("context", "surroundings")  # else without effect
        values = {**self.config.as_dict(), "encoder": self.encoder.name, "class_map": self.class_map}
        return {name: None if name in crop else value for name, value in values.items() if name != "batch_size"}

    def probabilities(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """(N, K): softmax over the mapped classes, or over all of the classifier's, summed for each name."""
        logits = self._logits(images).float()
        if self.config.others == "ignore":
            logits = logits.masked_fill(self._members.sum(dim=1) == 0, -torch.inf)
        return logits.softmax(dim=-1) @ self._members

    def _logits(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """(N, classes), images of equal working size in one forward pass."""
        logits = torch.zeros(len(images), self.encoder.num_classes, device=self.encoder.device)
        for size, indices in group_by_size(images, self.config.image_size, self.encoder.fit).items():
            for start in range(0, len(indices), self.config.batch_size):
                batch = indices[start : start + self.config.batch_size]
                pixels = self.encoder.pixels([images[index] for index in batch], size)
                logits[batch] = self.encoder.classify(pixels).float()
        return logits

    def __call__(self, images: Sequence[Image.Image], proposals: Sequence[Proposals]) -> list[Proposals]:
        """Name the masks; the labeler's own labels are replaced."""
        if self.config.mode == "crop":
            config = self.config
            crops = crops_of(images, proposals, config.context, config.surroundings, self.encoder.image_mean)
            return name_crops(crops, proposals, lambda batch: (self.probabilities(batch), None), config.batch_size)
        named = list(proposals)
        # An image without masks needs no name.
        todo = [index for index, p in enumerate(proposals) if len(p)]
        if todo:
            confidences, labels = self.probabilities([images[index] for index in todo]).cpu().max(dim=1)
        for place, index in enumerate(todo):
            count = len(proposals[index])
            named[index] = replace(
                proposals[index],
                labels=np.full(count, int(labels[place]), np.int64),
                confidences=np.full(count, float(confidences[place]), np.float32),
            )
        return [_with_names(p) for p in named]


def _with_names(proposals: Proposals) -> Proposals:
    """Empty labels for no masks, in place of what the labeler knew."""
    if len(proposals):
        return proposals
    return replace(proposals, labels=np.zeros(0, np.int64), confidences=np.zeros(0, np.float32))
