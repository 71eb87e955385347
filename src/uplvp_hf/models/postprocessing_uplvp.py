"""From query logits to instances of one picture: choose, upsample, threshold, encode.

Shared by the image processors. Copied to the Hub beside the weights: no other module of the library is imported.
At no time are more than 16 dense masks held in float, and with run-length encoding not in bool either.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F

from .roi_masks import paste_masks

try:  # only COCO annotations and RLE results need it; plain inference from the Hub does not
    from pycocotools import mask as coco_mask
except ImportError:
    coco_mask = None

# Masks leave the model at a quarter of the padded input's resolution (as in Mask2Former).
MASK_STRIDE = 4
# Masks upsampled at once: 16 float masks of 1333 x 800 pixels take 68 MB.
MASKS_PER_CHUNK = 16


def best_instances(
    class_logits: torch.Tensor, mask_logits: torch.Tensor, threshold: float, mask_threshold: float, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores, labels and queries (N,) of the instances of one picture that reach the threshold, best first."""
    probabilities = class_logits.softmax(-1)[:, :-1]  # (Q, C)
    num_classes = probabilities.shape[1]
    order = probabilities.flatten().argsort(descending=True, stable=True)[:top_k]
    class_scores, labels = probabilities.flatten()[order], order % num_classes
    queries = torch.div(order, num_classes, rounding_mode="floor")
    # Mask quality is at most 1, so what fails here cannot pass below; most queries of a picture end here.
    candidates = class_scores >= threshold
    class_scores, labels, queries = class_scores[candidates], labels[candidates], queries[candidates]
    unique, position = queries.unique(return_inverse=True)
    mask_probabilities = mask_logits[unique].flatten(1).sigmoid()
    inside = mask_probabilities > mask_threshold
    quality = (mask_probabilities * inside).sum(1) / inside.sum(1).clamp(min=1)
    scores = class_scores * quality[position]
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] >= threshold]
    return scores[order], labels[order], queries[order]


def best_scores(
    class_scores: torch.Tensor, threshold: float, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `best_instances`, for scores (Q, C) that are final: every class on its own, masks not rated."""
    scores, order = class_scores.flatten().sort(descending=True, stable=True)
    order = order[:top_k][scores[:top_k] >= threshold]
    queries = torch.div(order, class_scores.shape[1], rounding_mode="floor")
    return class_scores.flatten()[order], order % class_scores.shape[1], queries


def resized_probabilities(
    logits: torch.Tensor, input_size: tuple[int, int], target_size: tuple[int, int]
) -> torch.Tensor:
    """Mask logits (n, h, w) at stride 4 of the padded input -> probabilities (n, H, W) float32 of the target size.

    As in K-Net: probabilities are interpolated, to the padded input, cut to the picture, then to the target.
    """
    canvas = [MASK_STRIDE * side for side in logits.shape[-2:]]
    values = F.interpolate(logits[None].float().sigmoid(), size=canvas, mode="bilinear", align_corners=False)
    values = values[..., : input_size[0], : input_size[1]]
    return F.interpolate(values, size=target_size, mode="bilinear", align_corners=False)[0]


def probability_masks(
    logits: torch.Tensor, input_size: tuple[int, int], target_size: tuple[int, int], mask_threshold: float
) -> Iterator[torch.Tensor]:
    """Bool masks (n, H, W) of the target size, a chunk of queries at a time, from `resized_probabilities`."""
    for chunk in logits.split(MASKS_PER_CHUNK):
        if len(chunk):
            yield resized_probabilities(chunk, input_size, target_size) > mask_threshold


def pasted_masks(
    logits: torch.Tensor, boxes: torch.Tensor, target_size: tuple[int, int], mask_threshold: float
) -> Iterator[torch.Tensor]:
    """Bool masks (n, H, W) of the target size, a chunk at a time, from mask logits (N, S, S) within boxes (N, 4), which
    are in pixels of the target: probabilities are pasted, then compared."""
    for chunk, within in zip(logits.split(MASKS_PER_CHUNK), boxes.split(MASKS_PER_CHUNK), strict=True):
        if len(chunk):
            yield paste_masks(chunk.float().sigmoid(), within, target_size) >= mask_threshold


def upsampled_masks(
    logits: torch.Tensor, input_size: tuple[int, int], target_size: tuple[int, int], mask_threshold: float
) -> Iterator[torch.Tensor]:
    """Bool masks (n, H, W) of the target size, a chunk of queries at a time.

    One bilinear step in continuous coordinates: the un-padded picture need not end on a cell of the stride-4 grid, so
    the scale comes from its exact size and what lies beyond it is cut off afterwards.
    """
    # The hair above 1 keeps rounding from losing the last row when the picture does end on a cell.
    scale = [MASK_STRIDE * target / source * (1 + 1e-7) for target, source in zip(target_size, input_size, strict=True)]
    bound = torch.logit(torch.tensor(float(mask_threshold), dtype=torch.float64)).item()
    for chunk in logits.split(MASKS_PER_CHUNK):
        if len(chunk):
            masks = F.interpolate(
                chunk[None], scale_factor=scale, mode="bilinear", align_corners=False, recompute_scale_factor=False
            )[0]
            yield masks[:, : target_size[0], : target_size[1]] > bound


def collect_instances(
    scores: torch.Tensor,
    labels: torch.Tensor,
    queries: torch.Tensor,
    unique: list[int],
    chunks: Iterator[torch.Tensor],
    target_size: tuple[int, int],
    return_rle: bool,
    overlap: float | None,
    given_boxes: torch.Tensor | None = None,
) -> dict[str, Any]:
    """The result of one picture. `chunks` yields the masks of the queries in `unique`, which are in order of score.

    Instances whose mask has no pixel are left out. given_boxes (N, 4) replace the boxes around the masks.
    """
    device = scores.device
    masks, boxes = [], [torch.zeros((0, 4), device=device)]
    segmentation = torch.full(target_size, -1, dtype=torch.int32, device=device)
    done = 0
    for chunk in chunks:
        boxes.append(boxes_of(chunk))
        masks.extend(encode_rle(chunk)) if return_rle else masks.append(chunk)
        if overlap is not None:
            for offset, mask in enumerate(chunk):
                visible = mask & (segmentation < 0)
                seen = visible.sum()
                if seen > 0 and seen >= overlap * mask.sum():
                    segmentation[visible] = done + offset
        done += len(chunk)
    boxes = torch.cat(boxes)
    slots = {query: slot for slot, query in enumerate(unique)}
    slot = torch.tensor([slots[query] for query in queries.tolist()], dtype=torch.int64, device=device)
    kept = boxes[slot, 2] > boxes[slot, 0]  # a mask may vanish between the stride-4 grid and a small target
    scores, labels, slot = scores[kept], labels[kept], slot[kept]
    result = {"scores": scores, "labels": labels, "boxes": boxes[slot] if given_boxes is None else given_boxes[kept]}
    if return_rle:
        result["rle"] = [dict(masks[position]) for position in slot.tolist()]
    else:
        stack = torch.cat(masks) if masks else torch.zeros((0, *target_size), dtype=torch.bool, device=device)
        # Without repeated queries the stack is the answer as it stands; indexing would copy it.
        result["masks"] = stack if slot.tolist() == list(range(len(stack))) else stack[slot]
    if overlap is not None:
        result.update(_flat_map(segmentation, scores, labels, slot, len(unique)))
    return result


def _flat_map(
    segmentation: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, slot: torch.Tensor, num_slots: int
) -> dict[str, Any]:
    """Renames the mask slots painted into the map to positions in `scores` (the best of a query's instances)."""
    names = torch.full((num_slots + 1,), -1, dtype=torch.int32, device=segmentation.device)  # the last is background
    for position, index in reversed(list(enumerate(slot.tolist()))):
        names[index] = position
    segmentation = names[segmentation.long()]
    shown = [position for position in segmentation.unique().tolist() if position >= 0]
    info = [
        {"id": position, "label_id": int(labels[position]), "score": float(scores[position]), "was_fused": False}
        for position in shown
    ]
    return {"segmentation": segmentation, "segments_info": info}


def boxes_of(masks: torch.Tensor) -> torch.Tensor:
    """(n, H, W) bool to (n, 4) float32 x1, y1, x2, y2 with exclusive ends; zeros for an empty mask."""
    spans = []
    for occupied in (masks.any(1), masks.any(2)):  # columns (n, W), rows (n, H)
        length = occupied.shape[1]
        occupied = occupied.to(torch.uint8)
        first, last = occupied.argmax(1), length - occupied.flip(1).argmax(1)
        spans.append((first, last))
    boxes = torch.stack([spans[0][0], spans[1][0], spans[0][1], spans[1][1]], 1).to(torch.float32)
    return boxes * masks.flatten(1).any(1)[:, None]


def require_pycocotools(purpose: str) -> None:
    if coco_mask is None:
        raise ImportError(f"{purpose} needs pycocotools: pip install pycocotools")


def encode_rle(masks: torch.Tensor) -> list[dict[str, Any]]:
    """(n, H, W) bool to COCO run lengths, which go down the columns: hence the transposition before the copy."""
    require_pycocotools("return_rle=True")
    columns = masks.transpose(1, 2).contiguous().to(torch.uint8).cpu().numpy()  # (n, W, H)
    encoded = coco_mask.encode(columns.T)  # (H, W, n), Fortran order, no copy
    return [{"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")} for rle in encoded]
