"""CLIP names the masks: zero-shot classification of their crops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from ..cutting.proposals import Proposals
from ..encoders.prompt_templates import TEMPLATES, read_background, read_templates
from ..encoders.text import TextEmbeddings, split_synonyms, texts_of
from ..features import crop_about
from ..settings import ZeroShotSettings
from .crops import crops_of, name_crops

if TYPE_CHECKING:
    from ..encoders.clip import Clip


class ClipZeroShotNamer:
    """CLIP zero-shot classification of each mask's crop among the class names.

    Args:
        clip: see `load_clip`. entries: vocabulary entries, synonyms separated by commas; the best synonym counts.
        settings, changes: see `ZeroShotSettings`; `templates` default to those that `clip.recommended` has. A crop of
            a background name keeps its best class at a low confidence, for `min_confidence` to drop.
        text: precomputed embeddings of the entries, then the background names (`load_text_embeddings`).

    Raises UserError for an empty vocabulary, and for text that does not fit.
    """

    name = "clip"

    def __init__(
        self,
        clip: Clip,
        entries: Sequence[str],
        settings: ZeroShotSettings | None = None,
        *,
        text: TextEmbeddings | None = None,
        **changes: Any,
    ) -> None:
        self.config = config = ZeroShotSettings.of(settings, **changes)
        self.clip = clip
        templates = clip.recommended.get("templates", TEMPLATES) if config.templates is None else config.templates
        self.entries, self.templates = list(entries), list(read_templates(templates)) if text is None else None
        self.background = read_background(config.background, entries)
        self.names = [split_synonyms(entry)[0] for entry in entries]
        self.text = texts_of(clip, entries, self.background, self.templates or (), text)

    @property
    def settings(self) -> dict[str, Any]:
        """For the store's header."""
        own = ("entries", "templates", "background")
        values = {name: getattr(self.config, name) for name in ("context", "surroundings", "temperature")}
        return {"clip": self.clip.name, **values} | {name: getattr(self, name) for name in own}

    @property
    def about_features(self) -> dict[str, Any]:
        """Of the vectors that are kept of the masks."""
        return crop_about(self.clip.name, self.config.context, self.config.surroundings)

    def probabilities(self, crops: Sequence[Image.Image]) -> torch.Tensor:
        """(N, K) softmax over the classes and the background names, without the latter."""
        return self._look(crops)[0]

    @torch.inference_mode()
    def _look(self, crops: Sequence[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
        """The probabilities, and the embeddings (N, D)."""
        size = (self.clip.image_size, self.clip.image_size)
        features = self.clip.encode_images(self.clip.pixels(crops, size))
        cosine = torch.nn.functional.normalize(features, dim=-1) @ self.text.vectors.T
        scale = self.clip.model.logit_scale.float().exp() / self.config.temperature
        return (self.text.per_class(cosine) * scale).softmax(dim=-1)[:, : len(self.entries)], features

    def __call__(self, images: Sequence[Image.Image], proposals: Sequence[Proposals]) -> list[Proposals]:
        """Name the masks; the labeler's own labels are replaced."""
        config = self.config
        crops = crops_of(images, proposals, config.context, config.surroundings, self.clip.image_mean)
        return name_crops(crops, proposals, self._look, self.config.batch_size)
