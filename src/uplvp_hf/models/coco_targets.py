"""COCO annotations of one image -> masks and classes on the padded canvas. Copied to the Hub beside the weights."""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from .errors import UserError
from .masks import decode_segmentation, polygon_overhang


def annotation_targets(
    record: Mapping[str, Any],
    original: tuple[int, int],
    resized: tuple[int, int],
    canvas: tuple[int, int],
    label_map: Mapping[int, int] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks (N, H, W) bool on the padded canvas and classes (N,) int64 of one COCO record.

    original, resized, canvas: (height, width) of the image, after resizing, and padded. Crowds are left out, and so
    are masks without a pixel after resizing; polygons are cut off at the border of the image, as in training, with a
    warning where that is more than rounding. Raises UserError, with the image and the position of the annotation,
    for a missing key, a category that is not in `label_map` and a segmentation that does not fit the image.
    """
    image = f"Image {record.get('image_id')!r}"
    if "annotations" not in record:
        raise UserError(f"{image}: no `annotations`, only {sorted(record)}. Without any it is an empty list.")
    masks, classes = [], []
    for index, annotation in enumerate(record["annotations"]):
        if annotation.get("iscrowd", 0):
            continue
        try:
            class_index = _class_index(annotation["category_id"], label_map)
            mask = torch.from_numpy(decode_segmentation(annotation["segmentation"], *original).view(np.uint8))
        except KeyError as error:
            raise UserError(f"{image}, annotation {index}: no {error} in it.") from error
        except (ValueError, TypeError, OverflowError) as error:
            raise UserError(f"{image}, annotation {index}: {error}") from error
        _warn_of_overhang(annotation["segmentation"], original, f"{image}, annotation {index}")
        mask = F.interpolate(mask[None, None], resized, mode="nearest-exact")[0, 0] > 0
        if mask.any():
            masks.append(F.pad(mask, [0, canvas[1] - resized[1], 0, canvas[0] - resized[0]]))
            classes.append(class_index)
    stack = torch.stack(masks) if masks else torch.zeros((0, *canvas), dtype=torch.bool)
    return stack, torch.tensor(classes, dtype=torch.int64)


def _warn_of_overhang(segmentation: Any, size: tuple[int, int], where: str) -> None:
    for part in () if isinstance(segmentation, Mapping) else segmentation:
        if overhang := polygon_overhang(part, *size):
            warnings.warn(f"{where}: {overhang}; it is clipped.", stacklevel=5)


def _class_index(category: int, label_map: Mapping[int, int] | None) -> int:
    if label_map is None and (not isinstance(category, (int, np.integer)) or category < 0):
        raise UserError(f"category_id {category!r} is no class index, which is 0 or more. Pass a label_map.")
    if label_map is not None and category not in label_map:
        raise UserError(
            f"category_id {category} is not in label_map, which has {sorted(label_map)}. Add it, or leave the "
            "annotation out."
        )
    return int(category if label_map is None else label_map[category])
