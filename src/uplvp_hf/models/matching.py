"""Assignments: prompts to queries (by likeness), and pseudo or true masks to queries (by cost)."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import UserError

# (cost (L, N, G) float32 of one image, its place in the batch) -> cost of the same shape.
LabelGuide = Callable[[Tensor, int], Tensor]


@torch.no_grad()
def match_prompts(queries: Tensor, vectors: Tensor, valid: Tensor, how: str = "cosine") -> Tensor:
    """Chooses a prompt for every query. Many queries may share one.

    queries (B, N, D), vectors (B, P, D), valid (B, P) bool. Returns (B, N) int64, -1 in images without prompts.
    cosine: the valid prompt of largest cosine similarity, ties to the lowest index (SP eq. 2).
    sequential: query n takes valid prompt floor(n * P_i / N). hungarian: the same; the classes of the prompts then
    guide the assignment of masks, see `label_guide`. random: a uniform draw.
    """
    batch, queries_count, _ = queries.shape
    count = valid.sum(1, keepdim=True)  # (B, 1)
    if how == "none" or vectors.shape[1] == 0:
        return torch.full((batch, queries_count), -1, dtype=torch.int64, device=queries.device)
    if how == "cosine":
        with torch.autocast(queries.device.type, enabled=False):  # it would multiply in half precision
            likeness = F.normalize(queries.float(), dim=-1) @ F.normalize(vectors.float(), dim=-1).transpose(1, 2)
        match = likeness.masked_fill(~valid[:, None], -torch.inf).argmax(-1)
    elif how in ("sequential", "hungarian", "random"):
        if how == "random":
            rank = (torch.rand((batch, queries_count), device=queries.device) * count).floor().long()
        else:
            rank = torch.arange(queries_count, device=queries.device)[None] * count // queries_count
        order = valid.int().argsort(dim=1, descending=True, stable=True)  # valid prompts first, in their order
        match = order.gather(1, rank.clamp(max=vectors.shape[1] - 1))
    else:
        raise UserError(f"Unknown prompt matching `{how}`: choose cosine, sequential, hungarian, random or none.")
    return torch.where(count > 0, match, -1)


def guidance(epoch: float, start: float = 0.1, epochs: float = 6.0) -> float:
    """Weight of the true cost after `epoch` epochs: from `start` linearly to 1 after `epochs`, then 1."""
    return 1.0 if epoch >= epochs else start + (1 - start) * epoch / epochs


def label_guide(match: Tensor, source: Tensor, class_labels: list[Tensor], theta: float) -> LabelGuide:
    """The curriculum of label-guided assignment: theta * C1 + (1 - theta) * C2.

    C1 is the matching cost, C2 its smallest value where the class of the query's prompt is that of the target, its
    largest value elsewhere. match (B, N): the prompt of every query or -1; source (B, P): the pseudo mask of every
    prompt; class_labels: per image (G,). Source: the released "hun" variant, which could not run.
    """

    def guide(cost: Tensor, image: int) -> Tensor:
        if theta >= 1 or cost.shape[-1] == 0 or source.shape[1] == 0:
            return cost
        labels = class_labels[image].to(cost.device)
        prompt = match[image].to(cost.device)
        mask = source[image].to(cost.device)[prompt.clamp(min=0)].clamp(min=0)  # (N,)
        same = (labels[mask][:, None] == labels[None]) & (prompt >= 0)[:, None]  # (N, G)
        least, most = cost.amin((-2, -1), keepdim=True), cost.amax((-2, -1), keepdim=True)
        return theta * cost + (1 - theta) * torch.where(same, least, most)

    return guide


class CostWatch:
    """`with CostWatch() as watch:` around forward passes; `watch.finite` then says whether all matching costs were.

    A cost that is not finite need not show in the loss, when the query that it belongs to is not matched.
    """

    _watching: list["CostWatch"] = []

    def __enter__(self) -> "CostWatch":
        self.finite = True
        self._watching.append(self)
        return self

    def __exit__(self, *error) -> None:
        self._watching.remove(self)


@torch.no_grad()
def hungarian(costs: list[Tensor]) -> list[list[tuple[Tensor, Tensor]]]:
    """Least-cost one-to-one assignments of all layers and images, with a single device-to-host transfer.

    costs: per image (L, N, G_i) float32. Returns, per layer and image, (query ids, target ids): int64 on the
    host, queries ascending, min(N, G_i) pairs. Non-finite costs are replaced by a value above all others and reported,
    by a warning and to every `CostWatch`.
    """
    layers = costs[0].shape[0]
    from scipy.optimize import linear_sum_assignment  # here: inference needs no scipy

    flat = torch.cat([cost.float().flatten() for cost in costs]).cpu()
    if not torch.isfinite(flat).all():
        for watch in CostWatch._watching:
            watch.finite = False
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


@dataclass
class Pairs:
    """Matched pairs of L layers, M of each layer, in order of image and query: (L, M) int64 each.

    layer, image, query; target: the place among the targets of the whole batch.
    """

    layer: Tensor
    image: Tensor
    query: Tensor
    target: Tensor


def pair_up(matches: list[list[tuple[Tensor, Tensor]]], counts: list[int] | None, device: torch.device) -> Pairs:
    """The assignments as index tensors, brought to the device in one piece.

    counts: targets of every image; None leaves the place of a target among those of its own image.
    """
    offsets = [0] * len(matches[0]) if counts is None else [sum(counts[:i]) for i in range(len(counts))]
    rows = []
    for layer, match in enumerate(matches):
        query = torch.cat([query for query, _ in match])
        image = torch.cat([torch.full_like(query, i) for i, (query, _) in enumerate(match)])
        target = torch.cat([target + offset for offset, (_, target) in zip(offsets, match, strict=True)])
        rows.append(torch.stack([torch.full_like(query, layer), image, query, target]))
    return Pairs(*torch.stack(rows, dim=1).to(device))
