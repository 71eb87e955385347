"""Masks of what words name, by SAM 3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ...data import Row
from ...models.errors import UserError
from ..cutting.proposals import Proposals, filter_proposals, mask_nms, top_k
from ..encoders.text import split_synonyms
from ..encoders.weights import load_frozen, model_type, weights_license
from ..prompt_settings import ConceptSettings
from ..protocol import Labeler
from .box_segmenter import MASK_BYTES


class ConceptLabeler(Labeler):
    """All instances of what each class's words name, by transformers' `Sam3Model`.

    model: folder or Hub id. entries: of a vocabulary; phrases for one class are separated by commas, and each of them
    is looked for. device: where it runs. dtype: of the weights; None: as stored. settings, changes: see
    `ConceptSettings`.

    The image goes through the vision tower once, each phrase through the text tower once in a run; only the decoder
    runs for each pair, `phrases_per_pass` at a time. The score is that of the instance times that of the phrase being
    in the image at all, as SAM 3 has it. A mask found by several phrases is kept once, under the best.

    Raises OSError when the model cannot be found, UserError when it is no SAM 3, lacks tensors, or has no vocabulary.
    """

    name = "concept"

    def __init__(
        self,
        model: str,
        entries: Sequence[str],
        settings: ConceptSettings | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        **changes: Any,
    ) -> None:
        from transformers import Sam3Model, Sam3Processor

        self.config = ConceptSettings.of(settings, **changes)
        if not entries:
            raise UserError("the concept labeler needs a vocabulary: the words that it looks for")
        model_type(model, ("sam3", "sam3_video"), "which masks no words; name a SAM 3, such as facebook/sam3")
        self.model = load_frozen(Sam3Model, model, device, dtype)
        self.processor = Sam3Processor.from_pretrained(model)
        self.encoder_name, self.license = str(model), weights_license(model)
        self.entries = list(entries)
        phrases = [split_synonyms(entry) for entry in entries]
        self.vocabulary = [names[0] for names in phrases]
        pairs = [(phrase, label) for label, names in enumerate(phrases) for phrase in names]
        self.owners = np.array([label for _, label in pairs])
        self.text, self.text_mask = self._read([phrase for phrase, _ in pairs])

    @property
    def settings(self) -> dict[str, Any]:
        """For the store's header."""
        return {"entries": self.entries, **self.config.as_dict()}

    @torch.inference_mode()
    def _read(self, phrases: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Text features (P, L, D) of the phrases, and which of their tokens count (P, L)."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.processor.tokenizer(
            phrases, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).to(self.model.device)
        names = ("input_ids", "attention_mask")
        return self.model.get_text_features(**{name: tokens[name] for name in names}).pooler_output, tokens[names[1]]

    def __call__(self, images: Sequence[Image.Image], rows: Sequence[Row] | None = None) -> list[Proposals]:
        """One `Proposals` with labels an image, masks at the image's size."""
        return [self._proposals(image) for image in images]

    @torch.inference_mode()
    def _proposals(self, image: Image.Image) -> Proposals:
        size = (image.height, image.width)
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"]
        vision = self.model.get_vision_features(pixels.to(self.model.device, self.model.dtype))
        scores, labels, logits = self._instances(vision)
        proposals = Proposals.build(self._full_size(logits, size), scores.numpy(), size, labels.numpy())
        proposals = proposals.take(proposals.masks.any(axis=(1, 2)))
        proposals = filter_proposals(proposals, self.config.min_area, self.config.max_area)
        return top_k(mask_nms(proposals, self.config.mask_nms, agnostic=True), self.config.top)

    def _instances(self, vision: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scores (N,), classes (N,) and mask logits (N, h, w) on the CPU, best first. Four times as many as are kept
        in the end, because some of them will fall to the suppression."""
        best = torch.zeros(0), torch.zeros(0, dtype=torch.int64), None
        for start in range(0, len(self.owners), self.config.phrases_per_pass):
            part = slice(start, start + self.config.phrases_per_pass)
            output = self._decode(vision, part)
            scores = (output.pred_logits.float().sigmoid() * output.presence_logits.float().sigmoid()).cpu()
            row, query = (scores > self.config.threshold).nonzero(as_tuple=True)
            masks = output.pred_masks[row.to(output.pred_masks.device), query.to(output.pred_masks.device)]
            found = scores[row, query], torch.from_numpy(self.owners[part])[row], masks.float().cpu()
            merged = [new if old is None else torch.cat([old, new]) for old, new in zip(best, found)]
            order = merged[0].argsort(descending=True, stable=True)[: 4 * self.config.top]
            best = tuple(values[order] for values in merged)
        return best

    def _decode(self, vision: Any, part: slice) -> Any:
        """The model's output for some phrases, one a row."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        text = BaseModelOutputWithPooling(pooler_output=self.text[part])
        shared = {
            name: tuple(level.expand(len(self.text[part]), -1, -1, -1) for level in vision[name])
            for name in ("fpn_hidden_states", "fpn_position_encoding")
        }
        return self.model(vision_embeds=type(vision)(**shared), text_embeds=text, attention_mask=self.text_mask[part])

    def _full_size(self, logits: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
        """(N, h, w) logits -> (N, H, W) bool, as transformers' post-processing makes them, some at a time."""
        masks = np.zeros((len(logits), *size), dtype=bool)
        step = max(1, MASK_BYTES // (4 * size[0] * size[1]))
        for start in range(0, len(logits), step):
            part = logits[start : start + step].sigmoid()[None]
            grown = F.interpolate(part, size=size, mode="bilinear", align_corners=False)[0]
            masks[start : start + step] = (grown > self.config.mask_threshold).numpy()
        return masks
