"""Zero-shot detectors of transformers: boxes of what phrases name.

Phrases are sorted before they are put to a detector, so that what is found does not depend on the order in which the
classes are written. Grounding DINO and OmDet-Turbo read all phrases of a pass together: phrases of one pass influence
each other a little, as they do in the models' own pipelines. OWL looks for each phrase by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.ops import box_convert

from ...models.errors import UserError
from ..encoders.pixels import group_by_size
from ..encoders.weights import load_frozen, model_type, weights_license


@dataclass(frozen=True)
class Boxes:
    """xyxy (N, 4) float32 in pixels, scores (N,) float32 in 0 to 1, labels (N,) int64: the class of each."""

    xyxy: np.ndarray
    scores: np.ndarray
    labels: np.ndarray

    def take(self, indices: np.ndarray) -> Boxes:
        """The boxes at `indices`, integers or a bool mask."""
        return Boxes(self.xyxy[indices], self.scores[indices], self.labels[indices])


class Detector:
    """A zero-shot detector with the phrases that it looks for.

    Args:
        model, processor: of transformers.
        phrases: for each class the phrases that name it; a box's score is that of its best phrase.
        phrases_per_pass: phrases that are asked for at once; None: the detector's own number.

    A subclass says what one pass is: `look` yields, for some phrases at a time, logits (B, Q, phrases), the classes
    of the phrases, and boxes (B, Q, 4) as center and size in shares of the canvas.
    """

    threshold = 0.3

    def __init__(
        self, model: Any, processor: Any, phrases: Sequence[Sequence[str]], phrases_per_pass: int | None = None
    ) -> None:
        self.model, self.processor, self.limit = model, processor, phrases_per_pass
        pairs = sorted((phrase, label) for label, names in enumerate(phrases) for phrase in names)
        self.phrases, self.owners = [phrase for phrase, _ in pairs], [label for _, label in pairs]

    def look(self, images: Sequence[Image.Image]) -> Iterator[tuple[torch.Tensor, list[int], torch.Tensor]]:
        """See the class."""
        raise NotImplementedError

    def canvas(self, image: Image.Image) -> tuple[float, float]:
        """Width and height in pixels of the image that boxes are shares of."""
        return image.width, image.height

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], threshold: float | None = None) -> list[Boxes]:
        """The boxes of each image whose score is above `threshold` (None: the detector's own), cut at the image.

        Images of equal size go through the network together: others would have to be padded, which it can see.
        """
        least = self.threshold if threshold is None else threshold
        found: list[list[Boxes]] = [[] for _ in images]
        for members in group_by_size(images, 0, lambda width, height, _: (height, width)).values():
            chosen = [images[k] for k in members]
            for logits, owners, boxes in self.look(chosen):
                for place, k in enumerate(members):
                    found[k].append(self._above(images[k], logits[place], owners, boxes[place], least))
        return [_join(parts) for parts in found]

    def _above(
        self, image: Image.Image, logits: torch.Tensor, owners: list[int], boxes: torch.Tensor, least: float
    ) -> Boxes:
        highest, best = logits.float().cpu().max(dim=1)
        scores = highest.sigmoid()
        keep = scores > least
        xyxy = box_convert(boxes.float().cpu()[keep], "cxcywh", "xyxy") * torch.tensor(self.canvas(image)).repeat(2)
        return Boxes(xyxy.numpy(), scores[keep].numpy(), np.asarray(owners, dtype=np.int64)[best[keep].numpy()])

    def _inputs(self, **values: Any) -> dict[str, Any]:
        """What the processor makes of `values`, on the model's device and in its dtype."""
        weights = next(self.model.parameters())
        made = self.processor(**values, return_tensors="pt")
        return {
            name: value.to(weights.device, weights.dtype if value.is_floating_point() else value.dtype)
            for name, value in made.items()
        }

    def _chunks(self, size: int) -> Iterator[slice]:
        size = self.limit or size
        for start in range(0, len(self.phrases), size):
            yield slice(start, start + size)


class GroundingDetector(Detector):
    """Grounding DINO and MM-Grounding-DINO: all phrases of a pass are one text, "bear. deer. otter."."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # A full stop or a question mark ends a phrase for the model.
        self.phrases = [" ".join(phrase.lower().replace(".", " ").replace("?", " ").split()) for phrase in self.phrases]

    def look(self, images: Sequence[Image.Image]) -> Iterator[tuple[torch.Tensor, list[int], torch.Tensor]]:
        """See `Detector`. The logit of a phrase is that of its likeliest token."""
        for part in self._passes():
            phrases = self.phrases[part]
            inputs = self._inputs(images=list(images), text=[". ".join(phrases) + "."] * len(images))
            output = self.model(**inputs)
            spans = self._spans(inputs["input_ids"][0].tolist(), phrases)
            logits = torch.stack([output.logits[..., span].amax(dim=-1) for span in spans], dim=-1)
            yield logits, self.owners[part], output.pred_boxes

    def _passes(self) -> Iterator[slice]:
        """As many phrases as the text takes."""
        if self.limit is not None:
            yield from self._chunks(self.limit)
            return
        room, start, used = self.model.config.max_text_len - 2, 0, 0
        for number, phrase in enumerate(self.phrases):
            length = len(self.processor.tokenizer(phrase, add_special_tokens=False)["input_ids"]) + 1
            if used and used + length > room:
                yield slice(start, number)
                start, used = number, 0
            used += length
        yield slice(start, len(self.phrases))

    def _spans(self, tokens: list[int], phrases: Sequence[str]) -> list[list[int]]:
        """Places of the tokens of each phrase."""
        ends = set(self.processor.tokenizer.convert_tokens_to_ids([".", "?"])) | set(
            self.processor.tokenizer.all_special_ids
        ) - {self.processor.tokenizer.unk_token_id}
        spans: list[list[int]] = [[]]
        for place, token in enumerate(tokens[: self.model.config.max_text_len]):
            if token not in ends:
                spans[-1].append(place)
            elif spans[-1]:
                spans.append([])
        spans = [span for span in spans if span]
        if len(spans) != len(phrases):
            raise UserError(
                f"the detector reads {len(spans)} phrases in {', '.join(phrases)}; write plain words, and fewer of "
                "them in a pass (labeler.phrases_per_pass)"
            )
        return spans


class OmDetDetector(Detector):
    """OmDet-Turbo: phrases are classes of their own, and a task that lists them all."""

    def look(self, images: Sequence[Image.Image]) -> Iterator[tuple[torch.Tensor, list[int], torch.Tensor]]:
        """See `Detector`."""
        for part in self._chunks(20):
            inputs = self._inputs(images=list(images), text=[self.phrases[part]] * len(images))
            output = self.model(**inputs)
            logits = output.decoder_class_logits[..., : len(self.phrases[part])]
            yield logits, self.owners[part], output.decoder_coord_logits


class OwlDetector(Detector):
    """OWL-ViT and OWLv2: one pass of the image tower, then each phrase, or each example crop, is compared with it."""

    threshold = 0.2

    def __init__(self, *args: Any, crops: Sequence[tuple[Image.Image, int]] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        with torch.inference_mode():
            queries = [self._text(self.phrases[part]) for part in self._chunks(64)]
            queries += [self._crop(image) for image, _ in crops]
        self.queries = torch.cat(queries)
        self.owners = self.owners + [label for _, label in crops]

    def canvas(self, image: Image.Image) -> tuple[float, float]:
        """OWLv2 pads images to a square."""
        side = max(image.width, image.height)
        return (side, side) if self.model.config.model_type == "owlv2" else (image.width, image.height)

    def look(self, images: Sequence[Image.Image]) -> Iterator[tuple[torch.Tensor, list[int], torch.Tensor]]:
        """See `Detector`."""
        features, grid = self._image(list(images))
        logits, _ = self.model.class_predictor(features, self.queries[None].expand(len(features), -1, -1))
        yield logits, self.owners, self.model.box_predictor(features, grid)

    def _image(self, images: list[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
        grid = self.model.image_embedder(self._inputs(images=images)["pixel_values"])[0]
        return grid.flatten(1, 2), grid

    def _text(self, phrases: list[str]) -> torch.Tensor:
        tower = getattr(self.model, self.model.config.model_type)
        inputs = self._inputs(text=phrases, padding="max_length", truncation=True)
        return tower.get_text_features(**inputs).pooler_output

    def _crop(self, image: Image.Image) -> torch.Tensor:
        """The embedding of what the detector takes for the object of a crop, (1, D)."""
        return self.model.embed_image_query(*self._image([image]))[0][:, 0]


# model_type: the class that knows how to ask it
DETECTORS: dict[str, type[Detector]] = {
    "grounding-dino": GroundingDetector,
    "mm-grounding-dino": GroundingDetector,
    "omdet-turbo": OmDetDetector,
    "owlv2": OwlDetector,
    "owlvit": OwlDetector,
}


def load_detector(
    name: str,
    phrases: Sequence[Sequence[str]],
    crops: Sequence[tuple[Image.Image, int]] = (),
    phrases_per_pass: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> tuple[Detector, str | None]:
    """A detector by folder or Hub id, and the license of its weights where it is known.

    phrases: of each class. crops: images of single objects, with their class, for OWLv2.
    Raises OSError when it cannot be found, UserError when it is no zero-shot detector, lacks tensors, takes no crops,
    or has nothing to look for.
    """
    from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

    kind = model_type(name, DETECTORS, f"no zero-shot detector; known are {', '.join(DETECTORS)}")
    if crops and kind != "owlv2":
        raise UserError(f"{name} is a {kind} model, which finds by words alone; OWLv2 also takes example crops")
    if not crops and not any(phrases):
        raise UserError(f"{name} needs to be told what to look for; give a vocabulary")
    model = load_frozen(AutoModelForZeroShotObjectDetection, name, device, dtype)
    options: dict[str, Any] = {"crops": crops} if crops else {}
    processor = AutoProcessor.from_pretrained(name)
    return DETECTORS[kind](model, processor, phrases, phrases_per_pass, **options), weights_license(name)


def _join(parts: Sequence[Boxes]) -> Boxes:
    return Boxes(
        np.concatenate([part.xyxy for part in parts]),
        np.concatenate([part.scores for part in parts]),
        np.concatenate([part.labels for part in parts]),
    )
