"""Saliency Prompt's mask proposals (arXiv 2302.01171): self-similarity of a backbone map, one function a step.

Every function takes one map or a batch of maps (leading dimension B). Differences from the authors' script, all
deliberate: an eps in the min-max division, masks enlarged to the image according to where the cells lie, tight boxes
in image pixels downstream, and a trained backbone is insisted upon.

It proposes many masks an image, few of them right; for ImageNet features of single large objects `foreground` is the
better labeler.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ...data.dataset import Row
from ...models.masks import tight_boxes
from ..cutting.proposals import Proposals, matrix_nms, upsample_grid
from ..encoders.backbone import Encoder
from ..features import averages
from ..protocol import BackboneLabeler, Finish
from ..settings import SaliencySettings

# The filters of the authors' three scripts: the offline generator, the one inside the detector, and the supervised one.
VARIANTS: dict[str, dict[str, Any]] = {
    "offline": {"min_center": 0.2, "max_width": 0.95, "max_extent": None, "min_score": 0.7, "when_empty": "skip"},
    "online": {"min_center": 0.1, "max_width": None, "max_extent": None, "min_score": 0.7, "when_empty": "best"},
    "sup": {"min_center": 0.1, "max_width": None, "max_extent": 0.8, "min_score": 0.7, "when_empty": "best"},
}

SEARCH = ("scales", "threshold", "min_cells", "kernel", "sigma", "top")  # settings of `propose_batch`


def make_queries(features: torch.Tensor, scales: Sequence[float] = (1.0, 0.5, 0.25)) -> torch.Tensor:
    """The map ([B,] C, h, w) at several bilinear scales, flattened: ([B,] Q, C) queries, finest scale first."""
    maps = features if features.ndim == 4 else features[None]
    levels = [
        maps if scale == 1 else F.interpolate(maps, scale_factor=scale, mode="bilinear")
        for scale in scales
        if min(maps.shape[2:]) * scale >= 1
    ]
    queries = torch.cat([level.flatten(2) for level in levels], dim=2).transpose(1, 2)
    return queries if features.ndim == 4 else queries[0]


def similarity_maps(features: torch.Tensor, queries: torch.Tensor, eps: float = 1e-12) -> torch.Tensor:
    """Cosine of every query with every cell, min-max scaled a query: ([B,] C, h, w), ([B,] Q, C) -> ([B,] Q, h, w).

    Values in [0, 1]. A query equally similar to all cells gives zeros, not NaN.
    """
    cells = F.normalize(features.flatten(-2), dim=-2)  # ([B,] C, h*w)
    maps = F.normalize(queries, dim=-1) @ cells
    maps = maps - maps.amin(dim=-1, keepdim=True)
    maps = maps / maps.amax(dim=-1, keepdim=True).clamp_min(eps)
    return maps.unflatten(-1, features.shape[-2:])


def maskness(soft: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Mean soft value inside each mask: (..., Q, h, w), (..., Q, h, w) bool -> (..., Q)."""
    return (soft * masks).sum(dim=(-2, -1)) / masks.sum(dim=(-2, -1)).clamp_min(1)


def mass_geometry(soft: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Center and extent of (..., h, w) masks from their row and column projections, in cells.

    Returns center x, center y (of mass, of the max-projections), width, height (sums of the projections), each (...,).
    """
    columns, rows = soft.amax(dim=-2).float(), soft.amax(dim=-1).float()  # (..., w), (..., h)
    width, height = columns.sum(dim=-1), rows.sum(dim=-1)
    x = (columns * torch.arange(columns.shape[-1], device=soft.device)).sum(dim=-1) / width.clamp_min(1e-6)
    y = (rows * torch.arange(rows.shape[-1], device=soft.device)).sum(dim=-1) / height.clamp_min(1e-6)
    return x, y, width, height


def keep_plausible(
    masks: torch.Tensor,
    scores: torch.Tensor,
    min_center: float = 0.2,
    max_width: float | None = 0.95,
    min_score: float = 0.7,
    max_extent: float | None = None,
) -> torch.Tensor:
    """Drop what hugs the top, spans the image, or has decayed: (..., h, w) masks, (...,) scores -> (...,) bool.

    min_center: the center of mass lies lower than this share of the grid's height. max_width: the row of occupied
    columns is shorter than this share of the width. max_extent: the tight box does not exceed this share of both the
    height and the width. None leaves a filter out.
    """
    _, y, width, _ = mass_geometry(masks)
    height_cells, width_cells = masks.shape[-2:]
    keep = (y > min_center * height_cells) & (scores >= min_score)
    if max_width is not None:
        keep &= width < max_width * width_cells
    if max_extent is not None:
        boxes = tight_boxes(masks > 0)
        wide, tall = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
        keep &= ~((tall > max_extent * height_cells) & (wide > max_extent * width_cells))
    return keep


def propose_batch(
    features: torch.Tensor,
    scales: Sequence[float] = (1.0, 0.5, 0.25),
    threshold: float = 0.5,
    min_cells: int = 2,
    kernel: str = "gaussian",
    sigma: float = 2.0,
    top: int = 20,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From maps to ranked soft masks, for all images of a batch at once (reference steps 1 to 7).

    features: (B, C, h, w). scales: of the queries. threshold: of the soft masks. min_cells: smaller masks are dropped.
    kernel, sigma: of Matrix NMS. top: most masks an image.
    Returns soft masks (B, K, h, w), decayed scores (B, K), best first, and (B, K) bool, False where an image has fewer
    than K masks. Memory: B * Q * (h * w + Q) floats for Q = sum over scales of the scaled map's cells.
    """
    soft = similarity_maps(features, make_queries(features, scales))
    masks = soft >= threshold
    large = masks.sum(dim=(-2, -1)) >= min_cells
    masks = masks & large[..., None, None]  # an empty mask overlaps nothing
    scores = maskness(soft, masks).masked_fill(~large, -torch.inf)
    scores, order = scores.sort(dim=-1, descending=True, stable=True)
    decayed = matrix_nms(_pick(masks, order), scores.masked_fill(scores.isinf(), 0.0), kernel=kernel, sigma=sigma)
    decayed = decayed.masked_fill(scores.isinf(), -torch.inf)
    decayed, best = decayed.sort(dim=-1, descending=True, stable=True)
    decayed, best = decayed[:, :top], order.gather(1, best[:, :top])
    return _pick(soft, best), decayed, ~decayed.isinf()


def _pick(maps: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(B, Q, h, w), (B, K) -> (B, K, h, w)."""
    return maps.gather(1, index[..., None, None].expand(-1, -1, *maps.shape[2:]))


def median_filter(maps: torch.Tensor, size: int = 3) -> torch.Tensor:
    """Median over size x size cells, edge cells repeated: (B, K, h, w). On soft maps it commutes with thresholding."""
    reach = size // 2
    padded = F.pad(maps, (reach,) * 4, mode="replicate")
    return padded.unfold(2, size, 1).unfold(3, size, 1).flatten(-2).median(dim=-1).values


class SaliencyLabeler(BackboneLabeler):
    """SP's proposals for images. Class-agnostic. encoder: a frozen backbone. settings, changes: `SaliencySettings`."""

    name = "saliency"
    settings_class = SaliencySettings
    config: SaliencySettings

    def __init__(self, encoder: Encoder, settings: SaliencySettings | None = None, **changes: Any) -> None:
        super().__init__(encoder, settings, **changes)
        self.search = {name: getattr(self.config, name) for name in SEARCH}
        variant = VARIANTS[self.config.variant]
        given = {name: getattr(self.config, name) for name in variant}
        self.filters = variant | {name: value for name, value in given.items() if value is not None}
        self.when_empty = self.filters.pop("when_empty")

    @property
    def settings(self) -> dict[str, Any]:
        """For the store's header, with the variant's filters."""
        return super().settings | self.filters | {"when_empty": self.when_empty}

    def _fit(self, width: int, height: int, longest: Any) -> tuple[int, int]:
        if isinstance(longest, int):
            return self.encoder.fit(width, height, longest)
        multiple = self.encoder.size_multiple
        return self.encoder.fixed_size or tuple(max(multiple, round(s / multiple) * multiple) for s in longest)

    @torch.inference_mode()
    def begin(self, images: Sequence[Image.Image], rows: Sequence[Row] | None = None) -> Finish:
        """Everything on the grid; what it returns enlarges the masks: one `Proposals` an image, best first, at the
        image's size."""
        found: list[Any] = [None] * len(images)
        for chunk, size in self.encoder.passes(images, self.config.image_size, self._fit):
            members = [images[i] for i in chunk]
            features, offset = self.encoder.map_of(members, size, self.config.stage, self.config.cell_offset)
            for index, kept, own in zip(chunk, self.propose_maps(features), features):
                found[index] = (*kept, own, offset)

        def enlarge() -> Iterator[Proposals]:
            for image, (soft, scores, features, offset) in zip(images, found):
                large = upsample_grid(soft, image.size[::-1], offset) >= self.config.threshold
                seen = averages(soft >= self.config.threshold, features)  # on the grid, which is cheaper
                proposals = Proposals(large.cpu().numpy(), scores, features=seen)
                yield proposals.take(proposals.masks.any(axis=(1, 2)))  # a median filter can empty a mask

        return enlarge

    @torch.inference_mode()
    def propose_maps(self, features: torch.Tensor) -> list[tuple[torch.Tensor, np.ndarray]]:
        """(B, C, h, w) -> for each image the soft masks that pass the filters (N, h, w), scores (N,) best first."""
        soft, scores, valid = propose_batch(features, **self.search)
        if self.config.median:
            soft = median_filter(soft, self.config.median)
        keep = valid & keep_plausible((soft >= self.config.threshold).float(), scores, **self.filters)
        if self.when_empty == "best":
            keep[:, 0] |= valid[:, 0] & ~keep.any(dim=1)
        kept, ranked = keep.cpu(), scores.cpu().numpy().astype(np.float32)  # one transfer for the batch
        picked = [torch.nonzero(row)[:, 0] for row in kept]
        return [(maps[index.to(maps.device)], rank[index.numpy()]) for maps, index, rank in zip(soft, picked, ranked)]
