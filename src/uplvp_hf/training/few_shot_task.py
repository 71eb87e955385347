"""Few-shot training: its part of a run, for the one loop.

fewshot.conditioning=prototype   all objects of the base classes, as "object"; no supports
fewshot.conditioning=prompt      episodes: one class an image, and supports of it from other images
"""

from __future__ import annotations

import dataclasses
import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from ..data import InstanceDataset
from ..data.aliases import find_classes
from ..data.class_splits import ClassSplit, class_split
from ..data.episodes import EpisodeSet, collate_episodes
from ..data.supports import Entry, SupportSet, draw_supports, instances_of, keep_classes
from ..evaluation.few_shot import evaluate_few_shot, fit_scores, object_vectors, use_supports
from ..models.configuration_few_shot import UplvpFewShotConfig
from ..models.errors import reading
from ..models.image_processing_uplvp import UplvpImageProcessor
from ..models.modeling_few_shot import UplvpForFewShotSegmentation
from ..models.query_segmenter import QuerySegmenter
from .batch import model_inputs
from .build import build_data, build_samples, prepare_model
from .config import ConfigError, TrainSettings
from .freezing import refuse_random_frozen
from .segmenter_settings import refuse_other_segmenter, refuse_unknown
from .stream import make_loader
from .task import InstanceTask

logger = logging.getLogger(__name__)

_OF_MODEL = ("conditioning", "support_map", "support_normalization", "support_score")
_OF_METHOD = ("prompt_injection", "prompt_drop", "kernel_supervision_weight")


class FewShotTask(InstanceTask):
    """Base classes in, a model that takes supports out."""

    train: InstanceDataset  # these are set on the way
    split: ClassSplit
    conditioning: str
    bank: dict[Entry, torch.Tensor] | None

    def data(self, settings: TrainSettings) -> tuple[InstanceDataset, InstanceDataset | None]:
        """The base classes alone, of the training rows and of those to evaluate on."""
        _check(settings)
        train, val = build_data(settings)
        names = [category["name"] for category in train.categories]
        self.split = class_split(settings.fewshot.classes, names, train.name)
        drop = settings.fewshot.novel_in_base == "drop"
        self.train = keep_classes(train, self.split.base, drop_images=drop)
        if val is not None:
            known = [category["name"] for category in val.categories]
            val = keep_classes(val, find_classes(self.split.base, known, val.name))
        return self.train, val

    def extra(self, settings: TrainSettings, train: InstanceDataset, val: InstanceDataset | None) -> None:
        return None

    def check_evaluation(self, settings: TrainSettings, config: Any, val: InstanceDataset) -> None:
        """Raises DataError where supports for the evaluation are lacking, before hours of training."""
        self._supports(settings).refuse_overlap(val)

    def usage(self, settings: TrainSettings, rows: InstanceDataset) -> str:
        novel = f"; held out: {', '.join(self.split.novel)}" if self.split.novel else ""
        return f"{super().usage(settings, rows)} Base classes ({self.split.name}): {len(self.split.base)}{novel}."

    def model(self, settings: TrainSettings, train: InstanceDataset) -> UplvpForFewShotSegmentation:
        given = {name: getattr(settings.fewshot, name) for name in _OF_MODEL}
        given |= {name: getattr(settings.model, name) for name in _OF_METHOD}
        given = {name: value for name, value in given.items() if value is not None}
        refuse_random_frozen(settings.model)
        if settings.model.init is not None:
            with reading(f"`model.init`: {settings.model.init}"):
                model = UplvpForFewShotSegmentation.from_pretraining(settings.model.init, **given)
            refuse_other_segmenter(settings.model, model.segmenter.config)
            logger.info("From %s: %s", settings.model.init, model.transfer_report)
        elif settings.model.segmenter is None:
            raise ConfigError("Set `model.init` (a checkpoint) or `model.segmenter` (settings of a new segmenter).")
        else:
            config = UplvpFewShotConfig(segmenter_config=dict(settings.model.segmenter), **given)
            refuse_unknown(settings.model.segmenter, config.segmenter_config)
            model = UplvpForFewShotSegmentation(config)
        prepare_model(model, settings)
        self.conditioning = model.config.conditioning
        prompted = self.conditioning == "prompt"
        if prompted and settings.model.init is None:
            logger.warning(
                "Support prompts are trained from scratch, where a network may learn to ignore them. Train with "
                "fewshot.conditioning=prototype first, start from that (`model.init`), and compare with wrong supports."
            )
        freeze = settings.fewshot.freeze_encoder
        if freeze is None:
            freeze = prompted and settings.model.init is not None
        for module in model.segmenter.encoder if freeze else ():
            module.requires_grad_(False)
        self.bank = None
        if settings.fewshot.support_bank and prompted:
            if not freeze:
                raise ConfigError("`fewshot.support_bank` needs a frozen encoder: set `fewshot.freeze_encoder=true`.")
            if type(model.segmenter).encoder is QuerySegmenter.encoder:
                raise ConfigError(
                    f"`fewshot.support_bank`: a `{model.segmenter.config.model_type}` makes the features of supports "
                    "with modules that are trained too: leave the setting out."
                )
            self.bank = self._fill_bank(settings, model)
        return model

    def samples(self, settings: TrainSettings, train: InstanceDataset, extra: Any) -> Any:
        if self.conditioning == "prototype":
            agnostic = dataclasses.replace(settings.model, class_agnostic=True)
            return build_samples(dataclasses.replace(settings, model=agnostic), train)
        fewshot, samples = settings.fewshot, build_samples(settings, train)
        shots, share = (fewshot.shots[0], fewshot.shots[-1]), fewshot.least_share
        return EpisodeSet(samples, shots, fewshot.negatives, least_share=share, vectors=self.bank)

    def _fill_bank(self, settings: TrainSettings, model: UplvpForFewShotSegmentation) -> dict[Entry, torch.Tensor]:
        """Vectors of up to `support_bank` objects of every base class, from a frozen encoder."""
        found = instances_of(self.train, self.split.base, settings.fewshot.least_share)
        rng = np.random.default_rng(settings.seed)
        entries = [
            own[place]
            for own in found.values()
            for place in rng.permutation(len(own))[: settings.fewshot.support_bank].tolist()
        ]
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        vectors = object_vectors(model, self.processor(settings, model), self.train, entries).cpu()
        return dict(zip(entries, vectors, strict=True))

    def loader(self, samples: Any, settings: TrainSettings, start: int, accelerator: Accelerator) -> DataLoader:
        place = (accelerator.process_index, accelerator.num_processes)
        if not isinstance(samples, EpisodeSet):
            return make_loader(samples, settings, start, *place)
        together = partial(collate_episodes, pad_to=settings.data.size if settings.data.square else None)
        return make_loader(samples, settings, start, *place, together)

    def inputs(self, batch: dict, device: torch.device, stage: str) -> dict:
        inputs = model_inputs(batch, device, stage)
        for name in ("support_values", "support_pixel_mask", "support_owner", "support_vectors"):
            if name in batch:
                inputs[name] = batch[name].to(device, non_blocking=True)
        if "support_masks" in batch:
            inputs["support_masks"] = batch["support_masks"].dense().to(device, non_blocking=True)
        return inputs

    def processor(self, settings: TrainSettings, model: Any) -> UplvpImageProcessor:
        self._processor = super().processor(settings, model)
        return self._processor

    def evaluate(self, model: Any, processor: Any, rows: InstanceDataset, settings: TrainSettings, progress: bool):
        """All base classes, with supports from the training images."""
        evaluation = settings.evaluation
        fit_scores(model, processor, self.train, settings.seed)
        use_supports(model, processor, self._supports(settings))
        (metrics,) = evaluate_few_shot(
            model, processor, rows, batch_size=evaluation.batch_size, progress=progress, backend=evaluation.backend,
            mask_threshold=evaluation.mask_threshold, distributed=True,
        )  # fmt: skip
        model.set_supports([], model.supports[:0])
        return metrics

    def save(self, model: Any, folder: Path) -> None:
        """Fits the scores, which are written with the model."""
        fit_scores(model, self._processor, self.train)

    def _supports(self, settings: TrainSettings) -> SupportSet:
        fewshot = settings.fewshot
        return draw_supports(
            self.train, self.split.base, fewshot.evaluation_shots, settings.seed, fewshot.least_share, allow_fewer=True
        )


def _check(settings: TrainSettings) -> None:
    """Raises ConfigError for settings that few-shot training has no use for."""
    data, model = settings.data, settings.model
    wrong = {
        "model.class_agnostic": model.class_agnostic, "model.kernel_target": model.kernel_target,
        "model.text_features": model.text_features, "data.unlabeled": data.unlabeled,
        "data.copy_paste": data.copy_paste, "data.side_by_side": data.side_by_side,
        "evaluation.class_agnostic": settings.evaluation.class_agnostic,
    }  # fmt: skip
    given = [f"`{name}`" for name, value in wrong.items() if value]
    if given:
        raise ConfigError(f"Not for few-shot training: leave out {', '.join(given)}.")
    if len(settings.fewshot.shots) not in (1, 2) or settings.fewshot.shots[0] > settings.fewshot.shots[-1]:
        raise ConfigError(f"`fewshot.shots` must be one or two numbers, the lower first, got {settings.fewshot.shots}.")
