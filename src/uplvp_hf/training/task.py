"""What a run does differently for instances and for classes of pixels: data, model, samples, inputs, evaluation.

The loop asks `task_of(settings)` once. A task is a set of functions; the instance task's are those of `build.py`,
`batch.py` and `evaluation/predictor.py`, the semantic task's stand in `semantic_task.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from ..data import InstanceDataset
from ..data.usage import training_usage
from ..evaluation.classes import evaluated_classes
from ..evaluation.predictor import evaluate_model
from ..models.losses import Normalizers
from ..models.thresholds import SCORE_THRESHOLD
from .batch import effective_normalizers, model_inputs
from .build import build_data, build_model, build_processor, build_samples, with_image_settings
from .config import TrainSettings
from .mixture import load_extra
from .stream import make_loader


class InstanceTask:
    """Masks with classes: pre-training and fine-tuning of query segmenters and Mask R-CNN."""

    metrics = ("AP", "AP50", "AP75")  # of an evaluation; the first one decides which model is the best

    def with_image_settings(self, settings: TrainSettings) -> TrainSettings:
        return with_image_settings(settings)

    def data(self, settings: TrainSettings) -> tuple[InstanceDataset, InstanceDataset | None]:
        """Rows to train on, and to evaluate on if any."""
        return build_data(settings)

    def extra(self, settings: TrainSettings, train: InstanceDataset, val: InstanceDataset | None):
        return load_extra(settings, train, val)

    def model(self, settings: TrainSettings, train: InstanceDataset) -> Any:
        return build_model(settings, train)

    def check_evaluation(self, settings: TrainSettings, config: Any, val: InstanceDataset) -> None:
        """Raises DataError where the model could not be evaluated, before hours of training."""
        evaluated_classes(config, val, evaluates_agnostic(settings))

    def usage(self, settings: TrainSettings, rows: InstanceDataset) -> str:
        """What the run uses of its rows, for the log."""
        return str(training_usage(rows, settings.data.size, settings.data.max_instances))

    def samples(self, settings: TrainSettings, train: InstanceDataset, extra: InstanceDataset | None) -> Any:
        return build_samples(settings, train, extra)

    def processor(self, settings: TrainSettings, model: Any) -> Any:
        return build_processor(settings.data, model.segmenter.size_divisor)

    def loader(self, samples: Any, settings: TrainSettings, start: int, accelerator: Accelerator) -> DataLoader:
        """The micro-batches of this process, from step `start` on."""
        return make_loader(samples, settings, start, accelerator.process_index, accelerator.num_processes)

    def set_progress(self, model: Any, epoch: float, share: float) -> None:
        """Tells the model, before a step, how many epochs and which share of the steps are done."""
        model.set_progress(epoch)
        model.segmenter.anneal(share)

    def inputs(self, batch: dict, device: torch.device, stage: str) -> dict:
        return model_inputs(batch, device, stage)

    def normalizers(self, model: Any, accelerator: Accelerator, micro_batches: list[dict]) -> Normalizers:
        return effective_normalizers(model, accelerator, micro_batches)

    def evaluate(self, model: Any, processor: Any, rows: InstanceDataset, settings: TrainSettings, progress: bool):
        """The metrics; every process predicts its share of the images, and all get the numbers."""
        evaluation = settings.evaluation
        metrics = evaluate_model(
            model, processor, rows, batch_size=evaluation.batch_size, class_agnostic=evaluates_agnostic(settings),
            progress=progress, mask_threshold=evaluation.mask_threshold, backend=evaluation.backend, distributed=True,
            at_score=SCORE_THRESHOLD,
        )  # fmt: skip
        del metrics["findings"]["curve"], metrics["findings"]["calibration"]  # a page's, not a log's
        return metrics

    def save(self, model: Any, folder: Any) -> None:
        """Writes what belongs beside model and processor, before these are written."""


def evaluates_agnostic(settings: TrainSettings) -> bool:
    return settings.evaluation.class_agnostic or settings.model.class_agnostic


def task_of(settings: TrainSettings) -> InstanceTask:
    """The task of the model that a run trains."""
    if settings.stage == "fewshot":
        from .few_shot_task import FewShotTask

        return FewShotTask()
    from .semantic_task import SemanticTask, is_semantic

    if is_semantic(settings.model):
        return SemanticTask()
    if settings.data.cache_features:
        from .cached_task import CachedTask

        return CachedTask()
    return InstanceTask()
