"""The endless stream of training samples. The order of the images depends on the seed alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ..data.collator import collate
from ..data.training_set import TrainingSet
from ..data.views import UnlabeledViews, collate_views
from .config import TrainSettings
from .mixture import MixedSamples, extra_count


class SampleKeys(Sampler):
    """Yields one list of (epoch, index) per micro-batch of this process, from update `start` to `steps`.

    Every epoch is a permutation drawn from (seed, epoch). All processes walk through the same order, each taking its
    share of every effective batch, so an image is seen once an epoch whatever the number of processes. With `extra`
    images, `data.extra_share` of every effective batch, spread evenly over it, has indices from `count` on.
    """

    def __init__(
        self, count: int, settings: TrainSettings, start: int, rank: int = 0, world: int = 1, extra: int = 0
    ) -> None:
        self.settings, self.start, self.rank, self.world, self.extra = settings, start, rank, world, extra
        self._orders = {False: _Order(count, settings.seed), True: _Order(extra, settings.seed + 1, count)}

    def __len__(self) -> int:
        return (self.settings.optim.steps - self.start) * self.settings.optim.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        optim, size = self.settings.optim, self.settings.optim.batch_size
        whole = size * optim.accumulation * self.world
        share = (self.settings.data.extra_share or [0.0]) if self.extra else [0.0]
        extra_before = sum(extra_count(step, optim.steps, share, whole) for step in range(self.start))
        for step in range(self.start, optim.steps):
            count = extra_count(step, optim.steps, share, whole)
            # How many of the first k places of this step are extra: k * count / whole, rounded down.
            for micro in range(optim.accumulation):
                first = (micro * self.world + self.rank) * size
                keys = []
                for place in range(first, first + size):
                    before, after = place * count // whole, (place + 1) * count // whole
                    extra = extra_before + before
                    position = extra if after > before else step * whole + place - extra
                    keys.append(self._orders[after > before].key(position))
                yield keys
            extra_before += count


class _Order:
    """The images of one source, epoch after epoch, each a permutation. offset: of their indices."""

    def __init__(self, count: int, seed: int, offset: int = 0) -> None:
        self.count, self.seed, self.offset = count, seed, offset
        self._epoch = -1
        self._order: list[int] = []

    def key(self, position: int) -> tuple[int, int]:
        """(epoch, index) of the image at a position of the endless order."""
        epoch, place = divmod(position, self.count)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.count, generator=generator).tolist()
        return epoch, self.offset + self._order[place]


class _Keyed(Dataset):
    """Samples by (epoch, index)."""

    def __init__(self, samples: TrainingSet | MixedSamples):
        self.samples = samples

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        return self.samples.sample(index, epoch)


def make_loader(
    samples: TrainingSet | MixedSamples,
    settings: TrainSettings,
    start: int,
    rank: int,
    world: int,
    together: Callable[[list[dict]], dict] | None = None,
) -> DataLoader:
    """Micro-batches of this process, on the canvas that `data.canvas` says. Their `mask_labels` are `InstanceMasks`:
    dense masks would be copied between processes, and be held for all micro-batches of a step at once. `together` makes
    batches of other samples."""
    extra = len(getattr(samples, "extra", ()))
    pad_to = settings.data.size if settings.data.square else None
    return DataLoader(
        _Keyed(samples),
        batch_sampler=SampleKeys(len(samples), settings, start, rank, world, extra),
        collate_fn=together or partial(collate, size_divisor=32 if pad_to is None else 1, pad_to=pad_to, dense=False),
        num_workers=settings.data.workers,
        persistent_workers=settings.data.workers > 0,
        generator=torch.Generator().manual_seed(settings.seed),  # leaves the global random state alone
    )


class UnlabeledKeys(Sampler):
    """One list of (epoch, index) a step for this process, from update `start` to `steps`; the first is of update
    `first`. The order is as that of `SampleKeys`, of another seed."""

    def __init__(
        self, count: int, settings: TrainSettings, start: int, first: int, rank: int = 0, world: int = 1
    ) -> None:
        self.steps, self.first, self.rank, self.world = range(start, settings.optim.steps), first, rank, world
        self.size = settings.teacher.batch_size or settings.optim.batch_size
        self._order = _Order(count, settings.seed + 2)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self.steps:
            begin = ((step - self.first) * self.world + self.rank) * self.size
            yield [self._order.key(position) for position in range(begin, begin + self.size)]


def make_unlabeled_loader(
    views: UnlabeledViews, settings: TrainSettings, start: int, rank: int, world: int
) -> DataLoader:
    """The unlabeled micro-batch of every update from `start` and the burn-in on, as `collate_views` makes it."""
    first = settings.teacher.burn_in_of(settings.optim.steps)
    return DataLoader(
        _Keyed(views),
        batch_sampler=UnlabeledKeys(len(views), settings, max(start, first), first, rank, world),
        collate_fn=partial(collate_views, pad_to=settings.data.size if settings.data.square else None),
        num_workers=settings.data.workers,
        persistent_workers=settings.data.workers > 0,
        generator=torch.Generator().manual_seed(settings.seed),
    )
