"""From query logits to instances of one image: choose, resample, threshold, encode.

Shared by the image processors. Copied to the Hub beside the weights: no other module of the library is imported.
With run-length encoding no dense mask of the target's size is held at all (QueryInst: one, as large as its box).
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from .mask_resampling import resampling_axis, resized_flips, resized_masks, signed_values, window_flips
from .masks import decode_segmentation, mask_iou, rle_boxes, rle_from_borders, tight_boxes
from .roi_masks import paste_masks

# Masks leave the model at a quarter of the padded input's resolution (as in Mask2Former).
MASK_STRIDE = 4
# Masks rated, or brought to the padded input's resolution, at once: 16 float masks of 1333 x 800 pixels take 68 MB.
MASKS_PER_CHUNK = 16

Size = tuple[int, int]


class Found(NamedTuple):
    """Instances of one image, best first: scores, labels and a key of the mask, (N,) each; two may share a mask.

    masks(keys) yields the bool masks (H, W) of a list of keys, and flips(keys) where they begin and end, see
    `mask_flips`. boxes: (N, 4) of the model in pixels of the target, or None where those around the masks count.
    """

    scores: torch.Tensor
    labels: torch.Tensor
    keys: torch.Tensor
    masks: Callable[[list[int]], Iterator[torch.Tensor]]
    flips: Callable[[list[int]], Iterator[np.ndarray]]
    boxes: torch.Tensor | None = None


def find_instances(
    outputs: Any, index: int, input_size: Size, target_size: Size, threshold: float, mask_threshold: float, top_k: int
) -> Found:
    """Instances of the image at `index` of a batch by the rule of its model, see the image processor."""
    scores, regions = getattr(outputs, "class_scores", None), getattr(outputs, "roi_mask_logits", None)
    if scores is not None and regions is not None:
        return _found_in_boxes(outputs, index, input_size, target_size, threshold, mask_threshold, top_k)
    # The un-padded image alone: masks are rated there, and nothing of the padding gets into the last pixels.
    cells = [math.ceil(side / MASK_STRIDE) for side in input_size]
    logits = outputs.masks_queries_logits[index, :, : cells[0], : cells[1]]
    if scores is None:
        classes = outputs.class_queries_logits[index].float()
        found = best_instances(classes, logits, threshold, mask_threshold, top_k)
        stride = MASK_STRIDE
    else:
        found = best_scores(scores[index].float(), threshold, top_k)
        stride, cells = 1, input_size
    rows, columns = (resampling_axis(*side, stride) for side in zip(cells, input_size, target_size, strict=True))

    def values(keys: list[int]) -> Iterator[torch.Tensor]:
        chunks = logits[keys].split(MASKS_PER_CHUNK) if keys else ()
        for chunk in chunks:
            if scores is None:
                yield signed_values(chunk, bound_of(mask_threshold))
            else:
                yield signed_values(input_probabilities(chunk, input_size), mask_threshold)

    boxes = getattr(outputs, "boxes", None)
    if boxes is not None:  # of the model itself (RF-DETR)
        down, across = (target / source for target, source in zip(target_size, input_size, strict=True))
        boxes = boxes[index][found[2]].float() * boxes.new_tensor([across, down, across, down])
    return Found(
        *found,
        lambda keys: (mask for chunk in values(keys) for mask in resized_masks(chunk, rows, columns)),
        lambda keys: (flips for chunk in values(keys) for flips in resized_flips(chunk, rows, columns)),
        boxes,
    )


def _found_in_boxes(
    outputs: Any, index: int, input_size: Size, target_size: Size, threshold: float, mask_threshold: float, top_k: int
) -> Found:
    """QueryInst: every pair of query and class has a mask of its own, in the query's box."""
    scores, labels, queries = best_scores(outputs.class_scores[index].float(), threshold, top_k)
    down, across = (target / source for target, source in zip(target_size, input_size, strict=True))
    boxes = outputs.boxes[index][queries].float()
    boxes = boxes * boxes.new_tensor([across, down, across, down])
    grids = outputs.roi_mask_logits[index][queries, labels].float().sigmoid()

    def masks(keys: list[int]) -> Iterator[torch.Tensor]:
        for top, left, part in parts_in_boxes(grids[keys], boxes[keys], target_size, mask_threshold):
            mask = torch.zeros(target_size, dtype=torch.bool, device=part.device)
            mask[top : top + part.shape[0], left : left + part.shape[1]] = part
            yield mask

    def flips(keys: list[int]) -> Iterator[np.ndarray]:
        parts = parts_in_boxes(grids[keys].cpu(), boxes[keys].cpu(), target_size, mask_threshold)
        for top, left, part in parts:
            yield window_flips(part.numpy(), top, left, target_size)

    return Found(scores, labels, torch.arange(len(scores), device=scores.device), masks, flips, boxes)


def parts_in_boxes(
    grids: torch.Tensor, boxes: torch.Tensor, target_size: Size, mask_threshold: float
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Probabilities (n, s, s) pasted into boxes (n, 4), then compared: top, left and the bool mask of each box as far
    as it lies on an image of `target_size`."""
    height, width = target_size
    corners = torch.cat([boxes[:, :2].floor(), boxes[:, 2:].ceil()], 1).nan_to_num()
    limits = corners.new_tensor([width, height, width, height])
    corners = corners.clamp(min=torch.zeros_like(limits), max=limits).long().tolist()
    for grid, box, (left, top, right, bottom) in zip(grids, boxes, corners, strict=True):
        size = (max(bottom - top, 0), max(right - left, 0))
        yield top, left, paste_masks(grid[None], box[None], size, offset=(top, left))[0] >= mask_threshold


def bound_of(mask_threshold: float) -> float:
    """The logit whose sigmoid is `mask_threshold`, infinite for 0 and 1."""
    if mask_threshold in (0, 1):
        return math.inf if mask_threshold else -math.inf
    return math.log(mask_threshold / (1 - mask_threshold))


def best_instances(
    class_logits: torch.Tensor, mask_logits: torch.Tensor, threshold: float, mask_threshold: float, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores, labels and queries (N,) of the instances of one image that reach the threshold, best first."""
    probabilities = class_logits.softmax(-1)[:, :-1]  # (Q, C)
    num_classes = probabilities.shape[1]
    order = probabilities.flatten().argsort(descending=True, stable=True)[:top_k]
    class_scores, labels = probabilities.flatten()[order], order % num_classes
    queries = torch.div(order, num_classes, rounding_mode="floor")
    # Mask quality is at most 1, so what fails here cannot pass below; most queries of an image end here.
    candidates = class_scores >= threshold
    class_scores, labels, queries = class_scores[candidates], labels[candidates], queries[candidates]
    unique, position = queries.unique(return_inverse=True)
    chunks = [mask_quality(mask_logits[some], mask_threshold) for some in unique.split(MASKS_PER_CHUNK)]
    scores = class_scores * torch.cat(chunks)[position]
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] >= threshold]
    return scores[order], labels[order], queries[order]


def mask_quality(logits: torch.Tensor, mask_threshold: float) -> torch.Tensor:
    """Mean probability (n,) of the pixels inside masks (n, h, w); 0 without any."""
    logits = logits.flatten(1).float()
    inside = logits > bound_of(mask_threshold)
    return (logits.sigmoid() * inside).sum(1) / inside.sum(1).clamp(min=1)


def best_scores(
    class_scores: torch.Tensor, threshold: float, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `best_instances`, for scores (Q, C) that are final: every class on its own, masks not rated."""
    scores, order = class_scores.flatten().sort(descending=True, stable=True)
    order = order[:top_k][scores[:top_k] >= threshold]
    queries = torch.div(order, class_scores.shape[1], rounding_mode="floor")
    return class_scores.flatten()[order], order % class_scores.shape[1], queries


def input_probabilities(logits: torch.Tensor, input_size: Size) -> torch.Tensor:
    """Mask logits (n, h, w) at stride 4 -> probabilities (n, *input_size) float32 at the resolution of the input.

    As in K-Net, whose masks are resized twice: probabilities to the padded input, cut to the image, then to the
    target. The pixels lose a quarter of a cell at most against one step; the released weights are rated this way.
    """
    canvas = [MASK_STRIDE * side for side in logits.shape[-2:]]
    values = F.interpolate(logits[None].float().sigmoid(), size=canvas, mode="bilinear", align_corners=False)[0]
    return values[..., : input_size[0], : input_size[1]]


def without_duplicates(found: Found, target_size: Size, most: float) -> Found:
    """Leaves out instances whose mask has an IoU above `most` with a better one of their class that stays."""
    keys = found.keys.tolist()
    rles = {key: rle_from_borders(flips, *target_size) for key, flips in _unique_flips(found, keys)}
    labels, kept = found.labels.tolist(), []
    for label in dict.fromkeys(labels):
        own = [place for place, one in enumerate(labels) if one == label]
        masks = [rles[keys[place]] for place in own]
        kept += [own[place] for place in first_of_duplicates(mask_iou(masks, masks), most)]
    chosen = torch.tensor(sorted(kept), dtype=torch.int64, device=found.keys.device)
    boxes = None if found.boxes is None else found.boxes[chosen]
    scores, labels, keys = found.scores[chosen], found.labels[chosen], found.keys[chosen]
    return found._replace(scores=scores, labels=labels, keys=keys, boxes=boxes)


def _unique_flips(found: Found, keys: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    unique = list(dict.fromkeys(keys))
    return zip(unique, found.flips(unique), strict=True)


def first_of_duplicates(ious: Any, most: float) -> list[int]:
    """The positions that stay, ascending, when each needs an IoU of at most `most` with all that stay before; ious:
    (N, N), best first."""
    kept: list[int] = []
    for position in range(len(ious)):
        if not kept or float(ious[position, kept].max()) <= most:
            kept.append(position)
    return kept


def collect_instances(found: Found, target_size: Size, return_rle: bool, overlap: float | None) -> dict[str, Any]:
    """The result of one image, see the image processor; instances whose mask has no pixel are left out.

    overlap: least visible share of a mask on the flat map; None: no map.
    """
    keys = found.keys.tolist()
    unique = list(dict.fromkeys(keys))
    device = found.scores.device
    if return_rle:
        masks = [rle_from_borders(flips, *target_size) for flips in found.flips(unique)]
        corners = rle_boxes(masks).reshape(-1, 2, 2).cumsum(1).reshape(-1, 4)  # x, y, width, height -> x1, y1, x2, y2
        boxes = torch.from_numpy(corners).to(device, torch.float32)
        painted = (torch.from_numpy(decode_segmentation(rle, *target_size)).to(device) for rle in masks)
    else:
        masks = torch.zeros((len(unique), *target_size), dtype=torch.bool, device=device)
        for slot, mask in enumerate(found.masks(unique)):
            masks[slot] = mask
        boxes = tight_boxes(masks).float()
        painted = iter(masks)
    slots = {key: slot for slot, key in enumerate(unique)}
    slot = torch.tensor([slots[key] for key in keys], dtype=torch.int64, device=device)
    kept = boxes[slot, 2] > boxes[slot, 0]  # a mask may vanish between the stride-4 grid and a small target
    scores, labels, slot = found.scores[kept], found.labels[kept], slot[kept]
    result = {"scores": scores, "labels": labels, "boxes": boxes[slot] if found.boxes is None else found.boxes[kept]}
    if return_rle:
        result["rle"] = [dict(masks[position]) for position in slot.tolist()]
    else:
        # Without repeated queries the stack is the answer as it stands; indexing would copy it.
        result["masks"] = masks if slot.tolist() == list(range(len(masks))) else masks[slot]
    if overlap is not None:
        result.update(_flat_map(painted, target_size, overlap, scores, labels, slot))
    return result


def _flat_map(
    masks: Iterator[torch.Tensor],
    target_size: Size,
    overlap: float,
    scores: torch.Tensor,
    labels: torch.Tensor,
    slot: torch.Tensor,
) -> dict[str, Any]:
    """The map of the image, where better masks (H, W) lie above worse ones, with positions in `scores` (the best of
    those that share a mask)."""
    device = scores.device
    segmentation = torch.full(target_size, -1, dtype=torch.int32, device=device)
    count = 0
    for count, mask in enumerate(masks, start=1):
        visible = mask & (segmentation < 0)
        visible &= visible.sum() >= overlap * mask.sum()
        segmentation[visible] = count - 1
    names = torch.full((count + 1,), -1, dtype=torch.int32, device=device)  # the last is background
    for position, index in reversed(list(enumerate(slot.tolist()))):
        names[index] = position
    segmentation = names[segmentation.long()]
    shown = [position for position in segmentation.unique().tolist() if position >= 0]
    values = zip(shown, labels[shown].tolist(), scores[shown].tolist(), strict=True)
    info = [{"id": id_, "label_id": label, "score": score, "was_fused": False} for id_, label, score in values]
    return {"segmentation": segmentation, "segments_info": info}
