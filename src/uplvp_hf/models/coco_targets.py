"""COCO annotations of one image -> masks and classes on the padded canvas. Copied to the Hub beside the weights."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from .errors import UserError
from .postprocessing_uplvp import coco_mask, require_pycocotools

# How far a polygon may leave the image, in pixels: what exporters round, not what is wrong.
_ROUNDING = 1.0


def annotation_targets(
    record: Mapping[str, Any],
    original: tuple[int, int],
    resized: tuple[int, int],
    canvas: tuple[int, int],
    label_map: Mapping[int, int] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks (N, H, W) bool on the padded canvas and classes (N,) int64 of one COCO record.

    original, resized, canvas: (height, width) of the image, after resizing, and padded. Crowds are left out, and so
    are masks without a pixel after resizing. Raises UserError, with the image and the position of the annotation,
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
            mask = torch.from_numpy(decode_segmentation(annotation["segmentation"], *original))
        except KeyError as error:
            raise UserError(f"{image}, annotation {index}: no {error} in it.") from error
        except (ValueError, TypeError, OverflowError) as error:
            raise UserError(f"{image}, annotation {index}: {error}") from error
        mask = F.interpolate(mask[None, None], resized, mode="nearest-exact")[0, 0] > 0
        if mask.any():
            masks.append(F.pad(mask, [0, canvas[1] - resized[1], 0, canvas[0] - resized[0]]))
            classes.append(class_index)
    stack = torch.stack(masks) if masks else torch.zeros((0, *canvas), dtype=torch.bool)
    return stack, torch.tensor(classes, dtype=torch.int64)


def _class_index(category: int, label_map: Mapping[int, int] | None) -> int:
    if label_map is None and (not isinstance(category, (int, np.integer)) or category < 0):
        raise UserError(f"category_id {category!r} is no class index, which is 0 or more. Pass a label_map.")
    if label_map is not None and category not in label_map:
        raise UserError(
            f"category_id {category} is not in label_map, which has {sorted(label_map)}. Add it, or leave the "
            "annotation out."
        )
    return int(category if label_map is None else label_map[category])


def decode_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Polygons or RLE, plain or compressed, to (H, W) uint8.

    Raises UserError for what does not describe a mask of that size. It is checked here because pycocotools leaves
    memory as it finds it under run lengths that end early, and takes hours over a vertex far away.
    """
    require_pycocotools("COCO annotations")
    if isinstance(segmentation, Mapping):
        _check_runs(segmentation, height, width)
        if isinstance(segmentation["counts"], (list, tuple)):
            segmentation = coco_mask.frPyObjects(dict(segmentation), height, width)
        return coco_mask.decode(segmentation)
    for polygon in segmentation:
        _check_polygon(polygon, height, width)
    polygons = [[float(value) for value in polygon] for polygon in segmentation]
    if not polygons:
        raise UserError("the segmentation is empty. Leave the annotation out.")
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width)))


def _check_runs(rle: Mapping[str, Any], height: int, width: int) -> None:
    if not {"size", "counts"} <= rle.keys():
        raise UserError(f"a run-length mask has `size` and `counts`, this one {sorted(rle)}.")
    size, counts = [int(side) for side in rle["size"]], rle["counts"]
    if size != [height, width]:
        raise UserError(
            f"a run-length mask of {size[0]} x {size[1]} for an image of {height} x {width} (height x width). "
            "Annotations refer to the original, un-rotated pixels."
        )
    runs = counts if isinstance(counts, (list, tuple)) else unpacked_runs(counts)
    if not all(isinstance(run, (int, np.integer)) for run in runs):
        raise UserError(f"run lengths are whole numbers, got {runs!r:.60}. The mask is damaged.")
    if min(runs, default=0) < 0 or sum(runs) != height * width:
        raise UserError(f"run lengths of {sum(runs)} pixels for an image of {height * width}. The mask is damaged.")


def unpacked_runs(counts: str | bytes) -> list[int]:
    """Run lengths of COCO's compressed form: groups of 5 bits from low to high, bit 5 says that another follows, bit 4
    of the last is the sign; from the fourth on, differences to the run two before."""
    runs: list[int] = []
    value = shift = 0
    for character in counts.encode("ascii") if isinstance(counts, str) else counts:
        code = character - 48
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            value -= (1 << shift) if code & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs


def _check_polygon(polygon: Sequence[float], height: int, width: int) -> None:
    if isinstance(polygon, (int, float, str)) or len(polygon) < 6 or len(polygon) % 2:
        raise UserError(
            f"a polygon is a list of at least three points, x and y in turn, got {polygon!r:.60}. "
            "A segmentation is a list of polygons."
        )
    for position, value in enumerate(polygon):
        limit = height if position % 2 else width
        if not math.isfinite(value) or not -_ROUNDING <= value <= limit + _ROUNDING:
            raise UserError(
                f"polygon coordinate {position} ({'xy'[position % 2]}) is {value}, outside the image of "
                f"{height} x {width} (height x width). Cut polygons off at the image's border."
            )


__all__ = ["annotation_targets", "decode_segmentation", "unpacked_runs"]
