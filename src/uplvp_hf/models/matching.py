"""Assignments: prompts to queries (by likeness), and pseudo or true masks to queries (by cost)."""

import warnings

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.no_grad()
def match_prompts(queries: Tensor, vectors: Tensor, valid: Tensor, how: str = "cosine") -> Tensor:
    """Chooses a prompt for every query. Many queries may share one.

    queries (B, N, D), vectors (B, P, D), valid (B, P) bool. Returns (B, N) int64, -1 in pictures without prompts.
    cosine: the valid prompt of largest cosine similarity, ties to the lowest index (SP eq. 2).
    sequential: query n takes valid prompt floor(n * P_i / N). random: a uniform draw.
    """
    batch, queries_count, _ = queries.shape
    count = valid.sum(1, keepdim=True)  # (B, 1)
    if how == "none" or vectors.shape[1] == 0:
        return torch.full((batch, queries_count), -1, dtype=torch.int64, device=queries.device)
    if how == "cosine":
        with torch.autocast(queries.device.type, enabled=False):  # it would multiply in half precision
            likeness = F.normalize(queries.float(), dim=-1) @ F.normalize(vectors.float(), dim=-1).transpose(1, 2)
        match = likeness.masked_fill(~valid[:, None], -torch.inf).argmax(-1)
    elif how in ("sequential", "random"):
        if how == "sequential":
            rank = torch.arange(queries_count, device=queries.device)[None] * count // queries_count
        else:
            rank = (torch.rand((batch, queries_count), device=queries.device) * count).floor().long()
        order = valid.int().argsort(dim=1, descending=True, stable=True)  # valid prompts first, in their order
        match = order.gather(1, rank.clamp(max=vectors.shape[1] - 1))
    else:
        raise ValueError(f"Unknown prompt matching `{how}`: choose cosine, sequential, random or none.")
    return torch.where(count > 0, match, -1)


@torch.no_grad()
def hungarian(costs: list[Tensor]) -> list[list[tuple[Tensor, Tensor]]]:
    """Least-cost one-to-one assignments of all layers and pictures, with a single device-to-host transfer.

    costs: per picture (L, N, G_i) float32. Returns, per layer and picture, (query ids, target ids): int64 on the
    host, queries ascending, min(N, G_i) pairs. Non-finite costs are replaced by a value above all others and reported.
    """
    layers = costs[0].shape[0]
    from scipy.optimize import linear_sum_assignment  # here: inference needs no scipy

    flat = torch.cat([cost.float().flatten() for cost in costs]).cpu()
    if not torch.isfinite(flat).all():
        warnings.warn("Non-finite matching costs: the model or its targets hold NaN or inf.", stacklevel=2)
        finite = flat[torch.isfinite(flat)].abs()
        limit = 1e3 + 2 * (finite.max().item() if len(finite) else 0.0)
        flat = torch.nan_to_num(flat, nan=limit, posinf=limit, neginf=limit)
    pieces = flat.split([cost.numel() for cost in costs])
    solved = [
        [linear_sum_assignment(layer) for layer in piece.view(cost.shape).numpy()]
        for piece, cost in zip(pieces, costs, strict=True)
    ]
    return [
        [tuple(torch.as_tensor(part, dtype=torch.int64) for part in solved[i][layer]) for i in range(len(costs))]
        for layer in range(layers)
    ]
