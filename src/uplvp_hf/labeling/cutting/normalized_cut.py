"""Normalized cuts of an image's features (Shi and Malik 2000), and splitting masks by them.

Cells are the nodes of a graph; two cells are joined by 1 where the cosine of their features exceeds tau, else by a
small eps that keeps the graph connected (TokenCut, arXiv 2202.11539: tau .2, eps 1e-5). The second smallest generalized
eigenvector of (D - A, D) orders the cells along the cheapest cut.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ...models.errors import UserError

EPS = 1e-5
# Floats of one batch of affinities: 64 MiB.
BATCH_FLOATS = 1 << 24


def affinity(features: torch.Tensor, tau: float, eps: float = EPS) -> torch.Tensor:
    """(..., n, C) features -> (..., n, n): 1 where the cosine exceeds tau, else eps."""
    units = F.normalize(features.float(), dim=-1)
    return torch.where(units @ units.transpose(-1, -2) > tau, 1.0, eps)


def second_eigenvector(weights: torch.Tensor) -> torch.Tensor:
    """Second smallest generalized eigenvector of (D - A, D).

    weights: (B, n, n) symmetric affinities above 0. Returns (B, n), scaled so that y^T D y = 1 and orthogonal to the
    constant vector under D. The sign is arbitrary.
    """
    root = weights.sum(dim=-1).sqrt()
    inverse = 1 / root.clamp_min(1e-12)
    # The smallest eigenvector is known (D^1/2 1, eigenvalue 0): move it above all others (<= 2), so that rounding
    # cannot mix it with the one wanted.
    first = root / root.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    laplacian = torch.eye(weights.shape[-1], device=weights.device) - inverse[:, :, None] * weights * inverse[:, None]
    return inverse * torch.linalg.eigh(laplacian + 4 * first[:, :, None] * first[:, None]).eigenvectors[..., 0]


def best_cut(weights: torch.Tensor, order: torch.Tensor, min_cells: int = 1) -> tuple[float, float]:
    """The threshold on `order` with the smallest normalized cut.

    weights: (n, n); order: (n,) values to threshold. At least `min_cells` on each side.
    Returns the threshold, to be used as `order > threshold`, and ncut = cut / vol(a) + cut / vol(b), inf where no side
    would be large enough. O(n^2).
    """
    ordered, rank = order.sort(stable=True)
    weights = weights[rank][:, rank]
    volume = weights.sum(dim=-1).cumsum(dim=0)  # of the first k + 1 cells
    within = (2 * weights.tril(-1).sum(dim=-1) + weights.diagonal()).cumsum(dim=0)
    cut = (volume - within).clamp_min(0)
    ncut = cut / volume.clamp_min(1e-12) + cut / (volume[-1] - volume).clamp_min(1e-12)
    taken = torch.arange(1, len(order) + 1, device=order.device)
    ncut = ncut.masked_fill((taken < min_cells) | (len(order) - taken < max(1, min_cells)), torch.inf)
    place = int(ncut.argmin())
    after = min(place + 1, len(order) - 1)  # halfway to the next value: nothing lies on the threshold
    return float(ordered[place] + ordered[after]) / 2, float(ncut[place])


def split_by_ncut(
    features: torch.Tensor,
    masks: torch.Tensor,
    max_parts: int = 4,
    tau: float = 0.2,
    min_cells: int = 2,
    max_ncut: float = 0.3,
    max_cells: int = 512,
    center: bool = False,
) -> list[list[torch.Tensor]]:
    """Split masks where their own features fall apart: recursive two-way normalized cuts, cheapest first.

    Args:
        features: (C, h, w) on the grid. masks: (M, h, w) bool on the same grid.
        max_parts: most parts a mask. tau: cosine above which two cells are joined. min_cells: smallest part.
        max_ncut: a cut that costs more is not made (0: no link is cut, 2: the most that is possible).
        max_cells: a larger piece is cut on so many evenly drawn cells; the others follow by the eigenvector's own
            equation, y_i = sum_j A_ij y_j / d_i (Nystrom).
        center: subtract the grid's mean feature first; for features that all point one way (CLIP's, ReLU outputs),
            whose cosines would otherwise all exceed tau.

    Returns for every mask its parts as (h, w) bool masks, largest first; they share no cell and together are the mask.
    A mask that is not split, or empty, is its own only part. Raises UserError for masks on another grid.
    """
    if masks.shape[1:] != features.shape[1:]:
        raise UserError(f"split_by_ncut: masks {tuple(masks.shape)} do not lie on features {tuple(features.shape)}")
    vectors = features.flatten(1).T.float()
    if center:
        vectors = vectors - vectors.mean(dim=0)

    def best_split(cells: torch.Tensor) -> tuple[float, torch.Tensor | None]:
        return _best_split(vectors[cells], tau, max(1, min_cells), max_cells)

    parts_of = []
    for mask in masks.flatten(1).bool():
        pieces = [mask.nonzero()[:, 0]]
        splits = [best_split(pieces[0])]
        while len(pieces) < max_parts:
            cheapest = min(range(len(pieces)), key=lambda k: splits[k][0])
            cost, sides = splits.pop(cheapest)
            if sides is None or cost > max_ncut:
                break
            cells = pieces.pop(cheapest)
            pieces += [cells[sides], cells[~sides]]
            if len(pieces) < max_parts:  # else nothing is split any more
                splits += [best_split(piece) for piece in pieces[-2:]]
        parts_of.append([_paint(piece, masks.shape[1:]) for piece in sorted(pieces, key=len, reverse=True)])
    return parts_of


def _paint(cells: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    mask = torch.zeros(size[0] * size[1], dtype=torch.bool, device=cells.device)
    mask[cells] = True
    return mask.view(*size)


def _best_split(
    features: torch.Tensor, tau: float, min_cells: int, max_cells: int
) -> tuple[float, torch.Tensor | None]:
    """Cost and sides (n,) bool of the best cut of cells with features (n, C); (inf, None) where there is none."""
    count = len(features)
    if count < 2 * min_cells:
        return float("inf"), None
    drawn = torch.arange(count)
    if count > max_cells:  # alike every time
        drawn = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:max_cells].sort().values
    drawn = drawn.to(features.device)
    weights = affinity(features[drawn], tau)
    values = second_eigenvector(weights[None])[0]
    threshold, cost = best_cut(weights, values, min_cells)
    if count > max_cells:
        units = F.normalize(features, dim=1)
        links = torch.where(units @ units[drawn].T > tau, 1.0, EPS)
        extended = links @ values / links.sum(dim=1)
        extended[drawn] = values
        values = extended
    sides = values > threshold
    large = min_cells <= int(sides.sum()) <= count - min_cells
    return (cost, sides) if large else (float("inf"), None)
