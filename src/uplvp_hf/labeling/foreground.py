"""Foreground of natural pictures from a classifier's features: strong and unusual cells of the last map, sharpened.

Coarse map: the norm of the last map's features plus their first principal component, averaged over several picture
sizes (small ones see the object whole, large ones place its outline). Sharpening: a ridge regression per picture
predicts the coarse map from the finer maps and the position; what finer features cannot explain is noise, what they can
is outlined at their resolution. Otsu's threshold and connected components then give the instances. Class-agnostic.

Both the regression and the several sizes improve the masks of single large animals, for which the defaults were chosen.
A class activation map of the named class added next to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..data.dataset import Row
from .encoders import Encoder
from .instances import Proposals, connected_components, filter_proposals, otsu_threshold, top_k, upsample_grid
from .pipeline import LabelerBase
from .saliency import group_by_size


def standardise(values: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Zero mean, unit standard deviation over all elements."""
    return (values - values.mean()) / (values.std() + eps)


def principal_map(features: torch.Tensor) -> torch.Tensor:
    """Projection of the cells of (C, h, w) on their first principal component -> (h, w); the sign is arbitrary."""
    cells = features.flatten(1).T  # (h*w, C)
    cells = cells - cells.mean(dim=0)
    left, values, _ = torch.linalg.svd(cells, full_matrices=False)
    return (left[:, 0] * values[0]).view(features.shape[1:])


def foreground_map(features: torch.Tensor, component: float = 1.0) -> torch.Tensor:
    """Norm plus `component` times the first principal component, signed like the norm: (C, h, w) -> (h, w)."""
    norm = standardise(features.norm(dim=0))
    if component == 0:
        return norm
    principal = standardise(principal_map(features))
    sign = 1.0 if float((principal * norm).mean()) >= 0 else -1.0
    return norm + component * sign * principal


def regression_inputs(maps: Sequence[torch.Tensor], size: tuple[int, int], offsets: Sequence[float]) -> torch.Tensor:
    """Predictors of every pixel of `size` (H, W): the standardised maps (C_l, h_l, w_l), the position to second order,
    and 1 -> (H*W, D)."""
    columns = []
    for level, offset in zip(maps, offsets):
        flat = upsample_grid(level, size, offset).flatten(1)
        columns.append((flat - flat.mean(dim=1, keepdim=True)) / (flat.std(dim=1, keepdim=True) + 1e-3))
    y = torch.linspace(-1, 1, size[0], device=columns[0].device)
    x = torch.linspace(-1, 1, size[1], device=columns[0].device)
    yy, xx = torch.meshgrid(y, x, indexing="ij")
    columns.append(torch.stack([yy, xx, yy * yy, xx * xx, xx * yy, torch.ones_like(yy)]).flatten(1))
    return torch.cat(columns).T


class Ridge:
    """Closed-form ridge regression with one factorisation for several targets. inputs: (P, D)."""

    def __init__(self, inputs: torch.Tensor, strength: float) -> None:
        self.inputs = inputs
        penalty = strength * len(inputs) * torch.eye(inputs.shape[1], device=inputs.device)
        self.factor = torch.linalg.cholesky(inputs.T @ inputs + penalty)

    def fit_predict(self, target: torch.Tensor) -> torch.Tensor:
        """target: (h, w) with h*w = P -> fitted values (h, w), standardised."""
        weights = torch.cholesky_solve(self.inputs.T @ target.reshape(-1, 1), self.factor)
        return standardise((self.inputs @ weights).view(target.shape))


class ForegroundLabeler(LabelerBase):
    """Foreground components as proposals; class-agnostic.

    Args:
        encoder: a frozen backbone.
        norm_sizes, component_sizes: longer sides in pixels at which the norm alone, and norm + component, are computed.
        component: weight of the principal component in the latter.
        refine: sharpen by regression on the maps of stride 8 and 16 at the largest size.
        strength: ridge penalty per pixel. blend: weight of the coarse map in the result.
        grid: longer side in pixels of the map that is thresholded.
        min_area, max_area: shares of the picture's area. top: most instances a picture.
        cell_offset: in cells of the last map; None takes the encoder's.
    """

    name = "foreground"

    def __init__(
        self,
        encoder: Encoder,
        norm_sizes: Sequence[int] = (256, 384, 512, 768),
        component_sizes: Sequence[int] = (384, 512, 768),
        component: float = 1.0,
        refine: bool = True,
        strength: float = 3.0,
        blend: float = 0.5,
        grid: int = 160,
        min_area: float = 0.02,
        max_area: float = 0.95,
        top: int = 20,
        cell_offset: float | None = None,
    ) -> None:
        if not norm_sizes and not component_sizes:
            raise ValueError(
                "foreground labeler: norm_sizes and component_sizes are both empty; give at least one size"
            )
        self.encoder = encoder
        self.encoder_name = encoder.name
        self.norm_sizes, self.component_sizes, self.component = tuple(norm_sizes), tuple(component_sizes), component
        self.refine, self.strength, self.blend, self.grid = refine, strength, blend, grid
        self.min_area, self.max_area, self.top, self.cell_offset = min_area, max_area, top, cell_offset

    @property
    def settings(self) -> dict[str, Any]:
        """What the labels depend on, for the store's header."""
        names = ("component", "refine", "strength", "blend", "grid", "min_area", "max_area", "top", "cell_offset")
        sizes = {"norm_sizes": list(self.norm_sizes), "component_sizes": list(self.component_sizes)}
        return sizes | {name: getattr(self, name) for name in names}

    def __call__(self, images: Sequence[Image.Image], rows: Sequence[Row] | None = None) -> list[Proposals]:
        """One `Proposals` a picture, masks at the picture's size."""
        sizes = sorted({*self.norm_sizes, *self.component_sizes})
        pyramids = {longest: self._encode(images, longest) for longest in sizes}
        results = []
        for index, image in enumerate(images):
            soft = self.soft_map({longest: pyramids[longest][index] for longest in sizes}, image.size[::-1])
            results.append(self._components(soft, image.size[::-1]))
        return results

    def _encode(self, images: Sequence[Image.Image], longest: int) -> list[tuple[tuple[torch.Tensor, ...], int]]:
        """Per picture: the last three maps, finest first, and the height in pixels of the network's input."""
        results: list[Any] = [None] * len(images)
        for size, indices in group_by_size(images, longest).items():
            maps = self.encoder(self.encoder.pixels([images[i] for i in indices], size)).maps[-3:]
            for position, index in enumerate(indices):
                results[index] = (tuple(level[position].float() for level in maps), size[0])
        return results

    def _offset(self, level: torch.Tensor, input_height: int, last: bool = False) -> float:
        if last and self.cell_offset is not None:
            return self.cell_offset
        return self.encoder.cell_offset(input_height / level.shape[1])

    def soft_map(self, pyramid: dict[int, tuple[tuple[torch.Tensor, ...], int]], size: tuple[int, int]) -> torch.Tensor:
        """{longer side: (maps, input height)} of a picture of `size` (H, W) -> soft foreground, `grid` pixels long."""
        scale = self.grid / max(size)
        grid = tuple(max(1, round(side * scale)) for side in size)

        def average(longest_sides: Sequence[int], component: float) -> torch.Tensor | float:
            total: torch.Tensor | float = 0.0
            for longest in longest_sides:
                maps, height = pyramid[longest]
                coarse = foreground_map(maps[-1], component)[None]
                total = total + standardise(upsample_grid(coarse, grid, self._offset(maps[-1], height, last=True))[0])
            return standardise(total) if isinstance(total, torch.Tensor) else total

        coarse = standardise(average(self.norm_sizes, 0.0) + average(self.component_sizes, self.component))
        if not self.refine:
            return coarse
        maps, height = pyramid[max(pyramid)]
        inputs = regression_inputs(maps[:-1], grid, [self._offset(level, height) for level in maps[:-1]])
        ridge = Ridge(inputs, self.strength)
        first = ridge.fit_predict(coarse)
        # A second fit, to the saturated first one: the outline counts, not how strongly the parts respond.
        second = ridge.fit_predict(torch.tanh(first - otsu_threshold(first.cpu().numpy())))
        return standardise(second + self.blend * coarse)

    def _components(self, soft: torch.Tensor, size: tuple[int, int]) -> Proposals:
        large = upsample_grid(soft[None], size)[0]
        threshold = otsu_threshold(soft.cpu().numpy())
        spread = float(soft.max()) - threshold
        values = large.cpu().numpy()
        masks = connected_components(values > threshold, int(self.min_area * values.size), fill_holes=True)
        # Height above the threshold, of what is possible in this picture: 0.5 at the threshold, 1 at the summit.
        scores = [
            0.5 + 0.5 * float(np.clip((values[mask].mean() - threshold) / max(spread, 1e-6), 0, 1)) for mask in masks
        ]
        proposals = Proposals.build(masks, scores, size)
        return top_k(filter_proposals(proposals, self.min_area, self.max_area), self.top)
