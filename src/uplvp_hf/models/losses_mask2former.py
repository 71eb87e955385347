"""Set loss of Mask2Former (arXiv 2112.01527, section 3.3): all layers and images matched at once, in float32."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .losses import LayerOutput, Normalizers, check_labels, dice_cost
from .matching import LabelGuide, Pairs, hungarian, pair_up
from .padding import image_extent
from .point_sampling import BinaryMasks, Draw, PointSampler, point_terms, sample_points
from .pseudo_targets import PseudoTargets, leave_out


def pairwise_mask_costs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean binary cross-entropy and dice cost of every pair: (..., N, P) logits, (G, P) targets -> two (..., N, G)."""
    # softplus(-x) t + softplus(x) (1 - t) = softplus(x) - x t
    cross_entropy = (F.softplus(logits).sum(-1, keepdim=True) - logits @ targets.T) / logits.shape[-1]
    return cross_entropy, dice_cost(logits.sigmoid(), targets, 1.0, "linear")


@dataclass
class MaskClassificationLoss:
    """Set loss of Mask2Former: Hungarian matching and class, mask and dice terms for every layer.

    Matching costs and loss terms share `class_weight`, `mask_weight` and `dice_weight` (2, 5, 5 in the paper).
    `no_object_weight` (0.1) is the cross-entropy weight of the "no object" class, the last one. `hard_points`: see
    `PointSampler.hard`.
    """

    class_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    no_object_weight: float = 0.1
    num_points: int = 12544
    oversample_ratio: float = 3.0
    importance_ratio: float = 0.75
    hard_points: bool = False

    def __call__(
        self,
        layers: list[LayerOutput],
        mask_labels: list[Tensor],
        class_labels: list[Tensor],
        pixel_mask: Tensor | None = None,
        normalizers: Normalizers | None = None,
        draw: Draw | None = None,
        label_guide: LabelGuide | None = None,
        pseudo: PseudoTargets | None = None,
    ) -> tuple[dict[str, Tensor], list[list[tuple[Tensor, Tensor]]]]:
        """Loss terms, weighted, by name (`class_0`, `mask_0`, `dice_0`, ... last layer last) and the assignments.

        mask_labels: per image (G_i, H, W) bool at the padded input size; class_labels: per image (G_i,) int.
        pixel_mask (B, H, W), 1 on the image: points are drawn there only. label_guide changes the matching costs.
        """
        with torch.autocast(layers[0].mask_logits.device.type, enabled=False):  # it would multiply in half precision
            return self._losses(layers, mask_labels, class_labels, pixel_mask, normalizers, draw, label_guide, pseudo)

    def _losses(self, layers, mask_labels, class_labels, pixel_mask, normalizers, draw, label_guide, pseudo):
        device = layers[0].mask_logits.device
        check_labels(class_labels, mask_labels, layers[0].class_logits.shape[-1] - 1)
        class_labels = [labels.to(device).long() for labels in class_labels]
        mask_labels = [masks.to(device).bool() for masks in mask_labels]
        extent = None if pixel_mask is None else image_extent(pixel_mask, len(mask_labels), device)
        masks = BinaryMasks(torch.cat(mask_labels))
        normalizers = normalizers or Normalizers()
        num_masks = normalizers.masks or max(sum(len(labels) for labels in class_labels), 1)
        costs = self._costs(layers, masks, class_labels, extent, draw)
        if label_guide is not None:
            costs = [label_guide(cost, i) for i, cost in enumerate(costs)]
        matches = hungarian(costs)
        logits = [layer.class_logits for layer in layers]
        pairs = pair_up(matches, [len(labels) for labels in class_labels], device)
        left_out = None if pseudo is None else pseudo.left_out_by_masks([layer.mask_logits for layer in layers])
        class_terms = self._class_terms(logits, class_labels, pairs, normalizers.class_weight, pseudo, left_out)
        weights = None if pseudo is None else pseudo.weights_of(pairs)
        losses = {}
        for index, (layer, class_term) in enumerate(zip(layers, class_terms, strict=True)):
            losses[f"class_{index}"] = self.class_weight * class_term
            own = None if weights is None else weights[index]
            mask_term, dice_term = self._mask_terms(index, layer.mask_logits, masks, pairs, extent, draw, own)
            losses[f"mask_{index}"] = self.mask_weight * mask_term / num_masks
            losses[f"dice_{index}"] = self.dice_weight * dice_term / num_masks
        return losses, matches

    @torch.no_grad()
    def _costs(self, layers, masks: BinaryMasks, class_labels, extent, draw) -> list[Tensor]:
        """Per image the (L, N, G_i) matching costs. All layers share one set of points unless `draw` differs."""
        costs, start = [], 0
        for i, labels in enumerate(class_labels):
            probability = torch.stack([layer.class_logits[i] for layer in layers]).float().softmax(-1)
            ids = torch.arange(start, start + len(labels), device=labels.device)
            start += len(labels)
            points, target, rows = None, None, []
            for index, layer in enumerate(layers):
                if points is None or getattr(draw, "per_layer", False):
                    shape = (1, self.num_points, 2)
                    points = draw(index, "match", i, shape) if draw else torch.rand(shape, device=labels.device)
                    points = points if extent is None else points * extent[i]
                    target = masks.sample(ids, points.expand(len(labels), -1, -1))
                if len(labels) == 0:
                    continue
                logits = sample_points(layer.mask_logits[i][None], points)[0]  # (N, P)
                cross_entropy, dice = pairwise_mask_costs(logits, target)
                rows.append(self.mask_weight * cross_entropy + self.dice_weight * dice)
            cost = -self.class_weight * probability[..., labels]
            costs.append(cost + torch.stack(rows) if rows else cost)
        return costs

    def with_text_cost(self, text_logits: list[Tensor], class_labels: list[Tensor], then: LabelGuide | None):
        """A guide that adds the class cost of a further head, (B, N, K + 1) a layer, before another guide."""

        def guide(cost: Tensor, image: int) -> Tensor:
            labels = class_labels[image].to(cost.device).long()
            probability = torch.stack([logits[image] for logits in text_logits]).detach().float().softmax(-1)
            cost = cost - self.class_weight * probability[..., labels]
            return cost if then is None else then(cost, image)

        return guide

    def text_terms(self, text_logits: list[Tensor], class_labels: list[Tensor], matches, normalizers) -> dict:
        """Weighted cross-entropies of a further class head under the same assignments: `text_class_0`, ..."""
        divisor = None if normalizers is None else normalizers.class_weight
        labels = [labels.to(text_logits[0].device).long() for labels in class_labels]
        pairs = pair_up(matches, [len(own) for own in labels], labels[0].device)
        terms = self._class_terms(text_logits, labels, pairs, divisor)
        return {f"text_class_{index}": self.class_weight * term for index, term in enumerate(terms)}

    def _class_terms(
        self, logits: list[Tensor], class_labels: list[Tensor], pairs: Pairs, divisor, pseudo=None, left_out=None
    ) -> list[Tensor]:
        """Cross-entropies of all layers' (B, N, K + 1) logits: weighted sums over their divisors. left_out (L, B, N):
        queries that are no background."""
        stacked = torch.stack(logits).float()  # (L, B, N, K + 1)
        background = stacked.shape[-1] - 1
        target = torch.full(stacked.shape[:3], background, dtype=torch.int64, device=stacked.device)
        target[pairs.layer, pairs.image, pairs.query] = torch.cat(class_labels)[pairs.target]
        weight = stacked.new_ones(background + 1)
        weight[background] = self.no_object_weight
        total = F.cross_entropy(stacked.flatten(0, 2), target.flatten(), weight=weight, reduction="none")
        if pseudo is not None:
            total = _with_pseudo(total.view(target.shape), stacked, pairs, pseudo, left_out)
        if divisor is None:
            divisor = weight[target].sum((1, 2)).clamp(min=1e-6)
        return list((total.view(len(logits), -1).sum(1) / divisor).unbind())

    def class_weight_sum(self, num_queries: int, counts: list[int]) -> float:
        """Sum of the cross-entropy weights of images with `counts` true masks each: known before matching."""
        matched = sum(min(count, num_queries) for count in counts)
        return matched + self.no_object_weight * (num_queries * len(counts) - matched)

    def _mask_terms(
        self, index, logits, masks: BinaryMasks, pairs: Pairs, extent, draw, weights=None
    ) -> tuple[Tensor, Tensor]:
        """Point-sampled cross-entropy and dice of the matched masks of one layer, summed, perhaps with weights (M,)."""
        image, query, ids = pairs.image[index], pairs.query[index], pairs.target[index]
        if len(query) == 0:
            nothing = logits.float().sum() * 0
            return nothing, nothing
        sampler = PointSampler(
            self.num_points, self.oversample_ratio, self.importance_ratio, index,
            None if extent is None else extent[image], draw, self.hard_points,
        )  # fmt: skip
        return point_terms(logits, image, query, masks, ids, sampler, weights)


def _with_pseudo(losses: Tensor, logits: Tensor, pairs: Pairs, pseudo: PseudoTargets, left_out: Tensor) -> Tensor:
    """Cross-entropies (L, B, N) against the probabilities of pseudo labels, without what is left out."""
    wanted = pseudo.classes_of(pairs)
    if wanted is not None:
        wanted = torch.cat([wanted, 1 - wanted.sum(-1, keepdim=True)], -1)
        place = (pairs.layer, pairs.image, pairs.query)
        losses = losses.index_put(place, -(wanted * logits[place].log_softmax(-1)).sum(-1))
    return leave_out(losses, pairs, left_out)
