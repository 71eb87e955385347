"""MaskCut (arXiv 2301.11320): masks by repeated normalized cuts of a backbone's features (`normalized_cut`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from ...data.dataset import Row
from ..cutting.normalized_cut import BATCH_FLOATS, affinity, second_eigenvector
from ..cutting.proposals import Proposals, filter_proposals, upsample_grid
from ..cutting.refine import pamr
from ..encoders.pixels import images_to_pixels
from ..features import pooled
from ..protocol import BackboneLabeler, Finish
from ..settings import NcutSettings


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


class NcutLabeler(BackboneLabeler):
    """Class-agnostic proposals by normalized cuts of a backbone's features (MaskCut's recipe, on any backbone).

    encoder: a frozen backbone; MaskCut has DINO's ViT-B/8. settings, changes: see `NcutSettings`; its defaults are
    MaskCut's. The eigenproblem grows with the third power of the number of cells: 900 (480 pixels at stride 16) take
    .2 s a mask on a CPU core. Refinement stands in the place of MaskCut's CRF, whose agreement check it keeps.
    """

    name = "ncut"
    settings_class = NcutSettings
    config: NcutSettings

    @torch.inference_mode()
    def begin(self, images: Sequence[Image.Image], rows: Sequence[Row] | None = None) -> Finish:
        """The cuts; what it returns enlarges the masks: one `Proposals` an image, in the order they were cut out."""
        config = self.config
        found: list[Any] = [None] * len(images)
        for chunk, size in self.encoder.passes(images, config.image_size):
            members = [images[index] for index in chunk]
            features, offset = self.encoder.map_of(members, size, config.stage, config.cell_offset)
            _, soft, scores = cut_out(
                features, config.masks, config.tau, config.min_area, config.max_iou, config.center
            )
            for index, own, *values in zip(chunk, features, members, soft, scores.cpu()):
                found[index] = (*values, size, offset), own
        return lambda: (pooled(self._enlarge(*values), own, values[-1]) for values, own in found)

    def _enlarge(
        self, image: Image.Image, soft: torch.Tensor, scores: torch.Tensor, size: tuple[int, int], offset: float
    ) -> Proposals:
        keep = scores >= 0
        soft, kept = soft[keep.to(soft.device)], scores[keep].numpy().astype(np.float32)
        shape = image.size[::-1]
        if self.config.refine is None or not len(soft):
            masks = upsample_grid(soft, shape, offset) > 0
        else:
            before = upsample_grid(soft, size, offset) > 0
            pixels = images_to_pixels([image], size, (0.0,) * 3, (1.0,) * 3, soft.device)
            after = pamr(pixels, before[None].float())[0]
            refined = after > 0.5
            agreement = (before & refined).sum(dim=(1, 2)) / (before | refined).sum(dim=(1, 2)).clamp_min(1)
            masks = upsample_grid(after, shape) > 0.5
            masks &= (agreement >= self.config.min_agreement)[:, None, None]
        proposals = Proposals(masks.cpu().numpy(), kept)
        proposals = proposals.take(proposals.masks.any(axis=(1, 2)))
        return filter_proposals(proposals, max_area=self.config.max_area, max_border=self.config.max_border)
