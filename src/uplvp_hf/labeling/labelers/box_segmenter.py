"""Boxes to masks: any SAM of transformers, prompted with all boxes of an image at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..encoders.weights import load_frozen, model_type, weights_license

MASK_BYTES = 1 << 26  # full-size logits that exist at a time while masks are made: 64 MB


class BoxSegmenter:
    """SAM, SAM-HQ, SAM 2, SAM 3 (its tracker) or EdgeTAM as a function from boxes to masks.

    Args:
        model: folder or Hub id. device: where it runs. dtype: of its weights; None: as stored.
        boxes_per_pass: boxes of an image that go through the mask decoder together.

    Raises OSError when the model cannot be found, UserError when it is another kind of model or lacks tensors.
    """

    def __init__(
        self,
        model: str,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        boxes_per_pass: int = 64,
    ) -> None:
        from transformers import AutoModelForMaskGeneration, AutoProcessor
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASK_GENERATION_MAPPING_NAMES as KINDS

        model_type(model, KINDS, f"which makes no masks of boxes; known are {', '.join(KINDS)}")
        self.model = load_frozen(AutoModelForMaskGeneration, model, device, dtype)
        self.processor = AutoProcessor.from_pretrained(model)
        self.name, self.license = str(model), weights_license(model)
        self.boxes_per_pass = boxes_per_pass

    @torch.inference_mode()
    def __call__(
        self, images: Sequence[Image.Image], boxes: Sequence[np.ndarray]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """One mask a box.

        boxes: (N, 4) x1, y1, x2, y2 in pixels for each image, N may be 0.
        Returns for each image (N, H, W) bool masks and (N,) float32, the IoU with the object that the model predicts
        for its mask, 0 to 1. All images go through the image encoder in one pass; images with fewer boxes than others
        repeat their last one, as a box does not see the others.
        """
        results: list[Any] = [
            (np.zeros((0, image.height, image.width), dtype=bool), np.zeros(0, dtype=np.float32)) for image in images
        ]
        busy = [k for k, found in enumerate(boxes) if len(found)]
        if not busy:
            return results
        most = max(len(boxes[k]) for k in busy)
        padded = [np.concatenate([boxes[k], boxes[k][-1:].repeat(most - len(boxes[k]), axis=0)]) for k in busy]
        inputs = self.processor(
            images=[images[k] for k in busy], input_boxes=[part.tolist() for part in padded], return_tensors="pt"
        )
        logits, scores = self._decode(inputs)
        sizes = {key: inputs[key].tolist() for key in ("original_sizes", "reshaped_input_sizes") if key in inputs}
        for place, k in enumerate(busy):
            own = {key: [value[place]] for key, value in sizes.items()}
            masks = self._full_size(logits[place][: len(boxes[k])], own)
            results[k] = (masks, scores[place][: len(boxes[k])].clamp(0, 1).numpy())
        return results

    def _decode(self, inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, N, h, w) mask logits and (B, N) predicted IoU, float32 on the CPU."""
        weights = next(self.model.parameters())
        found = self.model.get_image_embeddings(inputs["pixel_values"].to(weights.device, weights.dtype))
        names = ("image_embeddings", "intermediate_embeddings")  # the latter of SAM-HQ
        embeddings = dict(zip(names, found)) if isinstance(found, tuple) else {"image_embeddings": found}
        logits, scores = [], []
        for part in inputs["input_boxes"].split(self.boxes_per_pass, dim=1):
            prompt = part.to(weights.device, weights.dtype)
            output = self.model(**embeddings, input_boxes=prompt, multimask_output=False)
            logits.append(output.pred_masks[:, :, 0].float().cpu())
            scores.append(output.iou_scores[:, :, 0].float().cpu())
        return torch.cat(logits, dim=1), torch.cat(scores, dim=1)

    def _full_size(self, logits: torch.Tensor, sizes: dict[str, list[Any]]) -> np.ndarray:
        """(N, h, w) logits of one image -> (N, H, W) bool, some at a time."""
        height, width = sizes["original_sizes"][0]
        step = max(1, MASK_BYTES // (4 * max(height * width, 1024 * 1024)))  # SAM's first come at the canvas's size
        parts = [
            self.processor.post_process_masks([part[:, None]], *sizes.values())[0][:, 0].numpy()
            for part in logits.split(step)
        ]
        return np.concatenate(parts).astype(bool)
