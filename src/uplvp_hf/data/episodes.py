"""Episodes: one question an image ("which objects are of this class?") with support objects of the class.

episode = EpisodeSet(samples, shots=(1, 5), negatives=0.25).sample(index, epoch)
batch = collate_episodes([episode, ...])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..models.errors import UserError
from .collator import collate
from .dataset import InstanceDataset
from .errors import DataError, ImageError
from .instance_masks import InstanceMasks
from .supports import LEAST_SHARE, Entry, instances_of
from .training_set import TrainingSet
from .transforms import TrainTransform

_TRIES = 10  # supports that may be lost, to a crop or a file that cannot be read, before an episode gives up


class EpisodeSet(torch.utils.data.Dataset):
    """The samples of a `TrainingSet`, each with a class that is asked for and supports of it.

    Args:
        samples: of the base classes; its `label_map` numbers them.
        shots: least and most supports of an episode, drawn evenly.
        negatives: share of the episodes that ask for a class that the image does not show; without them a model learns
            to find anything.
        transform: of support images; default: that of the samples.
        least_share: least share of its image that a support covers.
        vectors: what a frozen encoder makes of objects; supports are then drawn from these alone, and an episode has
            their mean in place of images.

    A class is drawn with the square root of its frequency as weight. Supports come from other images than the one that
    is asked about. An episode depends on (seed, epoch, index) only, never on the worker that makes it. Raises DataError
    when fewer than two images hold a class.
    """

    def __init__(
        self,
        samples: TrainingSet,
        shots: tuple[int, int] = (1, 5),
        negatives: float = 0.25,
        transform: TrainTransform | None = None,
        least_share: float = LEAST_SHARE,
        vectors: dict[Entry, torch.Tensor] | None = None,
    ) -> None:
        if not 1 <= shots[0] <= shots[1]:
            raise UserError(f"shots must be two whole numbers of at least 1, the lower first, got {shots}")
        if not 0 <= negatives <= 1:
            raise UserError(f"negatives must be within 0 to 1, got {negatives}")
        if samples.label_map is None:
            raise UserError("episodes need the classes of the objects: samples with a label_map")
        self.samples, self.shots, self.negatives = samples, shots, negatives
        self.transform = transform or samples.transform
        self.names = [category["name"] for category in self.dataset.categories]
        self.vectors = vectors
        self.pool = instances_of(self.dataset, self.names, least_share)
        if vectors is not None:
            self.pool = {name: [entry for entry in found if entry in vectors] for name, found in self.pool.items()}
        for name, found in self.pool.items():
            if len({row for row, _ in found}) < 2:
                raise DataError(
                    f"class {name!r} has supports in fewer than two images",
                    file=self.dataset.name or None,
                    remedy="Leave the class out of the base classes, or give more images.",
                )
        self._weights = np.sqrt([len(self.pool[name]) for name in self.names])

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def dataset(self) -> InstanceDataset:
        return self.samples.dataset

    @property
    def failures(self) -> list[dict[str, str]]:
        """As of the samples."""
        return self.samples.failures

    def sample(self, index: int, epoch: int) -> dict[str, Any]:
        """A sample of `TrainingSet` with the objects of one class, all labeled 0, and:

        asked, the class as a number; supports, K dicts with pixel_values (3, h, w) and mask_labels, `InstanceMasks` of
        the one object, or, with `vectors`, support_vector (C,); support_ids, (image id, position of the object) of
        each. Raises DataError when no support of the class can be read.
        """
        sample = self.samples.sample(index, epoch)
        rng = np.random.default_rng([self.samples.seed, epoch, index % len(self), 1])
        asked = self._ask(sample["class_labels"].tolist(), rng)
        chosen = [k for k, label in enumerate(sample["class_labels"].tolist()) if label == asked]
        supports = self._supports(asked, sample["index"], int(rng.integers(self.shots[0], self.shots[1] + 1)), rng)
        if self.vectors is None:
            sample["supports"] = [support for _, support in supports]
        else:
            sample["support_vector"] = torch.stack([self.vectors[entry] for entry, _ in supports]).mean(0)
        return {
            **sample,
            "mask_labels": sample["mask_labels"].select(chosen),
            "class_labels": torch.zeros(len(chosen), dtype=torch.int64),
            "prompt_scores": sample["prompt_scores"][chosen],
            "asked": asked,
            "support_ids": [(self.dataset.image_id(row), k) for (row, k), _ in supports],
        }

    def _ask(self, labels: list[int], rng: np.random.Generator) -> int:
        """A class of the image, or one that it does not show."""
        there = sorted(set(labels))
        absent = [label for label in range(len(self.names)) if label not in there]
        candidates = absent if absent and (not there or rng.random() < self.negatives) else there
        weights = self._weights[candidates]
        return int(rng.choice(candidates, p=weights / weights.sum()))

    def _supports(self, asked: int, index: int, count: int, rng: np.random.Generator) -> list[tuple[Entry, dict]]:
        """Up to `count` objects of a class in other images than that at `index`, as images where they are needed."""
        pool = [entry for entry in self.pool[self.names[asked]] if entry[0] != index]
        found: list[tuple[Entry, dict]] = []
        for tried, place in enumerate(rng.permutation(len(pool)).tolist()):
            if len(found) == count or tried >= count + _TRIES:
                break
            seed = int(rng.integers(2**62))
            row, k = pool[place]
            support = {} if self.vectors is not None else self._support(row, k, seed)
            if support is not None:
                found.append((pool[place], support))
        if not found:
            raise DataError(
                f"no support of class {self.names[asked]!r} can be read",
                file=self.dataset.name or None,
                remedy="Check the images, or leave the class out of the base classes.",
            )
        return found

    def _support(self, row: int, k: int, seed: int) -> dict[str, Any] | None:
        """One augmented support; None where the crop lost it, or the image cannot be read."""
        try:
            image = self.dataset.load_image(row)
        except ImageError:
            return None
        found = self.dataset[row]
        segmentation = found["objects"]["segmentation"][k]
        generator = torch.Generator().manual_seed(seed)
        pixels, masks, kept = self.transform(image, [segmentation], found["height"], found["width"], generator)
        if not kept:
            return None
        values = self.samples.normalized(pixels)
        return {"pixel_values": values, "mask_labels": masks, "class_labels": torch.zeros(1, dtype=torch.int64)}


def collate_episodes(episodes: Sequence[dict[str, Any]], pad_to: int | None = None) -> dict[str, Any]:
    """Episodes as one batch: what `collate` gives for their images, with masks as `InstanceMasks`, and

    support_values (S, 3, H, W), support_pixel_mask (S, H, W), support_masks: `InstanceMasks` of the S objects, one an
    image; support_owner (S,) int64: the episode of each. Of episodes with vectors, support_vectors (B, C) instead.
    """
    batch = collate(episodes, pad_to=pad_to, dense=False)
    if "support_vector" in episodes[0]:
        return batch | {"support_vectors": torch.stack([one["support_vector"] for one in episodes])}
    supports = collate([support for one in episodes for support in one["supports"]], pad_to=pad_to, dense=False)
    height, width = supports["pixel_values"].shape[-2:]
    owner = [number for number, one in enumerate(episodes) for _ in one["supports"]]
    return batch | {
        "support_values": supports["pixel_values"],
        "support_pixel_mask": supports["pixel_mask"],
        "support_masks": InstanceMasks(height, width, tuple(one.patches[0] for one in supports["mask_labels"])),
        "support_owner": torch.tensor(owner, dtype=torch.int64),
    }
