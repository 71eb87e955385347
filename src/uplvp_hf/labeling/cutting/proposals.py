"""From soft maps to instances: thresholds, connected components, filters and non-maximum suppression.

Masks are numpy bool arrays (N, H, W) in image pixels unless a function says that it works on a feature grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import ndimage

from ...models.errors import UserError
from ...models.masks import mask_iou_matrix, tight_boxes

NMS_KINDS = ("mask", "matrix", "none")
KEPT = ("masks", "scores", "labels", "confidences", "features")  # of `Proposals.take`


@dataclass(frozen=True)
class Proposals:
    """Instances proposed for one image.

    masks: (N, H, W) bool at the image's size. scores: (N,) float32, higher is better.
    labels: (N,) int64 index into the vocabulary, or None while class-agnostic.
    confidences: (N,) float32 in [0, 1], how sure the namer was of `labels`, or None.
    features: (N, D) float16, what a network saw of each mask, or None where nothing looked (`labeling.features`).
    """

    masks: np.ndarray
    scores: np.ndarray
    labels: np.ndarray | None = None
    confidences: np.ndarray | None = None
    features: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.masks)

    def take(self, indices: Sequence[int] | np.ndarray) -> Proposals:
        """The proposals at `indices` (integers or a bool mask), in that order."""
        indices = np.asarray(indices)
        if indices.dtype != bool:
            indices = indices.astype(np.int64)
        kept = {name: getattr(self, name) for name in KEPT}
        return replace(self, **{name: None if value is None else value[indices] for name, value in kept.items()})

    @classmethod
    def build(
        cls, masks: Sequence[np.ndarray], scores: Sequence[float], size: tuple[int, int], labels=None
    ) -> Proposals:
        """Stack lists; `size` (height, width) gives the shape of an empty result."""
        stacked = np.stack(masks).astype(bool) if len(masks) else np.zeros((0, *size), dtype=bool)
        names = None if labels is None else np.asarray(labels, dtype=np.int64)
        return cls(stacked, np.asarray(scores, dtype=np.float32), names)


def _neighbors(
    length: int, cells: int, offset: float, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The two cells that each of `length` pixels lies between, and the weight of the second: three (length,)."""
    place = (torch.arange(length, device=device, dtype=torch.float64) + 0.5) * (cells / length) - 0.5 - offset
    place = place.clamp(0, cells - 1)
    first = place.floor().long()
    return first, (first + 1).clamp_max(cells - 1), (place - first).float()


def upsample_grid(
    grid: torch.Tensor, size: tuple[int, int], cell_offset: tuple[float, float] | float = 0.0
) -> torch.Tensor:
    """Bilinear resize of maps that respects where the cells of the grid lie in the image.

    grid: (..., h, w) float; size: (H, W). Cell (i, j) is taken to be centered at (i + .5 + dy, j + .5 + dx) cells from
    the image's top-left corner, with `cell_offset` = (dy, dx). With offset 0 this equals `F.interpolate(
    mode="bilinear", align_corners=False)` when enlarging; strided convolutions with one-sided padding shift the grid by
    up to half a cell. Memory is linear in the size of the result.
    Returns (..., H, W) float32.
    """
    dy, dx = (cell_offset, cell_offset) if isinstance(cell_offset, (int, float)) else cell_offset
    left, right, share = _neighbors(size[1], grid.shape[-1], dx, grid.device)
    rows = torch.lerp(grid.float()[..., left], grid.float()[..., right], share)  # (..., h, W)
    above, below, share = _neighbors(size[0], grid.shape[-2], dy, grid.device)
    return torch.lerp(rows[..., above, :], rows[..., below, :], share[:, None])


def otsu_threshold(values: np.ndarray, bins: int = 64) -> float:
    """Otsu's threshold: the histogram edge that maximizes the variance between the two sides. values: any shape."""
    if float(values.max()) == float(values.min()):
        return float(values.max())
    counts, edges = np.histogram(values, bins)
    centers = (edges[1:] + edges[:-1]) / 2
    weight = np.cumsum(counts) / counts.sum()  # share of the values at or below each bin
    mean = np.cumsum(counts * centers) / counts.sum()
    between = np.zeros(bins)
    inner = (weight > 0) & (weight < 1)
    between[inner] = (mean[-1] * weight[inner] - mean[inner]) ** 2 / (weight[inner] * (1 - weight[inner]))
    return float(edges[1:][between.argmax()])


def connected_components(mask: np.ndarray, min_area: int = 1, fill_holes: bool = False) -> list[np.ndarray]:
    """The 4-connected components of a (H, W) bool mask with at least `min_area` pixels, largest first."""
    if fill_holes:
        mask = ndimage.binary_fill_holes(mask)
    labeled, count = ndimage.label(mask)
    areas = np.bincount(labeled.ravel(), minlength=count + 1)[1:]
    order = np.argsort(-areas, kind="stable")
    return [labeled == k + 1 for k in order if areas[k] >= min_area]


def border_fraction(masks: np.ndarray) -> np.ndarray:
    """Share of the image's outermost pixels that each mask covers: (N, H, W) bool -> (N,) in [0, 1]."""
    height, width = masks.shape[1:]
    covered = masks[:, [0, -1][: min(height, 2)]].sum(axis=(1, 2))
    covered += masks[:, 1:-1, [0, -1][: min(width, 2)]].sum(axis=(1, 2))
    return covered / (height * width - max(height - 2, 0) * max(width - 2, 0))


def filter_proposals(
    proposals: Proposals,
    min_area: float = 0.0,
    max_area: float = 1.0,
    max_border: float = 1.0,
    min_score: float = -np.inf,
    max_aspect: float = np.inf,
    min_side: int = 0,
) -> Proposals:
    """Drop proposals outside the given shares of the image's area, of its border, or below a score.

    max_aspect: longer over shorter side of the tight box. min_side: pixels of the shorter side.
    """
    if not len(proposals):
        return proposals
    share = np.array([np.count_nonzero(mask) / mask.size for mask in proposals.masks])
    keep = (share >= min_area) & (share <= max_area) & (proposals.scores >= min_score)
    keep &= border_fraction(proposals.masks) <= max_border
    if np.isfinite(max_aspect) or min_side > 0:
        boxes = tight_boxes(proposals.masks)
        sides = boxes[:, 2:] - boxes[:, :2]
        shorter, longer = sides.min(axis=1), sides.max(axis=1)
        keep &= (longer <= max_aspect * np.maximum(shorter, 1)) & (shorter >= min_side)
    return proposals.take(keep)


def mask_nms(proposals: Proposals, iou: float = 0.5, agnostic: bool = False) -> Proposals:
    """Greedy suppression on mask IoU, per label (over all when class-agnostic); best score first."""
    if len(proposals) < 2:
        return proposals
    overlap = mask_iou_matrix(torch.from_numpy(proposals.masks)).numpy()
    if proposals.labels is not None and not agnostic:
        overlap = overlap * (proposals.labels[:, None] == proposals.labels[None])
    kept: list[int] = []
    for index in np.argsort(-proposals.scores, kind="stable"):
        if not kept or overlap[index, kept].max() <= iou:
            kept.append(int(index))
    return proposals.take(kept)


def apply_nms(
    proposals: Proposals,
    kind: str = "mask",
    iou: float = 0.5,
    sigma: float = 2.0,
    min_score: float = 0.0,
    kernel: str = "gaussian",
    agnostic: bool = False,
) -> Proposals:
    """Suppress duplicates; the result is sorted, best score first.

    kind: "mask" drops what overlaps a better mask by more than `iou`; "matrix" multiplies scores by `matrix_nms`'s
        decay (`kernel`, `sigma`) and drops what falls below `min_score`; "none" only sorts.
    agnostic: masks of different labels compete too.

    Raises UserError for an unknown kind or kernel.
    """
    if kind not in NMS_KINDS:
        raise UserError(f"NMS kind {kind!r} is unknown; use one of {', '.join(NMS_KINDS)}")
    proposals = proposals.take(np.argsort(-proposals.scores, kind="stable"))
    if kind == "none" or not len(proposals):
        return proposals
    if kind == "mask":
        return mask_nms(proposals, iou, agnostic)
    labels = None if proposals.labels is None or agnostic else torch.from_numpy(proposals.labels)
    scores = torch.from_numpy(np.asarray(proposals.scores, dtype=np.float32))
    decayed = matrix_nms(torch.from_numpy(proposals.masks), scores, labels, kernel, sigma).numpy()
    proposals = replace(proposals, scores=decayed).take(decayed >= min_score)
    return proposals.take(np.argsort(-proposals.scores, kind="stable"))


def matrix_nms(
    masks: torch.Tensor,
    scores: torch.Tensor,
    labels: torch.Tensor | None = None,
    kernel: str = "gaussian",
    sigma: float = 2.0,
) -> torch.Tensor:
    """Matrix NMS (SOLOv2): decayed scores instead of a hard decision; spec of SP uses gaussian, sigma 2, one class.

    masks: (..., N, h, w) bool, sorted by descending score; scores: (..., N). labels: (..., N) or None for
    class-agnostic.
    decay_j = min_i f(iou_ij) / f(comp_i), comp_i the largest IoU of i with a better mask, f = exp(-sigma iou^2) or
    1 - iou.
    Returns (..., N) scores * decay. Raises UserError for an unknown kernel.
    """
    if not scores.numel():
        return scores
    overlap = mask_iou_matrix(masks).triu(diagonal=1)
    if labels is not None:
        overlap = overlap * (labels[..., :, None] == labels[..., None, :])
    compensation = overlap.amax(dim=-2)[..., None]  # (..., N, 1), for the better mask i of each pair (i, j)
    if kernel == "gaussian":
        decay = torch.exp(-sigma * overlap**2) / torch.exp(-sigma * compensation**2)
    elif kernel == "linear":
        # A mask that repeats a better one (compensation 1) suppresses nothing: the better one does, and 0 / 0 is NaN.
        decay = (1 - overlap) / (1 - compensation).clamp_min(1e-6)
    else:
        raise UserError(f"matrix_nms kernel {kernel!r} is unknown; use 'gaussian' or 'linear'")
    return scores * decay.amin(dim=-2)


def top_k(proposals: Proposals, k: int = 20) -> Proposals:
    """The `k` best scores, best first (20 pseudo masks an image is the papers' number)."""
    return proposals.take(np.argsort(-proposals.scores, kind="stable")[:k])
