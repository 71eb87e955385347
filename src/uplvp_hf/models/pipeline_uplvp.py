"""`pipeline("instance-segmentation")`: images in, one entry an instance out, overlaps kept.

Registered where this library is imported, and copied to the Hub beside the weights (`custom_pipelines` of config.json):
imports nothing of the library but siblings.

The stock `pipeline("image-segmentation")` paints instances onto one flat map, so that the lower of two overlapping ones
loses pixels, needs a score of 0.9, and pads no batches.
"""

import base64
import math
import os
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers.pipelines.base import Pipeline

from .errors import UserError
from .images import array_to_rgb, as_rgb, open_bytes, open_image
from .masks import encode_masks, tight_boxes
from .thresholds import MASK_THRESHOLD, duplicate_iou, score_threshold

# What post-processing reads of a model's outputs.
OUTPUTS = ("class_queries_logits", "masks_queries_logits", "class_scores", "roi_mask_logits", "boxes")
FORMATS = ("rle", "pil")

Size = tuple[int, int]


class UplvpInstanceSegmentationPipeline(Pipeline):
    r"""
    Instances of images: class, score, box and mask of each, in the pixels of the image.

    Inputs: an image, a list, or a generator or dataset of them; an image is a path, a URL, a base64 string, bytes, a
    PIL image, or a numpy array (H, W), (H, W, 3) or (H, W, 4). All become upright 8-bit RGB as in training. With
    `batch_size` images of equal padded shape go through the model together; results do not depend on it.

    Args, of the call or of `pipeline(...)`:
        threshold (`float`, *optional*, defaults to the `default_threshold` of the model's configuration, else 0.5):
            Instances that score less are left out. Models trained on few labels are seldom sure: 0.9, the stock
            pipeline's, leaves next to nothing of them.
        mask_threshold (`float`, *optional*, defaults to 0.5):
            A pixel belongs to a mask when its probability is above this.
        overlap_mask_area_threshold (`float`, *optional*):
            With it every pixel goes to the best instance, and instances of which less than this share is left are
            dropped, as in the stock pipeline. Without it masks may overlap.
        duplicates (`float`, *optional*, defaults to the `duplicate_iou` of the model's configuration):
            Of two instances of one class whose masks have a larger IoU, the worse one is left out; 1 keeps all.
        top_k (`int`, *optional*, defaults to 100):
            Most instances an image.
        masks (`str`, *optional*, defaults to `"rle"`):
            `"rle"`: COCO run lengths; the result can be written as JSON as it stands. `"pil"`: 8-bit gray images, 255
            inside.
        timeout (`float`, *optional*):
            Seconds to wait for a URL.
        max_pixels (`int`, *optional*, defaults to the image processor's):
            Larger images are refused; above 179 million Pillow refuses to open files.

    Returns:
        `list[dict]`, best first, or a list of these for several images: `score` (`float`), `label` (`str`),
        `label_id` (`int`, the model's class index), `category_id` (`int`, of the dataset that the model was trained
        on, where the model knows it), `box` (`{"xmin", "ymin", "xmax", "ymax"}`, `float`, pixels with exclusive ends)
        and `rle` (`{"size": [height, width], "counts": str}`) or `mask`.

    Example:

    ```python
    >>> segmenter = pipeline("instance-segmentation", model="my/model")
    >>> segmenter(["a.jpg", "b.jpg"], batch_size=2, threshold=0.5)
    ```
    """

    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = False
    _load_video_processor = False

    def _sanitize_parameters(self, **kwargs) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        known = {
            "timeout",
            "max_pixels",
            "threshold",
            "mask_threshold",
            "overlap_mask_area_threshold",
            "duplicates",
            "top_k",
            "masks",
        }
        if unknown := kwargs.keys() - known:
            raise UserError(f"No such setting of the pipeline: {', '.join(sorted(unknown))}. It has {sorted(known)}.")
        if kwargs.get("masks", "rle") not in FORMATS:
            raise UserError(f"masks must be one of {', '.join(FORMATS)}, got {kwargs['masks']!r}.")
        reading = {name: kwargs.pop(name) for name in ("timeout", "max_pixels") if name in kwargs}
        return reading, {}, kwargs

    def preprocess(
        self, image: Any, timeout: float | None = None, max_pixels: int | None = None
    ) -> dict[str, list[Any]]:
        image = _opened(image, timeout)
        limit = {} if max_pixels is None else {"max_pixels": max_pixels}
        pixels = self.image_processor(image, do_pad=False, return_tensors="pt", **limit)["pixel_values"][0]
        # In lists, which transformers puts together as they are; tensors it would want in one shape.
        return {"images": [pixels], "targets": [(image.height, image.width)]}

    def _forward(self, inputs: dict[str, list[Any]]) -> dict[str, list[Any]]:
        images, targets = _flat(inputs["images"]), _flat(inputs["targets"])
        # Only images of one padded size go together: window attention (Swin) sees padding.
        groups: dict[Size, list[int]] = {}
        for index, image in enumerate(images):
            groups.setdefault(_padded_size(image, self.image_processor.size_divisor), []).append(index)
        found: list[dict[str, torch.Tensor]] = [{} for _ in images]
        for size, indices in groups.items():
            values, mask = _padded([images[index] for index in indices], size)
            outputs = self.model(pixel_values=values.to(self.model.dtype), pixel_mask=mask)
            for name in OUTPUTS:
                if (value := getattr(outputs, name, None)) is not None:
                    for index, part in zip(indices, value.split(1), strict=True):
                        found[index][name] = part
        sizes = [(target, tuple(image.shape[-2:])) for target, image in zip(targets, images, strict=True)]
        return {"outputs": found, "sizes": sizes}

    def postprocess(
        self,
        outputs: dict[str, Any],
        threshold: float | None = None,
        mask_threshold: float = MASK_THRESHOLD,
        overlap_mask_area_threshold: float | None = None,
        duplicates: float | None = None,
        top_k: int = 100,
        masks: str = "rle",
    ) -> list[dict[str, Any]]:
        found, sizes = outputs["outputs"], outputs["sizes"]
        if isinstance(found, list):  # of no batch
            found, sizes = found[0], sizes[0]
        target, size = sizes
        result = self.image_processor.post_process_instance_segmentation(
            SimpleNamespace(**found),
            threshold=score_threshold(self.model.config) if threshold is None else threshold,
            mask_threshold=mask_threshold,
            duplicates=duplicate_iou(self.model.config) if duplicates is None else duplicates,
            target_sizes=[target],
            input_sizes=[size],
            top_k=top_k,
            return_rle=masks == "rle" and overlap_mask_area_threshold is None,
            return_segmentation=overlap_mask_area_threshold is not None,
            **(
                {}
                if overlap_mask_area_threshold is None
                else {"overlap_mask_area_threshold": overlap_mask_area_threshold}
            ),
        )[0]
        if overlap_mask_area_threshold is not None:
            result = _apart(result, masks == "rle")
        return self._entries(result, masks)

    def _entries(self, result: dict[str, Any], masks: str) -> list[dict[str, Any]]:
        config = self.model.config
        category_ids = getattr(config, "category_ids", None)
        entries = []
        for index, (score, label, box) in enumerate(
            zip(result["scores"].tolist(), result["labels"].tolist(), result["boxes"].tolist(), strict=True)
        ):
            entry = {"score": score, "label": config.id2label[label], "label_id": label}
            if category_ids is not None:
                entry["category_id"] = int(category_ids[label])
            entry["box"] = dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
            if masks == "rle":
                entry["rle"] = result["rle"][index]
            else:
                entry["mask"] = Image.fromarray(result["masks"][index].cpu().numpy().astype(np.uint8) * 255)
            entries.append(entry)
        return entries


def _apart(result: dict[str, Any], rle: bool) -> dict[str, Any]:
    """The instances of the flat map, each with what it shows there."""
    flat, shown = result["segmentation"], result["segments_info"]
    masks = torch.stack([flat == info["id"] for info in shown]) if shown else result["masks"][:0]
    kept = [info["id"] for info in shown]
    apart = {"scores": result["scores"][kept], "labels": result["labels"][kept], "boxes": tight_boxes(masks).float()}
    return {**apart, "rle": encode_masks(masks.cpu().numpy())} if rle else {**apart, "masks": masks}


def _opened(image: Any, timeout: float | None) -> Image.Image:
    """Upright 8-bit RGB of what may be passed for an image. Raises UserError for what is none."""
    if isinstance(image, np.ndarray):
        return array_to_rgb(image)
    if isinstance(image, Image.Image):
        return as_rgb(image)
    try:
        if isinstance(image, os.PathLike) or (isinstance(image, str) and os.path.isfile(image)):
            return open_image(image)
        if isinstance(image, str) and image.startswith(("http://", "https://")):
            answer = httpx.get(image, timeout=timeout, follow_redirects=True)
            content = answer.raise_for_status().content
        elif isinstance(image, str):
            text = image.partition(",")[2] if image.startswith("data:image/") else image
            content = base64.b64decode("".join(text.split()), validate=True)
        else:
            content = bytes(memoryview(image))
        if not content:
            raise UserError("it is empty")
        return open_bytes(content, file=image[:100] if isinstance(image, str) else "image in memory")
    except Exception as error:  # httpx and base64 raise classes of many kinds
        name = image if isinstance(image, str) else type(image).__name__
        raise UserError(
            f"{name:.100} cannot be read as an image ({type(error).__name__}: {error!s:.200}). Pass the path, address "
            "or base64 string of an image, or open it and pass the PIL image."
        ) from error


def _flat(values: list[Any]) -> list[Any]:
    """Of a batch there comes a list of lists, of a single image a list."""
    return [item for value in values for item in value] if isinstance(values[0], list) else values


def _padded_size(image: torch.Tensor, divisor: int) -> Size:
    height, width = (divisor * math.ceil(side / divisor) for side in image.shape[-2:])
    return height, width


def _padded(images: list[torch.Tensor], size: Size) -> tuple[torch.Tensor, torch.Tensor]:
    """(3, h, w) each -> (B, 3, H, W) with zeros at the bottom and right, and (B, H, W) int64, 1 on real pixels."""
    spare = [(0, size[1] - image.shape[-1], 0, size[0] - image.shape[-2]) for image in images]
    values = [F.pad(image, pad) for image, pad in zip(images, spare, strict=True)]
    masks = [F.pad(torch.ones_like(p[0], dtype=torch.int64), pad) for p, pad in zip(images, spare, strict=True)]
    return torch.stack(values), torch.stack(masks)
