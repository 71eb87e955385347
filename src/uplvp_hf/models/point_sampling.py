"""Mask losses at sampled points (PointRend, arXiv 1912.08193; Mask2Former, arXiv 2112.01527, section 3.3).

Values and gradients are computed a few masks at a time, so that nothing of the size masks x points is kept: for the
backward pass each loss term keeps its gradient on the matched masks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# (layer, kind, image, shape) -> uniform numbers in [0, 1). kind: "match" | "oversample" | "uniform"; image is -1
# for draws over all matched masks of a layer. Lets a test feed recorded draws. A draw whose attribute `per_layer` is
# true gives every layer matching points of its own.
Draw = Callable[[int, str, int, tuple[int, ...]], Tensor]


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of maps (M, C, h, w) at points (M, P, 2), x and y in [0, 1] -> (M, C, P) float32."""
    grid = 2 * points.float()[:, :, None] - 1
    return F.grid_sample(maps.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)[..., 0]


class BinaryMasks:
    """Bool masks (G, H, W) in a form that is sampled with one read a point.

    codes (G, H + 1, W + 1) uint8: the four pixels around every corner of the pixel grid, zeros outside, as bits 1
    (top left), 2 (top right), 4 (bottom left) and 8 (bottom right).
    """

    def __init__(self, masks: Tensor):
        padded = F.pad(masks.to(torch.uint8), (1, 1, 1, 1))
        self.codes = padded[:, :-1, :-1].contiguous()
        self.codes.add_(padded[:, :-1, 1:], alpha=2).add_(padded[:, 1:, :-1], alpha=4)
        self.codes.add_(padded[:, 1:, 1:], alpha=8)

    def sample(self, ids: Tensor, points: Tensor) -> Tensor:
        """Bilinear values of masks ids (M,) at points (M, P, 2), x and y in [0, 1] -> (M, P) float32.

        Equals `sample_points(masks[ids].float())`, zeros beyond the border.
        """
        _, rows, columns = self.codes.shape
        whole = torch.int32 if self.codes.numel() < 2**31 else torch.int64
        x = (points[..., 0].float() * (columns - 1)).add_(0.5)  # in cells of the corner grid
        y = (points[..., 1].float() * (rows - 1)).add_(0.5)
        left, top = x.floor().clamp_(0, columns - 1), y.floor().clamp_(0, rows - 1)
        x, y = x.sub_(left), y.sub_(top)
        place = top.to(whole).mul_(columns).add_(left.to(whole)).add_((ids.to(whole) * (rows * columns))[:, None])
        code = self.codes.view(-1).index_select(0, place.view(-1)).view(place.shape)
        bits = [code.bitwise_and(1 << bit).ne_(0).to(x.dtype) for bit in range(4)]
        return torch.lerp(torch.lerp(bits[0], bits[1], x), torch.lerp(bits[2], bits[3], x), y)


@dataclass
class PointSampler:
    """Draws the points of one layer's matched masks: three quarters (`importance_ratio`) where |logit| is smallest
    among `oversample_ratio` times as many, the rest uniform.

    extent (M, 2): width and height of each mask's image as shares of the canvas, or None for the whole canvas.
    hard: points on the wrong side of the mask come first, however sure the logit is. The uncertain ones lie along the
    border of the prediction; a query that covers a neighbor and is sure of it would hear of it from the uniform ones
    alone.
    """

    num_points: int
    oversample_ratio: float
    importance_ratio: float
    layer: int = 0
    extent: Tensor | None = None
    draw: Draw | None = None
    hard: bool = False

    def chunks(
        self, maps: Tensor, masks: BinaryMasks | None = None, ids: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """For maps (M, h, w), a few at a time: which, points (m, P, 2), logits there (m, P). masks, ids (M,): what the
        maps should be, for `hard`."""
        count = len(maps)
        candidates, certain = int(self.num_points * self.oversample_ratio), int(self.importance_ratio * self.num_points)
        numbers = {"oversample": candidates, "uniform": self.num_points - certain}
        drawn = {
            kind: self.draw(self.layer, kind, -1, (count, number, 2)) if self.draw and number else None
            for kind, number in numbers.items()
        }
        step = 8 if maps.device.type == "cpu" else max(count, 1)  # eight masks' points stay in a core's cache
        for start in range(0, count, step):
            chosen = slice(start, min(start + step, count))

            def points(kind: str, chosen: slice = chosen) -> Tensor:
                shape = (chosen.stop - chosen.start, numbers[kind], 2)
                found = torch.rand(shape, device=maps.device) if drawn[kind] is None else drawn[kind][chosen]
                return found if self.extent is None else found * self.extent[chosen, None]

            candidates_here = points("oversample")
            truth = masks.sample(ids[chosen], candidates_here) if self.hard and masks and ids is not None else None
            place, value = _most_uncertain(maps[chosen], candidates_here, certain, truth)
            if certain < self.num_points:
                uniform = points("uniform")
                place = torch.cat([place, uniform], 1)
                value = torch.cat([value, sample_points(maps[chosen, None], uniform)[:, 0]], 1)
            yield chosen, place, value


def _most_uncertain(
    maps: Tensor, candidates: Tensor, wanted: int, truth: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The `wanted` of candidates (m, C, 2) where |logit| is smallest: (m, wanted, 2), and the logits (m, wanted). With
    `truth` (m, C), 0 to 1, those whose logit is wrong come before all others, in random order."""
    value = sample_points(maps[:, None], candidates)[:, 0]
    distance = value.abs()
    if truth is not None:
        distance = torch.where((value > 0) == (truth > 0.5), distance, -torch.rand_like(distance))
    if value.device.type == "cpu" and 0 < wanted < value.shape[1]:
        # numpy selects ten times as fast as topk; the order of the points does not matter.
        limit = np.partition(distance.numpy(), wanted - 1, axis=1)[:, wanted - 1 : wanted]
        places = torch.from_numpy(np.flatnonzero(distance.numpy() <= limit))
        if len(places) == len(maps) * wanted:  # otherwise some are equal, or not numbers
            pairs = candidates.contiguous().view(-1, 2).index_select(0, places)
            return pairs.view(len(maps), wanted, 2), value.view(-1).index_select(0, places).view(len(maps), wanted)
    best = distance.topk(wanted, dim=1, largest=False, sorted=False).indices
    return candidates.gather(1, best[..., None].expand(-1, -1, 2)), value.gather(1, best)


def point_terms(
    logits: Tensor,
    image: Tensor,
    query: Tensor,
    masks: BinaryMasks,
    ids: Tensor,
    sampler: PointSampler,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sums over matched pairs of the mean cross-entropy and of the dice loss at sampled points, two scalars.

    logits (B, N, h, w); image, query, ids (M,): pair m is query[m] of image[m] with mask ids[m]. No pair twice.
    weights (M,): of the pairs in the sums.
    """
    return _PointTerms.apply(logits, image, query, masks, ids, sampler, weights)


class _PointTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, image, query, masks, ids, sampler, weights):
        maps = logits[image, query].float()
        slopes = maps.new_zeros((2, *maps.shape)) if ctx.needs_input_grad[0] else None
        entropies, dices = [], []
        for chosen, points, value in sampler.chunks(maps, masks, ids):
            target = masks.sample(ids[chosen], points)
            entropy, dice, slope = _terms(value, target, with_slopes=slopes is not None)
            entropies.append(entropy)
            dices.append(dice)
            if slopes is not None:
                spread = _to_maps(slope, points, maps.shape[-2:])  # (m, 2, h, w)
                slopes[:, chosen] = spread.transpose(0, 1)
        entropy, dice = torch.cat(entropies), torch.cat(dices)
        if weights is not None:
            entropy, dice = entropy * weights, dice * weights
            slopes = None if slopes is None else slopes.mul_(weights[:, None, None])
        ctx.save_for_backward(slopes, image, query)
        ctx.shape, ctx.dtype = logits.shape, logits.dtype
        ctx.by_rows = takes_rows(logits)
        return entropy.sum(), dice.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, to_entropy: Tensor, to_dice: Tensor):
        slopes, image, query = ctx.saved_tensors
        rows = torch.add(slopes[0] * to_entropy, slopes[1] * to_dice).to(ctx.dtype)
        if ctx.by_rows:
            gradient = torch.sparse_coo_tensor(torch.stack([image, query]), rows, ctx.shape, check_invariants=False)
        else:
            gradient = rows.new_zeros(ctx.shape).index_put_((image, query), rows)
        return gradient, None, None, None, None, None, None


def _terms(value: Tensor, target: Tensor, with_slopes: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mean cross-entropy (m,), dice loss (m,), and their derivatives (m, 2, P) at logits (m, P), targets (m, P)."""
    count = value.shape[1]
    probability = value.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(value, target, reduction="none").mean(1)
    overlap = 2 * (probability * target).sum(1) + 1
    total = probability.sum(1) + target.sum(1) + 1
    dice = 1 - overlap / total
    if not with_slopes:
        return entropy, dice, None
    slopes = torch.empty((len(value), 2, count), dtype=value.dtype, device=value.device)
    torch.sub(probability, target, out=slopes[:, 0]).div_(count)
    # d dice / d probability = overlap / total^2 - 2 target / total
    along = torch.sub((overlap / total.square())[:, None], target * (2 / total)[:, None], out=slopes[:, 1])
    along.mul_(probability).mul_(1 - probability)
    return entropy, dice, slopes


def _to_maps(slopes: Tensor, points: Tensor, size: torch.Size) -> Tensor:
    """Gradients (m, C, P) of bilinear values at points (m, P, 2) -> of the maps, (m, C, h, w)."""
    shape = (*slopes.shape[:2], *size)
    grid = (2 * points.float() - 1)[:, :, None]
    maps = slopes.new_zeros(1).expand(shape)  # only its shape matters
    wanted = [True, False]
    return torch.ops.aten.grid_sampler_2d_backward(slopes[..., None], maps, grid, 0, 0, False, wanted)[0]


def takes_rows(logits: Tensor) -> bool:
    """Whether the gradient of these mask logits may come as a sparse tensor of (query) rows; see `mask_products`."""
    return getattr(logits.grad_fn, "takes_rows", False)


def mask_products(features: Tensor, embeddings: list[Tensor], masks: list[Tensor]) -> list[Tensor]:
    """Puts mask logits computed without gradients into the graph: masks[l] = embeddings[l] @ features.

    features (B, C, h, w), embeddings (B, N, C), masks (B, N, h, w) a layer. Their gradients are taken together, and on
    CPUs only for the queries that have any: after matching, most have none.
    """
    return list(_MaskProducts.apply(features, len(masks), *embeddings, *masks))


class _MaskProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, layers, *tensors):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(features, *tensors[:layers])
        ctx.takes_rows = features.device.type == "cpu"
        return tuple(masks.detach() for masks in tensors[layers:])

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        features, *embeddings = ctx.saved_tensors
        maps = features.flatten(2)  # (B, C, hw)
        to_maps = torch.zeros_like(maps)
        to_embeddings = [None] * len(embeddings)
        for layer, (gradient, embedding) in enumerate(zip(gradients, embeddings, strict=True)):
            if gradient is None:
                continue
            if not gradient.is_sparse:
                gradient = gradient.flatten(2).to(maps.dtype)
                to_embeddings[layer] = (gradient @ maps.transpose(1, 2)).to(embedding.dtype)
                to_maps.baddbmm_(embedding.transpose(1, 2).to(maps.dtype), gradient)
                continue
            gradient = gradient.coalesce()
            to_embeddings[layer] = torch.zeros_like(embedding)
            image, query = gradient.indices()
            for i in range(len(maps)):
                own = query[image == i]
                rows = gradient.values()[image == i].flatten(1).to(maps.dtype)
                to_embeddings[layer][i, own] = (rows @ maps[i].T).to(embedding.dtype)
                to_maps[i].addmm_(embedding[i, own].T.to(maps.dtype), rows)
        return to_maps.view(features.shape), None, *to_embeddings, *[None] * len(embeddings)
