"""Set loss of K-Net (arXiv 2106.14855): all stages and images matched at once, everything in float32.

Every stage is supervised by the assignment of the predictions that it starts from: the first by that of the initial
masks, the others by that of the stage before.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .losses import (
    FocalClassLoss,
    LayerOutput,
    Normalizers,
    check_labels,
    dice_cost,
    dice_loss,
    mask_cost,
    stacked,
)
from .matching import LabelGuide, Pairs, hungarian, pair_up
from .padding import is_padded, valid_cells
from .pseudo_targets import PseudoTargets
from .torchvision_ops import sigmoid_focal_loss as dense_focal_loss


@dataclass
class KNetStageOutput(LayerOutput):
    """Predictions of one stage.

    class_logits (B, N, K) of sigmoids; mask_logits (B, N, H/4, W/4); queries (B, N, D): kernels after the stage.
    Beside them: small_masks (B, N, H/8, W/8), mask logits before doubling.
    """

    small_masks: Tensor | None = None


@torch.no_grad()
def soft_targets(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Bool masks (G, H, W) -> (G, *size) float32 in [0, 1], as bilinear interpolation (`align_corners=False`) has it.

    At a quarter of the size that is the mean of the four pixels in the middle of each 4 x 4 block, which needs no
    float copy of the masks.
    """
    height, width = size
    if masks.shape[-2:] != (4 * height, 4 * width):
        if len(masks) == 0:
            return torch.zeros((0, *size), device=masks.device)
        parts = [
            F.interpolate(part[None].float(), size=size, mode="bilinear", align_corners=False)[0]
            for part in masks.split(16)
        ]
        return torch.cat(parts)
    middle = [masks[:, row::4, column::4] for row in (1, 2) for column in (1, 2)]
    return sum(part.to(torch.uint8) for part in middle).float() / 4


def semantic_targets(masks: Tensor, labels: Tensor, num_labels: int, rule: str) -> Tensor:
    """Soft masks (G, h, w) and labels (G,) -> (K, h, w) float32, ones where the class is to be found.

    majority: a mask of the class fills at least half of the cell. touched: any non-zero value counts, and of several
    masks in a cell the last one takes it; the original implementation gives them in the order of their kernels.
    """
    size = masks.shape[-2:]
    if rule == "majority":
        of_class = F.one_hot(labels, num_labels).T.float()  # (K, G)
        return ((of_class @ (masks >= 0.5).flatten(1).float()) > 0).float().unflatten(1, size)
    number = torch.arange(1, len(masks) + 1, device=masks.device)[:, None, None]
    last = torch.cat([number.new_zeros((1, *size)), (masks > 0) * number]).amax(0)  # 0: no mask
    label = torch.cat([labels.new_full((1,), num_labels), labels])[last]
    return F.one_hot(label, num_labels + 1)[..., :num_labels].permute(2, 0, 1).to(masks.dtype)


def count_cells(masks: Tensor, rule: str) -> int:
    """Cells of stride 4 with an object, of one image's masks (G, H, W) bool. Rule as in `semantic_targets`."""
    soft = soft_targets(masks.bool(), (masks.shape[-2] // 4, masks.shape[-1] // 4))
    return int(((soft >= 0.5) if rule == "majority" else (soft > 0)).any(0).sum())


@dataclass
class KNetLoss(FocalClassLoss):
    """Hungarian matching and class, mask, dice and class map terms. Weights as in `KNetConfig`."""

    semantic_targets: str = "majority"
    mask_weight: float = 1.0
    dice_weight: float = 4.0
    semantic_weight: float = 1.0
    mask_cost: float = 1.0
    dice_cost: float = 4.0
    dice_eps: float = 1e-3

    def __call__(
        self,
        initial_masks: Tensor,
        semantic_logits: Tensor,
        layers: list[KNetStageOutput],
        mask_labels: list[Tensor],
        class_labels: list[Tensor],
        pixel_mask: Tensor | None = None,
        normalizers: Normalizers | None = None,
        text_logits: list[Tensor] | None = None,
        label_guide: LabelGuide | None = None,
        pseudo: PseudoTargets | None = None,
    ) -> tuple[dict[str, Tensor], list[list[tuple[Tensor, Tensor]]]]:
        """Loss terms, weighted, by name and the assignment that supervises each stage.

        Names: `semantic`, `initial_mask`, `initial_dice`, then per stage `class_0`, `mask_0`, `dice_0` and, with
        text logits, `text_class_0`, ...

        initial_masks (B, N, h, w) and semantic_logits (B, K, h, w): of the kernel head, on the grid of the layers'
        mask_logits. mask_labels: per image (G_i, H, W) bool at the padded input size; class_labels: per image
        (G_i,) int in 0..K-1. pixel_mask (B, H, W), 1 on the image: cells outside take no part. text_logits: per
        stage (B, N, K) of a further class head. label_guide acts on the assignments of the stages only.
        pseudo: of pseudo labels; cells where they are unsure take no part in the class maps.

        Divisors: the number of matched pairs of a stage (`normalizers.masks`), for the class maps the number of cells
        with an object (`normalizers.cells`), each at least 1. Without objects the mask terms are zeros that still
        touch the masks.
        """
        with torch.autocast(initial_masks.device.type, enabled=False):  # it would multiply in half precision
            device, normalizers = initial_masks.device, normalizers or Normalizers()
            check_labels(class_labels, mask_labels, layers[0].class_logits.shape[-1])
            labels = [label.to(device).long() for label in class_labels]
            targets = [soft_targets(mask.to(device).bool(), initial_masks.shape[-2:]) for mask in mask_labels]
            valid = _valid(pixel_mask, initial_masks.shape[-2:], device)
            masks = [initial_masks, *(layer.mask_logits for layer in layers)]
            costs = self.costs(masks, layers, targets, labels, valid, text_logits)
            matches = self._match(costs, label_guide)
            sure = _without_unsure(valid, pseudo, targets)
            losses = {"semantic": self._semantic(semantic_logits, targets, labels, matches[0], sure, normalizers.cells)}
            pairs = pair_up(matches, [len(target) for target in targets], device)
            divisor = max(pairs.query.shape[1], 1) if normalizers.masks is None else normalizers.masks
            losses.update(self._mask_terms(masks, torch.cat(targets), pairs, valid, divisor, pseudo))
            # A stage has the assignment of the masks that it starts from: the first one that of the initial masks.
            stages = Pairs(pairs.layer[:-1], pairs.image[1:], pairs.query[1:], pairs.target[1:])
            logits = stacked([layer.class_logits for layer in layers])
            left_out = None if pseudo is None else pseudo.left_out_by_masks(masks[1:])
            terms = self.class_terms(logits, stacked(text_logits), torch.cat(labels), stages, pseudo, left_out)
            for stage in range(len(layers)):
                losses.update({f"{name}_{stage}": values[stage] / divisor for name, values in terms.items()})
        return losses, matches[1:]

    @torch.no_grad()
    def costs(self, masks, layers, targets, labels, valid=None, text_logits=None) -> list[Tensor]:
        """Per image the (S, N, G_i) matching costs: of the initial masks, then of every stage but the last.

        The initial masks have no classes.
        """
        logits, texts = stacked([layer.class_logits for layer in layers]), stacked(text_logits)
        costs = []
        for i, (target, label) in enumerate(zip(targets, labels, strict=True)):
            if len(label) == 0:
                costs.append(logits.new_zeros((len(layers), logits.shape[2], 0)))
                continue
            probability = torch.stack([mask[i] for mask in masks[:-1]]).float().sigmoid()  # (S, N, h, w)
            if valid is not None:
                probability = probability * valid[i]
            probability, flat = probability.flatten(2), target.flatten(1)
            agreement = mask_cost(probability, flat)
            if valid is not None:  # cells outside agreed, on zero: take them out of the sum and of the divisor
                cells, inside = flat.shape[1], valid[i].sum()
                agreement = (agreement * cells + (cells - inside)) / inside
            cost = self.mask_cost * agreement + self.dice_cost * dice_cost(probability, flat, self.dice_eps)
            cost[1:] += self.cost_of_classes(logits[:-1, i], None if texts is None else texts[:-1, i], label)
            costs.append(cost)
        return costs

    def _match(self, costs: list[Tensor], label_guide: LabelGuide | None) -> list[list[tuple[Tensor, Tensor]]]:
        """Assignments of the initial masks and of every stage, of which the first two are one without a guide."""
        if label_guide is None:
            matches = hungarian(costs)
            return [matches[0], *matches]
        guided = [label_guide(cost, i) for i, cost in enumerate(costs)]
        return hungarian([torch.cat([cost[:1], guide]) for cost, guide in zip(costs, guided, strict=True)])

    def _semantic(self, logits: Tensor, targets, labels, match, valid: Tensor | None, divisor) -> Tensor:
        """Focal loss of every cell and class, over the number of cells with an object."""
        if self.semantic_targets == "touched":  # the order of the kernels that the masks are matched to
            order = [target.to(logits.device) for _, target in match]
            targets = [target[ids] for target, ids in zip(targets, order, strict=True)]
            labels = [label[ids] for label, ids in zip(labels, order, strict=True)]
        rule, classes = self.semantic_targets, logits.shape[1]
        wanted = [semantic_targets(*pair, classes, rule) for pair in zip(targets, labels, strict=True)]
        wanted = torch.stack(wanted)
        loss = dense_focal_loss(logits.float(), wanted, alpha=self.focal_alpha, gamma=self.focal_gamma)
        if valid is not None:
            loss = loss * valid[:, None]
        if divisor is None:
            divisor = wanted.amax(1).sum().clamp(min=1)
        return self.semantic_weight * loss.sum() / divisor

    def _mask_terms(self, masks, targets, pairs: Pairs, valid, divisor, pseudo=None) -> dict[str, Tensor]:
        """Cross-entropy and dice of the matched masks of the kernel head and of all stages in one go."""
        names = ["initial_mask", "initial_dice"], *([f"mask_{s}", f"dice_{s}"] for s in range(len(masks) - 1))
        if pairs.query.numel() == 0:
            return {name: mask.float().sum() * 0 for pair, mask in zip(names, masks, strict=True) for name in pair}
        logits = torch.stack([mask[pair] for mask, pair in zip(masks, zip(pairs.image, pairs.query), strict=True)])
        logits, target = logits.float().flatten(2), targets.flatten(1)[pairs.target]  # (1 + S, M, cells)
        cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        probability = logits.sigmoid()
        if valid is None:
            cross_entropy = cross_entropy.mean(-1)
        else:
            inside = valid.flatten(1)[pairs.image[0]]
            cross_entropy = (cross_entropy * inside).sum(-1) / inside.sum(-1)
            probability = probability * inside
        dice = dice_loss(probability, target, self.dice_eps)
        weights = None if pseudo is None else pseudo.weights_of(pairs)
        if weights is not None:
            cross_entropy, dice = cross_entropy * weights, dice * weights
        cross_entropy = self.mask_weight * cross_entropy.sum(1) / divisor
        dice = self.dice_weight * dice.sum(1) / divisor
        return {
            name: value
            for pair, values in zip(names, zip(cross_entropy, dice, strict=True), strict=True)
            for name, value in zip(pair, values, strict=True)
        }


def _without_unsure(valid: Tensor | None, pseudo: PseudoTargets | None, targets: list[Tensor]) -> Tensor | None:
    """`valid` without the cells of which pseudo labels say nothing: those that are unsure, or all without a mask."""
    if pseudo is None or (pseudo.unsure is None and pseudo.background):
        return valid
    if pseudo.unsure is not None and pseudo.background:
        sure = pseudo.unsure_cells(targets[0].shape[-2:]) == 0
    else:
        sure = torch.stack([(masks >= 0.5).any(0) for masks in targets])
    return sure if valid is None else valid & sure


def _valid(pixel_mask: Tensor | None, size: tuple[int, int], device: torch.device) -> Tensor | None:
    """(B, h, w) bool, cells of the images; None without padding."""
    return valid_cells(pixel_mask, size).to(device) if is_padded(pixel_mask) else None
