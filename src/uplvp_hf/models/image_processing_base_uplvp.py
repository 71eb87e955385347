"""What both image processors share: images in, tensors out, and back: query logits to instances in the pixels of
the original image.

Copied to the Hub beside the weights: no other module of the library is imported but siblings. Needs no torchvision.

Differences to transformers' Mask2Former processor, on purpose: masks are resized once, straight from the un-padded
logits to the target size (no fixed 384 x 384 grid); `mask_threshold` and `overlap_mask_area_threshold` are honored;
overlapping instances all survive in `masks` / `rle`; there is no panoptic method, so that
`pipeline("image-segmentation")` answers with instances.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from transformers.image_processing_base import BatchFeature, ImageProcessingMixin
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ImageInput,
    PILImageResampling,
    SizeDict,
    get_max_height_width,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import cached_file

from .coco_targets import annotation_targets
from .errors import UserError
from .images import scaled_array, to_rgb
from .masks import require_pycocotools
from .postprocessing_uplvp import MASK_STRIDE, collect_instances, find_instances, without_duplicates
from .remote_code import name_processor_in_config


def _three_numbers(values: Any) -> bool:
    return isinstance(values, list) and len(values) == 3 and all(type(value) in (int, float) for value in values)


def stored_settings(name_or_path: str) -> dict[str, Any]:
    """What a checkpoint says about its images; empty where it has no such file.

    Raises UserError for a file that cannot be read or holds no three means and deviations, and OSError where a
    repository cannot be reached: other means than those of training would be taken without a word.
    """
    names = ("preprocessor_config.json", "processor_config.json")
    if not any(cached_file(name_or_path, name, _raise_exceptions_for_missing_entries=False) for name in names):
        return {}
    where, remedy = f"the image settings of {name_or_path}", "Restore its preprocessor_config.json, or delete it."
    try:
        found = ImageProcessingMixin.get_image_processor_dict(name_or_path)[0]
    except (OSError, ValueError) as error:
        raise UserError(f"{where} cannot be read ({error!s:.200}). {remedy}") from error
    for key in ("image_mean", "image_std"):
        numbers = found.get(key)
        if numbers is not None and not _three_numbers(numbers):
            raise UserError(f"{where}: {key} is {numbers!r}, not three numbers such as [0.5, 0.5, 0.5]. {remedy}")
    if not isinstance(found.get("size", {}), dict):
        raise UserError(f'{where}: size is {found["size"]!r}, not an object such as {{"longest_edge": 512}}. {remedy}')
    return found


class UplvpImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    size_divisor (`int`, *optional*, defaults to 32):
        Batches are padded at the bottom and right to multiples of this many pixels (the backbone's largest stride).
    max_pixels (`int`, *optional*, defaults to 134217728):
        Larger images are refused.
    """

    size_divisor: int
    max_pixels: int


class SizedProcessing:
    r"""
    Mixed into a backend of transformers, which brings `process_image`, `pad` and `rescale_and_normalize`.

    Args:
        size (`dict`, *optional*, defaults to `{"longest_edge": 1024}`):
            `{"longest_edge": L}` scales the longer side to L pixels, up or down, keeping the aspect ratio.
            `{"shortest_edge": S}` with or without `"longest_edge"` (an upper bound) and `{"height", "width"}` work too.
            The default is the canvas that Mask2Former trains on with large-scale jitter.
        size_divisor (`int`, *optional*, defaults to 32):
            The padded height and width are multiples of it.
        max_pixels (`int`, *optional*, defaults to 2^27, 134 million):
            Images of more pixels are refused, before they are decoded where Pillow has only opened them: one of that
            size takes 1.6 GB in float32.
        image_mean, image_std (`tuple[float]`, *optional*, defaults to ImageNet's):
            Of pixels scaled to 0..1.
    """

    valid_kwargs = UplvpImageProcessorKwargs
    model_input_names = ["pixel_values", "pixel_mask"]
    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"longest_edge": 1024}
    default_to_square = False
    size_divisor = 32
    max_pixels = 2**27
    do_convert_rgb = True
    do_resize = True
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    do_pad = True

    def __init__(self, **kwargs: Unpack[UplvpImageProcessorKwargs]) -> None:
        super().__init__(**kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> list[str]:
        """As of transformers; beside a model with source files, `config.json` names the processor."""
        written = super().save_pretrained(save_directory, **kwargs)
        name_processor_in_config(Path(save_directory))
        return written

    def process_image(self, image: Any, max_pixels: int | None = None, do_rescale: bool | None = None, **kwargs) -> Any:
        """One image to the backend's (3, H, W). Raises UserError if it has more than `max_pixels`."""
        if isinstance(image, Image):
            _check_pixels(image.height, image.width, max_pixels)
            if kwargs.get("do_convert_rgb"):
                image = to_rgb(image)
        elif do_rescale:  # pixels of 0..1 or 16 bits must not be taken for 0..255
            image = scaled_array(image)
        image = super().process_image(image, **kwargs)
        height, width = image.shape[-2:]
        _check_pixels(height, width, max_pixels)
        return image

    def _preprocess(
        self,
        images: list[Any],
        size_divisor: int,
        do_pad: bool,
        pad_size: SizeDict | None,
        disable_grouping: bool | None,
        **kwargs,
    ) -> tuple[dict[str, list[Any]], list[tuple[int, int]]]:
        """`pixel_values` (3, H, W) and `pixel_mask` (H, W) of every image, and the un-padded sizes."""
        resized = self._resized(images, **kwargs)
        input_sizes = [tuple(image.shape[-2:]) for image in resized]
        if not do_pad:
            masks = [np.ones(size, dtype=np.int64) for size in input_sizes]
            return {"pixel_values": resized, "pixel_mask": masks}, input_sizes
        height, width = (pad_size.height, pad_size.width) if pad_size else get_max_height_width(resized)
        height, width = (math.ceil(side / size_divisor) * size_divisor for side in (height, width))
        canvas = SizeDict(height=height, width=width)
        values, masks = self.pad(resized, pad_size=canvas, return_mask=True, disable_grouping=disable_grouping)
        return {"pixel_values": values, "pixel_mask": masks}, input_sizes

    def _resized(
        self,
        images: list[Any],
        do_resize: bool,
        size: SizeDict,
        resample: Any,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
        **kwargs,
    ) -> list[Any]:
        if do_resize:
            images = [self.resize(image, size, resample=resample) for image in images]
        scaling = (do_rescale, rescale_factor, do_normalize, image_mean, image_std)
        return [self.rescale_and_normalize(image, *scaling) for image in images]

    def resize(self, image: Any, size: SizeDict, resample: Any = None, **kwargs) -> Any:
        """Resizes (..., H, W) by the rule of `size`, see the class."""
        height, width = resized_size(image.shape[-2:], size)
        return super().resize(image, SizeDict(height=height, width=width), resample=resample, **kwargs)

    @staticmethod
    def get_input_sizes(pixel_mask: torch.Tensor) -> list[tuple[int, int]]:
        """Heights and widths of the un-padded images from `pixel_mask` (B, H, W), for post-processing."""
        heights, widths = pixel_mask[:, :, 0].sum(1).tolist(), pixel_mask[:, 0, :].sum(1).tolist()
        return [(int(height), int(width)) for height, width in zip(heights, widths)]


class UplvpProcessing(SizedProcessing):
    __doc__ = f"""{SizedProcessing.__doc__}
    Example:

    ```python
    >>> processor = UplvpImageProcessor(size={{"longest_edge": 512}})
    >>> inputs = processor(image, return_tensors="pt")  # pixel_values (1, 3, H, W), pixel_mask (1, H, W)
    >>> outputs = model(**inputs)
    >>> result = processor.post_process_instance_segmentation(outputs, target_sizes=[(image.height, image.width)])[0]
    ```
    """

    def preprocess(
        self,
        images: ImageInput,
        annotations: Mapping | Sequence[Mapping] | None = None,
        label_map: Mapping[int, int] | None = None,
        **kwargs: Unpack[UplvpImageProcessorKwargs],
    ) -> BatchFeature:
        r"""
        Args:
            images (`ImageInput`):
                One image or a list of B images: PIL, numpy or torch, gray, RGB or RGBA, of any sizes. Arrays are
                uint8, 16-bit integers, or floats, of which 0..1 are taken as they are and not divided by 255 again.
            annotations (`dict` or `list[dict]`, *optional*):
                One COCO record an image: `{"image_id", "annotations": [{"segmentation", "category_id", "iscrowd"}]}`.
                Segmentations are polygons or RLE in the pixels of the original image. Crowds are left out, and so
                are masks with no pixel left after resizing.
            label_map (`dict[int, int]`, *optional*):
                Original category id to contiguous class index. Without it category ids are taken as class indices.
            kwargs:
                Any setting of the processor, for this call.

        Returns:
            `BatchFeature`, with `return_tensors="pt"`: `pixel_values` (B, 3, H, W) float32 padded with zeros at the
            bottom and right, `pixel_mask` (B, H, W) int64, 1 on real pixels; with annotations also `mask_labels`, a
            list of (N, H, W) bool tensors, and `class_labels`, a list of (N,) int64 tensors.

        Raises:
            `ValueError`: if there are not as many annotation records as images, a category is not in `label_map`, a
            segmentation does not fit its image, or an image has no pixel or more than `max_pixels`.
        """
        return super().preprocess(images, annotations, label_map, **kwargs)

    def _preprocess_image_like_inputs(self, images, annotations, label_map, **kwargs) -> BatchFeature:
        return_tensors = kwargs.pop("return_tensors", None)
        names = ("do_convert_rgb", "input_data_format", "device", "max_pixels", "do_rescale")
        images = self._prepare_image_like_inputs(images=images, **{name: kwargs.get(name) for name in names})
        if isinstance(annotations, Mapping):
            annotations = [annotations]
        if annotations is not None and len(annotations) != len(images):
            raise UserError(f"{len(annotations)} annotation records for {len(images)} images; pass one an image.")
        original_sizes = [tuple(image.shape[-2:]) for image in images]
        data, input_sizes = self._preprocess(images, **kwargs)
        features = BatchFeature(data=data, tensor_type=return_tensors)
        if annotations is not None:
            canvases = [tuple(image.shape[-2:]) for image in data["pixel_values"]]
            sizes = zip(annotations, original_sizes, input_sizes, canvases, strict=True)
            targets = [annotation_targets(*entry, label_map) for entry in sizes]
            features["mask_labels"] = [masks for masks, _ in targets]
            features["class_labels"] = [classes for _, classes in targets]
        return features

    @torch.no_grad()
    def post_process_instance_segmentation(
        self,
        outputs: Any,
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.8,
        target_sizes: Sequence[tuple[int, int]] | torch.Tensor | None = None,
        input_sizes: Sequence[tuple[int, int]] | torch.Tensor | None = None,
        top_k: int = 100,
        return_rle: bool = False,
        return_segmentation: bool = True,
        duplicates: float | None = None,
    ) -> list[dict[str, Any]]:
        r"""
        Instances of every image, best first. The `top_k` best pairs of query and class are kept.

        Mask2Former (softmax, the no-object class left out): score = class probability x mean mask probability inside
        the mask, taken on the stride-4 grid of the un-padded image. Outputs with `class_scores` (K-Net, QueryInst):
        these are the scores. Outputs with `roi_mask_logits` (QueryInst): the mask of the very class, pasted into its
        box; `boxes` are then those of the model, which may exceed the image, otherwise those around the masks.

        Args:
            outputs: `masks_queries_logits` (B, Q, h, w) at stride 4 of the padded input, and `class_queries_logits`
                (B, Q, C + 1), no-object last, or `class_scores` (B, Q, C) in 0..1; with `roi_mask_logits`
                (B, Q, C, s, s) also `boxes` (B, Q, 4) x1, y1, x2, y2 in pixels of the padded input.
            threshold: instances that score less are left out, before their masks are upsampled.
            mask_threshold: a pixel belongs to a mask when its probability is above this (some K-Net recipes: 0.3).
            overlap_mask_area_threshold: only for the flat `segmentation`, where the better score takes a pixel: an
                instance is left out of the map if less than this share of its mask would be seen.
            target_sizes: (height, width) of the results, usually of the original images; default: `input_sizes`.
            input_sizes: (height, width) of the resized images before padding, see
                [`~UplvpImageProcessor.get_input_sizes`]. By default they are computed from `target_sizes` by the
                processor's own resizing; without either the images fill the padded input (4 h, 4 w).
            top_k: most instances an image (COCO evaluation looks at 100).
            return_rle: return COCO run lengths, made from the logits, in place of `masks`.
            return_segmentation: also return `segmentation` and `segments_info`.
            duplicates: IoU of two instances of a class above which the worse one is left out; none, or 1: all stay.

        Returns:
            Per image `scores` (N,) float32, `labels` (N,) int64 class indices, `boxes` (N, 4) float32 x1, y1, x2, y2
            pixels with exclusive ends, `masks` (N, H, W) bool or `rle` (list of N dicts), and, if asked for,
            `segmentation` (H, W) int32 holding the position of the instance in `scores` or -1, and `segments_info`, a
            list of `{"id", "label_id", "score", "was_fused": False}` for what the map shows.

        Raises UserError if sizes and batch disagree or a value is out of range, ImportError for `return_rle` or
        `duplicates` without pycocotools.
        """
        duplicates = 1.0 if duplicates is None else duplicates
        shares = {"threshold": threshold, "mask_threshold": mask_threshold, "duplicates": duplicates}
        _check_thresholds(top_k, **shares, overlap_mask_area_threshold=overlap_mask_area_threshold)
        if return_rle or duplicates < 1:
            require_pycocotools("return_rle=True" if return_rle else "duplicates")
        overlap = overlap_mask_area_threshold if return_segmentation else None
        results = []
        sizes = self._sizes(outputs.masks_queries_logits, target_sizes, input_sizes)
        for index, (input_size, target_size) in enumerate(sizes):
            found = find_instances(outputs, index, input_size, target_size, threshold, mask_threshold, top_k)
            found = found if duplicates == 1 else without_duplicates(found, target_size, duplicates)
            results.append(collect_instances(found, target_size, return_rle, overlap))
        return results

    def _sizes(self, mask_logits: torch.Tensor, target_sizes: Any, input_sizes: Any) -> list[tuple]:
        """(input size, target size) of every image."""
        batch_size = len(mask_logits)
        canvas = (mask_logits.shape[-2] * MASK_STRIDE, mask_logits.shape[-1] * MASK_STRIDE)
        target_sizes = check_sizes("target_sizes", target_sizes, batch_size)
        input_sizes = check_sizes("input_sizes", input_sizes, batch_size)
        if input_sizes is None and target_sizes is not None:
            size = self.size if isinstance(self.size, SizeDict) else SizeDict(**self.size)
            input_sizes = [resized_size(target, size) if self.do_resize else target for target in target_sizes]
        input_sizes = input_sizes or [canvas] * batch_size
        for index, (height, width) in enumerate(input_sizes):
            if height > canvas[0] or width > canvas[1]:
                raise UserError(
                    f"Image {index} of the batch: un-padded input of {height} x {width} is larger than "
                    f"the {canvas[0]} x {canvas[1]} that the masks cover. Pass "
                    "input_sizes=processor.get_input_sizes(pixel_mask)."
                )
        return list(zip(input_sizes, target_sizes or input_sizes))


def _check_thresholds(top_k: int, **thresholds: float) -> None:
    for name, value in thresholds.items():
        if not 0 <= value <= 1:
            raise UserError(f"{name}={value} is out of range; it goes from 0 to 1.")
    if top_k < 1:
        raise UserError(f"top_k={top_k} leaves no instance; it is at least 1.")


def _check_pixels(height: int, width: int, max_pixels: int | None) -> None:
    if not height * width:
        raise UserError(f"An image of {height} x {width} has no pixel. Leave it out.")
    if max_pixels is not None and height * width > max_pixels:
        raise UserError(
            f"An image of {height} x {width} has {height * width} pixels, more than max_pixels={max_pixels}. Cut it "
            "into tiles, make it smaller, or pass a larger max_pixels if memory allows it."
        )


def resized_size(image_size: tuple[int, int], size: SizeDict) -> tuple[int, int]:
    """(height, width) after resizing an image of `image_size` = (height, width) by the rule of `size`."""
    height, width = int(image_size[0]), int(image_size[1])
    if size.height and size.width:
        return size.height, size.width
    if size.shortest_edge:
        return get_size_with_aspect_ratio((height, width), size.shortest_edge, size.longest_edge)
    if size.longest_edge:
        scale = size.longest_edge / max(height, width)
        return max(1, round(height * scale)), max(1, round(width * scale))
    raise UserError(f"size={dict(size)} needs 'longest_edge', 'shortest_edge' or both, or 'height' and 'width'.")


def check_sizes(name: str, sizes: Any, batch_size: int) -> list[tuple[int, int]] | None:
    if sizes is None:
        return None
    if len(sizes) != batch_size:
        raise UserError(f"{name} has {len(sizes)} entries for a batch of {batch_size} images; pass one an image.")
    sizes = [(int(height), int(width)) for height, width in sizes]
    for index, size in enumerate(sizes):
        if min(size) < 1:
            raise UserError(f"{name}[{index}] is {size}; height and width are at least 1.")
    return sizes
