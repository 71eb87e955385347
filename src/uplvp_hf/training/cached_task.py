"""Training from the features of a frozen backbone that lie on disk (`data.cache_features`)."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.modeling_outputs import BackboneOutput

from ..data import InstanceDataset
from ..data.collator import collate
from ..models.padding import padding_masked
from ..progress import Progress
from .config import ConfigError, TrainSettings
from .feature_cache import CachedSamples, FeatureCache, Key, cache_folder, collate_cached
from .stream import SampleKeys, make_loader
from .task import InstanceTask

logger = logging.getLogger(__name__)

GIB = 2**30


class GivenMaps:
    """In place of the `forward` of a backbone: gives `maps` once where they are set, else what the backbone gives."""

    def __init__(self, backbone: nn.Module) -> None:
        self.backbone, self.own = backbone, backbone.forward
        self.maps: tuple[Tensor, ...] | None = None
        backbone.forward = self

    def __call__(self, *arguments, **options):
        if self.maps is None:
            return self.own(*arguments, **options)
        maps, self.maps = self.maps, None
        return BackboneOutput(feature_maps=maps)

    def release(self) -> None:
        del self.backbone.forward  # the class has its own


class CachedTask(InstanceTask):
    """As `InstanceTask`; the backbone runs before the first step, once for every image and view that is not on disk,
    and in evaluations."""

    def with_image_settings(self, settings: TrainSettings) -> TrainSettings:
        settings = super().with_image_settings(settings)
        against = {
            "`data.copy_paste`, as pasted images have no features of their own": settings.data.copy_paste > 0,
            "`data.side_by_side`, as pasted images have no features of their own": settings.data.side_by_side > 0,
            "`data.unlabeled`, whose views are new in every step": settings.data.unlabeled is not None,
            "`fsdp`": settings.fsdp,
            "a canvas other than the square one (`data.canvas`, `data.short_edges`)": not settings.data.square,
        }
        for what, given in against.items():
            if given:
                raise ConfigError(f"`data.cache_features` does not go with {what}: leave one of the two out.")
        return settings

    def model(self, settings: TrainSettings, train: InstanceDataset) -> Any:
        model = super().model(settings, train)
        backbone = model.segmenter.backbone
        if isinstance(backbone, nn.ModuleList):
            raise ConfigError(
                f"`data.cache_features` needs a segmenter on a backbone, and a `{model.segmenter.config.model_type}` "
                "is one ViT as a whole: take `vit_mask_decoder`."
            )
        if any(parameter.requires_grad for parameter in backbone.parameters()):
            raise ConfigError(
                "`data.cache_features` is for a frozen backbone, since features of one that is trained change: set "
                "`model.freeze_backbone=true`."
            )
        self.segmenter, self.given = model.segmenter, GivenMaps(backbone)
        return model

    def loader(self, samples: Any, settings: TrainSettings, start: int, accelerator: Accelerator) -> DataLoader:
        rank, world, views = accelerator.process_index, accelerator.num_processes, settings.data.cache_views
        folder = cache_folder(settings, self.segmenter.backbone, samples, settings.mixed_precision)
        cache = FeatureCache(folder)
        batches = SampleKeys(len(samples), settings, start, rank, world, len(getattr(samples, "extra", ())))
        keys = dict.fromkeys((index, epoch % views) for batch in batches for epoch, index in batch)
        self._fill(cache, [key for key in keys if key not in cache], samples, settings, accelerator)
        together = partial(collate_cached, pad_to=settings.data.size)
        return make_loader(CachedSamples(samples, cache, views), settings, start, rank, world, together)

    @torch.no_grad()
    def _fill(
        self, cache: FeatureCache, keys: list[Key], samples: Any, settings: TrainSettings, accelerator: Accelerator
    ) -> None:
        """Runs the backbone for these images and views. Raises ConfigError before they would take too much room."""
        logger.info("Features in %s: %d are there, %d are to be computed.", cache.folder, len(cache), len(keys))
        segmenter, step = self.segmenter, settings.optim.batch_size
        training = segmenter.backbone.training
        segmenter.backbone.eval()
        weight = next(segmenter.backbone.parameters())
        bar = Progress("features", len(keys), accelerator.is_main_process, "views")
        for first in range(0, len(keys), step):
            chosen = keys[first : first + step]
            views = [samples.sample(*key) for key in chosen]
            batch = collate(views, size_divisor=1, pad_to=settings.data.size, dense=False)
            mask = batch["pixel_mask"].to(weight.device)
            padding = nullcontext() if segmenter.square_canvas else padding_masked(segmenter.backbone, mask)
            with accelerator.autocast(), padding:
                maps = segmenter.backbone(batch["pixel_values"].to(weight.device, weight.dtype)).feature_maps
            if first == 0:
                _check_room(cache, sum(one[0].numel() for one in maps) * 2 * len(keys), settings)
            for place, (key, view) in enumerate(zip(chosen, views, strict=True)):
                cache.add(key, view["index"], [one[place] for one in maps])
            bar.update(len(chosen))
        cache.flush()
        bar.close()
        segmenter.backbone.train(training)

    def inputs(self, batch: dict, device: torch.device, stage: str) -> dict:
        dtype = next(self.segmenter.backbone.parameters()).dtype
        self.given.maps = tuple(one.to(device, dtype, non_blocking=True) for one in batch["feature_maps"])
        return super().inputs(batch, device, stage)

    def save(self, model: Any, folder: Any) -> None:
        self.given.release()


def _check_room(cache: FeatureCache, more: int, settings: TrainSettings) -> None:
    wanted, limit = (cache.size() + more) / GIB, settings.data.cache_gib
    if wanted > limit:
        raise ConfigError(
            f"The features would take {wanted:.1f} GiB, more than `data.cache_gib={limit:g}`: lower `data.cache_views` "
            f"({settings.data.cache_views}) or `data.size`, or raise `data.cache_gib`."
        )
