"""What a teacher finds in an unlabeled image: which of its queries become pseudo instances, and of which it is unsure.

Class and mask are judged apart: a query needs the probability of its best class and the mean probability inside its
mask, each above a threshold of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data import InstanceDataset
from ..models.mask_resampling import resampling_axis, resized_flips, signed_values
from ..models.masks import mask_iou_matrix, rle_from_borders
from ..models.postprocessing_uplvp import MASK_STRIDE, first_of_duplicates, mask_quality
from .teacher_settings import TeacherSettings


@dataclass
class PseudoInstances:
    """What a teacher found in an image, best first.

    rles: COCO run lengths in the un-padded view. labels (G,) int64; scores, qualities (G,): of class and mask;
    probabilities (G, K): of all classes. unsure: run lengths of what it half believes in. candidates: (C, 2) class and
    score of everything with a mask that is good enough, pseudo instance or not. All on the host.
    """

    rles: list[dict[str, Any]]
    labels: Tensor
    scores: Tensor
    qualities: Tensor
    probabilities: Tensor
    unsure: list[dict[str, Any]]
    candidates: Tensor


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
    good = quality >= settings.mask_threshold
    sure = (best >= thresholds.to(best.device)[labels]) & good
    order = (best * quality + sure).argsort(descending=True, stable=True)  # all sure ones come first
    overlap = mask_iou_matrix(logits[order] > 0)
    first = torch.tensor(first_of_duplicates(overlap.cpu(), settings.duplicates), dtype=torch.int64)
    order = order[first.to(order.device)]
    sure, good = sure[order], order[good[order]]
    kept, unsure = order[sure], order[~sure & (best[order] >= settings.unsure_threshold)]
    return PseudoInstances(
        _rles(logits[kept], size),
        labels[kept].cpu(),
        best[kept].cpu(),
        quality[kept].cpu(),
        probabilities[kept].cpu(),
        _rles(logits[unsure], size),
        torch.stack([labels[good].float(), best[good]], dim=-1).cpu(),
    )


def _rles(logits: Tensor, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Masks (n, h, w) at stride 4 as run lengths at the size of the view, as post-processing resizes them."""
    rows, columns = (
        resampling_axis(cells, side, side, MASK_STRIDE) for cells, side in zip(logits.shape[-2:], size, strict=True)
    )
    return [rle_from_borders(flips, *size) for flips in resized_flips(signed_values(logits, 0.0), rows, columns)]


class ClassThresholds:
    """Thresholds of the class scores, from `class_threshold` down to `class_floor` for classes that are seldom found.

    With `label_share` that of a class is the highest one at which the teacher finds so many instances of it an image
    as `label_share` times the labels have (the idea of LabelMatch, arXiv 2206.06608).
    With `adaptive` it is, from how often classes become pseudo instances (FlexMatch, arXiv 2110.08263, section 3.2),

        threshold_c = class_threshold * (1 - adaptive * (1 - M(counts_c / most counts))),   M(x) = x / (2 - x)

    Each step weighs 1 % less than the next one. labeled (K,): instances of every class an image of the labels.
    """

    _MEMORY = 0.99
    _BINS = 50  # of scores

    def __init__(self, settings: TeacherSettings, labeled: Tensor):
        self.settings, self.labeled = settings, labeled.to(torch.float64)
        self.counts = torch.zeros(len(labeled), dtype=torch.float64)
        self.scores = torch.zeros((len(labeled), self._BINS), dtype=torch.float64)  # of the candidates
        self.images = 0.0

    def seen(self, found: list[PseudoInstances]) -> Tensor:
        """What `update` wants of a batch, (K, 1 + bins): sums of several processes are those of their images."""
        classes = len(self.counts)
        seen = torch.zeros((classes, 1 + self._BINS), dtype=torch.float64)
        for own in found:
            seen[:, 0] += torch.bincount(own.labels, minlength=classes)
            label, score = own.candidates.unbind(-1)
            place = label.long() * self._BINS + (score * self._BINS).long().clamp(max=self._BINS - 1)
            seen[:, 1:] += torch.bincount(place, minlength=classes * self._BINS).view(classes, self._BINS)
        return seen

    def update(self, seen: Tensor, images: int) -> None:
        """Adds what a step found in so many images of all processes."""
        seen = seen.to(torch.float64)
        self.counts.mul_(self._MEMORY).add_(seen[:, 0])
        self.scores.mul_(self._MEMORY).add_(seen[:, 1:])
        self.images = self._MEMORY * self.images + images

    def values(self) -> Tensor:
        """(K,) float32."""
        highest, floor = self.settings.class_threshold, self.settings.class_floor
        if self.settings.label_share and self.images:
            # As many as have at least the lowest score of each bin, an image.
            found = self.scores.flip(1).cumsum(1).flip(1) / self.images
            enough = found >= self.settings.label_share * self.labeled[:, None]
            lowered = enough.sum(1).sub(1).clamp(min=0) / self._BINS
        else:
            share = self.counts / self.counts.max().clamp(min=1e-12)
            lowered = highest * (1 - self.settings.adaptive * (1 - share / (2 - share)))
        return lowered.clamp(min=min(floor, highest), max=highest).float()

    def state(self) -> dict[str, Any]:
        """What `load` restores."""
        return {"counts": self.counts.tolist(), "scores": self.scores.tolist(), "images": self.images}

    def load(self, state: dict[str, Any]) -> None:
        self.counts, self.scores = (torch.tensor(state[name], dtype=torch.float64) for name in ("counts", "scores"))
        self.images = state["images"]


def instances_an_image(dataset: InstanceDataset, classes: int) -> Tensor:
    """(K,) float64: objects of every class an image of the labels, crowds apart; all of class 0 where there is one."""
    place = {category: min(index, classes - 1) for index, category in enumerate(dataset.category_ids)}
    counts = torch.zeros(classes, dtype=torch.float64)
    for row in dataset.rows:
        for category, crowd in zip(row["objects"]["category_id"], row["objects"]["iscrowd"], strict=True):
            counts[place[category]] += not crowd
    return counts / max(len(dataset), 1)
