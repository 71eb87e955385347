"""Training of semantic segmenters: their part of a run, for the one loop."""

from __future__ import annotations

import dataclasses
import os
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from ..conversion.denseclip import CLIP_TOKENIZER
from ..conversion.openai_clip import TIMM, icpc_from_clip
from ..data import InstanceDataset
from ..data.semantic import SemanticTrainingSet, SemanticTransform, collate_semantic, label_map, semantic_view
from ..evaluation.classes import match_category_ids
from ..evaluation.semantic import evaluate_semantic, is_semantic_model
from ..models.configuration_icpc import IcpcConfig
from ..models.errors import reading
from ..models.image_processing_icpc import IcpcImageProcessor
from ..models.label_maps import ignored_label
from ..models.losses import Normalizers
from ..models.modeling_icpc import IcpcForSemanticSegmentation
from .build import build_data, processor_settings, with_image_settings
from .config import PRETRAINING, ConfigError, ModelSettings, TrainSettings
from .segmenter_settings import refuse_unknown_names
from .stream import make_loader
from .task import InstanceTask


def is_semantic(model: ModelSettings) -> bool:
    """Whether the settings describe a semantic segmenter, or start from one."""
    if model.segmenter is not None:
        return model.segmenter.get("model_type") == IcpcConfig.model_type
    if model.init is None or not os.path.isfile(os.path.join(model.init, "config.json")):
        return model.init is not None and not os.path.isdir(model.init) and is_semantic_model(model.init)
    with reading(f"`model.init`: {model.init}"):
        return IcpcConfig.get_config_dict(model.init)[0].get("model_type") == IcpcConfig.model_type


class SemanticTask(InstanceTask):
    """The class of every pixel."""

    metrics = ("mIoU", "mAcc", "aAcc")

    def with_image_settings(self, settings: TrainSettings) -> TrainSettings:
        """As for instances, with CLIP's own mean and deviation where `model.init` has none."""
        _check(settings)
        data = settings.data
        standard = {name: list(getattr(IcpcImageProcessor, name)) for name in ("image_mean", "image_std")}
        if settings.model.init is None:
            filled = {name: getattr(data, name) or values for name, values in standard.items()}
            settings = dataclasses.replace(settings, data=dataclasses.replace(data, **filled))
        elif data.size is None:
            side = processor_settings(settings.model.init).get("size", {}).get("shortest_edge")
            if side and side % 32 == 0:
                settings = dataclasses.replace(settings, data=dataclasses.replace(data, size=side))
        return with_image_settings(settings)

    def data(self, settings: TrainSettings) -> tuple[InstanceDataset, InstanceDataset | None]:
        train, val = build_data(settings)
        train = semantic_view(train)
        label_map(train, 0)  # an error in the list of classes shows now
        return train, None if val is None else semantic_view(val)

    def extra(self, settings: TrainSettings, train: InstanceDataset, val: InstanceDataset | None) -> None:
        return None

    def check_evaluation(self, settings: TrainSettings, config: Any, val: InstanceDataset) -> None:
        match_category_ids(config, val)

    def usage(self, settings: TrainSettings, rows: InstanceDataset) -> str:
        return f"Training uses {len(rows)} images with the class of every pixel, {len(rows.categories)} classes."

    def model(self, settings: TrainSettings, train: InstanceDataset) -> IcpcForSemanticSegmentation:
        given = dict(settings.model.segmenter or {})
        given.pop("model_type", None)
        clip = given.pop("clip", None)
        refuse_unknown_names(given, IcpcConfig, "model.segmenter.")
        given.setdefault("semantic_loss_ignore_index", ignored_label(len(train.categories)))
        classes = (train.id2label, train.category_ids)
        if settings.model.init is not None:
            model = IcpcForSemanticSegmentation.from_pretraining(
                settings.model.init, *classes, settings.model.class_head, **given
            )
        elif clip is None:
            raise ConfigError("Set `model.segmenter.clip`: a folder or repository with a CLIP; or `model.init`.")
        else:
            if clip.startswith("package:"):
                clip = str(resources.files("uplvp_hf") / clip.removeprefix("package:"))
            with reading(f"`model.segmenter.clip`: {clip}"):
                model = icpc_from_clip(clip, classes[0], category_ids=classes[1], **given)
            if os.path.isfile(clip) or clip.startswith(TIMM):
                clip = CLIP_TOKENIZER
        model.tokenizer_source = clip or settings.model.init
        if settings.model.freeze_backbone:
            # Of a CLIP tower: the pyramid behind it begins untrained.
            getattr(model.backbone, "tower", model.backbone).requires_grad_(False)
        return model

    def samples(self, settings: TrainSettings, train: InstanceDataset, extra: Any) -> SemanticTrainingSet:
        data = settings.data
        transform = SemanticTransform(data.size, tuple(data.scale_range), data.flip, data.color_jitter)
        return SemanticTrainingSet(train, transform, data.image_mean, data.image_std, settings.seed)

    def processor(self, settings: TrainSettings, model: Any) -> IcpcImageProcessor:
        data = settings.data
        return IcpcImageProcessor(
            size={"shortest_edge": data.size, "longest_edge": 4 * data.size}, image_mean=list(data.image_mean),
            image_std=list(data.image_std), ignore_index=model.config.semantic_loss_ignore_index,
        )  # fmt: skip

    def loader(self, samples: Any, settings: TrainSettings, start: int, accelerator: Accelerator) -> DataLoader:
        together = partial(collate_semantic, size=settings.data.size, ignored=samples.ignored)
        place = (accelerator.process_index, accelerator.num_processes)
        return make_loader(samples, settings, start, *place, together)

    def set_progress(self, model: Any, epoch: float, share: float) -> None:
        model.progress = share

    def inputs(self, batch: dict, device: torch.device, stage: str) -> dict:
        return {key: batch[key].to(device, non_blocking=True) for key in ("pixel_values", "labels")}

    def normalizers(self, model: Any, accelerator: Accelerator, micro_batches: list[dict]) -> Normalizers:
        """Labeled pixels and images of the whole step, averaged over the processes, as the gradients are."""
        own = model.normalizers([labels for batch in micro_batches for labels in batch["labels"]])
        values = torch.tensor([float(own.pixels), float(own.images)])
        if accelerator.num_processes > 1:
            values = accelerator.reduce(values.to(accelerator.device), "mean")
        pixels, images = values.tolist()
        return Normalizers(pixels=max(pixels, 1.0), images=images)

    def evaluate(self, model: Any, processor: Any, rows: InstanceDataset, settings: TrainSettings, progress: bool):
        return evaluate_semantic(model, processor, rows, progress, distributed=True)

    def save(self, model: Any, folder: Path) -> None:
        """The tokenizer of the class names, so that other classes can be named later."""
        source = getattr(model, "tokenizer_source", None)
        if source is not None and model.prompts is not None:
            from transformers import AutoTokenizer

            try:
                AutoTokenizer.from_pretrained(source).save_pretrained(folder)
            except (OSError, ValueError):
                return  # a model that was saved without one


def _check(settings: TrainSettings) -> None:
    """Raises ConfigError for settings that a semantic segmenter has no use for."""
    if settings.stage == "pretrain":
        raise ConfigError("A semantic segmenter has no prompts to pre-train with: use finetune.")
    data = settings.data
    wrong = {
        "data.rotate": data.rotate, "data.copy_paste": data.copy_paste, "data.short_edges": data.short_edges,
        "data.side_by_side": data.side_by_side, "data.unlabeled": data.unlabeled,
        "model.class_agnostic": settings.model.class_agnostic,
        "model.backbone_weights": settings.model.backbone_weights, "model.freeze_stages": settings.model.freeze_stages,
    }  # fmt: skip
    wrong["data.extra"] = data.extra not in (None, PRETRAINING)
    wrong["evaluation.class_agnostic"] = settings.evaluation.class_agnostic
    given = [f"`{name}`" for name, value in wrong.items() if value]
    if given:
        raise ConfigError(f"Not for semantic segmentation: leave out {', '.join(given)}.")
