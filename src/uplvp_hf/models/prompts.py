"""Prompts: pseudo masks turned into vectors, and vectors put into queries.

Sources: Saliency Prompt (arXiv 2302.01171), section 3; the released code pools tight boxes and repeats the prompts of a
image to fill 20 slots. Here a validity mask says which prompts exist, so an image without masks gets no prompt.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from .masks import tight_boxes
from .precision import in_float32


@dataclass
class Prompts:
    """Prompts of a batch. P is the largest number in the batch.

    vectors (B, P, C): zeros where not valid. valid (B, P) bool. source (B, P) int64: which pseudo mask of the image
    each prompt was pooled from, -1 where not valid.
    """

    vectors: Tensor
    valid: Tensor
    source: Tensor

    def to_slots(self, slots: int) -> "Prompts":
        """Repeats the K prompts of every image to fill `slots`: each floor(slots / K) times in a row, then the first
        slots mod K once more, as the released code does with 20. Images without prompts stay without."""
        place = torch.arange(slots, device=self.valid.device)[None]
        count = self.valid.sum(1, keepdim=True).clamp(min=1, max=slots)  # (B, 1)
        runs = slots // count
        rank = torch.where(place < runs * count, place // runs, place - runs * count)  # (B, slots)
        order = self.valid.int().argsort(dim=1, descending=True, stable=True)  # valid prompts first, in their order
        if order.shape[1] == 0:
            return Prompts(self.vectors.new_zeros((len(order), slots, self.vectors.shape[-1])),
                           self.valid.new_zeros((len(order), slots)),
                           self.source.new_full((len(order), slots), -1))  # fmt: skip
        chosen = order.gather(1, rank)
        vectors = self.vectors.gather(1, chosen[..., None].expand(-1, -1, self.vectors.shape[-1]))
        return Prompts(vectors, self.valid.gather(1, chosen), self.source.gather(1, chosen))

    def of_mask(self, count: int) -> Tensor:
        """The prompt of every pseudo mask 0..count-1 of the images, -1 for none: (B, count) int64."""
        table = self.source.new_full((len(self.source), count + 1), -1)
        # Without a mask the entry goes to the last column, which is cut off.
        mask = torch.where(self.valid & (self.source < count), self.source, count)
        table.scatter_(1, mask, torch.arange(mask.shape[1], device=mask.device).expand_as(mask))
        return table[:, :count]


def mask_weights(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Share of every cell of a `size` grid that each mask covers: (N, H, W) bool -> (N, h, w) float32 in [0, 1].

    Cells are averaged, so an object smaller than a cell keeps its share instead of vanishing.
    """
    if masks.shape[0] == 0:
        return masks.new_zeros((0, *size), dtype=torch.float32)
    return F.adaptive_avg_pool2d(masks.float()[:, None], size)[:, 0]


def box_weights(boxes: Tensor, size: tuple[int, int], stride: tuple[float, float]) -> Tensor:
    """One on the cells of a (h, w) grid that the released code averages for each box, else zero: (N, h, w) float32.

    boxes (N, 4) x1, y1, x2, y2 in pixels with exclusive ends; stride: (height, width) of a cell in pixels. Ends are
    divided by the stride and cut to whole cells; a side that becomes empty is widened by two cells to the right or
    bottom; the grid's border clips.
    """
    spans = []
    for axis in (1, 0):  # rows, columns
        first = (boxes[:, axis].double() / stride[1 - axis]).floor()
        last = (boxes[:, axis + 2].double() / stride[1 - axis]).floor()
        last = torch.where(last == first, last + 2, last)
        cell = torch.arange(size[1 - axis], device=boxes.device)[None]
        spans.append((cell >= first[:, None]) & (cell < last[:, None]))
    return (spans[0][:, :, None] & spans[1][:, None]).float()


@torch.no_grad()
def pool_prompts(
    features: Tensor,
    masks: list[Tensor],
    scores: list[Tensor] | None = None,
    max_prompts: int = 20,
    pooling: str = "mask",
) -> Prompts:
    """Averages `features` over every pseudo mask (`mask`) or over the cells of its tight box (`box`).

    features (B, C, h, w); masks: per image (N_i, H, W) bool at the padded input size; scores: per image (N_i,),
    by which the best `max_prompts` are kept (the first ones when None). Empty masks give no prompt. Detached, as in
    the reference.
    """
    batch, channels, height, width = features.shape
    features = features.detach().float()
    most = max((min(len(mask), max_prompts) for mask in masks), default=0)
    vectors = features.new_zeros((batch, most, channels))
    source = torch.full((batch, most), -1, dtype=torch.int64, device=features.device)
    for i, mask in enumerate(masks):
        index = _best(len(mask), None if scores is None else scores[i], max_prompts).to(features.device)
        mask = mask.to(features.device)[index].bool()
        if pooling == "box":
            stride = (mask.shape[-2] / height, mask.shape[-1] / width)
            weights = box_weights(tight_boxes(mask), (height, width), stride)
        else:
            weights = mask_weights(mask, (height, width))
        weights, present = weights.flatten(1), mask.flatten(1).any(1)
        with torch.autocast(features.device.type, enabled=False):  # it would multiply in half precision
            pooled = weights @ features[i].flatten(1).T / weights.sum(1, keepdim=True).clamp(min=1e-6)  # (n, C)
        vectors[i, : len(index)] = torch.where(present[:, None], pooled, 0.0)
        source[i, : len(index)] = torch.where(present, index, -1)
    return Prompts(vectors=vectors, valid=source >= 0, source=source)


def _best(count: int, scores: Tensor | None, most: int) -> Tensor:
    if scores is None or count <= most:
        return torch.arange(min(count, most))
    return scores.float().argsort(descending=True, stable=True)[:most].sort().values


class PromptFusion(nn.Module):
    """Query and prompt side by side through one linear layer (the "concat" variant), which starts as their sum."""

    def __init__(self, channels: int):
        super().__init__()
        self.linear = nn.Linear(2 * channels, channels)

    @torch.no_grad()
    def init_weights(self) -> None:
        eye = torch.eye(self.linear.out_features, device=self.linear.weight.device, dtype=self.linear.weight.dtype)
        init.copy_(self.linear.weight, torch.cat([eye, eye], dim=1))
        init.zeros_(self.linear.bias)

    def forward(self, queries: Tensor, prompts: Tensor) -> Tensor:
        # In float32: K-Net's queries hold sums over whole objects, which are beyond the range of float16.
        with torch.autocast(queries.device.type, enabled=False):
            return in_float32(self.linear, torch.cat([queries.float(), prompts.float()], dim=-1)).to(queries.dtype)


def kept_prompts(match: Tensor, drop: float, uniform: Tensor | None = None) -> Tensor:
    """Which queries get their prompt: (B, N) bool, Bernoulli(1 - drop) per query and image where there is a match.

    match (B, N) int64 with -1 for "no prompt". uniform (B, N) in [0, 1): a recorded draw in place of a new one.
    """
    keep = match >= 0
    if drop > 0:
        uniform = torch.rand(match.shape, device=match.device) if uniform is None else uniform.to(match.device)
        keep = keep & (uniform > drop)
    return keep


def faded(drop: float, epoch: float, epochs: float | None) -> float:
    """Share of queries without prompt: `drop`, which with `epochs` rises linearly to 1 until then, and stays there."""
    return drop if epochs is None else drop + (1 - drop) * min(1.0, epoch / epochs)


def inject_prompts(
    queries: Tensor, vectors: Tensor, match: Tensor, keep: Tensor, fusion: PromptFusion | None = None
) -> Tensor:
    """queries + prompt where `keep`, not rescaled, as in the authors' released code; with `fusion` its result instead
    of the sum. Queries that get no prompt stay as they are, to the bit.

    queries (B, N, D), vectors (B, P, D), match (B, N) int64, keep (B, N) bool. Returns (B, N, D).
    """
    if vectors.shape[1] == 0:
        matched = vectors.sum() * 0 + queries.new_zeros(queries.shape, dtype=vectors.dtype)
    else:
        matched = vectors.gather(1, match.clamp(min=0)[..., None].expand(-1, -1, vectors.shape[-1]))
    if fusion is not None:
        return torch.where(keep[..., None], fusion(queries, matched), queries)
    return queries + torch.where(keep[..., None], matched, 0.0).to(queries.dtype)
