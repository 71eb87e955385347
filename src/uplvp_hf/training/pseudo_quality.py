"""Number and quality of pseudo instances, for the log; with hidden labels their precision and recall as well."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator

from ..data import InstanceDataset
from ..models.masks import encode_masks, mask_iou, segmentation_to_rle
from .pseudo_labels import PseudoInstances

_SUMS = ("images", "instances", "scores", "qualities", "unsure", "right", "hidden")
_IOU = 0.5


class PseudoStatistics:
    """Sums over the steps since the last report.

    hidden: the images with labels that are compared with, or None. names: {class: name}.
    """

    def __init__(self, accelerator: Accelerator, hidden: InstanceDataset | None, names: dict[int, str]):
        self.accelerator, self.hidden = accelerator, hidden
        classes = {name: index for index, name in names.items()}
        categories = [] if hidden is None else hidden.categories
        self._classes = {one["id"]: classes[one["name"]] for one in categories if one["name"] in classes}
        self._sums = dict.fromkeys(_SUMS, 0.0)

    def add(self, views: dict[str, Any], found: list[PseudoInstances]) -> None:
        """Adds what was found in the weak views of a batch of `collate_views`."""
        sums = self._sums
        for index, (weak, _), own in zip(views["index"], views["windows"], found, strict=True):
            sums["images"] += 1
            sums["instances"] += len(own.rles)
            sums["scores"] += float(own.scores.sum())
            sums["qualities"] += float(own.qualities.sum())
            sums["unsure"] += len(own.unsure)
            if self.hidden is not None:
                right, hidden = self._compared(index, weak, own)
                sums["right"] += right
                sums["hidden"] += hidden

    def _compared(self, index: int, weak: Any, own: PseudoInstances) -> tuple[int, int]:
        """Pseudo instances that show an object of their class, each another one; objects of known classes."""
        assert self.hidden is not None
        row = self.hidden[index]
        objects, size = row["objects"], (row["height"], row["width"])
        known = [k for k, c in enumerate(objects["category_id"]) if c in self._classes and not objects["iscrowd"][k]]
        rles = [segmentation_to_rle(objects["segmentation"][k], *size) for k in known]
        masks, kept = weak.masks(rles, *size, 1)
        if not kept or not own.rles:
            return 0, len(kept)
        labels = [self._classes[objects["category_id"][known[k]]] for k in kept]
        overlap = mask_iou(own.rles, encode_masks(masks.dense()))
        right, taken = 0, set()
        for position, label in enumerate(own.labels.tolist()):
            options = [
                (overlap[position, k], k)
                for k in range(len(labels))
                if labels[k] == label and k not in taken and overlap[position, k] >= _IOU
            ]
            if options:
                taken.add(max(options)[1])
                right += 1
        return right, len(kept)

    def take(self) -> dict[str, float]:
        """The numbers by name (none before the first image), and starts afresh. All processes call it."""
        self._gather()
        sums, self._sums = self._sums, dict.fromkeys(_SUMS, 0.0)
        if not sums["images"]:
            return {}
        count = max(sums["instances"], 1e-12)
        values = {
            "pseudo_instances": sums["instances"] / sums["images"],
            "pseudo_unsure": sums["unsure"] / sums["images"],
        }
        if sums["instances"]:
            values |= {"pseudo_score": sums["scores"] / count, "pseudo_quality": sums["qualities"] / count}
        if self.hidden is not None:
            values["pseudo_recall"] = sums["right"] / max(sums["hidden"], 1e-12)
            if sums["instances"]:
                values["pseudo_precision"] = sums["right"] / count
        return values

    def state(self) -> dict[str, float]:
        """The state that `load` restores. All processes call it."""
        self._gather()
        return dict(self._sums)

    def load(self, state: dict[str, float]) -> None:
        self._sums = dict(state)

    def _gather(self) -> None:
        """Means over the processes: the report only has ratios."""
        if self.accelerator.num_processes > 1:
            values = torch.tensor(list(self._sums.values()), dtype=torch.float32, device=self.accelerator.device)
            self._sums = dict(zip(self._sums, self.accelerator.reduce(values, "mean").tolist(), strict=True))
