"""What the masks are called: zero-shot CLIP on its crop, a classifier with mapped classes, or one class for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ..data.rle import masks_to_boxes
from .encoders import Encoder, fit_longest
from .instances import Proposals
from .pipeline import AGNOSTIC_NAME
from .text import TEMPLATES, embed_classes, split_synonyms

if TYPE_CHECKING:
    from .dense_clip import Clip


def crop_box(box: Sequence[float], width: int, height: int, context: float) -> tuple[int, int, int, int]:
    """A square around `box` (x1, y1, x2, y2), `context` times its longer side added all round, cut at the picture."""
    x1, y1, x2, y2 = box
    half = max(x2 - x1, y2 - y1) * (0.5 + context)
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    left, top = max(0, int(x - half)), max(0, int(y - half))
    return left, top, max(left + 1, min(width, round(x + half))), max(top + 1, min(height, round(y + half)))


def mask_crops(image: Image.Image, proposals: Proposals, context: float) -> list[Image.Image]:
    """One crop a mask."""
    boxes = masks_to_boxes(proposals.masks)
    return [image.crop(crop_box(box, image.width, image.height, context)) for box in boxes.tolist()]


def _name_crops(
    images, proposals: Sequence[Proposals], context: float, probabilities, batch_size: int
) -> list[Proposals]:
    """Name all masks of a batch of pictures by `probabilities(crops) -> (N, K)`."""
    crops = [crop for image, p in zip(images, proposals) for crop in mask_crops(image, p, context)]
    parts = [probabilities(crops[start : start + batch_size]).cpu() for start in range(0, len(crops), batch_size)]
    confidences, labels = torch.cat(parts).max(dim=1) if parts else (torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    named, start = [], 0
    for p in proposals:
        end = start + len(p)
        named.append(replace(p, labels=labels[start:end].numpy(), confidences=confidences[start:end].numpy()))
        start = end
    return named


class AgnosticNamer:
    """Drops what the labeler may know: all masks are of the one class "object"."""

    name = "none"
    names: tuple[str, ...] = (AGNOSTIC_NAME,)
    settings: Mapping[str, Any] = {}

    def __call__(self, images: Sequence[Image.Image], proposals: Sequence[Proposals]) -> list[Proposals]:
        """Labels become None."""
        return [replace(p, labels=None, confidences=None) for p in proposals]


class ClipZeroShotNamer:
    """CLIP zero-shot classification of each mask's crop among the class names.

    Args:
        clip: see `dense_clip.load_clip`. entries: vocabulary entries, synonyms separated by commas.
        background: names of what is no object. They take their share of the probability: a crop of background keeps
            its best class at a low confidence, for `min_confidence` to drop.
        context: share of the box's longer side added on every side of the crop.
        temperature: divides the logits, which CLIP's own logit scale multiplies; 1 gives CLIP's probabilities.
    """

    name = "clip"

    def __init__(
        self,
        clip: Clip,
        entries: Sequence[str],
        templates: Sequence[str] = TEMPLATES,
        background: Sequence[str] = (),
        context: float = 0.1,
        temperature: float = 1.0,
        batch_size: int = 64,
    ) -> None:
        self.clip, self.context, self.temperature, self.batch_size = clip, context, temperature, batch_size
        self.entries, self.templates, self.background = list(entries), list(templates), list(background)
        self.names = [split_synonyms(entry)[0] for entry in entries]
        self.text = embed_classes(clip.model, clip.tokenizer, [*self.entries, *self.background], templates)

    @property
    def settings(self) -> dict[str, Any]:
        """For the store's header."""
        values = {
            "clip": self.clip.name,
            "entries": self.entries,
            "templates": self.templates,
            "background": self.background,
        }
        return values | {"context": self.context, "temperature": self.temperature}

    @torch.inference_mode()
    def probabilities(self, crops: Sequence[Image.Image]) -> torch.Tensor:
        """(N, K) softmax over the classes and the background names, without the latter."""
        size = (self.clip.image_size, self.clip.image_size)
        features = self.clip.model.get_image_features(pixel_values=self.clip.pixels(crops, size)).pooler_output.float()
        cosine = torch.nn.functional.normalize(features, dim=-1) @ self.text.vectors.T
        scale = self.clip.model.logit_scale.float().exp() / self.temperature
        return (self.text.per_class(cosine) * scale).softmax(dim=-1)[:, : len(self.entries)]

    def __call__(self, images: Sequence[Image.Image], proposals: Sequence[Proposals]) -> list[Proposals]:
        """Name the masks; the labeler's own labels are replaced."""
        return _name_crops(images, proposals, self.context, self.probabilities, self.batch_size)


class ClassifierNamer:
    """An image classifier whose classes are mapped to the vocabulary, its softmax restricted to the mapped classes.

    Args:
        encoder: with a classifier head. class_map: {class name: [indices of the classifier's classes]}.
        mode: "picture" gives all masks of a picture its best class; "crop" classifies each mask's crop.
        image_size: longer side in pixels of what the classifier sees; somewhat more than the side it was trained with
            names more pictures rightly. context: as in `ClipZeroShotNamer`.

    Raises ValueError for an encoder without classifier, an unknown mode, or an index beyond its classes.
    """

    name = "classifier"

    def __init__(
        self,
        encoder: Encoder,
        class_map: Mapping[str, Sequence[int]],
        mode: str = "picture",
        image_size: int = 320,
        context: float = 0.1,
        batch_size: int = 32,
    ) -> None:
        if not encoder.num_classes:
            raise ValueError(f"{encoder.name} has no classifier head to name classes with; load classifier weights")
        if mode not in ("picture", "crop"):
            raise ValueError(f"classifier namer: mode {mode!r} is unknown; use 'picture' or 'crop'")
        for name, indices in class_map.items():
            beyond = [index for index in indices if not 0 <= index < encoder.num_classes]
            if beyond:
                raise ValueError(
                    f"class map, {name!r}: {encoder.name} has no class {beyond[0]}, only 0 to {encoder.num_classes - 1}"
                )
        self.encoder, self.class_map = encoder, {name: list(indices) for name, indices in class_map.items()}
        self.mode, self.image_size, self.context, self.batch_size = mode, image_size, context, batch_size
        self.names = list(class_map)

    @property
    def settings(self) -> dict[str, Any]:
        """For the store's header."""
        values = {"encoder": self.encoder.name, "class_map": self.class_map, "mode": self.mode}
        return values | {"image_size": self.image_size, "context": self.context if self.mode == "crop" else None}

    def probabilities(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """(N, K): softmax over all mapped classes, summed for each name."""
        mapped = sorted({index for indices in self.class_map.values() for index in indices})
        place = {index: k for k, index in enumerate(mapped)}
        logits = (
            torch.cat([self._logits(image) for image in images]) if images else torch.zeros(0, self.encoder.num_classes)
        )
        shares = logits.float()[:, mapped].softmax(dim=-1)
        return torch.stack([shares[:, [place[i] for i in self.class_map[n]]].sum(dim=-1) for n in self.names], dim=-1)

    def _logits(self, image: Image.Image) -> torch.Tensor:
        size = fit_longest(*image.size, self.image_size)
        return self.encoder.classify(self.encoder.pixels([image], size))

    def __call__(self, images: Sequence[Image.Image], proposals: Sequence[Proposals]) -> list[Proposals]:
        """Name the masks; the labeler's own labels are replaced."""
        if self.mode == "crop":
            return _name_crops(images, proposals, self.context, self.probabilities, self.batch_size)
        confidences, labels = self.probabilities(images).cpu().max(dim=1)
        named = []
        for p, confidence, label in zip(proposals, confidences.tolist(), labels.tolist()):
            count = len(p)
            named.append(
                replace(p, labels=np.full(count, label, np.int64), confidences=np.full(count, confidence, np.float32))
            )
        return named
