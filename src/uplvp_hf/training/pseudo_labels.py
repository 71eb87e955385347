"""What a teacher finds in an unlabeled image: which of its queries become pseudo instances, and of which it is unsure.

Class and mask are judged apart: a query needs the probability of its best class and the mean probability inside its
mask, each above a threshold of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.mask_resampling import resampling_axis, resized_flips, signed_values
from ..models.masks import mask_iou_matrix, rle_from_borders
from ..models.postprocessing_uplvp import MASK_STRIDE, mask_quality
from .teacher_settings import TeacherSettings


@dataclass
class PseudoInstances:
    """What a teacher found in an image, best first.

    rles: COCO run lengths in the un-padded view. labels (G,) int64; scores, qualities (G,): of class and mask;
    probabilities (G, K): of all classes. unsure: run lengths of what it half believes in. All on the host.
    """

    rles: list[dict[str, Any]]
    labels: Tensor
    scores: Tensor
    qualities: Tensor
    probabilities: Tensor
    unsure: list[dict[str, Any]]


@torch.no_grad()
def find_pseudo_instances(
    outputs: Any, index: int, size: tuple[int, int], thresholds: Tensor, settings: TeacherSettings
) -> PseudoInstances:
    """Of image `index` of a batch. size: height and width of the un-padded view; thresholds (K,): of the class scores.

    Instances whose masks have a larger IoU than `duplicates` with a better one are left out, and are not unsure either.
    """
    cells = [-(-side // MASK_STRIDE) for side in size]
    logits = outputs.masks_queries_logits[index, :, : cells[0], : cells[1]].float()
    scores = getattr(outputs, "class_scores", None)
    if scores is None:  # the last class is "no object"
        probabilities = outputs.class_queries_logits[index].float().softmax(-1)[:, :-1]
    else:
        probabilities = scores[index].float()
    best, labels = probabilities.max(-1)
    candidates = best >= torch.minimum(thresholds.to(best.device)[labels], best.new_tensor(settings.unsure_threshold))
    candidates &= (logits > 0).flatten(1).any(1)
    chosen = candidates.nonzero().flatten()
    best, labels, logits, probabilities = best[chosen], labels[chosen], logits[chosen], probabilities[chosen]
    quality = mask_quality(logits, 0.5)
    sure = (best >= thresholds.to(best.device)[labels]) & (quality >= settings.mask_threshold)
    order = (best * quality + sure).argsort(descending=True, stable=True)  # all sure ones come first
    overlap = mask_iou_matrix(logits[order] > 0)
    first = _without_duplicates(overlap.cpu(), settings.duplicates)
    order, sure = order[first.to(order.device)], sure[order][first.to(order.device)]
    kept, unsure = order[sure], order[~sure & (best[order] >= settings.unsure_threshold)]
    return PseudoInstances(
        _rles(logits[kept], size),
        labels[kept].cpu(),
        best[kept].cpu(),
        quality[kept].cpu(),
        probabilities[kept].cpu(),
        _rles(logits[unsure], size),
    )


def _without_duplicates(overlap: Tensor, most: float) -> Tensor:
    """The positions that stay, ascending, when each needs an overlap of at most `most` with all that stay before."""
    kept: list[int] = []
    for position in range(len(overlap)):
        if not kept or float(overlap[position, kept].max()) <= most:
            kept.append(position)
    return torch.tensor(kept, dtype=torch.int64)


def _rles(logits: Tensor, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Masks (n, h, w) at stride 4 as run lengths at the size of the view, as post-processing resizes them."""
    rows, columns = (
        resampling_axis(cells, side, side, MASK_STRIDE) for cells, side in zip(logits.shape[-2:], size, strict=True)
    )
    return [rle_from_borders(flips, *size) for flips in resized_flips(signed_values(logits, 0.0), rows, columns)]


class ClassThresholds:
    """Thresholds of the class scores. With `adaptive` those of classes that are found less often are lower:

        threshold_c = class_threshold * (1 - adaptive * (1 - M(counts_c / most counts))),   M(x) = x / (2 - x)

    counts: instances found, each step's weighing 1 % less than the next one's. FlexMatch (arXiv 2110.08263), section
    3.2, counts images of a whole dataset in the same place.
    """

    _MEMORY = 0.99

    def __init__(self, settings: TeacherSettings, classes: int):
        self.settings = settings
        self.counts = torch.zeros(classes, dtype=torch.float64)

    def update(self, counts: Tensor) -> None:
        """Adds the instances (K,) that a step found in all processes."""
        self.counts.mul_(self._MEMORY).add_(counts.to(torch.float64))

    def values(self) -> Tensor:
        """(K,) float32."""
        share = self.counts / self.counts.max().clamp(min=1e-12)
        lowered = 1 - self.settings.adaptive * (1 - share / (2 - share))
        return (self.settings.class_threshold * lowered).float()
