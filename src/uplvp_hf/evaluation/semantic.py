"""Semantic segmentation of a dataset: label maps image by image, whole, in windows, at several scales; and mIoU."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from uplvp_hf.data import DataError, InstanceDataset, Row

from ..data.semantic import label_map, semantic_view
from ..models.errors import UserError
from ..models.label_maps import ignored_label
from ..progress import with_progress
from .failing import failure_of
from .predictor import load_segmenter, match_category_ids
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


class MeanIoU:
    """Intersection over union of classes from one confusion matrix, image by image, for any number of classes."""

    def __init__(self, num_classes: int, ignored: int) -> None:
        self.num_classes, self.ignored = num_classes, ignored
        self.confusion = np.zeros((num_classes, num_classes), dtype=np.int64)  # [true class, found class]

    def add(self, prediction: np.ndarray, reference: np.ndarray) -> np.ndarray:
        """Counts an image; pixels whose reference is `ignored` do not count. Returns its own confusion matrix.

        Raises UserError for other shapes, and for an id that is no class.
        """
        if prediction.shape != reference.shape:
            raise UserError(f"a prediction of {prediction.shape} cannot be compared with labels of {reference.shape}.")
        valid = reference != self.ignored
        true, found = reference[valid].astype(np.int64), prediction[valid].astype(np.int64)
        for what, ids in (("labels", true), ("prediction", found)):
            if ids.size and not 0 <= ids.min() <= ids.max() < self.num_classes:
                last = self.num_classes - 1
                raise UserError(f"the {what} hold ids from {ids.min()} to {ids.max()}; classes are 0 to {last}.")
        counts = np.bincount(true * self.num_classes + found, minlength=self.num_classes**2)
        counts = counts.reshape(self.num_classes, self.num_classes)
        self.confusion += counts
        return counts

    def compute(self) -> dict[str, Any]:
        """mIoU, mAcc and aAcc, 0 to 1. Classes that occur neither in labels nor predictions have no IoU and do not
        count; `per_class` has the IoU of each, or None, and `absent` their number."""
        hits = self.confusion.diagonal().astype(np.float64)
        true, found = self.confusion.sum(1), self.confusion.sum(0)
        with np.errstate(invalid="ignore"):
            iou, accuracy = hits / (true + found - hits), hits / true
        total = self.confusion.sum()
        return {
            "mIoU": _mean(iou), "mAcc": _mean(accuracy), "aAcc": hits.sum() / total if total else None,
            "absent": int(np.isnan(iou).sum()), "per_class": [None if np.isnan(x) else float(x) for x in iou],
        }  # fmt: skip


def _mean(values: np.ndarray) -> float | None:
    return None if np.isnan(values).all() else float(np.nanmean(values))


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
) -> Tensor:
    """Class scores (K, H, W) of a PIL image at its own size: resized logits, or with several scales or `flip` the mean
    of the probabilities."""
    parameter = next(model.parameters())
    target = (image.height, image.width)
    several = flip or len(scales) > 1
    total = None
    for scale in scales:
        size = {key: max(32, round(scale * value)) for key, value in dict(processor.size).items() if value}
        unpadded = processor(image, return_tensors="pt", size=size, do_pad=False)["pixel_values"].shape[-2:]
        pixels = processor(image, return_tensors="pt", size=size)["pixel_values"].to(parameter.device, parameter.dtype)
        for mirrored in (False, True) if flip else (False,):
            logits = window_logits(model, pixels.flip(-1) if mirrored else pixels, window, stride)
            logits = (logits.flip(-1) if mirrored else logits)[..., : unpadded[0], : unpadded[1]]
            logits = F.interpolate(logits, size=target, mode="bilinear", align_corners=False)[0]
            scores = logits.softmax(0) if several else logits
            total = scores if total is None else total + scores
    return total / (len(scales) * (1 + flip))


def segment_dataset(
    model: Any,
    processor: Any,
    dataset: InstanceDataset,
    progress: bool = True,
    failures: list[dict[str, Any]] | None = None,
    share: tuple[int, int] = (0, 1),
    **options: Any,
) -> Iterator[tuple[int, Row, np.ndarray]]:
    """(index, row, label map (H, W) uint16 of model classes) of every image, one at a time; options: of
    `segment_image`. Images that cannot be decoded, that the processor refuses or that lack
    memory are left out and appended to `failures`."""
    was_training = model.training
    model.eval()
    indices = range(share[0], len(dataset), share[1])
    try:
        for index in with_progress(indices, "predicting", progress):
            try:
                image = dataset.load_image(index)
                with torch.inference_mode():
                    found = segment_image(model, processor, image, **options).argmax(0)
            except Exception as error:
                failure = failure_of(error, dataset[index]["file_name"], index)
                if failures is not None:
                    failures.append(failure)
                continue
            yield index, dataset[index], found.to(torch.int32).cpu().numpy().astype(np.uint16)
    finally:
        model.train(was_training)


def evaluate_semantic(
    model: Any,
    processor: Any,
    dataset: InstanceDataset,
    progress: bool = True,
    distributed: bool = False,
    on_result: Callable[[Row, np.ndarray, np.ndarray, np.ndarray], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """mIoU, mAcc, aAcc, IoU by class name, number of images, seconds and failures of a model on a labeled dataset.

    on_result: called with (row, prediction, labels, confusion matrix) of every image; options: of `segment_image`.
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
        **numbers, "per_class": dict(zip(names, numbers["per_class"], strict=True)), "num_images": images,
        "seconds": round(time.perf_counter() - started, 3), "failures": failures,
    }  # fmt: skip
