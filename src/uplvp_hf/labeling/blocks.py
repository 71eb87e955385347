"""The unit of labeling work: a block of consecutive images of the dataset, dealt to processes and decoded ahead.

Which images share a batch depends on the order of the dataset and on the batch size alone. So every float, hence
every row, is the same in one process, in several, and in a run that was killed and resumed.
"""

from __future__ import annotations

import bisect
import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from PIL import Image

from ..data.dataset import InstanceDataset, Row, RowStream, load_row_image
from ..data.errors import ImageError


@dataclass(frozen=True)
class Block:
    """number: 0, 1, ... first: running number of its first image in the dataset."""

    number: int
    first: int
    rows: Sequence[Row]


@dataclass(frozen=True)
class LoadedBlock:
    """A block with what became of its images: an image, the reason why there is none, or None if not looked at.

    todo: positions in the block that need a row. A block that was labeled in part is decoded whole, so that its
    images have the batch mates that they would have had in an undisturbed run.
    """

    block: Block
    images: Sequence[Image.Image | ImageError | None]
    todo: Collection[int]

    def positions(self) -> list[int]:
        """Of the images that were decoded."""
        return [k for k, image in enumerate(self.images) if isinstance(image, Image.Image)]

    def readable(self) -> tuple[list[Image.Image], list[Row]]:
        """The images that were decoded, and their rows."""
        kept = self.positions()
        return [self.images[k] for k in kept], [self.block.rows[k] for k in kept]


@dataclass(frozen=True)
class Deal:
    """Which process labels which block: in turn the calibration blocks, which it measures too, and in turn the rest.

    calibration: block numbers, ascending.
    """

    calibration: Sequence[int]
    rank: int = 0
    size: int = 1

    def mine(self, number: int) -> bool:
        """Whether block `number` is this process's."""
        before = bisect.bisect_left(self.calibration, number)
        measured = before < len(self.calibration) and self.calibration[before] == number
        return (before if measured else number - before) % self.size == self.rank


def block_count(images: int, size: int) -> int:
    """Blocks of `size` that hold so many images."""
    return -(-images // size)


def calibration_blocks(images: int | None, size: int, wanted: int) -> list[int]:
    """Numbers of the blocks to calibrate on: about `wanted` images spread evenly over the set.

    images: of the whole set; None, for a stream of unknown length, takes its first blocks.
    """
    needed = block_count(wanted, size)
    if images is None:
        return list(range(needed))
    count = block_count(images, size)
    needed = min(needed, count)
    return [k * count // needed for k in range(needed)]


def iterate_blocks(
    dataset: InstanceDataset | RowStream, size: int, limit: int | None, wanted: Callable[[int], bool]
) -> Iterator[Block]:
    """The blocks whose number is `wanted`, in order. Of a stream every row is read, one block held at a time."""
    if not isinstance(dataset, RowStream):
        images = len(range(len(dataset))[:limit])
        for number in filter(wanted, range(block_count(images, size))):
            first = number * size
            yield Block(number, first, [dataset[k] for k in range(first, min(first + size, images))])
        return
    rows = itertools.islice(dataset, limit)
    for number in itertools.count():
        part = list(itertools.islice(rows, size))
        if not part:
            return
        if wanted(number):
            yield Block(number, number * size, part)


def load_blocks(
    blocks: Iterable[Block], finished: Collection[int | str], workers: int, ahead: int = 2
) -> Iterator[LoadedBlock]:
    """Decode blocks in `workers` threads, at most `ahead` of them beyond the one that is handed out, in order.

    Images whose image id is in `finished` need no row (see `LoadedBlock`). Threads do: decoders of images work
    outside of Python's lock.
    """
    with ThreadPoolExecutor(workers, "decode") as pool:
        waiting: deque[tuple[Block, dict[int, Future]]] = deque()
        for block in blocks:
            todo = [k for k, row in enumerate(block.rows) if row["image_id"] not in finished]
            waiting.append((block, {k: pool.submit(_load, block.rows[k]) for k in todo}))
            if len(waiting) > ahead:
                yield _collect(*waiting.popleft(), pool)
        while waiting:
            yield _collect(*waiting.popleft(), pool)


def _load(row: Row) -> Image.Image | ImageError:
    try:
        return load_row_image(row)
    except ImageError as error:
        return error
    except Exception as error:  # too little memory, or a fault of a decoder
        return ImageError(f"cannot be read ({type(error).__name__}: {error})", file=row["file_name"])


def _collect(block: Block, futures: dict[int, Future], pool: ThreadPoolExecutor) -> LoadedBlock:
    images: list[Image.Image | ImageError | None] = [None] * len(block.rows)
    for k, future in futures.items():
        images[k] = future.result()
    if any(isinstance(image, Image.Image) for image in images):
        others = [k for k in range(len(images)) if k not in futures]
        for k, image in zip(others, pool.map(_load, [block.rows[k] for k in others])):
            images[k] = image
    return LoadedBlock(block, images, futures.keys())
