"""Foreground of natural images from a classifier's features: strong and unusual cells of the last map, sharpened.

Coarse map: the norm of the last map's features plus their first principal component, averaged over several image
sizes (small ones see the object whole, large ones place its outline). Sharpening: a ridge regression per image
predicts the coarse map from the finer maps and the position; what finer features cannot explain is noise, what they can
is outlined at their resolution. Otsu's threshold and connected components then give the instances, which `split` takes
apart further. Class-agnostic.

Both the regression and the several sizes improve the masks of single large animals, for which the defaults were chosen.
A class activation map of the named class added next to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ...data.dataset import Row
from ..cutting.proposals import Proposals, connected_components, filter_proposals, otsu_threshold, top_k, upsample_grid
from ..cutting.splitting import split_by_features, split_by_shape
from ..encoders.pixels import Size
from ..features import pooled
from ..protocol import BackboneLabeler, Finish
from ..settings import ForegroundSettings


def standardize(values: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Zero mean, unit standard deviation over the last two dimensions."""
    spread, mean = torch.std_mean(values, dim=(-2, -1), keepdim=True)
    return (values - mean) / (spread + eps)


def principal_map(features: torch.Tensor, iterations: int = 12, width: int = 4) -> torch.Tensor:
    """Projection of the cells of (B, C, h, w) on their first principal component -> (B, h, w); the sign is arbitrary.

    Subspace iteration with `width` vectors in place of a full decomposition: the error falls as (s_(width+1) / s_1)^(2
    iterations) of the singular values.
    """
    cells = features.flatten(2).transpose(1, 2).float()  # (B, h*w, C)
    cells = cells - cells.mean(dim=1, keepdim=True)
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(cells.shape[2], min(width, *cells.shape[1:]), generator=generator).to(cells)
    basis = basis.expand(len(cells), -1, -1)
    for _ in range(iterations):
        basis = torch.linalg.qr(cells.transpose(1, 2) @ (cells @ basis)).Q
    projected = cells @ basis
    direction = torch.linalg.eigh(projected.transpose(1, 2) @ projected).eigenvectors[..., -1:]
    return (projected @ direction)[..., 0].unflatten(1, features.shape[2:])


def foreground_maps(features: torch.Tensor, component: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Standardized norm, and norm plus `component` times the first principal component, signed like the norm.

    (B, C, h, w) -> two (B, h, w).
    """
    norm = standardize(features.norm(dim=1))
    if component == 0:
        return norm, norm
    principal = standardize(principal_map(features))
    sign = torch.where((principal * norm).mean(dim=(1, 2), keepdim=True) >= 0, 1.0, -1.0)
    return norm, norm + component * sign * principal


def regression_inputs(maps: Sequence[torch.Tensor], size: tuple[int, int], offsets: Sequence[float]) -> torch.Tensor:
    """Predictors of every cell of `size` (H, W): the standardized maps (B, C_l, h_l, w_l), the position to second
    order, and 1 -> (B, D, H*W)."""
    columns = []
    for level, offset in zip(maps, offsets):
        flat = upsample_grid(level, size, offset).flatten(2)
        spread, mean = torch.std_mean(flat, dim=2, keepdim=True)
        columns.append((flat - mean) / (spread + 1e-3))
    y = torch.linspace(-1, 1, size[0], device=columns[0].device)
    x = torch.linspace(-1, 1, size[1], device=columns[0].device)
    yy, xx = torch.meshgrid(y, x, indexing="ij")
    place = torch.stack([yy, xx, yy * yy, xx * xx, xx * yy, torch.ones_like(yy)]).flatten(1)
    columns.append(place.expand(len(columns[0]), -1, -1))
    return torch.cat(columns, dim=1)


class Ridge:
    """Closed-form ridge regressions, one an image, with one factorisation for several targets. inputs: (B, D, P)."""

    def __init__(self, inputs: torch.Tensor, strength: float) -> None:
        self.inputs = inputs
        penalty = strength * inputs.shape[2] * torch.eye(inputs.shape[1], device=inputs.device)
        self.factor = torch.linalg.cholesky(inputs @ inputs.transpose(1, 2) + penalty)

    def fit_predict(self, target: torch.Tensor) -> torch.Tensor:
        """target: (B, h, w) with h*w = P -> fitted values (B, h, w), standardized."""
        weights = torch.cholesky_solve(self.inputs @ target.flatten(1)[..., None], self.factor)  # (B, D, 1)
        return standardize((weights.transpose(1, 2) @ self.inputs).view(target.shape))


class ForegroundLabeler(BackboneLabeler):
    """Foreground components as proposals; class-agnostic. encoder: a frozen backbone. settings, changes: see
    `ForegroundSettings`."""

    name = "foreground"
    settings_class = ForegroundSettings
    config: ForegroundSettings

    @torch.inference_mode()
    def begin(self, images: Sequence[Image.Image], rows: Sequence[Row] | None = None) -> Finish:
        """The soft maps; what it returns cuts them into components: one `Proposals` an image, masks at its size."""
        if not images:
            return lambda: iter(())
        encoder, sizes = self.encoder, sorted({*self.config.norm_sizes, *self.config.component_sizes})
        grids: dict[int, Size] = {}
        largest = list(encoder.passes(images, sizes[-1]))
        for chunk, size in largest:
            grids |= dict.fromkeys(chunk, tuple(max(1, round(side * self.config.grid / max(size))) for side in size))
        # Sums over the sizes of the norm, and of norm + component, on each image's grid.
        sums = {index: torch.zeros(2, *grid, device=encoder.device) for index, grid in grids.items()}
        for longest in sizes[:-1]:
            for chunk, size in encoder.passes(images, longest):
                self._add_coarse([images[k] for k in chunk], size, longest, [sums[k] for k in chunk], ())
        found: list[Any] = [None] * len(images)
        for chunk, size in largest:
            members, totals = [images[k] for k in chunk], [sums[k] for k in chunk]
            fine = self.config.fine_stages if self.config.refine else ()
            *maps, last = self._add_coarse(members, size, sizes[-1], totals, fine)
            offset = encoder.cell_offset(size[0] / last.shape[2], self.config.cell_offset)
            offsets = [encoder.cell_offset(size[0] / level.shape[2]) for level in maps]
            sharp = self._sharpen(torch.stack(totals), maps, offsets, grids[chunk[0]])
            for index, soft, own in zip(chunk, sharp, last):
                found[index] = soft, own, offset
        return lambda: (
            pooled(self._components(soft.cpu(), image.size[::-1], own, offset), own, offset)
            for (soft, own, offset), image in zip(found, images)
        )

    def _add_coarse(
        self,
        images: Sequence[Image.Image],
        size: Size,
        longest: int,
        totals: Sequence[torch.Tensor],
        fine_stages: Sequence[int],
    ) -> list[torch.Tensor]:
        """Encode images of one size and add their coarse maps to `totals`; returns the maps of `fine_stages` and the
        one that the coarse maps are made of."""
        encoded = self.encoder(self.encoder.pixels(images, size), stages=(*fine_stages, self.config.stage))
        *fine, last = (level.float() for level in encoded)
        offset = self.encoder.cell_offset(size[0] / last.shape[2], self.config.cell_offset)
        wanted = longest in self.config.norm_sizes, longest in self.config.component_sizes
        maps = torch.stack(foreground_maps(last, self.config.component if wanted[1] else 0.0), dim=1)  # (B, 2, h, w)
        for total, soft in zip(totals, maps):
            large = standardize(upsample_grid(soft, total.shape[1:], offset))
            total += large * torch.tensor(wanted, device=large.device)[:, None, None]
        return [*fine, last]

    def _sharpen(
        self, sums: torch.Tensor, maps: Sequence[torch.Tensor], offsets: Sequence[float], grid: Size
    ) -> torch.Tensor:
        """(B, 2, *grid) sums of coarse maps, finer maps (B, C_l, h_l, w_l) -> soft foreground (B, *grid)."""
        coarse = standardize(standardize(sums).sum(dim=1))
        if not self.config.refine:
            return coarse
        ridge = Ridge(regression_inputs(maps, grid, offsets), self.config.strength)
        first = ridge.fit_predict(coarse)
        # A second fit, to the saturated first one: the outline counts, not how strongly the parts respond.
        thresholds = [otsu_threshold(values) for values in first.cpu().numpy()]
        second = ridge.fit_predict(torch.tanh(first - first.new_tensor(thresholds)[:, None, None]))
        return standardize(second + self.config.blend * coarse)

    def _components(
        self, soft: torch.Tensor, size: tuple[int, int], features: torch.Tensor, offset: float
    ) -> Proposals:
        large = upsample_grid(soft[None], size)[0]
        threshold = otsu_threshold(soft.cpu().numpy())
        spread = float(soft.max()) - threshold
        values = large.cpu().numpy()
        masks = connected_components(values > threshold, int(self.config.min_area * values.size), fill_holes=True)
        masks = [part for mask in masks for part in self._parts(mask, features, offset)]
        # Height above the threshold, of what is possible in this image: 0.5 at the threshold, 1 at the summit.
        scores = [
            0.5 + 0.5 * float(np.clip((values[mask].mean() - threshold) / max(spread, 1e-6), 0, 1)) for mask in masks
        ]
        proposals = Proposals.build(masks, scores, size)
        return top_k(filter_proposals(proposals, self.config.min_area, self.config.max_area), self.config.top)

    def _parts(self, mask: np.ndarray, features: torch.Tensor, offset: float) -> list[np.ndarray]:
        config = self.config
        if config.split == "shape":
            return split_by_shape(mask, config.max_parts, config.neck)
        if config.split == "ncut":
            return split_by_features(mask, features, config.max_parts, config.split_tau, config.max_ncut, offset)
        return [mask]
