"""Normalized cuts of an image's features (Shi and Malik 2000): splitting masks, and MaskCut-style proposals.

Cells are the nodes of a graph; two cells are joined by 1 where the cosine of their features exceeds tau, else by a
small eps that keeps the graph connected (TokenCut, arXiv 2202.11539: tau .2, eps 1e-5). The second smallest generalized
eigenvector of (D - A, D) orders the cells along the cheapest cut. All eigenproblems of a step are solved as batches of
`torch.linalg.eigh`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage

from ..data.rows import Row
from ..models.errors import UserError
from .encoders import Encoder
from .instances import Proposals, filter_proposals, upsample_grid
from .pixels import group_by_size, images_to_pixels
from .protocol import Finish, LabelerBase
from .refine import pamr

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


def cut_cost(weights: torch.Tensor, sides: torch.Tensor) -> torch.Tensor:
    """Normalized cut of given sides: (B, n, n), (B, n) bool -> cut / vol(a) + cut / vol(b) (B,), in 0 to 2."""
    inside = sides.to(weights.dtype)
    degree = weights.sum(dim=-1)
    volume = (degree * inside).sum(dim=-1)
    cut = volume - torch.einsum("bi,bij,bj->b", inside, weights, inside)
    return cut / volume.clamp_min(1e-12) + cut / (degree.sum(dim=-1) - volume).clamp_min(1e-12)


def _seed_components(sides: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    """The 4-connected component of (B, h, w) bool that holds cell `seeds` (B,). One transfer for the batch."""
    kept = []
    for side, seed in zip(sides.cpu().numpy(), seeds.cpu().tolist()):
        labeled, _ = ndimage.label(side)
        kept.append(labeled == labeled.flat[seed])
    return torch.from_numpy(np.stack(kept)).to(sides.device)


def cut_foreground(features: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The foreground of a two-way cut.

    features: (B, C, h, w), for the shape alone; weights: (B, h*w, h*w) affinities. The eigenvector is split at its
    mean; foreground is the side of its largest absolute value, unless that holds three or more of the grid's corners;
    of it, the component of its most extreme cell.
    Returns (B, h, w) bool and the eigenvector above its mean, positive in the foreground (B, h, w).
    """
    height, width = features.shape[2:]
    vectors = second_eigenvector(weights)
    vectors = vectors - vectors.mean(dim=1, keepdim=True)
    strongest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
    vectors = torch.where(strongest < 0, -vectors, vectors)
    corners = torch.tensor([0, width - 1, (height - 1) * width, height * width - 1], device=vectors.device)
    background = (vectors[:, corners] > 0).sum(dim=1, keepdim=True) >= 3
    vectors = torch.where(background, -vectors, vectors)
    components = _seed_components((vectors > 0).unflatten(1, (height, width)), vectors.argmax(dim=1))
    return components, vectors.unflatten(1, (height, width))


def _balanced(vectors: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Magnitudes of (B, h, w) in units of the typical cell on the same side of the masks, at most 1; negative outside
    of them. An edge between two plain regions so lies halfway, a gradual one where the eigenvector has it."""
    size = vectors.abs()
    typical = [
        (size * side).flatten(1).sum(dim=1) / side.flatten(1).sum(dim=1).clamp_min(1) for side in (masks, ~masks)
    ]
    inside, outside = (size / value.clamp_min(1e-12)[:, None, None] for value in typical)
    return torch.where(masks, inside, -outside).clamp(-1, 1)


def cut_out(
    features: torch.Tensor,
    masks: int = 3,
    tau: float = 0.2,
    min_area: float = 0.01,
    max_iou: float = 0.5,
    center: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """MaskCut (arXiv 2301.11320): cut out a foreground, remove its features, repeat.

    Args:
        features: (B, C, h, w); an eigenproblem of h*w unknowns is solved for every image and mask.
        masks: most masks an image. tau: see `affinity`. center: subtract each image's mean feature first.
        min_area: share of the cells; max_iou: with any earlier mask. A mask beyond them is rejected, and its image
            is finished, for the next cut would be the same one.

    Returns masks (B, masks, h, w) bool, disjoint, in the order they were cut out; soft maps (B, masks, h, w) that are
    positive in the mask and negative elsewhere, for enlarging; scores (B, masks), 1 - normalized cut of the mask
    against the rest, at least 0, and -1 where there is no mask.
    """
    count, _, height, width = features.shape
    cells = features.flatten(2).transpose(1, 2).float()  # (B, n, C)
    if center:
        cells = cells - cells.mean(dim=1, keepdim=True)
    found = torch.zeros(count, masks, height, width, dtype=torch.bool, device=features.device)
    soft = torch.full(found.shape, -1.0, device=features.device)
    scores = torch.full((count, masks), -1.0, device=features.device)
    todo = torch.arange(count, device=features.device)
    step = max(1, BATCH_FLOATS // (height * width) ** 2)
    for position in range(masks):
        still = [todo[:0]]
        for rows in todo.split(step):
            earlier = found[rows].any(dim=1)
            weights = affinity(cells[rows] * ~earlier.flatten(1)[..., None], tau)
            fresh, vectors = cut_foreground(features[rows], weights)
            inter = (found[rows] & fresh[:, None]).sum(dim=(2, 3))
            union = (found[rows] | fresh[:, None]).sum(dim=(2, 3)).clamp_min(1)
            repeated = (inter / union > max_iou).any(dim=1)
            fresh &= ~earlier
            good = ~repeated & (fresh.flatten(1).sum(dim=1) > min_area * height * width)
            found[rows, position] = fresh & good[:, None, None]
            soft[rows, position] = _balanced(vectors, fresh)
            scores[rows, position] = torch.where(good, (1 - cut_cost(weights, fresh.flatten(1))).clamp_min(0), -1.0)
            still.append(rows[good])
        todo = torch.cat(still)
        if not len(todo):
            break
    return found, soft, scores


class NcutLabeler(LabelerBase):
    """Class-agnostic proposals by normalized cuts of a backbone's features (MaskCut's recipe, on any backbone).

    Args:
        encoder: a frozen backbone; MaskCut has DINO's ViT-B/8. stage: which of its maps, counted from the finest (0)
            or the last (-1).
        image_size: longer side in pixels that images are stretched to (MaskCut: 480). The eigenproblem grows with
            the third power of the number of cells: 900 (480 pixels at stride 16) take .2 s a mask on a CPU core.
        masks, tau, min_area, max_iou, center: see `cut_out` (MaskCut: 3 masks, tau .15, 1 %, IoU .5).
        refine: None, or "pamr": pixel-adaptive refinement at the working size. A mask whose IoU with itself before
            refinement is below `min_agreement` is dropped, as MaskCut does around its CRF.
        max_area, max_border: shares of the image. cell_offset: in cells; None takes the encoder's.

    Raises UserError for an unknown refine.
    """

    name = "ncut"

    def __init__(
        self,
        encoder: Encoder,
        image_size: int = 480,
        stage: int = -1,
        masks: int = 3,
        tau: float = 0.15,
        min_area: float = 0.01,
        max_iou: float = 0.5,
        center: bool = False,
        refine: str | None = None,
        min_agreement: float = 0.5,
        max_area: float = 1.0,
        max_border: float = 1.0,
        cell_offset: float | None = None,
    ) -> None:
        if refine not in (None, "pamr"):
            raise UserError(f"ncut: refine {refine!r} is unknown; use 'pamr' or None")
        self.encoder, self.encoder_name, self.license = encoder, encoder.name, encoder.license
        self.image_size, self.stage, self.cell_offset = image_size, stage, cell_offset
        self.search = {"masks": masks, "tau": tau, "min_area": min_area, "max_iou": max_iou, "center": center}
        self.refine, self.min_agreement = refine, min_agreement
        self.filters = {"max_area": max_area, "max_border": max_border}

    @property
    def settings(self) -> dict[str, Any]:
        """What the labels depend on, for the store's header."""
        own = ("image_size", "stage", "cell_offset", "refine", "min_agreement")
        values = {name: getattr(self, name) for name in own} | self.search | self.filters
        return values | {"dtype": self.encoder.dtype_name}

    @torch.inference_mode()
    def begin(self, images: Sequence[Image.Image], rows: Sequence[Row] | None = None) -> Finish:
        """The cuts; what it returns enlarges the masks: one `Proposals` an image, in the order they were cut out."""
        found: list[Any] = [None] * len(images)
        for size, indices in group_by_size(images, self.image_size, self.encoder.fit).items():
            for chunk in self.encoder.passes(indices, size):
                chunk_images = [images[index] for index in chunk]
                (features,) = self.encoder(self.encoder.pixels(chunk_images, size), stages=(self.stage,)).maps
                _, soft, scores = cut_out(features, **self.search)
                stride = size[0] / features.shape[2]
                offset = self.encoder.cell_offset(stride) if self.cell_offset is None else self.cell_offset
                for index, *values in zip(chunk, chunk_images, soft, scores.cpu()):
                    found[index] = (*values, size, offset)
        return lambda: (self._enlarge(*values) for values in found)

    def _enlarge(
        self, image: Image.Image, soft: torch.Tensor, scores: torch.Tensor, size: tuple[int, int], offset: float
    ) -> Proposals:
        keep = scores >= 0
        soft, kept = soft[keep.to(soft.device)], scores[keep].numpy().astype(np.float32)
        shape = image.size[::-1]
        if self.refine is None or not len(soft):
            masks = upsample_grid(soft, shape, offset) > 0
        else:
            before = upsample_grid(soft, size, offset) > 0
            pixels = images_to_pixels([image], size, (0.0,) * 3, (1.0,) * 3, soft.device)
            after = pamr(pixels, before[None].float())[0]
            refined = after > 0.5
            agreement = (before & refined).sum(dim=(1, 2)) / (before | refined).sum(dim=(1, 2)).clamp_min(1)
            masks = upsample_grid(after, shape) > 0.5
            masks &= (agreement >= self.min_agreement)[:, None, None]
        proposals = Proposals(masks.cpu().numpy(), kept)
        return filter_proposals(proposals.take(proposals.masks.any(axis=(1, 2))), **self.filters)
