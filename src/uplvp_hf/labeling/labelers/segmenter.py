"""Masks of a trained segmenter, as labels for another round (self-training)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ...data import InstanceDataset, Row, decode_segmentation, empty_objects
from ...models.masks import mask_area
from ..cutting.proposals import Proposals, mask_nms
from ..encoders.weights import weights_license
from ..fingerprint import hash_files
from ..protocol import Labeler
from ..settings import SegmenterSettings


class SegmenterLabeler(Labeler):
    """Predictions of a trained segmenter of this library as labels for another round (self-training).

    model: folder or Hub id of a model of `uplvp pretrain` or `uplvp finetune`. device: where it runs. settings,
    changes: see `SegmenterSettings`. Raises FileNotFoundError and DataError as `evaluation.load_segmenter` does.
    """

    name = "segmenter"

    def __init__(
        self,
        model: str | os.PathLike[str],
        settings: SegmenterSettings | None = None,
        *,
        device: str | torch.device | None = None,
        **changes: Any,
    ) -> None:
        from ...evaluation.predictor import load_segmenter

        self.model, self.processor = load_segmenter(os.fspath(model), device)
        self.encoder_name, self.license = os.fspath(model), weights_license(model)
        self.config = SegmenterSettings.of(settings, **changes)
        id2label = self.model.config.id2label
        self.vocabulary = [] if self.config.class_agnostic else [id2label[index] for index in range(len(id2label))]
        # The same folder can be trained again between two runs.
        self.fingerprint = hash_files(sorted(Path(model).glob("*.safetensors"))) if os.path.isdir(model) else None

    @property
    def settings(self) -> dict[str, Any]:
        """For the store's header; `weights` is a hash of the model's files, None for a Hub id."""
        return {"weights": self.fingerprint, **self.config.as_dict()}

    def __call__(self, images: Sequence[Image.Image], rows: Sequence[Row] | None = None) -> list[Proposals]:
        """One `Proposals` an image. A prediction does not depend on the images beside it."""
        from ...evaluation.predictor import predict_dataset

        waiting = [
            Row(image=i, image_id=k, file_name=str(k), width=i.width, height=i.height, objects=empty_objects())
            for k, i in enumerate(images)
        ]
        found = predict_dataset(
            self.model,
            self.processor,
            InstanceDataset(waiting, []),
            batch_size=max(1, len(images)),
            threshold=self.config.min_score,
            top_k=self.config.top,
            progress=False,
        )
        return [self._proposals(result, (row["height"], row["width"])) for row, result in found]

    def _proposals(self, result: Mapping[str, Any], size: tuple[int, int]) -> Proposals:
        masks = [decode_segmentation(rle, *size) for rle in result["rle"]]
        labels = None if self.config.class_agnostic else result["labels"].tolist()
        proposals = Proposals.build(masks, result["scores"].tolist(), size, labels)
        keep = (mask_area(proposals.masks) >= self.config.min_area) & (proposals.scores >= self.config.min_score)
        proposals = proposals.take(keep)
        return proposals if self.config.nms is None else mask_nms(proposals, self.config.nms)
