"""Set loss of RF-DETR's instance segmenter, as transformers' `RfDetrForSegmentationLoss`, but with its assignments.

Differences: all layers, images and groups are matched with one transfer to the host; the logarithms of sigmoids stay
finite in half precision; the matching looks at as many points as the mask terms are said to, one for every
`mask_point_sample_ratio` cells of a mask (transformers counts boxes there). With equal points the values are equal.

Letters as in losses.py; R groups of N queries each (group DETR, arXiv 2207.13085): one in evaluation.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.image_transforms import center_to_corners_format as corners, corners_to_center_format

from .losses import (
    FocalClassLoss,
    LayerOutput,
    Normalizers,
    box_giou_cost,
    box_l1_cost,
    check_labels,
    giou_loss,
    stacked,
)
from .losses_mask2former import pairwise_mask_costs
from .masks import tight_boxes
from .matching import LabelGuide, Pairs, hungarian, pair_up
from .point_sampling import Draw, PointSampler, point_terms, sample_points
from .torchvision_ops import box_iou


@dataclass(kw_only=True)
class RfDetrLayerOutput(LayerOutput):
    """class_logits (B, R * N, K) of sigmoids, mask_logits (B, R * N, H/4, W/4), queries (B, R * N, D); boxes
    (B, R * N, 4) x1, y1, x2, y2 in pixels of the canvas; relative (B, R * N, 4): center, width and height as shares of
    the image."""

    boxes: Tensor
    relative: Tensor


class NearestMasks:
    """Bool masks (G, H, W) that are sampled at the nearest pixel, as RF-DETR's targets are."""

    def __init__(self, masks: Tensor):
        self.masks = masks

    def sample(self, ids: Tensor, points: Tensor) -> Tensor:
        """Values of masks ids (M,) at points (M, P, 2), x and y in [0, 1] -> (M, P) float32."""
        height, width = self.masks.shape[1:]
        x = (points[..., 0].float() * width - 0.5).round().clamp(0, width - 1).long()
        y = (points[..., 1].float() * height - 0.5).round().clamp(0, height - 1).long()
        return self.masks.flatten(1)[ids[:, None], y * width + x].float()


@dataclass
class RfDetrLoss(FocalClassLoss):
    """Matching and class, box, GIoU, mask and dice terms for every decoder layer and for the encoder's proposals.

    `class_cost`, `box_cost` and `giou_cost` of the matching; the mask terms have one weight in matching and loss.
    alpha: power of the class probability in the quality that positive classes are drawn to.
    """

    box_weight: float = 5.0
    giou_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    box_cost: float = 5.0
    giou_cost: float = 2.0
    alpha: float = 0.25
    cells_per_point: int = 16

    def __call__(
        self,
        layers: list[RfDetrLayerOutput],
        proposals: RfDetrLayerOutput,
        extents: Tensor,
        groups: int,
        mask_labels: list[Tensor],
        class_labels: list[Tensor],
        normalizers: Normalizers | None = None,
        draw: Draw | None = None,
        text_logits: list[Tensor] | None = None,
        label_guide: LabelGuide | None = None,
    ) -> tuple[dict[str, Tensor], list[list[tuple[Tensor, Tensor]]]]:
        """Weighted terms by name (`class_0`, `box_0`, `giou_0`, `mask_0`, `dice_0`, ..., `class_enc`, ...), and the
        assignments of the decoder layers over all groups.

        extents (B, 2): width and height in pixels that relative boxes are shares of. mask_labels: per image (G, H, W)
        bool on the canvas. The divisor is the number of masks times `groups`.
        """
        device = layers[0].mask_logits.device
        check_labels(class_labels, mask_labels, layers[0].class_logits.shape[-1])
        class_labels = [labels.to(device).long() for labels in class_labels]
        mask_labels = [masks.to(device).bool() for masks in mask_labels]
        every = [*layers, proposals]
        with torch.autocast(device.type, enabled=False):  # it would multiply in half precision
            boxes = [_relative(tight_boxes(masks), extent) for masks, extent in zip(mask_labels, extents, strict=True)]
            costs = self._costs(every, boxes, mask_labels, class_labels, draw, text_logits)
            if label_guide is not None:
                costs = [label_guide(cost, i) for i, cost in enumerate(costs)]
            matches = _match_groups(costs, groups)
            pairs = pair_up(matches, [len(labels) for labels in class_labels], device)
            known = None if normalizers is None else normalizers.masks
            divisor = max(sum(map(len, class_labels)) * groups, 1) if known is None else known
            labels, masks = torch.cat(class_labels), NearestMasks(torch.cat(mask_labels))
            terms = {}
            for index, layer in enumerate(every):
                own_pairs = Pairs(*(value[index] for value in vars(pairs).values()))
                own = self._terms(index, layer, own_pairs, torch.cat(boxes), labels, masks, draw)
                suffix = "enc" if layer is proposals else str(index)
                terms.update({f"{name}_{suffix}": value / divisor for name, value in own.items()})
            if text_logits is not None:
                inner = Pairs(*(value[:-1] for value in vars(pairs).values()))
                found = self.class_terms(stacked(text_logits), None, labels, inner)["class"] / divisor
                factor = self.text_class_weight / self.class_weight
                terms.update({f"text_class_{index}": factor * value for index, value in enumerate(found)})
        return terms, matches[:-1]

    @torch.no_grad()
    def _costs(self, layers, boxes, mask_labels, class_labels, draw, text_logits) -> list[Tensor]:
        """Per image the (L, R * N, G) matching costs. The proposals, last, have no text head."""
        height, width = layers[0].mask_logits.shape[-2:]
        shape, costs = (1, height * width // self.cells_per_point, 2), []
        for i, (targets, labels) in enumerate(zip(boxes, class_labels, strict=True)):
            points, rows = None, []
            for index, layer in enumerate(layers):
                texts = None if text_logits is None or index == len(text_logits) else text_logits[index][i]
                relative = layer.relative[i].float()
                cost = self.cost_of_classes(layer.class_logits[i], texts, labels)
                cost = cost + self.box_cost * box_l1_cost(relative, targets)
                cost = cost + self.giou_cost * box_giou_cost(corners(relative), corners(targets))
                if len(labels):
                    if points is None or getattr(draw, "per_layer", False):
                        given = draw(index, "match", i, shape) if draw else None
                        points = torch.rand(shape, device=labels.device) if given is None else given
                        ids = torch.arange(len(labels), device=labels.device)
                        wanted = NearestMasks(mask_labels[i]).sample(ids, points.expand(len(labels), -1, -1))
                    entropy, dice = pairwise_mask_costs(sample_points(layer.mask_logits[i][None], points)[0], wanted)
                    cost = cost + self.mask_weight * entropy + self.dice_weight * dice
                rows.append(cost)
            costs.append(torch.stack(rows))
        return costs

    def _terms(self, index, layer, pairs: Pairs, boxes, labels, masks: NearestMasks, draw) -> dict[str, Tensor]:
        """Terms of one layer, weighted, summed over its pairs (M,)."""
        logits, relative = layer.class_logits.float(), layer.relative.float()
        place = (pairs.image, pairs.query)
        found, target = relative[place], boxes[pairs.target]
        overlap = box_iou(corners(found.detach()), corners(target)).diagonal() if len(target) else found.new_zeros(0)
        terms = {"class": self.class_weight * self._class_term(logits, (*place, labels[pairs.target]), overlap)}
        if len(target) == 0:
            masks_too = layer.mask_logits.float()
            nothing = {"box": relative, "giou": relative, "mask": masks_too, "dice": masks_too}
            return terms | {name: value.sum() * 0 for name, value in nothing.items()}
        terms["box"] = self.box_weight * (found - target).abs().sum()
        terms["giou"] = self.giou_weight * giou_loss(corners(found), corners(target)).sum()
        height, width = layer.mask_logits.shape[-2:]
        sampler = PointSampler(max(height, height * width // self.cells_per_point), 3.0, 0.75, index, None, draw)
        entropy, dice = point_terms(layer.mask_logits, *place, masks, pairs.target, sampler)
        return terms | {"mask": self.mask_weight * entropy, "dice": self.dice_weight * dice}

    def _class_term(self, logits: Tensor, place: tuple[Tensor, Tensor, Tensor], overlap: Tensor) -> Tensor:
        """Positive classes are drawn to a quality between their probability and the IoU of their box (IA-BCE of
        LW-DETR, arXiv 2406.03459, eq. 1); all others to 0, weighted by their squared probability."""
        probability = logits.sigmoid()
        quality = (probability[place].detach().pow(self.alpha) * overlap.pow(1 - self.alpha)).clamp(min=0.01)
        positive = torch.zeros_like(logits).index_put(place, quality)
        negative = probability.square().index_put(place, 1 - quality)
        return -(positive * F.logsigmoid(logits) + negative * F.logsigmoid(-logits)).sum()


def _relative(boxes: Tensor, extent: Tensor) -> Tensor:
    """x1, y1, x2, y2 in pixels -> center, width and height as shares of (width, height)."""
    return corners_to_center_format(boxes.float() / extent.repeat(2))


def _match_groups(costs: list[Tensor], groups: int) -> list[list[tuple[Tensor, Tensor]]]:
    """Assignments of every layer and image, in which each group of queries takes all masks. costs: (L, R * N, G)."""
    layers, count = costs[0].shape[0], costs[0].shape[1] // groups
    solved = hungarian([cost.unflatten(1, (groups, count)).flatten(0, 1) for cost in costs])  # of L * R
    matches = []
    for layer in range(layers):
        own = solved[layer * groups : (layer + 1) * groups]
        matches.append(
            [
                (
                    torch.cat([group[i][0] + number * count for number, group in enumerate(own)]),
                    torch.cat([group[i][1] for group in own]),
                )
                for i in range(len(costs))
            ]
        )
    return matches
