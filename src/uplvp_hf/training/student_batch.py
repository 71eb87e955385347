"""What the student is taught of an unlabeled image: its strong view, with the teacher's masks cut to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.copy_paste import choose, paste
from ..data.instance_masks import InstanceMasks
from ..data.transforms import uniform
from ..data.usage import MIN_AREA
from ..data.views import seen_from
from ..data.window import Window
from ..models.pseudo_targets import PseudoTargets
from .config import TrainSettings
from .pseudo_labels import PseudoInstances


@dataclass
class Lesson:
    """A strong view of h x w pixels with what is taught in it.

    pixels (3, h, w) float32. masks: G pseudo instances of h x w. labels (G,) int64; scores, qualities (G,) and
    probabilities (G, K) of the teacher. unsure (h, w) bool: where something may be that is not taught.
    """

    pixels: Tensor
    masks: InstanceMasks
    labels: Tensor
    scores: Tensor
    qualities: Tensor
    probabilities: Tensor
    unsure: np.ndarray

    def pasted(self, other: Lesson, most: int, generator: torch.Generator) -> Lesson:
        """With a random half of the instances of another lesson over it, at most `most` in all, see `copy_paste`."""
        chosen = choose(len(other.masks), most - len(self.masks), generator)
        pixels, masks, kept, pasted = paste(
            self.pixels, self.masks, other.pixels, other.masks.select(chosen), MIN_AREA, generator
        )
        added = [chosen[index] for index in pasted]

        def joined(name: str) -> Tensor:
            return torch.cat([getattr(self, name)[kept], getattr(other, name)[added]])

        return Lesson(
            pixels, masks, joined("labels"), joined("scores"), joined("qualities"), joined("probabilities"),
            self.unsure & ~masks.union(),
        )  # fmt: skip


def lesson(pixels: Tensor, windows: tuple[Window, Window], found: PseudoInstances) -> Lesson:
    """Of one image. pixels (3, H, W): the strong view, perhaps padded. windows: of the weak and the strong view."""
    weak, strong = windows
    window, size = seen_from(strong, weak), (weak.height, weak.width)
    masks, shown = window.masks(found.rles, *size, MIN_AREA)
    doubtful, _ = window.masks(found.unsure, *size, 1)
    return Lesson(
        pixels[:, : window.height, : window.width],
        masks,
        found.labels[shown],
        found.scores[shown],
        found.qualities[shown],
        found.probabilities[shown],
        doubtful.union() & ~masks.union(),
    )


def lessons_of(
    views: dict[str, Any], found: list[PseudoInstances], settings: TrainSettings, step: int, rank: int
) -> list[Lesson]:
    """Of a batch of `collate_views`, with instances pasted as `teacher.copy_paste` says. What is drawn depends on the
    seed, the step and the process alone."""
    pixels = views["strong"]["pixel_values"]
    plain = [lesson(*one) for one in zip(pixels, views["windows"], found, strict=True)]
    share = settings.teacher.copy_paste
    if not share or len(plain) < 2:
        return plain
    state = np.random.SeedSequence([settings.seed + 2, step, rank]).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(state[0]) >> 1)
    lessons = []
    for index, own in enumerate(plain):
        if uniform(generator, 0, 1) < share:
            other = (index + 1 + int(uniform(generator, 0, len(plain) - 1))) % len(plain)
            own = own.pasted(plain[other], settings.data.max_instances, generator)
        lessons.append(own)
    return lessons


def student_batch(
    views: dict[str, Any], lessons: list[Lesson], settings: TrainSettings, weight: float
) -> dict[str, Any]:
    """Lessons as a batch of `collate`, with `weight`, `pseudo` and, for `teacher.prompts`, `prompts` beside it."""
    teacher, values = settings.teacher, views["strong"]["pixel_values"].clone()
    canvas = values.shape[-2:]
    unsure = torch.zeros((len(lessons), *canvas), dtype=torch.bool)
    for index, own in enumerate(lessons):
        height, width = own.unsure.shape
        values[index, :, :height, :width] = own.pixels
        unsure[index, :height, :width] = torch.from_numpy(own.unsure)
    return {
        "pixel_values": values,
        "pixel_mask": views["strong"]["pixel_mask"],
        "image_ids": views["image_ids"],
        "weight": weight,
        "mask_labels": [own.masks.on_canvas(*canvas) for own in lessons],
        "class_labels": [own.labels for own in lessons],
        "prompt_scores": [own.scores for own in lessons],
        "prompts": teacher.prompts,
        "pseudo": PseudoTargets(
            [own.qualities for own in lessons] if teacher.weigh_masks else None,
            [own.probabilities for own in lessons] if teacher.soft_classes else None,
            unsure if teacher.ignore == "unsure" else None,
            teacher.ignore != "all",
        ),
    }
