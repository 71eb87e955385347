"""An image classifier names the masks; its classes are mapped to the user's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from ...models.errors import UserError
from ..cutting.proposals import Proposals
from ..encoders.backbone import Encoder
from ..encoders.pixels import group_by_size
from .class_map import resolve_class_map
from .crops import check_surroundings, fill_color, mask_crops, name_crops


class ClassifierNamer:
    """An image classifier whose classes are mapped to the user's.

    Args:
        encoder: with a classifier head. class_map: {class name: [indices or names of the classifier's classes]}, see
            `resolve_class_map`.
        mode: "image" gives all masks of an image its best class; "crop" classifies each mask's crop.
        image_size: longer side in pixels of what the classifier sees; somewhat more than the side it was trained with
            names more images rightly.
        context: of a crop, as in `ClipZeroShotNamer`. surroundings: of a crop, as in `ClipZeroShotNamer`.
        others: what the classes outside of the map do to the confidence. "ignore" shares all probability among the
            mapped ones; "count" leaves the others their share, so that what is none of the classes has a low
            confidence, for `min_confidence` to drop or to leave unnamed.
        batch_size: images or crops a forward pass; only those of equal working size go together.

    Raises UserError for an encoder without classifier, an unknown option, and as `resolve_class_map` does.
    """

    name = "classifier"

    def __init__(
        self,
        encoder: Encoder,
        class_map: Mapping[str, Sequence[int | str]],
        mode: str = "image",
        image_size: int = 320,
        context: float = 0.1,
        surroundings: str = "none",
        others: str = "ignore",
        batch_size: int = 32,
    ) -> None:
        if not encoder.num_classes:
            raise UserError(f"{encoder.name} has no classifier head to name classes with; load classifier weights")
        if mode not in ("image", "crop"):
            raise UserError(f"classifier namer: mode {mode!r} is unknown; use 'image' or 'crop'")
        if others not in ("ignore", "count"):
            raise UserError(f"classifier namer: others {others!r} is unknown; use 'ignore' or 'count'")
        check_surroundings(surroundings)
        id2label = encoder.id2label
        self.encoder, self.mode, self.image_size, self.context = encoder, mode, image_size, context
        self.surroundings, self.others, self.batch_size = surroundings, others, batch_size
        self.class_map = resolve_class_map(class_map, encoder.num_classes, id2label, encoder.name)
        self.names = list(class_map)
        weights = torch.zeros(encoder.num_classes, len(self.names))
        for column, name in enumerate(self.names):
            weights[self.class_map[name], column] = 1
        self._members = weights.to(encoder.device)

    @property
    def settings(self) -> dict[str, Any]:
        """For the store's header."""
        values: dict[str, Any] = {"encoder": self.encoder.name, "class_map": self.class_map, "mode": self.mode}
        values |= {"image_size": self.image_size, "others": self.others}
        crop = self.mode == "crop"
        return values | {name: getattr(self, name) if crop else None for name in ("context", "surroundings")}

    def probabilities(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """(N, K): softmax over the mapped classes, or over all of the classifier's, summed for each name."""
        logits = self._logits(images).float()
        if self.others == "ignore":
            logits = logits.masked_fill(self._members.sum(dim=1) == 0, -torch.inf)
        return logits.softmax(dim=-1) @ self._members

    def _logits(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """(N, classes), images of equal working size in one forward pass."""
        logits = torch.zeros(len(images), self.encoder.num_classes, device=self.encoder.device)
        for size, indices in group_by_size(images, self.image_size, self.encoder.fit).items():
            for start in range(0, len(indices), self.batch_size):
                batch = indices[start : start + self.batch_size]
                pixels = self.encoder.pixels([images[index] for index in batch], size)
                logits[batch] = self.encoder.classify(pixels).float()
        return logits

    def __call__(self, images: Sequence[Image.Image], proposals: Sequence[Proposals]) -> list[Proposals]:
        """Name the masks; the labeler's own labels are replaced."""
        if self.mode == "crop":
            fill = fill_color(self.encoder.image_mean)
            crops = (
                crop
                for image, p in zip(images, proposals)
                for crop in mask_crops(image, p, self.context, self.surroundings, fill)
            )
            return name_crops(crops, proposals, self.probabilities, self.batch_size)
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
