"""The original K-Net's own last step, for comparisons with its published numbers.

`UplvpImageProcessor.post_process_instance_segmentation` is the one for use: it resizes logits in a single step. Here,
as in the original, probabilities are resized twice, to the padded input and from the picture on it to the target.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .postprocessing_uplvp import MASKS_PER_CHUNK, boxes_of


@torch.no_grad()
def knet_instances(
    class_logits: Tensor,
    mask_logits: Tensor,
    canvas: tuple[int, int],
    picture: tuple[int, int],
    target: tuple[int, int],
    max_instances: int = 100,
    mask_threshold: float = 0.5,
) -> dict[str, Tensor]:
    """Best pairs of kernel and class of one picture, by the class probability alone.

    class_logits (N, K); mask_logits (N, h, w) of the padded input; (height, width) of: `canvas`, the padded input,
    `picture`, what of it is picture, `target`, the result. Returns, best first: scores (M,) float32, labels (M,) and
    queries (M,) int64, masks (M, *target) bool, boxes (M, 4) float32 x1, y1, x2, y2 with exclusive ends, zeros for an
    empty mask. M = min(max_instances, N * K).
    """
    scores = class_logits.float().sigmoid().flatten()
    scores, order = scores.topk(min(max_instances, len(scores)))
    classes = class_logits.shape[1]
    queries, labels = torch.div(order, classes, rounding_mode="floor"), order % classes
    masks = [
        resized_probabilities(mask_logits[chunk], canvas, picture, target) > mask_threshold
        for chunk in queries.split(MASKS_PER_CHUNK)
    ]
    masks = torch.cat(masks)
    return {"scores": scores, "labels": labels, "queries": queries, "masks": masks, "boxes": boxes_of(masks)}


def resized_probabilities(
    logits: Tensor, canvas: tuple[int, int], picture: tuple[int, int], target: tuple[int, int]
) -> Tensor:
    """Logits (n, h, w) -> probabilities (n, *target) float32. Sizes as in `knet_instances`."""
    values = F.interpolate(logits.float().sigmoid()[None], size=canvas, mode="bilinear", align_corners=False)
    values = values[..., : picture[0], : picture[1]]
    return F.interpolate(values, size=target, mode="bilinear", align_corners=False)[0]


__all__ = ["knet_instances"]
