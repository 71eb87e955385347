"""The COCO results of a dataset, kept on the disk until all are there: 5000 images with 100 detections each would
take hundreds of megabytes as Python objects."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from tempfile import TemporaryFile
from typing import Any

from uplvp_hf.files import replacing, writing


class ResultsFile:
    """Results image by image, in a nameless temporary file beside the one they will be written to.

    path: of the COCO results file; its folder exists. Raises OSError naming it when the disk is full.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        self._image_ids: list[int | str] = []  # of each line
        self._lines = self._draft()

    def _draft(self) -> Any:
        return TemporaryFile("w+", encoding="utf-8", dir=os.path.dirname(os.path.abspath(self.path)))

    def add(self, image_id: int | str, entries: Iterable[Mapping[str, Any]]) -> None:
        """The entries of one image, which may be none."""
        text = ",\n".join(json.dumps(entry, allow_nan=False) for entry in entries)
        if text:
            self._append(image_id, text)

    def _append(self, image_id: int | str, text: str) -> None:
        self._image_ids.append(image_id)
        with writing(self.path):
            self._lines.write(json.dumps(text) + "\n")

    def images(self) -> Iterator[tuple[int | str, str]]:
        """(image id, its entries as text) in the order they were added; what one process sends to another."""
        with writing(self.path):
            self._lines.seek(0)
        yield from zip(self._image_ids, map(json.loads, self._lines))

    def merge(self, others: Iterable[tuple[int | str, str]], order: Mapping[int | str, int]) -> None:
        """Adds the `images` of other processes, and sorts all by their place in `order`."""
        every = sorted([*self.images(), *others], key=lambda image: order[image[0]])
        self._image_ids, self._lines = [], self._draft()
        for image_id, text in every:
            self._append(image_id, text)

    def write(self) -> None:
        """Writes the file, in one step."""
        with replacing(self.path) as stream:
            stream.write("[")
            for number, (_, text) in enumerate(self.images()):
                stream.write(",\n" * bool(number) + text)
            stream.write("]\n")
