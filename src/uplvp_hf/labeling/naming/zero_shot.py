"""CLIP names the masks: zero-shot classification of their crops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from ...models.errors import UserError
from ..cutting.proposals import Proposals
from ..encoders.prompt_templates import TEMPLATES, read_background, read_templates
from ..encoders.text import TextEmbeddings, embed_classes, split_synonyms
from .crops import check_surroundings, fill_color, mask_crops, name_crops

if TYPE_CHECKING:
    from ..encoders.clip import Clip


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
        check_surroundings(surroundings)
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
        fill = fill_color(self.clip.image_mean)
        crops = (
            crop for i, p in zip(images, proposals) for crop in mask_crops(i, p, self.context, self.surroundings, fill)
        )
        return name_crops(crops, proposals, self.probabilities, self.batch_size)
