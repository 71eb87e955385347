"""Masks of a mask generator such as SAM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ...data import Row
from ...models.errors import UserError, reading
from ..cutting.proposals import Proposals, filter_proposals, mask_nms, top_k
from ..encoders.license import weights_license
from ..protocol import LabelerBase


class MaskGeneratorLabeler(LabelerBase):
    """Class-agnostic masks of a model of transformers' "mask-generation" task: SAM, SAM-HQ, SAM 2, SAM 3, EdgeTAM.

    Args:
        model: folder or Hub id. device: where it runs. dtype: of its weights; None: as stored.
        points: points along each side of the grid that the model is prompted with.
        points_batch: points a forward pass of the mask decoder.
        min_iou: least IoU that the model predicts for its own mask, 0 to 1; it becomes the score.
        min_stability: least IoU between the masks at a higher and a lower cut-off.
        crop_layers: how many times finer crops of the image are looked at too; costs 4^layers passes.
        nms: box IoU above which the worse of two masks is dropped, by the model's own suppression.
        min_area: share of the image. max_area: share of the image. max_border: share of the image's border.
        mask_nms: mask IoU above which the worse of two masks is dropped.
        top: most masks an image.

    Raises OSError when the model cannot be found, ValueError when it generates no masks.
    """

    name = "sam"

    def __init__(
        self,
        model: str,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        points: int = 32,
        points_batch: int = 64,
        min_iou: float = 0.88,
        min_stability: float = 0.95,
        crop_layers: int = 0,
        nms: float = 0.7,
        min_area: float = 0.001,
        max_area: float = 0.9,
        max_border: float = 1.0,
        mask_nms: float = 0.9,
        top: int = 100,
    ) -> None:
        self.encoder_name, self.license = str(model), weights_license(model)
        self.generator = _load_generator(model, device, dtype)
        self.points_batch, self.mask_nms, self.top = points_batch, mask_nms, top
        self.options = {
            "points_per_crop": points,
            "pred_iou_thresh": min_iou,
            "stability_score_thresh": min_stability,
            "crops_n_layers": crop_layers,
            "crops_nms_thresh": nms,
        }
        self.filters = {"min_area": min_area, "max_area": max_area, "max_border": max_border}

    @property
    def settings(self) -> dict[str, Any]:
        """For the store's header."""
        return {**self.options, **self.filters, "mask_nms": self.mask_nms, "top": self.top}

    def __call__(self, images: Sequence[Image.Image], rows: Sequence[Row] | None = None) -> list[Proposals]:
        """One class-agnostic `Proposals` an image, masks at the image's size."""
        return [self._proposals(image) for image in images]

    def _proposals(self, image: Image.Image) -> Proposals:
        size = (image.height, image.width)
        found = self.generator(image, points_per_batch=self.points_batch, **self.options)
        masks = [np.asarray(mask.cpu() if hasattr(mask, "cpu") else mask, dtype=bool) for mask in found["masks"]]
        scores = np.clip(np.asarray(torch.as_tensor(found["scores"]).float().cpu()), 0, 1)
        proposals = filter_proposals(Proposals.build(masks, scores, size), **self.filters)
        return top_k(mask_nms(proposals, self.mask_nms), self.top)


def _load_generator(model: str, device: str | torch.device, dtype: torch.dtype | None) -> Any:
    from transformers import AutoConfig, pipeline
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASK_GENERATION_MAPPING_NAMES as KINDS

    with reading(str(model)):
        kind = AutoConfig.from_pretrained(model).model_type
    if kind not in KINDS:
        raise UserError(f"{model} is a {kind} model, which generates no masks; known are {', '.join(KINDS)}")
    extra = {} if dtype is None else {"dtype": dtype}
    return pipeline("mask-generation", model=model, device=device, **extra)
