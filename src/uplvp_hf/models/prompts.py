"""Prompts: pseudo masks turned into vectors, and vectors added to queries.

Sources: Saliency Prompt (arXiv 2302.01171), section 3; the released code pools tight boxes and pads the prompts of a
picture by repetition. Here a validity mask says which prompts exist, so a picture without masks gets no prompt.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class Prompts:
    """Prompts of a batch. P is the largest number in the batch.

    vectors (B, P, C): zeros where not valid. valid (B, P) bool. source (B, P) int64: which pseudo mask of the picture
    each prompt was pooled from, -1 where not valid.
    """

    vectors: Tensor
    valid: Tensor
    source: Tensor


def mask_weights(masks: Tensor, size: tuple[int, int], pooling: str = "mask") -> Tensor:
    """Share of every cell of a `size` grid that each mask covers: (N, H, W) bool -> (N, h, w) float32 in [0, 1].

    `box` first fills the tight box of each mask. Exact for every size: cells are averaged, so an object smaller than
    a cell keeps its share instead of vanishing.
    """
    if pooling == "box":
        rows, columns = masks.any(dim=2), masks.any(dim=1)
        masks = _between_ends(rows)[:, :, None] & _between_ends(columns)[:, None, :]
    if masks.shape[0] == 0:
        return masks.new_zeros((0, *size), dtype=torch.float32)
    return F.adaptive_avg_pool2d(masks.float()[:, None], size)[:, 0]


def _between_ends(line: Tensor) -> Tensor:
    """(N, S) bool -> (N, S) bool: everything from the first to the last true entry of each row."""
    return (line.cumsum(1) > 0) & (line.flip(1).cumsum(1).flip(1) > 0)


@torch.no_grad()
def pool_prompts(
    features: Tensor,
    masks: list[Tensor],
    scores: list[Tensor] | None = None,
    max_prompts: int = 20,
    pooling: str = "mask",
) -> Prompts:
    """Averages `features` over every pseudo mask.

    features (B, C, h, w); masks: per picture (N_i, H, W) bool at the padded input size; scores: per picture (N_i,),
    by which the best `max_prompts` are kept (given order when None). Detached, as in the reference.
    """
    batch, channels, height, width = features.shape
    features = features.detach().float()
    kept = [_best(len(mask), None if scores is None else scores[i], max_prompts) for i, mask in enumerate(masks)]
    most = max((len(index) for index in kept), default=0)
    vectors = features.new_zeros((batch, most, channels))
    source = torch.full((batch, most), -1, dtype=torch.int64, device=features.device)
    for i, index in enumerate(kept):
        index = index.to(features.device)
        weights = mask_weights(masks[i].to(features.device)[index].bool(), (height, width), pooling).flatten(1)
        area = weights.sum(1, keepdim=True)
        with torch.autocast(features.device.type, enabled=False):  # it would multiply in half precision
            pooled = weights @ features[i].flatten(1).T / area.clamp(min=1e-6)  # (n, C)
        present = area[:, 0] > 0
        vectors[i, : len(index)] = torch.where(present[:, None], pooled, 0.0)
        source[i, : len(index)] = torch.where(present, index, -1)
    return Prompts(vectors=vectors, valid=source >= 0, source=source)


def _best(count: int, scores: Tensor | None, most: int) -> Tensor:
    if scores is None or count <= most:
        return torch.arange(min(count, most))
    return scores.float().cpu().argsort(descending=True, stable=True)[:most].sort().values


def inject_prompts(queries: Tensor, vectors: Tensor, match: Tensor, drop: float, training: bool = True) -> Tensor:
    """queries + keep * prompt, keep ~ Bernoulli(1 - drop) per query and picture, not rescaled, as in the
    authors' released code.

    queries (B, N, D), vectors (B, P, D), match (B, N) int64 with -1 for "no prompt". Returns (B, N, D).
    """
    if vectors.shape[1] == 0:
        return queries + vectors.sum() * 0  # still touches what projected the prompts
    matched = vectors.gather(1, match.clamp(min=0)[..., None].expand(-1, -1, vectors.shape[-1]))
    keep = match >= 0
    if drop > 0 and training:
        keep = keep & (torch.rand(match.shape, device=match.device) >= drop)
    return queries + torch.where(keep[..., None], matched, 0.0).to(queries.dtype)
