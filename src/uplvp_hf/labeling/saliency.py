"""Saliency Prompt's mask proposals (arXiv 2302.01171): self-similarity of the last backbone map, one function a step.

Differences from the authors' script, all deliberate: an eps in the min-max division, masks enlarged to the picture
according to where the cells lie, tight boxes in picture pixels downstream, and a trained backbone is insisted upon.

It proposes many masks a picture, few of them right; for ImageNet features of single large objects `foreground` is the
better source.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..data.dataset import Row
from .encoders import Encoder, fit_longest
from .instances import Proposals, filter_proposals, matrix_nms, top_k, upsample_grid
from .pipeline import LabelerBase


def make_queries(features: torch.Tensor, scales: Sequence[float] = (1.0, 0.5, 0.25)) -> torch.Tensor:
    """The map (C, h, w) at several bilinear scales, flattened: (Q, C) queries, finest scale first."""
    levels = [
        features if scale == 1 else F.interpolate(features[None], scale_factor=scale, mode="bilinear")[0]
        for scale in scales
        if min(features.shape[1:]) * scale >= 1
    ]
    return torch.cat([level.flatten(1) for level in levels], dim=1).T


def similarity_maps(features: torch.Tensor, queries: torch.Tensor, eps: float = 1e-12) -> torch.Tensor:
    """Cosine of every query with every cell, min-max scaled per query: (C, h, w), (Q, C) -> (Q, h, w) in [0, 1].

    A query equally similar to all cells gives zeros, not NaN.
    """
    cells = F.normalize(features.flatten(1), dim=0)  # (C, h*w)
    maps = F.normalize(queries, dim=1) @ cells
    maps = maps - maps.min(dim=1, keepdim=True).values
    maps = maps / maps.max(dim=1, keepdim=True).values.clamp_min(eps)
    return maps.view(len(queries), *features.shape[1:])


def maskness(soft: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Mean soft value inside each mask: (Q, h, w), (Q, h, w) bool -> (Q,)."""
    return (soft * masks).sum(dim=(1, 2)) / masks.sum(dim=(1, 2)).clamp_min(1)


def mass_geometry(soft: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Centre and extent of (N, h, w) masks from their row and column projections, in cells.

    Returns centre x, centre y (of mass, of the max-projections), width, height (sums of the projections), each (N,).
    """
    columns, rows = soft.amax(dim=1).float(), soft.amax(dim=2).float()  # (N, w), (N, h)
    width, height = columns.sum(dim=1), rows.sum(dim=1)
    x = (columns * torch.arange(columns.shape[1], device=soft.device)).sum(dim=1) / width.clamp_min(1e-6)
    y = (rows * torch.arange(rows.shape[1], device=soft.device)).sum(dim=1) / height.clamp_min(1e-6)
    return x, y, width, height


def mass_boxes(masks: torch.Tensor) -> torch.Tensor:
    """Boxes around the centre of mass, (N, h, w) -> (N, 4) xyxy in cells. Not the tight boxes; used by the filters."""
    x, y, width, height = mass_geometry(masks)
    return torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], dim=1)


def keep_plausible(
    masks: torch.Tensor, scores: torch.Tensor, min_centre: float = 0.2, max_width: float = 0.95, min_score: float = 0.7
) -> torch.Tensor:
    """Drop what hugs the top, spans the picture, or has decayed: (N, h, w) masks, (N,) scores -> (N,) bool.

    min_centre and max_width are shares of the grid's height and width.
    """
    _, y, width, _ = mass_geometry(masks)
    height_cells, width_cells = masks.shape[1:]
    return (y > min_centre * height_cells) & (width < max_width * width_cells) & (scores >= min_score)


def propose(
    features: torch.Tensor,
    scales: Sequence[float] = (1.0, 0.5, 0.25),
    threshold: float = 0.5,
    min_cells: int = 2,
    kernel: str = "gaussian",
    sigma: float = 2.0,
    top: int = 20,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps 1-7 for one map (C, h, w): soft masks (N, h, w) and their decayed scores (N,), best first, N <= top."""
    soft = similarity_maps(features, make_queries(features, scales))
    masks = soft >= threshold
    large = masks.sum(dim=(1, 2)) >= min_cells
    soft, masks = soft[large], masks[large]
    scores = maskness(soft, masks)
    order = scores.argsort(descending=True)
    scores = matrix_nms(masks[order], scores[order], kernel=kernel, sigma=sigma)
    best = scores.argsort(descending=True)[:top]
    return soft[order][best], scores[best]


class SaliencyLabeler(LabelerBase):
    """SP's proposals for pictures. Class-agnostic.

    Args:
        encoder: a frozen backbone; its last map is used.
        image_size: longer side in pixels that pictures are stretched to (sides become multiples of 32).
        scales, threshold, min_cells, kernel, sigma, top: see `propose`.
        min_centre, max_width, min_score: see `keep_plausible` (the offline script's values).
        cell_offset: in cells; None takes the encoder's.
    """

    name = "saliency"

    def __init__(
        self,
        encoder: Encoder,
        image_size: int = 512,
        scales: Sequence[float] = (1.0, 0.5, 0.25),
        threshold: float = 0.5,
        min_cells: int = 2,
        kernel: str = "gaussian",
        sigma: float = 2.0,
        top: int = 20,
        min_centre: float = 0.2,
        max_width: float = 0.95,
        min_score: float = 0.7,
        cell_offset: float | None = None,
    ) -> None:
        self.encoder = encoder
        self.encoder_name = encoder.name
        self.image_size, self.threshold, self.cell_offset = image_size, threshold, cell_offset
        self.search = {"scales": tuple(scales), "threshold": threshold, "min_cells": min_cells}
        self.search |= {"kernel": kernel, "sigma": sigma, "top": top}
        self.filters = {"min_centre": min_centre, "max_width": max_width, "min_score": min_score}

    @property
    def settings(self) -> dict[str, Any]:
        """What the labels depend on, for the store's header."""
        search = {**self.search, "scales": list(self.search["scales"])}
        return {"image_size": self.image_size, "cell_offset": self.cell_offset, **search, **self.filters}

    def __call__(self, images: Sequence[Image.Image], rows: Sequence[Row] | None = None) -> list[Proposals]:
        """One `Proposals` a picture, masks at the picture's size."""
        results: list[Proposals | None] = [None] * len(images)
        for size, indices in group_by_size(images, self.image_size).items():
            features = self.encoder(self.encoder.pixels([images[i] for i in indices], size)).maps[-1].float()
            for index, feature in zip(indices, features):
                results[index] = self.propose_picture(feature, images[index].size[::-1], size[0] / feature.shape[1])
        return results

    def propose_picture(self, feature: torch.Tensor, size: tuple[int, int], stride: float) -> Proposals:
        """feature: (C, h, w); size: (H, W) of the picture; stride in pixels of the network's input."""
        soft, scores = propose(feature, **self.search)
        keep = keep_plausible((soft >= self.threshold).float(), scores, **self.filters)
        offset = self.encoder.cell_offset(stride) if self.cell_offset is None else self.cell_offset
        large = upsample_grid(soft[keep], size, offset) if bool(keep.any()) else soft.new_zeros((0, *size))
        proposals = Proposals((large >= self.threshold).cpu().numpy(), scores[keep].cpu().numpy().astype(np.float32))
        return top_k(filter_proposals(proposals, min_area=1e-6), self.search["top"])


def group_by_size(images: Sequence[Image.Image], longest: int) -> dict[tuple[int, int], list[int]]:
    """Indices of the pictures by the (height, width) they are resized to, so that each group is one batch."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index, image in enumerate(images):
        groups.setdefault(fit_longest(*image.size, longest), []).append(index)
    return groups
