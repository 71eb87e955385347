"""Masks of a mask generator such as SAM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ...data import Row
from ..cutting.proposals import Proposals, filter_proposals, mask_nms, top_k
from ..encoders.weights import model_type, weights_license
from ..protocol import Labeler
from ..settings import MaskGeneratorSettings


class MaskGeneratorLabeler(Labeler):
    """Class-agnostic masks of a model of transformers' "mask-generation" task: SAM, SAM-HQ, SAM 2, SAM 3, EdgeTAM.

    model: folder or Hub id. device: where it runs. dtype: of its weights; None: as stored. settings, changes: see
    `MaskGeneratorSettings`. Raises OSError when the model cannot be found, UserError when it generates no masks.
    """

    name = "sam"

    def __init__(
        self,
        model: str,
        settings: MaskGeneratorSettings | None = None,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        **changes: Any,
    ) -> None:
        self.config = config = MaskGeneratorSettings.of(settings, **changes)
        self.encoder_name, self.license = str(model), weights_license(model)
        self.generator = _load_generator(model, device, dtype)
        self.options = {
            "points_per_batch": config.points_batch,
            "points_per_crop": config.points,
            "pred_iou_thresh": config.min_iou,
            "stability_score_thresh": config.min_stability,
            "crops_n_layers": config.crop_layers,
            "crops_nms_thresh": config.nms,
        }
        self.filters = {name: getattr(config, name) for name in ("min_area", "max_area", "max_border")}

    def __call__(self, images: Sequence[Image.Image], rows: Sequence[Row] | None = None) -> list[Proposals]:
        """One class-agnostic `Proposals` an image, masks at the image's size."""
        return [self._proposals(image) for image in images]

    def _proposals(self, image: Image.Image) -> Proposals:
        size = (image.height, image.width)
        found = self.generator(image, **self.options)
        masks = [np.asarray(mask.cpu() if hasattr(mask, "cpu") else mask, dtype=bool) for mask in found["masks"]]
        scores = np.clip(np.asarray(torch.as_tensor(found["scores"]).float().cpu()), 0, 1)
        proposals = filter_proposals(Proposals.build(masks, scores, size), **self.filters)
        return top_k(mask_nms(proposals, self.config.mask_nms), self.config.top)


def _load_generator(model: str, device: str | torch.device, dtype: torch.dtype | None) -> Any:
    from transformers import pipeline
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASK_GENERATION_MAPPING_NAMES as KINDS

    model_type(model, KINDS, f"which generates no masks; known are {', '.join(KINDS)}")
    extra = {} if dtype is None else {"dtype": dtype}
    return pipeline("mask-generation", model=model, device=device, **extra)
