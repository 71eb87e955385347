"""What the masks are called: zero-shot CLIP on its crop, a classifier with mapped classes, or one class for all."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageFilter

from ..data.rle import masks_to_boxes
from ..models.errors import UserError
from .class_map import resolve_class_map
from .encoders import Encoder
from .instances import Proposals
from .pipeline import AGNOSTIC_NAME
from .pixels import group_by_size
from .prompt_templates import TEMPLATES, read_background, read_templates
from .text import TextEmbeddings, embed_classes, split_synonyms

if TYPE_CHECKING:
    from .clip import Clip

SURROUNDINGS = ("none", "blur", "mean")


def crop_box(box: Sequence[float], width: int, height: int, context: float) -> tuple[int, int, int, int]:
    """A square around `box` (x1, y1, x2, y2), `context` times its longer side added all round, cut at the image."""
    x1, y1, x2, y2 = box
    half = max(x2 - x1, y2 - y1) * (0.5 + context)
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    left, top = max(0, int(x - half)), max(0, int(y - half))
    return left, top, max(left + 1, min(width, round(x + half))), max(top + 1, min(height, round(y + half)))


def mask_crops(
    image: Image.Image,
    proposals: Proposals,
    context: float,
    surroundings: str = "none",
    fill: tuple[int, int, int] = (128, 128, 128),
) -> Iterator[Image.Image]:
    """One crop a mask, made when it is asked for. `surroundings`: what becomes of the pixels outside of the mask
    ("none": they stay; "blur": gaussian, an eighth of the crop's longer side; "mean": the color `fill`)."""
    for box, mask in zip(masks_to_boxes(proposals.masks).tolist(), proposals.masks):
        area = crop_box(box, image.width, image.height, context)
        crop = image.crop(area)
        if surroundings != "none":
            left, top, right, bottom = area
            inside = Image.fromarray(mask[top:bottom, left:right].astype(np.uint8) * 255)
            outside = (
                crop.filter(ImageFilter.GaussianBlur(max(crop.size) / 8))
                if surroundings == "blur"
                else Image.new("RGB", crop.size, fill)
            )
            crop = Image.composite(crop, outside, inside)
        yield crop


def _check_surroundings(surroundings: str) -> None:
    if surroundings not in SURROUNDINGS:
        raise UserError(f"surroundings {surroundings!r} is unknown; use one of {', '.join(SURROUNDINGS)}")


def _fill_color(mean: Sequence[float]) -> tuple[int, int, int]:
    """The network's mean color, which is zero after normalization."""
    return tuple(round(255 * value) for value in mean)


def _name_crops(
    crops: Iterator[Image.Image],
    proposals: Sequence[Proposals],
    probabilities: Callable[[Sequence[Image.Image]], torch.Tensor],
    batch_size: int,
) -> list[Proposals]:
    """Name all masks of several images by `probabilities(crops) -> (N, K)`, `batch_size` crops at a time."""
    parts = [probabilities(batch).cpu() for batch in iter(lambda: list(itertools.islice(crops, batch_size)), [])]
    confidences, labels = torch.cat(parts).max(dim=1) if parts else (torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    named, start = [], 0
    for p in proposals:
        end = start + len(p)
        named.append(replace(p, labels=labels[start:end].numpy(), confidences=confidences[start:end].float().numpy()))
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
        clip: see `load_clip`. entries: vocabulary entries, synonyms separated by commas; the best synonym counts.
        templates: a preset ("bare", "openai7", "openai80"), a file, or prompts with {} for the name; None: those that
            `clip.recommended` has, else "openai7".
        background: names of what is no object, or the preset "stuff". They take their share of the probability: a crop
            of background keeps its best class at a low confidence, for `min_confidence` to drop or to leave unnamed.
        context: share of the box's longer side added on every side of the crop.
        surroundings: pixels of the crop outside of the mask: "none" leaves them, "blur" blurs them, "mean" paints them
            in CLIP's mean color.
        temperature: divides the logits, which CLIP's own logit scale multiplies; 1 gives CLIP's probabilities.
        batch_size: crops a forward pass.
        text: precomputed embeddings of the entries, then the background names (`load_text_embeddings`).

    Raises UserError for an empty vocabulary, unknown surroundings, a temperature of 0 or less.
    """

    name = "clip"

    def __init__(
        self,
        clip: Clip,
        entries: Sequence[str],
        templates: str | Sequence[str] | None = None,
        background: str | Sequence[str] = (),
        context: float = 0.1,
        surroundings: str = "none",
        temperature: float = 1.0,
        batch_size: int = 64,
        text: TextEmbeddings | None = None,
    ) -> None:
        _check_surroundings(surroundings)
        if not temperature > 0:
            raise UserError(f"temperature {temperature} cannot divide logits; use a number above 0")
        self.clip, self.context, self.surroundings = clip, context, surroundings
        self.temperature, self.batch_size = temperature, batch_size
        templates = clip.recommended.get("templates", TEMPLATES) if templates is None else templates
        self.entries, self.templates = list(entries), list(read_templates(templates)) if text is None else None
        self.background = read_background(background, entries)
        self.names = [split_synonyms(entry)[0] for entry in entries]
        wanted = [*self.entries, *self.background]
        if text is None:
            text = embed_classes(clip.model, clip.tokenizer, wanted, self.templates)
        elif text.count != len(wanted) or text.vectors.shape[1] != clip.dimension:
            raise UserError(
                f"text embeddings of {text.count} classes and {text.vectors.shape[1]} numbers; {len(wanted)} entries "
                f"and background names of {clip.dimension} numbers are needed"
            )
        self.text = text.to(clip.device)

    @property
    def settings(self) -> dict[str, Any]:
        """For the store's header."""
        own = ("entries", "templates", "background", "context", "surroundings", "temperature")
        return {"clip": self.clip.name} | {name: getattr(self, name) for name in own}

    @torch.inference_mode()
    def probabilities(self, crops: Sequence[Image.Image]) -> torch.Tensor:
        """(N, K) softmax over the classes and the background names, without the latter."""
        size = (self.clip.image_size, self.clip.image_size)
        features = self.clip.encode_images(self.clip.pixels(crops, size))
        cosine = torch.nn.functional.normalize(features, dim=-1) @ self.text.vectors.T
        scale = self.clip.model.logit_scale.float().exp() / self.temperature
        return (self.text.per_class(cosine) * scale).softmax(dim=-1)[:, : len(self.entries)]

    def __call__(self, images: Sequence[Image.Image], proposals: Sequence[Proposals]) -> list[Proposals]:
        """Name the masks; the labeler's own labels are replaced."""
        fill = _fill_color(self.clip.image_mean)
        crops = (
            crop for i, p in zip(images, proposals) for crop in mask_crops(i, p, self.context, self.surroundings, fill)
        )
        return _name_crops(crops, proposals, self.probabilities, self.batch_size)


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
        _check_surroundings(surroundings)
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
        values = {"encoder": self.encoder.name, "class_map": self.class_map, "mode": self.mode}
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
            fill = _fill_color(self.encoder.image_mean)
            crops = (
                crop
                for image, p in zip(images, proposals)
                for crop in mask_crops(image, p, self.context, self.surroundings, fill)
            )
            return _name_crops(crops, proposals, self.probabilities, self.batch_size)
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
