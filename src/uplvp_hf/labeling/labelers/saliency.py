"""Saliency Prompt's mask proposals (arXiv 2302.01171): self-similarity of a backbone map, one function a step.

Every function takes one map or a batch of maps (leading dimension B). Differences from the authors' script, all
deliberate: an eps in the min-max division, masks enlarged to the image according to where the cells lie, tight boxes
in image pixels downstream, and a trained backbone is insisted upon.

It proposes many masks an image, few of them right; for ImageNet features of single large objects `foreground` is the
better source.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ...data.rows import Row
from ...models.errors import UserError
from ...models.masks import tight_boxes
from ..cutting.proposals import Proposals, matrix_nms, upsample_grid
from ..encoders.backbone import Encoder
from ..encoders.pixels import group_by_size
from ..protocol import Finish, LabelerBase

# The filters of the authors' three scripts: the offline generator, the one inside the detector, and the supervised one.
VARIANTS: dict[str, dict[str, Any]] = {
    "offline": {"min_center": 0.2, "max_width": 0.95, "max_extent": None, "min_score": 0.7, "when_empty": "skip"},
    "online": {"min_center": 0.1, "max_width": None, "max_extent": None, "min_score": 0.7, "when_empty": "best"},
    "sup": {"min_center": 0.1, "max_width": None, "max_extent": 0.8, "min_score": 0.7, "when_empty": "best"},
}


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


def mass_boxes(masks: torch.Tensor) -> torch.Tensor:
    """Boxes around the center of mass, (N, h, w) -> (N, 4) xyxy in cells. Not the tight boxes; used by the filters."""
    x, y, width, height = mass_geometry(masks)
    return torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], dim=1)


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


def propose(features: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`propose_batch` for one map (C, h, w): soft masks (N, h, w) and their decayed scores (N,), best first."""
    soft, scores, valid = propose_batch(features[None], **options)
    return soft[0, valid[0]], scores[0, valid[0]]


def median_filter(maps: torch.Tensor, size: int = 3) -> torch.Tensor:
    """Median over size x size cells, edge cells repeated: (B, K, h, w). On soft maps it commutes with thresholding."""
    reach = size // 2
    padded = F.pad(maps, (reach,) * 4, mode="replicate")
    return padded.unfold(2, size, 1).unfold(3, size, 1).flatten(-2).median(dim=-1).values


class SaliencyLabeler(LabelerBase):
    """SP's proposals for images. Class-agnostic.

    Args:
        encoder: a frozen backbone. stage: which of its maps, counted from the finest (0) or the last (-1).
        image_size: longer side in pixels that images are stretched to, or (height, width) for all of them, which
            lets images of different shapes share a batch. Sides become multiples of what the encoder needs. On
            maps of stride 32, 256 finds large animals better (animals7) and balloons worse than 512.
        scales, threshold, min_cells, kernel, sigma, top: see `propose_batch`.
        variant: whose filters: "offline" (the authors' generator), "online" (inside their detector), "sup" (their
            supervised copy). min_center, max_width, max_extent, min_score (see `keep_plausible`; 0, or 1 for the
            upper bounds, lets everything pass) and when_empty replace the variant's value where given.
        when_empty: what an image whose masks were all filtered out gets: "skip" nothing, "best" its best mask.
        median: side in cells of a median filter over the masks (the authors' script has 3 commented out); 0 for none.
        cell_offset: in cells; None takes the encoder's.

    Raises UserError for an unknown variant, when_empty, kernel or median.
    """

    name = "saliency"

    def __init__(
        self,
        encoder: Encoder,
        image_size: int | tuple[int, int] = 512,
        stage: int = -1,
        scales: Sequence[float] = (1.0, 0.5, 0.25),
        threshold: float = 0.5,
        min_cells: int = 2,
        kernel: str = "gaussian",
        sigma: float = 2.0,
        top: int = 20,
        variant: str = "offline",
        min_center: float | None = None,
        max_width: float | None = None,
        max_extent: float | None = None,
        min_score: float | None = None,
        when_empty: str | None = None,
        median: int = 0,
        cell_offset: float | None = None,
    ) -> None:
        if variant not in VARIANTS:
            raise UserError(f"saliency variant {variant!r} is unknown; use one of {', '.join(VARIANTS)}")
        if kernel not in ("gaussian", "linear"):
            raise UserError(f"saliency: Matrix NMS kernel {kernel!r} is unknown; use 'gaussian' or 'linear'")
        if median and (median < 3 or median % 2 == 0):
            raise UserError(f"saliency: a median filter of {median} cells has no middle; use 0, 3, 5, ...")
        self.encoder, self.encoder_name, self.license = encoder, encoder.name, encoder.license
        self.image_size, self.stage, self.cell_offset, self.median = image_size, stage, cell_offset, median
        self.threshold = threshold
        self.search = {"scales": tuple(scales), "threshold": threshold, "min_cells": min_cells}
        self.search |= {"kernel": kernel, "sigma": sigma, "top": top}
        given = {"min_center": min_center, "max_width": max_width, "max_extent": max_extent, "min_score": min_score}
        given["when_empty"] = when_empty
        chosen = VARIANTS[variant] | {name: value for name, value in given.items() if value is not None}
        self.when_empty = chosen.pop("when_empty")
        if self.when_empty not in ("skip", "best"):
            raise UserError(f"saliency: when_empty {when_empty!r} is unknown; use 'skip' or 'best'")
        self.filters = chosen

    @property
    def settings(self) -> dict[str, Any]:
        """What the labels depend on, for the store's header."""
        search = {**self.search, "scales": list(self.search["scales"])}
        size = self.image_size if isinstance(self.image_size, int) else list(self.image_size)
        own = {name: getattr(self, name) for name in ("stage", "cell_offset", "median", "when_empty")}
        return {"image_size": size, "dtype": self.encoder.dtype_name, **own, **search, **self.filters}

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
        for size, indices in group_by_size(images, self.image_size, self._fit).items():
            for chunk in self.encoder.passes(indices, size):
                pixels = self.encoder.pixels([images[i] for i in chunk], size)
                (features,) = self.encoder(pixels, stages=(self.stage,)).maps
                stride = size[0] / features.shape[2]
                offset = self.encoder.cell_offset(stride) if self.cell_offset is None else self.cell_offset
                for index, kept in zip(chunk, self.propose_maps(features.float())):
                    found[index] = (*kept, offset)

        def enlarge() -> Iterator[Proposals]:
            for image, (soft, scores, offset) in zip(images, found):
                large = upsample_grid(soft, image.size[::-1], offset) >= self.threshold
                proposals = Proposals(large.cpu().numpy(), scores)
                yield proposals.take(proposals.masks.any(axis=(1, 2)))  # a median filter can empty a mask

        return enlarge

    @torch.inference_mode()
    def propose_maps(self, features: torch.Tensor) -> list[tuple[torch.Tensor, np.ndarray]]:
        """(B, C, h, w) -> for each image the soft masks that pass the filters (N, h, w), scores (N,) best first."""
        soft, scores, valid = propose_batch(features, **self.search)
        if self.median:
            soft = median_filter(soft, self.median)
        keep = valid & keep_plausible((soft >= self.threshold).float(), scores, **self.filters)
        if self.when_empty == "best":
            keep[:, 0] |= valid[:, 0] & ~keep.any(dim=1)
        kept, ranked = keep.cpu(), scores.cpu().numpy().astype(np.float32)  # one transfer for the batch
        picked = [torch.nonzero(row)[:, 0] for row in kept]
        return [(maps[index.to(maps.device)], rank[index.numpy()]) for maps, index, rank in zip(soft, picked, ranked)]
