"""Losses of mask-classification segmenters and of kernel supervision, batched over layers and pictures.

Everything is computed in float32 whatever the dtype of the predictions. Formulas: Mask2Former (arXiv 2112.01527),
section 3.3; kernel supervision: Saliency Prompt (arXiv 2302.01171), eq. 3.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .matching import hungarian

# (layer, kind, picture, shape) -> uniform numbers in [0, 1). kind: "match" | "oversample" | "uniform"; picture is -1
# for draws over all matched masks of a layer. Lets a test feed recorded draws.
Draw = Callable[[int, str, int, tuple[int, ...]], Tensor]


@dataclass
class Normalizers:
    """Divisors of the loss terms; None means those of the batch at hand.

    The training loop passes the values of the whole effective batch (all accumulated batches, averaged over
    processes), so that accumulated gradients equal those of one large batch.
    masks: number of true masks; class_weight: sum of the cross-entropy weights over all queries; pairs: number of
    supervised pairs (query, prompt) over all layers.
    """

    masks: Tensor | float | None = None
    class_weight: Tensor | float | None = None
    pairs: Tensor | float | None = None


@dataclass
class LayerOutput:
    """Predictions after one decoder layer.

    class_logits (B, N, K + 1), mask_logits (B, N, h, w), queries (B, N, D).
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
    ) -> tuple[dict[str, Tensor], list[list[tuple[Tensor, Tensor]]]]:
        """Loss terms, weighted, by name (`class_0`, `mask_0`, `dice_0`, ... last layer last) and the assignments.

        mask_labels: per picture (G_i, H, W) bool at the padded input size; class_labels: per picture (G_i,) int.
        pixel_mask (B, H, W), 1 on the picture: points are drawn there only.
        """
        with torch.autocast(layers[0].mask_logits.device.type, enabled=False):  # it would multiply in half precision
            return self._losses(layers, mask_labels, class_labels, pixel_mask, normalizers, draw)

    def _losses(self, layers, mask_labels, class_labels, pixel_mask, normalizers, draw):
        device = layers[0].mask_logits.device
        draw = draw or (lambda layer, kind, picture, shape: torch.rand(shape, device=device))
        _check_labels(class_labels, mask_labels, layers[0].class_logits.shape[-1] - 1)
        class_labels = [labels.to(device).long() for labels in class_labels]
        mask_labels = [masks.to(device).bool() for masks in mask_labels]
        extent = picture_extent(pixel_mask, len(mask_labels), device)
        normalizers = normalizers or Normalizers()
        num_masks = normalizers.masks or max(sum(len(labels) for labels in class_labels), 1)
        matches = hungarian(self._costs(layers, mask_labels, class_labels, extent, draw))
        masks, offsets = stack_masks(mask_labels)
        losses = {}
        for index, (layer, match) in enumerate(zip(layers, matches, strict=True)):
            terms = self._mask_terms(index, layer, masks, offsets, match, extent, num_masks, draw)
            losses[f"class_{index}"] = self.class_weight * self._class_term(
                layer, class_labels, match, normalizers.class_weight
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

    def _class_term(self, layer: LayerOutput, class_labels: list[Tensor], match, divisor) -> Tensor:
        logits = layer.class_logits.float()
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
    source: Tensor,
    num_pairs: Tensor | float | None = None,
) -> Tensor:
    """Mean over layers and matched pairs (query n, pseudo mask j) of 1 - cos(query_n, stopgrad(prompt_j)).

    vectors (B, P, D): the prompts; source (B, P): the pseudo mask of each, -1 for none. Pairs whose mask has no
    prompt take no part. `num_pairs` replaces the number of pairs of this batch (mean over processes). Without pairs
    the result is a zero that still touches the queries. Source: SP eq. 3. Unlike the authors' released code, which
    pairs queries and masks by their order and trains the targets too, pairs follow the assignment and targets are
    detached.
    """
    if not layers:
        return vectors.float().sum() * 0
    total, pairs = layers[0].queries.float().sum() * 0, 0
    vectors = F.normalize(vectors.detach().float(), dim=-1)
    position = _prompt_of_mask(source)
    for layer, match in zip(layers, matches, strict=True):
        for i, (query, target) in enumerate(match):
            known = target < len(position[i])
            query, place = query[known], position[i][target[known]]
            query, place = query[place >= 0], place[place >= 0]
            if len(query) == 0:
                continue
            device = layer.queries.device
            prediction = F.normalize(layer.queries[i, query.to(device)].float(), dim=-1)
            total = total + (1 - (prediction * vectors[i, place.to(device)]).sum(-1)).sum()
            pairs += len(query)
    return total / (num_pairs if num_pairs is not None else max(pairs, 1))


def _prompt_of_mask(source: Tensor) -> list[Tensor]:
    """For every picture, the prompt of each pseudo mask: (largest mask id + 1,) int64 on the host, -1 for none."""
    tables = []
    for row in source.cpu():
        table = torch.full((int(row.max()) + 1 if len(row) else 0,), -1, dtype=torch.int64)
        for prompt, mask in enumerate(row.tolist()):
            if mask >= 0:
                table[mask] = prompt
        tables.append(table)
    return tables


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
