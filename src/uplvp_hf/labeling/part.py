"""The part of the images that one machine labels, where machines share no disk."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from ..data.dataset import InstanceDataset, RowStream
from ..models.errors import UserError
from .blocks import block_count


@dataclass(frozen=True)
class Part:
    """Part `number` (1 to `of`) of the blocks of a dataset; 1 of 1 is all of it.

    Parts consist of whole blocks, so that every image has the batch mates that it has in a run over all images. Those
    of a dataset of known length are consecutive, and stores of parts 1, 2, ... hold the rows in their order; of a
    stream every `of`-th block is taken. A folder is in the order of its sorted relative paths, on every machine.
    """

    number: int = 1
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Part:
        """From text such as 3/16. Raises UserError for any other."""
        match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        number, of = (int(match[1]), int(match[2])) if match else (0, 0)
        if not 1 <= number <= of:
            raise UserError(f"--shard must be like 3/16, from 1/16 to 16/16, got {text!r}")
        return cls(number, of)

    def blocks(self, count: int) -> range:
        """Numbers of the blocks of this part, of `count` in all."""
        return range((self.number - 1) * count // self.of, self.number * count // self.of)

    def has(self, number: int) -> bool:
        """Whether block `number` of a stream is in this part."""
        return number % self.of == self.number - 1

    def images(self, count: int, batch_size: int) -> int:
        """How many of `count` images are in this part."""
        blocks = self.blocks(block_count(count, batch_size))
        return max(0, min(blocks.stop * batch_size, count) - blocks.start * batch_size)

    def record(self, dataset: InstanceDataset | RowStream, limit: int | None, batch_size: int) -> dict[str, Any] | None:
        """What the header of a store says about its part; None for all images.

        {"number", "of", "limit": of images, "images": in all parts, "own": in this one, "ids": sha256 of the image ids
        in their order}, the last three None for a stream, which nobody has counted. Parts are disjoint and complete
        where `of`, `limit`, `images` and `ids` are equal.
        """
        if self.of == 1:
            return None
        found: dict[str, Any] = {"number": self.number, "of": self.of, "limit": limit}
        found |= {"images": None, "own": None, "ids": None}
        if not isinstance(dataset, RowStream):
            images = len(range(len(dataset))[:limit])
            digest = hashlib.sha256()
            for k in range(images):
                digest.update(json.dumps(dataset.image_id(k)).encode() + b"\n")
            found |= {"images": images, "own": self.images(images, batch_size), "ids": digest.hexdigest()}
        return found


def described(record: dict[str, Any] | None) -> str:
    """The part of a header in words."""
    if record is None:
        return "all images"
    of = "" if record["images"] is None else f" of {record['images']} images"
    return f"part {record['number']}/{record['of']}{of}"
