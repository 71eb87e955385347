"""Loss terms and matching costs of query segmenters, in float32 whatever comes in, unreduced and unweighted.

Sources: focal loss arXiv 1708.02002; dice arXiv 1606.04797 (squared form) and the first-power form of MaskFormer
(arXiv 2107.06278); GIoU arXiv 1902.09630; costs of K-Net (arXiv 2106.14855) and DETR (arXiv 2005.12872); projection
and pairwise terms of BoxInst (arXiv 2012.02310), which Saliency Prompt (arXiv 2302.01171) uses on rough masks.

Letters: N queries, G targets, K classes, P pixels or points, M matched pairs. Callers apply weights and divisors.
"""

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import UserError
from .torchvision_ops import generalized_box_iou, generalized_box_iou_loss
from .torchvision_ops import sigmoid_focal_loss as focal

# Added to both sums of the denominator of the weak terms; together 1e-5, as in BoxInst.
WEAK_DICE_EPS = 5e-6


def _full_precision(function: Callable) -> Callable:
    """Floating tensors enter as float32, and autocast, which would multiply in half precision, is off."""

    @wraps(function)
    def wrapped(*arguments, **keywords):
        device = next(value for value in arguments if isinstance(value, Tensor)).device
        arguments = [
            value.float() if isinstance(value, Tensor) and value.is_floating_point() else value for value in arguments
        ]
        with torch.autocast(device.type, enabled=False):
            return function(*arguments, **keywords)

    return wrapped


@_full_precision
def sigmoid_focal_loss(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Focal loss of every class: logits (..., K), labels (...) int64 in 0..K, K for background -> (..., K)."""
    classes = logits.shape[-1]
    targets = F.one_hot(labels, classes + 1)[..., :classes].to(logits.dtype)
    return focal(logits, targets, alpha=alpha, gamma=gamma, reduction="none")


@_full_precision
def focal_cost(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0, eps: float = 1e-12) -> Tensor:
    """Focal loss of "is this class" less that of "is not": (..., N, K) logits, (G,) labels -> (..., N, G)."""
    probability = logits.sigmoid()
    negative = -(1 - probability + eps).log() * (1 - alpha) * probability**gamma
    positive = -(probability + eps).log() * alpha * (1 - probability) ** gamma
    return (positive - negative)[..., labels]


@_full_precision
def dice_loss(probabilities: Tensor, targets: Tensor, eps: float = 1e-3, form: str = "squared") -> Tensor:
    """Dice loss of matched pairs: (M, P) and (M, P), values in [0, 1] -> (M,).

    squared (K-Net, QueryInst): 1 - 2<p, t> / (<p, p> + eps + <t, t> + eps).
    linear (Mask2Former): 1 - (2<p, t> + eps) / (sum p + sum t + eps).
    """
    overlap = 2 * (probabilities * targets).sum(-1)
    if _is_squared(form):
        return 1 - overlap / ((probabilities.square().sum(-1) + eps) + (targets.square().sum(-1) + eps))
    return 1 - (overlap + eps) / (probabilities.sum(-1) + targets.sum(-1) + eps)


@_full_precision
def dice_cost(probabilities: Tensor, targets: Tensor, eps: float = 1e-3, form: str = "squared") -> Tensor:
    """Dice of every pair: (..., N, P) and (G, P) -> (..., N, G). squared: minus the dice coefficient, in [-1, 0];
    linear: one minus it, in [0, 1], as the two families of segmenters have it."""
    overlap = 2 * (probabilities @ targets.T)
    if _is_squared(form):
        own = probabilities.square().sum(-1, keepdim=True) + eps
        return -overlap / (own + (targets.square().sum(-1) + eps))
    return 1 - (overlap + eps) / (probabilities.sum(-1, keepdim=True) + targets.sum(-1) + eps)


def _is_squared(form: str) -> bool:
    if form not in ("squared", "linear"):
        raise UserError(f"The form of dice must be `squared` or `linear`, got `{form}`.")
    return form == "squared"


@_full_precision
def mask_cost(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Minus the share of agreement, -(p t + (1 - p)(1 - t)): (..., N, P) and (G, P) -> (..., N, G) in [-1, 0]."""
    agreement = probabilities @ targets.T + (1 - probabilities) @ (1 - targets).T
    return -agreement / probabilities.shape[-1]


@_full_precision
def box_l1_cost(boxes: Tensor, targets: Tensor) -> Tensor:
    """Sum of absolute differences of the four numbers: (..., N, 4) and (G, 4) -> (..., N, G)."""
    return torch.cdist(boxes, targets.expand(*boxes.shape[:-2], *targets.shape), p=1)


@_full_precision
def box_giou_cost(boxes: Tensor, targets: Tensor) -> Tensor:
    """Minus the generalized IoU of x1, y1, x2, y2 boxes: (..., N, 4) and (G, 4) -> (..., N, G) in [-1, 1]."""
    return -generalized_box_iou(boxes.reshape(-1, 4), targets).reshape(*boxes.shape[:-1], len(targets))


@_full_precision
def giou_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    """One minus the generalized IoU of matched x1, y1, x2, y2 boxes: (M, 4) and (M, 4) -> (M,)."""
    return generalized_box_iou_loss(boxes, targets, reduction="none")


@_full_precision
def projection_loss(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Dice of the maxima over columns plus that over rows: (M, H, W) and (M, H, W) -> (M,) in [0, 2]."""
    return _projected_dice(dice_loss, probabilities, targets, torch.amax)


@_full_precision
def average_loss(probabilities: Tensor, targets: Tensor) -> Tensor:
    """As `projection_loss`, with means instead of maxima."""
    return _projected_dice(dice_loss, probabilities, targets, torch.mean)


@_full_precision
def projection_cost(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Dice costs of the projections of every pair: (..., N, H, W) and (G, H, W) -> (..., N, G) in [-2, 0]."""
    return _projected_dice(dice_cost, probabilities, targets, torch.amax, eps=1e-3)


@_full_precision
def average_cost(probabilities: Tensor, targets: Tensor) -> Tensor:
    """As `projection_cost`, with means instead of maxima."""
    return _projected_dice(dice_cost, probabilities, targets, torch.mean, eps=1e-3)


def _projected_dice(dice, probabilities, targets, project, eps: float = WEAK_DICE_EPS) -> Tensor:
    return sum(dice(project(probabilities, dim=axis), project(targets, dim=axis), eps) for axis in (-1, -2))


@_full_precision
def pairwise_loss(logits: Tensor, kernel_size: int = 3, dilation: int = 2) -> Tensor:
    """-log of the probability that a pixel and its neighbor are of one kind: (M, H, W) -> (M, k * k - 1, H, W).

    The neighbors are those of a k x k window with spacing `dilation`, row by row without the center. A neighbor
    outside the image agrees with anything, so it costs nothing.
    """
    inside, outside = F.logsigmoid(logits), F.logsigmoid(-logits)
    same = torch.logaddexp(
        inside[:, None] + _neighbors(inside, kernel_size, dilation),
        outside[:, None] + _neighbors(outside, kernel_size, dilation),
    )
    beyond = _neighbors(torch.ones_like(logits), kernel_size, dilation) == 0
    return -same.masked_fill(beyond, 0.0)


def _neighbors(maps: Tensor, kernel_size: int, dilation: int) -> Tensor:
    """(M, H, W) -> (M, k * k - 1, H, W), zeros beyond the border."""
    reach = dilation * (kernel_size - 1) // 2
    windows = F.unfold(maps[:, None], kernel_size, dilation=dilation, padding=reach)
    windows = windows.view(len(maps), kernel_size**2, *maps.shape[-2:])
    center = kernel_size**2 // 2
    return torch.cat([windows[:, :center], windows[:, center + 1 :]], dim=1)


__all__ = [
    "average_cost",
    "average_loss",
    "box_giou_cost",
    "box_l1_cost",
    "dice_cost",
    "dice_loss",
    "focal_cost",
    "giou_loss",
    "mask_cost",
    "pairwise_loss",
    "projection_cost",
    "projection_loss",
    "sigmoid_focal_loss",
]
