"""The endless stream of training samples. The order of the images depends on the seed alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ..data.collator import collate
from ..data.training_set import TrainingSet
from .config import TrainSettings


class SampleKeys(Sampler):
    """Yields one list of (epoch, index) per micro-batch of this process, from update `start` to `steps`.

    Every epoch is a permutation drawn from (seed, epoch). All processes walk through the same order, each taking its
    share of every effective batch, so an image is seen once an epoch whatever the number of processes.
    """

    def __init__(self, count: int, settings: TrainSettings, start: int, rank: int = 0, world: int = 1):
        self.count, self.settings, self.start, self.rank, self.world = count, settings, start, rank, world
        self._epoch = -1
        self._order: list[int] = []

    def __len__(self) -> int:
        return (self.settings.optim.steps - self.start) * self.settings.optim.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        batch, accumulation = self.settings.optim.batch_size, self.settings.optim.accumulation
        for step in range(self.start, self.settings.optim.steps):
            for micro in range(accumulation):
                first = ((step * accumulation + micro) * self.world + self.rank) * batch
                yield [self._key(position) for position in range(first, first + batch)]

    def _key(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, self.count)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.count, generator=generator).tolist()
        return epoch, self._order[place]


class _Keyed(Dataset):
    """Samples of a `TrainingSet` by (epoch, index)."""

    def __init__(self, samples: TrainingSet):
        self.samples = samples

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        return self.samples.sample(index, epoch)


def make_loader(samples: TrainingSet, settings: TrainSettings, start: int, rank: int, world: int) -> DataLoader:
    """Micro-batches of this process, on the canvas that `data.canvas` says. Their `mask_labels` are `InstanceMasks`:
    dense masks would be copied between processes, and be held for all micro-batches of a step at once."""
    return DataLoader(
        _Keyed(samples),
        batch_sampler=SampleKeys(len(samples), settings, start, rank, world),
        collate_fn=partial(collate, pad_to=settings.data.size if settings.data.square else None, dense=False),
        num_workers=settings.data.workers,
        persistent_workers=settings.data.workers > 0,
        generator=torch.Generator().manual_seed(settings.seed),  # leaves the global random state alone
    )
