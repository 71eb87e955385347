"""What the losses of all segmenters share: divisors, kernel supervision, and the terms and matching costs.

Terms and costs are unreduced and unweighted, in float32 whatever comes in; callers apply weights and divisors.
Sources: kernel supervision Saliency Prompt (arXiv 2302.01171), eq. 3; focal loss arXiv 1708.02002; dice arXiv
1606.04797 (squared form) and the first-power form of MaskFormer (arXiv 2107.06278); GIoU arXiv 1902.09630; costs of
K-Net (arXiv 2106.14855) and DETR (arXiv 2005.12872).

Letters: N queries, G targets, K classes, P pixels or points, M matched pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import UserError
from .matching import Pairs, pair_up
from .pseudo_targets import PseudoTargets, leave_out
from .torchvision_ops import generalized_box_iou, generalized_box_iou_loss, sigmoid_focal_loss as focal


@dataclass
class Normalizers:
    """Divisors of the loss terms; None means those of the batch at hand.

    The training loop passes the values of the whole effective batch (all accumulated batches, averaged over
    processes), so that accumulated gradients equal those of one large batch.
    masks: number of true masks; class_weight: sum of the cross-entropy weights over all queries; pairs: number of
    supervised pairs (query, prompt) over all layers; cells: number of cells that hold an object (K-Net's class maps);
    images: number of images (Mask R-CNN, whose terms are means over what it samples in a batch); pixels: number of
    labeled pixels (semantic segmentation).
    """

    masks: Tensor | float | None = None
    class_weight: Tensor | float | None = None
    pairs: Tensor | float | None = None
    cells: Tensor | float | None = None
    images: Tensor | float | None = None
    pixels: Tensor | float | None = None


@dataclass
class LayerOutput:
    """Predictions after one decoder layer.

    class_logits (B, N, K + 1), or (B, N, K) for sigmoids; mask_logits (B, N, h, w), queries (B, N, D); attentions
    (B, heads, N, N): self-attention weights of the layer, where asked for.
    """

    class_logits: Tensor
    mask_logits: Tensor
    queries: Tensor
    attentions: Tensor | None = None


def check_labels(class_labels: list[Tensor], mask_labels: list[Tensor], num_labels: int) -> None:
    for i, (labels, masks) in enumerate(zip(class_labels, mask_labels, strict=True)):
        if len(labels) != len(masks):
            raise UserError(f"Image {i} of the batch has {len(masks)} masks but {len(labels)} class labels.")
        # Labels that are already on an accelerator are not read back: that would cost a transfer an image.
        if labels.device.type == "cpu" and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_labels:
            raise UserError(
                f"Image {i} of the batch has class labels {sorted(set(labels.tolist()))}, but the model has "
                f"{num_labels} classes (0..{num_labels - 1}). Build it with the `id2label` of the data."
            )


def kernel_supervision(
    layers: list[LayerOutput],
    matches: list[list[tuple[Tensor, Tensor]]],
    vectors: Tensor,
    prompt_of_mask: Tensor,
    num_pairs: Tensor | float | None = None,
) -> Tensor:
    """Mean over layers and matched pairs (query n, pseudo mask j) of 1 - cos(query_n, stopgrad(prompt_j)).

    vectors (B, P, D): the prompts; prompt_of_mask (B, G): the prompt of each pseudo mask, -1 for none. Pairs whose
    mask has no prompt take no part. `num_pairs` replaces the number of pairs of this batch (mean over processes).
    Without pairs the result is a zero that still touches the queries. Source: SP eq. 3. Unlike the authors' released
    code, which pairs queries and masks by their order and trains the targets too, pairs follow the assignment and
    targets are detached. Nothing is read back from the device.
    """

    def distances(queries: Tensor, image: Tensor, prompt: Tensor) -> Tensor:
        goal = F.normalize(vectors.detach().float()[image, prompt], dim=-1)
        return 1 - (F.normalize(queries, dim=-1) * goal).sum(-1)

    return mean_over_pairs(layers, matches, vectors, prompt_of_mask, num_pairs, distances)


def mean_over_pairs(
    layers: list[LayerOutput],
    matches: list[list[tuple[Tensor, Tensor]]],
    vectors: Tensor,
    vector_of_mask: Tensor,
    num_pairs: Tensor | float | None,
    term: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Mean of `term` over layers and matched pairs, as `kernel_supervision` says.

    term: (queries (L, M, D) in float32, images (L, M), places of their masks' vectors (L, M)) -> (L, M).
    """
    if not layers:
        return vectors.float().sum() * 0
    queries = torch.stack([layer.queries for layer in layers]).float()  # (L, B, N, D)
    total = queries.sum() * 0
    pairs = pair_up(matches, None, queries.device)
    if pairs.query.numel() == 0 or vectors.shape[1] == 0:
        return total
    place = vector_of_mask[pairs.image, pairs.target]
    known = place >= 0
    with torch.autocast(queries.device.type, enabled=False):
        terms = term(queries[pairs.layer, pairs.image, pairs.query], pairs.image, place.clamp(min=0))
    total = total + torch.where(known, terms, 0.0).sum()
    return total / (num_pairs if num_pairs is not None else known.sum().clamp(min=1))


@dataclass(kw_only=True)
class FocalClassLoss:
    """Class costs and class terms of a set loss with sigmoids (K-Net, QueryInst), for the class head and, where there
    is one, a further text class head. Weights as in `QuerySegmenterConfig`."""

    class_weight: float = 2.0
    class_cost: float = 2.0
    text_class_weight: float = 2.0
    text_class_cost: float = 2.0
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0

    def cost_of_classes(self, logits: Tensor, texts: Tensor | None, labels: Tensor) -> Tensor:
        """(..., N, K) logits of both heads, (G,) labels -> (..., N, G)."""
        focal = (self.focal_alpha, self.focal_gamma)
        cost = self.class_cost * focal_cost(logits, labels, *focal)
        return cost if texts is None else cost + self.text_class_cost * focal_cost(texts, labels, *focal)

    def class_terms(
        self,
        logits: Tensor,
        texts: Tensor | None,
        labels: Tensor,
        pairs: Pairs,
        pseudo: PseudoTargets | None = None,
        left_out: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Focal losses summed over images, queries and classes, (S, B, N, K) -> (S,), of `class` and `text_class`.

        labels: of all true masks, as `pairs.target` counts them. left_out (S, B, N): queries that are no background.
        """
        wanted = torch.full(logits.shape[:3], logits.shape[-1], dtype=torch.int64, device=logits.device)
        wanted[pairs.layer, pairs.image, pairs.query] = labels[pairs.target]
        heads = {"class": (self.class_weight, logits), "text_class": (self.text_class_weight, texts)}
        terms = {}
        for name, (weight, values) in heads.items():
            if values is not None:
                loss = sigmoid_focal_loss(values, wanted, self.focal_alpha, self.focal_gamma)
                if pseudo is not None:
                    loss = self._with_pseudo(loss, values, pairs, pseudo, left_out)
                terms[name] = weight * loss.sum((1, 2, 3))
        return terms

    def _with_pseudo(self, loss: Tensor, logits: Tensor, pairs: Pairs, pseudo: PseudoTargets, left_out) -> Tensor:
        """Focal losses (S, B, N, K) against the probabilities of pseudo labels, without what is left out."""
        wanted = pseudo.classes_of(pairs)
        if wanted is not None:
            place = (pairs.layer, pairs.image, pairs.query)
            own = focal(logits[place].float(), wanted, alpha=self.focal_alpha, gamma=self.focal_gamma, reduction="none")
            loss = loss.index_put(place, own)
        return loss if left_out is None else leave_out(loss, pairs, left_out)


def stacked(logits: list[Tensor] | None) -> Tensor | None:
    """(S, ...) float32."""
    return None if logits is None else torch.stack(list(logits)).float()


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
