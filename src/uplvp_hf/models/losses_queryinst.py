"""Set loss of QueryInst (arXiv 2105.01928): all stages and images matched at once, everything in float32.

Formulas as in mmdetection 2.28: focal class loss, L1 of boxes over image sizes, GIoU, and squared dice of the masks
in the matched predicted boxes. Matching is on the predictions of the very stage that is supervised.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .losses import (
    FocalClassLoss,
    LayerOutput,
    Normalizers,
    box_giou_cost,
    box_l1_cost,
    check_labels,
    dice_loss,
    giou_loss,
    stacked,
)
from .masks import tight_boxes
from .matching import LabelGuide, Pairs, hungarian, pair_up
from .pseudo_targets import PseudoTargets
from .roi import crop_masks


@dataclass(kw_only=True)
class QueryInstStageOutput(LayerOutput):
    """Predictions of one stage.

    class_logits (B, N, K) of sigmoids; mask_logits (B, N, H/4, W/4): the mask of the best class on the whole image,
    of the last stage in evaluation mode only, otherwise None; queries (B, N, D) after the stage. Beside them: boxes
    (B, N, 4) x1, y1, x2, y2 in pixels of the padded input, float32; deltas (B, N, 4): the changes that led to them;
    attended (B, N, D): queries after self-attention, input of the mask head; roi_mask_logits (B, N, K, S, S): masks of
    every class within the boxes, where mask_logits are.
    """

    boxes: Tensor
    deltas: Tensor
    attended: Tensor
    roi_mask_logits: Tensor | None = None


# (stage among those supervised, image (M,), query (M,)) -> mask logits (M, K, S, S) in the boxes of these queries.
MaskPredictor = Callable[[int, Tensor, Tensor], Tensor]


@dataclass
class QueryInstLoss(FocalClassLoss):
    """Hungarian matching and class, box, GIoU and mask terms for every stage. Weights as in `QueryInstConfig`."""

    box_weight: float = 5.0
    giou_weight: float = 2.0
    mask_weight: float = 8.0
    box_cost: float = 5.0
    giou_cost: float = 2.0
    dice_eps: float = 1e-5

    def __call__(
        self,
        layers: list[QueryInstStageOutput],
        sizes: Tensor,
        limits: Tensor,
        mask_labels: list[Tensor],
        class_labels: list[Tensor],
        predict_masks: MaskPredictor,
        normalizers: Normalizers | None = None,
        text_logits: list[Tensor] | None = None,
        label_guide: LabelGuide | None = None,
        pseudo: PseudoTargets | None = None,
    ) -> tuple[dict[str, Tensor], list[list[tuple[Tensor, Tensor]]]]:
        """Loss terms, weighted, by name (`class_0`, `box_0`, `giou_0`, `mask_0`, ...) and the assignments.

        sizes (B, 2): height and width of the images, which boxes are divided by; limits (B, 2): where boxes are cut
        off for the mask targets. mask_labels: per image (G_i, H, W) bool at the padded input size, class_labels: per
        image (G_i,) int in 0..K-1. text_logits: per stage (B, N, K) of a further class head, which adds a cost and
        terms `text_class_0`, ... The divisor of all terms is the number of matched pairs of a stage, at least 1.
        Without objects box and mask terms are zeros that still touch boxes and mask heads.
        """
        device = layers[0].boxes.device
        check_labels(class_labels, mask_labels, layers[0].class_logits.shape[-1])
        class_labels = [labels.to(device).long() for labels in class_labels]
        mask_labels = [masks.to(device).bool() for masks in mask_labels]
        target_boxes = [tight_boxes(masks).float() for masks in mask_labels]
        logits, texts = stacked([layer.class_logits for layer in layers]), stacked(text_logits)  # (S, B, N, K)
        boxes = torch.stack([layer.boxes for layer in layers])
        factors = sizes.flip(1).repeat(1, 2)  # (B, 4) width, height, width, height
        costs = self.costs(logits, boxes, target_boxes, class_labels, factors, texts)
        if label_guide is not None:
            costs = [label_guide(cost, i) for i, cost in enumerate(costs)]
        matches = hungarian(costs)
        pairs, labels = pair_up(matches, [len(own) for own in class_labels], device), torch.cat(class_labels)
        # Outside of the terms: the mask heads may run under autocast.
        masks = [predict_masks(stage, pairs.image[stage], pairs.query[stage]) for stage in range(len(layers))]
        with torch.autocast(device.type, enabled=False):  # it would multiply in half precision
            left_out = None if pseudo is None else pseudo.left_out_by_boxes(boxes)
            terms = self.class_terms(logits, texts, labels, pairs, pseudo, left_out)
            weights = None if pseudo is None else pseudo.weights_of(pairs)
            terms.update(self._box_terms(boxes, torch.cat(target_boxes), factors, pairs, weights))
            targets = mask_targets(mask_labels, boxes.detach(), limits, pairs, masks[0].shape[-1])
            terms["mask"] = self.mask_weight * self._mask_term(masks, targets, labels[pairs.target], weights)
        known = None if normalizers is None else normalizers.masks
        divisor = torch.as_tensor(pairs.query.shape[1] if known is None else known).clamp(min=1)
        return {
            f"{name}_{stage}": value[stage] / divisor for stage in range(len(layers)) for name, value in terms.items()
        }, matches

    @torch.no_grad()
    def costs(
        self,
        logits: Tensor,
        boxes: Tensor,
        target_boxes: list[Tensor],
        class_labels: list[Tensor],
        factors: Tensor,
        text_logits: Tensor | None = None,
    ) -> list[Tensor]:
        """Per image the (S, N, G_i) matching costs; logits (S, B, N, K), boxes (S, B, N, 4), factors (B, 4)."""
        costs = []
        for i, (targets, labels) in enumerate(zip(target_boxes, class_labels, strict=True)):
            texts = None if text_logits is None else text_logits[:, i]
            cost = self.cost_of_classes(logits[:, i], texts, labels)
            cost = cost + self.box_cost * box_l1_cost(boxes[:, i] / factors[i], targets / factors[i])
            costs.append(cost + self.giou_cost * box_giou_cost(boxes[:, i], targets))
        return costs

    def _box_terms(self, boxes, target_boxes: Tensor, factors, pairs: Pairs, weights=None) -> dict[str, Tensor]:
        """L1 over image sizes and GIoU of matched boxes, summed over pairs, perhaps with weights (S, M): (S,) each."""
        if pairs.query.shape[1] == 0:
            nothing = boxes.sum((1, 2, 3)) * 0
            return {"box": nothing, "giou": nothing}
        predicted, target = boxes[pairs.layer, pairs.image, pairs.query], target_boxes[pairs.target]  # (S, M, 4)
        factor = factors[pairs.image]
        difference = (predicted / factor - target / factor).abs()
        overlap = giou_loss(predicted.flatten(0, 1), target.flatten(0, 1)).view(predicted.shape[:2])
        if weights is not None:
            difference, overlap = difference * weights[..., None], overlap * weights
        difference, overlap = difference.sum((1, 2)), overlap.sum(1)
        return {"box": self.box_weight * difference, "giou": self.giou_weight * overlap}

    def _mask_term(self, masks: list[Tensor], targets: Tensor, labels: Tensor, weights=None) -> Tensor:
        """Dice loss of the channel of the true class, summed over pairs, perhaps with weights (S, M): per stage
        (M, K, S, S) -> (S,)."""
        terms = []
        for stage, (logits, target, label) in enumerate(zip(masks, targets, labels, strict=True)):
            own = logits[torch.arange(len(label), device=label.device), label].float().sigmoid()
            dice = dice_loss(own.flatten(1), target.flatten(1), self.dice_eps)
            terms.append((dice if weights is None else dice * weights[stage]).sum())
        return torch.stack(terms)


@torch.no_grad()
def mask_targets(mask_labels: list[Tensor], boxes: Tensor, limits: Tensor, pairs: Pairs, side: int) -> Tensor:
    """The matched masks within the matched predicted boxes, cut off at `limits` (B, 2): (S, M, side, side).

    Image by image, so that the masks of only one are held in float.
    """
    stages, targets, done, first = len(boxes), [], 0, 0
    for i, masks in enumerate(mask_labels):
        count = min(len(masks), boxes.shape[2])
        own = slice(done, done + count)
        ids = pairs.target[:, own] - first
        chosen = boxes[:, i].gather(1, pairs.query[:, own, None].expand(-1, -1, 4))  # (S, count, 4)
        chosen = chosen.clamp(min=0).minimum(limits[i].flip(0).repeat(2))
        targets.append(crop_masks(masks, ids.flatten(), chosen.flatten(0, 1), side).view(stages, count, side, side))
        done, first = done + count, first + len(masks)
    return torch.cat(targets, dim=1)
