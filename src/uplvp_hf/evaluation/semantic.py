"""Semantic segmentation of a dataset: label maps image by image, whole, in windows, at several scales; and mIoU."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.modeling_outputs import SemanticSegmenterOutput

from uplvp_hf.data import DataError, InstanceDataset, Row

from ..data.semantic import label_map, semantic_view
from ..models.errors import UserError
from ..models.label_maps import ignored_label
from ..progress import with_progress
from .classes import match_category_ids
from .failing import failure_of
from .mean_iou import MeanIoU
from .predictor import load_segmenter
from .processes import gather, gather_errors, place


def is_semantic_model(name_or_dir: str) -> bool:
    """Whether a folder or repository holds a semantic segmenter of ours; False for what cannot be read."""
    from ..models.configuration_icpc import IcpcConfig

    try:
        return IcpcConfig.get_config_dict(name_or_dir)[0].get("model_type") == IcpcConfig.model_type
    except (OSError, ValueError):
        return False


def load_semantic(name_or_dir: str, device: str | torch.device | None = None) -> tuple[Any, Any]:
    """Model and image processor, as `load_segmenter` gives them."""
    from ..models.image_processing_icpc import IcpcImageProcessor
    from ..models.modeling_icpc import IcpcForSemanticSegmentation

    model, _ = load_segmenter(name_or_dir, device, further={"icpc": IcpcForSemanticSegmentation})
    return model, IcpcImageProcessor.from_pretrained(name_or_dir)


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows along a side begin: every `stride` pixels, the last one moved back inside."""
    count = max(math.ceil((length - window) / stride), 0) + 1
    return [max(min(index * stride, length - window), 0) for index in range(count)]


def window_logits(
    model: Callable[..., Any], pixel_values: Tensor, window: int | None = None, stride: int | None = None
) -> Tensor:
    """Logits (B, K, H, W) at the size of the input: whole, or the mean over windows of `window` pixels that begin
    `stride` apart (two thirds of a window by default). An image smaller than the window is one window."""
    size = tuple(pixel_values.shape[-2:])
    if window is None or (size[0] <= window and size[1] <= window):
        return F.interpolate(model(pixel_values).logits.float(), size=size, mode="bilinear", align_corners=False)
    stride = stride or round(2 * window / 3)
    total, count = None, pixel_values.new_zeros((1, 1, *size), dtype=torch.float32)
    for top in window_starts(size[0], window, stride):
        for left in window_starts(size[1], window, stride):
            at = (..., slice(top, top + window), slice(left, left + window))
            crop = pixel_values[at]
            logits = F.interpolate(
                model(crop).logits.float(), size=crop.shape[-2:], mode="bilinear", align_corners=False
            )
            if total is None:
                total = logits.new_zeros((*logits.shape[:2], *size))
            total[at] += logits
            count[at] += 1
    return total / count


def segment_image(
    model: Any,
    processor: Any,
    image: Any,
    scales: tuple[float, ...] = (1.0,),
    flip: bool = False,
    window: int | None = None,
    stride: int | None = None,
    text_embeds: Tensor | None = None,
    score_maps: bool = False,
) -> Tensor:
    """Class scores (K, H, W) of a PIL image at its own size: resized logits, or with several scales or `flip` the mean
    of the probabilities. text_embeds: see `IcpcForSemanticSegmentation.forward`. score_maps: the cosines of CLIP's own
    patches and the class names in place of the logits, without pyramid and head."""
    parameter = next(model.parameters())
    run = model if text_embeds is None else partial(model, text_embeds=text_embeds)
    run = partial(_score_map, run, model.config) if score_maps else run
    target = (image.height, image.width)
    several = flip or len(scales) > 1
    total = None
    for scale in scales:
        size = {key: max(32, round(scale * value)) for key, value in dict(processor.size).items() if value}
        unpadded = processor(image, return_tensors="pt", size=size, do_pad=False)["pixel_values"].shape[-2:]
        pixels = processor(image, return_tensors="pt", size=size)["pixel_values"].to(parameter.device, parameter.dtype)
        for mirrored in (False, True) if flip else (False,):
            logits = window_logits(run, pixels.flip(-1) if mirrored else pixels, window, stride)
            logits = (logits.flip(-1) if mirrored else logits)[..., : unpadded[0], : unpadded[1]]
            logits = F.interpolate(logits, size=target, mode="bilinear", align_corners=False)[0]
            scores = logits.softmax(0) if several else logits
            total = scores if total is None else total + scores
    return total / (len(scales) * (1 + flip))


def _score_map(run: Callable[..., Any], config: Any, pixel_values: Tensor) -> SemanticSegmenterOutput:
    """CLIP's own score map over its temperature as logits."""
    found = run(pixel_values).score_maps
    if found is None:
        raise UserError("prompt='none' has no texts, and so no score map.")
    return SemanticSegmenterOutput(logits=found[config.score_stride] / config.tau)


def segment_dataset(
    model: Any,
    processor: Any,
    dataset: InstanceDataset,
    progress: bool = True,
    failures: list[dict[str, Any]] | None = None,
    share: tuple[int, int] = (0, 1),
    swap_prompts: bool = False,
    **options: Any,
) -> Iterator[tuple[int, Row, np.ndarray]]:
    """(index, row, label map (H, W) uint16 of model classes) of every image, one at a time; options: of
    `segment_image`. Images that cannot be decoded, that the processor refuses or that lack
    memory are left out and appended to `failures`.

    swap_prompts: every image gets the text features of the next one, the last those of the first. A model whose prompts
    are made from the image and serve it does worse then. Raises UserError for a model whose texts are the same for all.
    """
    if swap_prompts and not (model.config.uses_image or model.config.uses_decoder):
        raise UserError(f"prompt={model.config.prompt!r} has the same texts for every image: nothing can be swapped.")
    was_training = model.training
    model.eval()
    indices = range(share[0], len(dataset), share[1])
    try:
        for index in with_progress(indices, "predicting", progress):
            try:
                image = dataset.load_image(index)
                with torch.inference_mode():
                    if swap_prompts:
                        other = dataset.load_image((index + 1) % len(dataset))
                        options["text_embeds"] = _text_embeds(model, processor, other)
                    found = segment_image(model, processor, image, **options).argmax(0)
            except Exception as error:
                failure = failure_of(error, dataset[index]["file_name"], index)
                if failures is not None:
                    failures.append(failure)
                continue
            yield index, dataset[index], found.to(torch.int32).cpu().numpy().astype(np.uint16)
    finally:
        model.train(was_training)


def _text_embeds(model: Any, processor: Any, image: Any) -> Tensor:
    """The text features (1, K, D) that the model makes for a PIL image, seen whole."""
    parameter = next(model.parameters())
    pixels = processor(image, return_tensors="pt")["pixel_values"].to(parameter.device, parameter.dtype)
    return model(pixels).text_embeds


def evaluate_semantic(
    model: Any,
    processor: Any,
    dataset: InstanceDataset,
    progress: bool = True,
    distributed: bool = False,
    on_result: Callable[[Row, np.ndarray, np.ndarray, np.ndarray], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """mIoU, mAcc, aAcc, IoU by class name, `MeanIoU.classes`, number of images, seconds and failures of a model on a
    labeled dataset.

    on_result: called with (row, prediction, labels, confusion matrix) of every image; options: of `segment_dataset`.
    Raises DataError where the classes disagree, or no image can be decoded.
    """
    dataset = semantic_view(dataset)
    order = match_category_ids(model.config, dataset)
    to_model = {dataset.category_ids.index(category): index for index, category in enumerate(order)}
    count, ignored = len(order), ignored_label(len(order))
    lookup = np.full(max(count, ignored) + 1, ignored, dtype=np.int32)
    for theirs, ours in to_model.items():
        lookup[theirs] = ours
    failures: list[dict[str, Any]] = []
    metric, images = MeanIoU(count, ignored), 0
    started = time.perf_counter()
    rank, processes = share = place() if distributed else (0, 1)
    with gather_errors(processes):
        for index, row, found in segment_dataset(
            model, processor, dataset, progress and rank == 0, failures, share, **options
        ):
            labels = lookup[label_map(dataset, index)]
            counts = metric.add(found, labels)
            images += 1
            if on_result is not None:
                on_result(row, found, labels, counts)
    everything = gather((metric.confusion, images, failures))
    metric.confusion = sum(part for part, _, _ in everything)
    images = sum(number for _, number, _ in everything)
    failures = [failure for _, _, part in everything for failure in part]
    if not images:
        raise DataError(f"none of the {len(failures)} images could be decoded", file=dataset.name or "dataset")
    numbers = metric.compute()
    names = [model.config.id2label[index] for index in range(count)]
    return {
        **numbers, "per_class": dict(zip(names, numbers["per_class"], strict=True)),
        "classes": metric.classes(names, list(order)), "num_images": images,
        "seconds": round(time.perf_counter() - started, 3), "failures": failures,
    }  # fmt: skip
