"""Losses of mask-classification segmenters and of kernel supervision, batched over layers and pictures.

Everything is computed in float32 whatever the dtype of the predictions. Formulas: Mask2Former (arXiv 2112.01527),
section 3.3; kernel supervision: Saliency Prompt (arXiv 2302.01171), eq. 3.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .matching import LabelGuide, hungarian

# (layer, kind, picture, shape) -> uniform numbers in [0, 1). kind: "match" | "oversample" | "uniform"; picture is -1
# for draws over all matched masks of a layer. Lets a test feed recorded draws.
Draw = Callable[[int, str, int, tuple[int, ...]], Tensor]


@dataclass
class Normalizers:
    """Divisors of the loss terms; None means those of the batch at hand.

    The training loop passes the values of the whole effective batch (all accumulated batches, averaged over
    processes), so that accumulated gradients equal those of one large batch.
    masks: number of true masks; class_weight: sum of the cross-entropy weights over all queries; pairs: number of
    supervised pairs (query, prompt) over all layers; cells: number of cells that hold an object (K-Net's class maps).
    """

    masks: Tensor | float | None = None
    class_weight: Tensor | float | None = None
    pairs: Tensor | float | None = None
    cells: Tensor | float | None = None


@dataclass
class LayerOutput:
    """Predictions after one decoder layer.

    class_logits (B, N, K + 1), or (B, N, K) for sigmoids; mask_logits (B, N, h, w), queries (B, N, D).
    """

    class_logits: Tensor
    mask_logits: Tensor
    queries: Tensor


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of maps (M, C, h, w) at points (M, P, 2), x and y in [0, 1] -> (M, C, P) float32."""
    grid = 2 * points.float()[:, :, None] - 1
    return F.grid_sample(maps.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)[..., 0]


def sample_binary(masks: Tensor, ids: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of bool masks (G, H, W), chosen by ids (M,), at points (M, P, 2) -> (M, P) float32.

    Equals `sample_points(masks[ids].float())` without a dense copy of the masks: four gathers a point.
    """
    height, width = masks.shape[-2:]
    x, y = points[..., 0].float() * width - 0.5, points[..., 1].float() * height - 0.5
    left, top = x.floor(), y.floor()
    flat, base = masks.reshape(-1), (ids * (height * width))[:, None]
    total = torch.zeros_like(x)
    for dy in (0, 1):
        for dx in (0, 1):
            column, row = (left + dx).long(), (top + dy).long()
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            value = flat[base + row.clamp(0, height - 1) * width + column.clamp(0, width - 1)] & inside
            weight = (1 - (x - left - dx).abs()) * (1 - (y - top - dy).abs())
            total = total + weight * value
    return total


def pairwise_mask_costs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean binary cross-entropy and dice cost of every pair: (..., N, P) logits, (G, P) targets -> two (..., N, G)."""
    points = logits.shape[-1]
    positive, negative = F.softplus(-logits), F.softplus(logits)
    cross_entropy = (positive @ targets.T + negative @ (1 - targets).T) / points
    probability = logits.sigmoid()
    overlap = 2 * (probability @ targets.T)
    total = probability.sum(-1, keepdim=True) + targets.sum(-1)
    return cross_entropy, 1 - (overlap + 1) / (total + 1)


def dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """1 - (2 <p, t> + 1) / (sum p + sum t + 1) a row: (M, P), (M, P) -> (M,)."""
    probability = logits.sigmoid()
    return 1 - (2 * (probability * targets).sum(-1) + 1) / (probability.sum(-1) + targets.sum(-1) + 1)


@dataclass
class MaskClassificationLoss:
    """Set loss of Mask2Former: Hungarian matching and class, mask and dice terms for every layer.

    Matching costs and loss terms share `class_weight`, `mask_weight` and `dice_weight` (2, 5, 5 in the paper).
    `no_object_weight` (0.1) is the cross-entropy weight of the "no object" class, the last one.
    """

    class_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    no_object_weight: float = 0.1
    num_points: int = 12544
    oversample_ratio: float = 3.0
    importance_ratio: float = 0.75

    def __call__(
        self,
        layers: list[LayerOutput],
        mask_labels: list[Tensor],
        class_labels: list[Tensor],
        pixel_mask: Tensor | None = None,
        normalizers: Normalizers | None = None,
        draw: Draw | None = None,
        label_guide: LabelGuide | None = None,
    ) -> tuple[dict[str, Tensor], list[list[tuple[Tensor, Tensor]]]]:
        """Loss terms, weighted, by name (`class_0`, `mask_0`, `dice_0`, ... last layer last) and the assignments.

        mask_labels: per picture (G_i, H, W) bool at the padded input size; class_labels: per picture (G_i,) int.
        pixel_mask (B, H, W), 1 on the picture: points are drawn there only. label_guide changes the matching costs.
        """
        with torch.autocast(layers[0].mask_logits.device.type, enabled=False):  # it would multiply in half precision
            return self._losses(layers, mask_labels, class_labels, pixel_mask, normalizers, draw, label_guide)

    def _losses(self, layers, mask_labels, class_labels, pixel_mask, normalizers, draw, label_guide):
        device = layers[0].mask_logits.device
        draw = draw or (lambda layer, kind, picture, shape: torch.rand(shape, device=device))
        _check_labels(class_labels, mask_labels, layers[0].class_logits.shape[-1] - 1)
        class_labels = [labels.to(device).long() for labels in class_labels]
        mask_labels = [masks.to(device).bool() for masks in mask_labels]
        extent = picture_extent(pixel_mask, len(mask_labels), device)
        normalizers = normalizers or Normalizers()
        num_masks = normalizers.masks or max(sum(len(labels) for labels in class_labels), 1)
        costs = self._costs(layers, mask_labels, class_labels, extent, draw)
        if label_guide is not None:
            costs = [label_guide(cost, i) for i, cost in enumerate(costs)]
        matches = hungarian(costs)
        masks, offsets = stack_masks(mask_labels)
        losses = {}
        for index, (layer, match) in enumerate(zip(layers, matches, strict=True)):
            terms = self._mask_terms(index, layer, masks, offsets, match, extent, num_masks, draw)
            losses[f"class_{index}"] = self.class_weight * self._class_term(
                layer.class_logits, class_labels, match, normalizers.class_weight
            )
            losses[f"mask_{index}"], losses[f"dice_{index}"] = terms
        return losses, matches

    @torch.no_grad()
    def _costs(self, layers, mask_labels, class_labels, extent, draw) -> list[Tensor]:
        """Per picture the (L, N, G_i) matching costs. All layers share one set of points unless `draw` differs."""
        costs = []
        shared = [draw(0, "match", i, (1, self.num_points, 2)) for i in range(len(mask_labels))]
        for i, (masks, labels) in enumerate(zip(mask_labels, class_labels, strict=True)):
            probability = torch.stack([layer.class_logits[i] for layer in layers]).float().softmax(-1)
            if len(labels) == 0:
                costs.append(probability[..., :0])
                continue
            rows, ids = [], torch.arange(len(masks), device=masks.device)
            for index, layer in enumerate(layers):
                drawn = shared[i] if index == 0 else draw_again(draw, index, i, shared[i])
                if index == 0 or drawn is not shared[i]:
                    points = drawn * extent[i]
                    target = sample_binary(masks, ids, points.expand(len(masks), -1, -1))
                logits = sample_points(layer.mask_logits[i][None], points)[0]  # (N, P)
                cross_entropy, dice = pairwise_mask_costs(logits, target)
                rows.append(self.mask_weight * cross_entropy + self.dice_weight * dice)
            costs.append(torch.stack(rows) - self.class_weight * probability[..., labels])
        return costs

    def with_text_cost(self, text_logits: list[Tensor], class_labels: list[Tensor], then: LabelGuide | None):
        """A guide that adds the class cost of a further head, (B, N, K + 1) a layer, before another guide."""

        def guide(cost: Tensor, picture: int) -> Tensor:
            labels = class_labels[picture].to(cost.device).long()
            probability = torch.stack([logits[picture] for logits in text_logits]).detach().float().softmax(-1)
            cost = cost - self.class_weight * probability[..., labels]
            return cost if then is None else then(cost, picture)

        return guide

    def text_terms(self, text_logits: list[Tensor], class_labels: list[Tensor], matches, normalizers) -> dict:
        """Weighted cross-entropies of a further class head under the same assignments: `text_class_0`, ..."""
        divisor = None if normalizers is None else normalizers.class_weight
        labels = [labels.to(text_logits[0].device).long() for labels in class_labels]
        return {
            f"text_class_{index}": self.class_weight * self._class_term(logits, labels, match, divisor)
            for index, (logits, match) in enumerate(zip(text_logits, matches, strict=True))
        }

    def _class_term(self, logits: Tensor, class_labels: list[Tensor], match, divisor) -> Tensor:
        logits = logits.float()
        background = logits.shape[-1] - 1
        target = torch.full(logits.shape[:2], background, dtype=torch.int64, device=logits.device)
        for i, (query, label) in enumerate(match):
            target[i, query.to(logits.device)] = class_labels[i][label.to(logits.device)]
        weight = logits.new_ones(background + 1)
        weight[background] = self.no_object_weight
        total = F.cross_entropy(logits.transpose(1, 2), target, weight=weight, reduction="sum")
        return total / (divisor if divisor is not None else weight[target].sum().clamp(min=1e-6))

    def class_weight_sum(self, num_queries: int, counts: list[int]) -> float:
        """Sum of the cross-entropy weights of pictures with `counts` true masks each: known before matching."""
        matched = sum(min(count, num_queries) for count in counts)
        return matched + self.no_object_weight * (num_queries * len(counts) - matched)

    def _mask_terms(self, index, layer, masks, offsets, match, extent, num_masks, draw) -> tuple[Tensor, Tensor]:
        """Point-sampled cross-entropy and dice of the matched masks of one layer, summed and divided."""
        device = layer.mask_logits.device
        picture = torch.cat([torch.full_like(query, i) for i, (query, _) in enumerate(match)]).to(device)
        query = torch.cat([query for query, _ in match]).to(device)
        ids = torch.cat([target + offsets[i] for i, (_, target) in enumerate(match)]).to(device)
        if len(query) == 0:
            nothing = layer.mask_logits.float().sum() * 0
            return nothing, nothing
        logits = layer.mask_logits[picture, query][:, None]  # (M, 1, h, w)
        points = self._uncertain_points(logits, index, extent[picture], draw)
        target = sample_binary(masks, ids, points)
        value = sample_points(logits, points)[:, 0]
        cross_entropy = F.binary_cross_entropy_with_logits(value, target, reduction="none").mean(1).sum()
        dice = dice_loss(value, target).sum()
        return self.mask_weight * cross_entropy / num_masks, self.dice_weight * dice / num_masks

    @torch.no_grad()
    def _uncertain_points(self, logits: Tensor, layer: int, extent: Tensor, draw: Draw) -> Tensor:
        """Three quarters of the points where |logit| is smallest among 3x as many, the rest uniform: (M, P, 2)."""
        count = len(logits)
        wanted, certain = self.num_points, int(self.importance_ratio * self.num_points)
        candidates = draw(layer, "oversample", -1, (count, int(wanted * self.oversample_ratio), 2)) * extent[:, None]
        uncertainty = -sample_points(logits, candidates)[:, 0].abs()
        best = uncertainty.topk(certain, dim=1).indices
        chosen = candidates.gather(1, best[..., None].expand(-1, -1, 2))
        if wanted > certain:
            uniform = draw(layer, "uniform", -1, (count, wanted - certain, 2)) * extent[:, None]
            chosen = torch.cat([chosen, uniform], dim=1)
        return chosen


def draw_again(draw: Draw, layer: int, picture: int, shared: Tensor) -> Tensor:
    """The matching points of a later layer: the shared ones, unless `draw` was made to give each layer its own."""
    return draw(layer, "match", picture, tuple(shared.shape)) if getattr(draw, "per_layer", False) else shared


def picture_extent(pixel_mask: Tensor | None, batch: int, device: torch.device) -> Tensor:
    """Width and height of every picture as shares of the padded input: (B, 2), ones without a pixel mask."""
    if pixel_mask is None:
        return torch.ones((batch, 2), device=device)
    real = pixel_mask.to(device).bool()
    height, width = real[:, :, 0].float().mean(1), real[:, 0].float().mean(1)
    return torch.stack([width, height], dim=1)


def stack_masks(mask_labels: list[Tensor]) -> tuple[Tensor, list[int]]:
    """All masks of a batch as (G, H, W) bool, and where each picture's begin."""
    offsets, total = [], 0
    for masks in mask_labels:
        offsets.append(total)
        total += len(masks)
    return torch.cat(mask_labels), offsets


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
    if not layers:
        return vectors.float().sum() * 0
    queries = torch.stack([layer.queries for layer in layers]).float()  # (L, B, N, D)
    total = queries.sum() * 0
    pairs = [
        torch.stack([torch.full_like(query, index), torch.full_like(query, i), query, target])
        for index, match in enumerate(matches)
        for i, (query, target) in enumerate(match)
    ]
    layer, picture, query, target = torch.cat(pairs, dim=1).to(queries.device)
    if len(query) == 0 or vectors.shape[1] == 0:
        return total
    prompt = prompt_of_mask[picture, target]
    known = prompt >= 0
    goal = F.normalize(vectors.detach().float()[picture, prompt.clamp(min=0)], dim=-1)
    with torch.autocast(queries.device.type, enabled=False):
        distance = 1 - (F.normalize(queries[layer, picture, query], dim=-1) * goal).sum(-1)
    total = total + torch.where(known, distance, 0.0).sum()
    return total / (num_pairs if num_pairs is not None else known.sum().clamp(min=1))


def _check_labels(class_labels: list[Tensor], mask_labels: list[Tensor], num_labels: int) -> None:
    for i, (labels, masks) in enumerate(zip(class_labels, mask_labels, strict=True)):
        if len(labels) != len(masks):
            raise ValueError(f"Picture {i} of the batch has {len(masks)} masks but {len(labels)} class labels.")
        # Labels that are already on an accelerator are not read back: that would cost a transfer a picture.
        if labels.device.type == "cpu" and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_labels:
            raise ValueError(
                f"Picture {i} of the batch has class labels {sorted(set(labels.tolist()))}, but the model has "
                f"{num_labels} classes (0..{num_labels - 1}). Build it with the `id2label` of the data."
            )
