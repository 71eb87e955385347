"""Normalized cuts of an image's features (Shi and Malik 2000), and splitting masks by them.

Cells are the nodes of a graph; two cells are joined by 1 where the cosine of their features exceeds tau, else by a
small eps that keeps the graph connected (TokenCut, arXiv 2202.11539: tau .2, eps 1e-5). The second smallest generalized
eigenvector of (D - A, D) orders the cells along the cheapest cut. All eigenproblems of a step are solved as batches of
`torch.linalg.eigh`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


def second_eigenvector(weights: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Second smallest generalized eigenvector of (D - A, D).

    weights: (B, n, n) symmetric affinities above 0. valid: (B, n) bool, False for padding; None for no padding.
    Returns (B, n), scaled so that y^T D y = 1 and orthogonal to the constant vector under D; padding is 0. The sign is
    arbitrary.
    """
    if valid is None:
        valid = torch.ones(weights.shape[:2], dtype=torch.bool, device=weights.device)
    weights = weights * (valid[:, :, None] & valid[:, None])
    root = weights.sum(dim=-1).sqrt()
    inverse = torch.where(valid, 1 / root.clamp_min(1e-12), 0.0)
    laplacian = -inverse[:, :, None] * weights * inverse[:, None]
    # The smallest eigenvector is known (D^1/2 1, eigenvalue 0): move it, and the padding, above all others (<= 2), so
    # that rounding cannot mix it with the one wanted.
    first = root / root.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    laplacian = laplacian + 4 * first[:, :, None] * first[:, None]
    laplacian = laplacian + torch.diag_embed(torch.where(valid, 1.0, 4.0))
    vectors = torch.linalg.eigh(laplacian).eigenvectors[..., 0]
    return inverse * vectors


def best_cut(weights: torch.Tensor, order: torch.Tensor, valid: torch.Tensor, min_cells: int = 1):
    """The threshold on `order` with the smallest normalized cut.

    weights: (B, n, n); order: (B, n) values to threshold; valid: (B, n) bool. At least `min_cells` on each side.
    Returns the threshold (B,), to be used as `order > threshold`, and ncut = cut / vol(a) + cut / vol(b) (B,), inf
    where no side would be large enough. O(n^2).
    """
    sizes = valid.sum(dim=1)
    rank = order.masked_fill(~valid, torch.inf).argsort(dim=1, stable=True)  # padding last
    weights = weights * (valid[:, :, None] & valid[:, None])
    weights = weights.gather(1, rank[:, :, None].expand_as(weights)).gather(2, rank[:, None].expand_as(weights))
    volume = weights.sum(dim=-1).cumsum(dim=1)  # of the first k + 1 cells
    within = (2 * weights.tril(-1).sum(dim=-1) + weights.diagonal(dim1=1, dim2=2)).cumsum(dim=1)
    total = volume[:, -1:]
    cut = (volume - within).clamp_min(0)
    ncut = cut / volume.clamp_min(1e-12) + cut / (total - volume).clamp_min(1e-12)
    taken = torch.arange(1, order.shape[1] + 1, device=order.device)[None]
    ncut = ncut.masked_fill((taken < min_cells) | (sizes[:, None] - taken < max(1, min_cells)), torch.inf)
    lowest, place = ncut.min(dim=1)
    ordered = order.gather(1, rank)
    after = (place + 1).clamp_max(order.shape[1] - 1)  # halfway to the next value: nothing lies on the threshold
    return (ordered.gather(1, place[:, None]) + ordered.gather(1, after[:, None]))[:, 0] / 2, lowest


@dataclass
class _Piece:
    """cells: (n,) indices into the grid. ncut: of its best split, or None while unknown. sides: (n,) bool of it."""

    mask: int
    cells: torch.Tensor
    ncut: float | None = None
    sides: torch.Tensor | None = None


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
    flat, cells = masks.flatten(1).bool(), features.flatten(1).T.float()
    if center:
        cells = cells - cells.mean(dim=0)
    pieces = [[_Piece(k, torch.nonzero(mask)[:, 0])] for k, mask in enumerate(flat)]
    for _ in range(max_parts - 1):
        fresh = [piece for group in pieces for piece in group if piece.ncut is None and len(group) < max_parts]
        _evaluate(cells, fresh, tau, min_cells, max_cells)
        for group in pieces:
            group[:] = _split_cheapest(group, max_parts, max_ncut)
    return [[_paint(piece.cells, masks.shape[1:]) for piece in sorted(g, key=lambda p: -len(p.cells))] for g in pieces]


def _split_cheapest(group: list[_Piece], max_parts: int, max_ncut: float) -> list[_Piece]:
    known = [piece for piece in group if piece.ncut is not None]
    cheapest = min(known, key=lambda piece: piece.ncut, default=None)
    if cheapest is None or cheapest.ncut > max_ncut or len(group) >= max_parts:
        return group
    halves = [_Piece(cheapest.mask, cheapest.cells[side]) for side in (cheapest.sides, ~cheapest.sides)]
    return [piece for piece in group if piece is not cheapest] + halves


def _paint(cells: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    mask = torch.zeros(size[0] * size[1], dtype=torch.bool, device=cells.device)
    mask[cells] = True
    return mask.view(*size)


def _bucket(count: int) -> int:
    """Padded size, the next of 8, 12, 16, 24, 32, 48, ...: few cells are padding, and many pieces share a batch."""
    size = 8
    while size < count:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def _sample(cells: torch.Tensor, most: int) -> torch.Tensor:
    """At most `most` of the places in `cells`, drawn alike every time."""
    if len(cells) <= most:
        return torch.arange(len(cells), device=cells.device)
    drawn = torch.randperm(len(cells), generator=torch.Generator().manual_seed(0))[:most]
    return drawn.sort().values.to(cells.device)


def _evaluate(features: torch.Tensor, pieces: list[_Piece], tau: float, min_cells: int, max_cells: int) -> None:
    """Fill in the best split of each piece. features: (h*w, C)."""
    buckets: dict[int, list[_Piece]] = {}
    for piece in pieces:
        piece.ncut = float("inf")
        if len(piece.cells) >= 2 * max(1, min_cells):
            buckets.setdefault(_bucket(min(len(piece.cells), max_cells)), []).append(piece)
    for size, members in buckets.items():
        step = max(1, BATCH_FLOATS // size**2)
        for start in range(0, len(members), step):
            _evaluate_batch(features, members[start : start + step], size, tau, min_cells, max_cells)


def _evaluate_batch(features, pieces: list[_Piece], size: int, tau: float, min_cells: int, max_cells: int) -> None:
    samples = [_sample(piece.cells, max_cells) for piece in pieces]
    index = torch.zeros(len(pieces), size, dtype=torch.int64, device=features.device)
    valid = torch.zeros(len(pieces), size, dtype=torch.bool, device=features.device)
    for row, (piece, sample) in enumerate(zip(pieces, samples)):
        index[row, : len(sample)] = piece.cells[sample]
        valid[row, : len(sample)] = True
    weights = affinity(features[index], tau)
    vectors = second_eigenvector(weights, valid)
    thresholds, ncuts = best_cut(weights, vectors, valid, min_cells)
    for row, (piece, sample, ncut) in enumerate(zip(pieces, samples, ncuts.tolist())):
        values = vectors[row, : len(sample)]
        if len(sample) < len(piece.cells):
            known = features[piece.cells[sample]]
            links = torch.where(F.normalize(features[piece.cells], dim=1) @ F.normalize(known, dim=1).T > tau, 1.0, EPS)
            extended = links @ values / links.sum(dim=1)
            extended[sample] = values
            values = extended
        sides = values > thresholds[row]
        smaller = min(int(sides.sum()), len(sides) - int(sides.sum()))
        piece.ncut = ncut if smaller >= max(1, min_cells) else float("inf")
        piece.sides = sides
