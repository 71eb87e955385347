"""What a loss is told about pseudo labels beyond class and mask: how good they are, and where they may be missing.

A set loss takes every query that no target is matched to as background. With labels of a teacher that is wrong where
the teacher was unsure, so there such queries are left out. Shared by all segmenters.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .matching import Pairs

# A query lies on what is unsure when at least this share of its mask (or box) does.
_SHARE = 0.5


@dataclass
class PseudoTargets:
    """Beside the `mask_labels` and `class_labels` of B images, with G_i instances each and K classes.

    mask_weights: per image (G_i,), factors of the mask and box losses; None: 1. class_targets: per image (G_i, K),
    probabilities in place of the class labels; None: the labels. unsure (B, H, W) bool at the padded input size: where
    queries without a target are no background; None: nowhere. background: False leaves all of them out.
    """

    mask_weights: list[Tensor] | None = None
    class_targets: list[Tensor] | None = None
    unsure: Tensor | None = None
    background: bool = True

    def to(self, device: torch.device) -> "PseudoTargets":
        def moved(values: list[Tensor] | None) -> list[Tensor] | None:
            return None if values is None else [value.to(device) for value in values]

        unsure = None if self.unsure is None else self.unsure.to(device)
        return PseudoTargets(moved(self.mask_weights), moved(self.class_targets), unsure, self.background)

    def weights_of(self, pairs: Pairs) -> Tensor | None:
        """(L, M) weights of matched pairs."""
        return None if self.mask_weights is None else torch.cat(self.mask_weights)[pairs.target]

    def classes_of(self, pairs: Pairs) -> Tensor | None:
        """(L, M, K) class probabilities that matched queries should have."""
        return None if self.class_targets is None else torch.cat(self.class_targets)[pairs.target]

    @torch.no_grad()
    def left_out_by_masks(self, masks: list[Tensor]) -> Tensor:
        """(L, B, N) bool: queries whose mask logits (B, N, h, w) a layer say that they are no background."""
        if self.unsure is None or not self.background:
            return torch.full((len(masks), *masks[0].shape[:2]), not self.background, device=masks[0].device)
        cells = self.unsure_cells(masks[0].shape[-2:])[..., None].flatten(1, 2)  # (B, h w, 1)
        shares = []
        for logits in masks:
            inside = (logits > 0).flatten(2).to(cells.dtype)
            shares.append((inside @ cells)[..., 0] / inside.sum(-1).clamp(min=1))
        return torch.stack(shares) >= _SHARE

    @torch.no_grad()
    def left_out_by_boxes(self, boxes: Tensor) -> Tensor:
        """As `left_out_by_masks`, for boxes (L, B, N, 4) x1, y1, x2, y2 in pixels of the padded input."""
        if self.unsure is None or not self.background:
            return torch.full(boxes.shape[:3], not self.background, device=boxes.device)
        height, width = self.unsure.shape[-2:]
        # Sums of all pixels above and to the left, so that four reads give the sum in a box.
        sums = F.pad(self.unsure.to(torch.float64).cumsum(1).cumsum(2), (1, 0, 1, 0))
        limits = boxes.new_tensor([width, height, width, height])
        left, top, right, bottom = boxes.clamp(min=0).minimum(limits).round().long().unbind(-1)
        image = torch.arange(len(sums), device=boxes.device)[None, :, None].expand_as(left)
        inside = sums[image, bottom, right] - sums[image, top, right] - sums[image, bottom, left]
        inside = inside + sums[image, top, left]
        return inside >= _SHARE * ((bottom - top) * (right - left)).clamp(min=1)

    def unsure_cells(self, size: tuple[int, int]) -> Tensor:
        """(B, h, w) float32: 1 in the cells of which at least half is unsure."""
        assert self.unsure is not None
        shares = F.adaptive_avg_pool2d(self.unsure[:, None].float(), tuple(size))[:, 0]
        return (shares >= 0.5).float()


def leave_out(losses: Tensor, pairs: Pairs, left_out: Tensor) -> Tensor:
    """Class losses (L, B, N) or (L, B, N, K) with zeros for the queries (L, B, N) that are left out and not matched."""
    left_out = left_out.clone()
    left_out[pairs.layer, pairs.image, pairs.query] = False
    return losses.masked_fill(left_out if losses.dim() == 3 else left_out[..., None], 0.0)
