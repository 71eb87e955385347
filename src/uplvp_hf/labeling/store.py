"""Writing a pseudo-label store: a header, append-only shards of one row a line, and a list of failures.

    folder/header.json               schema version, labeler, settings and their hash, encoder, vocabulary, categories
    folder/rows-00000-00000.jsonl    rows of rank 0, finished shards only, each of whole batches
    folder/complete.json             how many images there were, once a run over all of them has come to its end
    folder/failures.jsonl            images that could not be labeled; failures-00001.jsonl of rank 1 while it runs
    folder/features-00000-00000.npy  a vector of each mask of such a shard, where a network saw it (data.store_features)
    folder/images/                   images that were in no file, such as those of a streamed dataset

Every file is written under a temporary name, synced and renamed, so that a kill or a full disk leaves finished shards
valid; at most the rows of one unfinished shard are made again. Reading is `uplvp_hf.data.read_store`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from ..data.dataset import Row
from ..data.errors import DataError
from ..data.store_features import ABOUT
from ..data.store_reader import FINISHED, SCHEMA_VERSION, read_failures, read_header, shard_files
from ..files import only_run, replacing, write_json, write_json_lines, write_text
from ..models.errors import UserError
from .features import save_features
from .part import described

logger = logging.getLogger(__name__)

SUFFIXES = {"JPEG": ".jpg", "TIFF": ".tif", "JPEG2000": ".jp2", "PPM": ".ppm"}  # by Pillow's name of the format
_LISTED = 5  # settings in a message, of stores that differ in more


class StoreError(UserError):
    """A store that cannot be written or continued; the message says which and what to do."""


def settings_hash(labeler: str, encoder: str, vocabulary: Sequence[str], settings: Mapping[str, Any]) -> str:
    """sha256 of what the labels depend on, key order aside."""
    content = {"labeler": labeler, "encoder": encoder, "vocabulary": list(vocabulary), "settings": settings}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def make_header(
    labeler: str,
    encoder: str,
    vocabulary: Sequence[str],
    settings: Mapping[str, Any],
    categories: Sequence[Mapping[str, Any]],
    image_root: str | None = None,
    license: str | None = None,
    batch_size: int | None = None,
    look: Mapping[str, Any] | None = None,
    part: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A header; `settings` must survive JSON. `state` (calibration) is filled in by the pipeline, outside the hash.

    license: of the encoder's weights, where it is known. batch_size: images that were labeled together; like
    `image_root` it is no setting of the labels. look: how the network that made the masks was shown its images, see
    `Encoder.look`; a training on the same network compares it with its own. part: of the images that this store is
    for, see `Part.record`; a store for all images has no such key.
    """
    settings = json.loads(json.dumps(settings))
    return {
        "schema_version": SCHEMA_VERSION,
        "labeler": labeler,
        "encoder": encoder,
        "license": license,
        "vocabulary": list(vocabulary),
        "categories": [dict(category) for category in categories],
        "settings": settings,
        "settings_hash": settings_hash(labeler, encoder, vocabulary, settings),
        "state": {},
        "image_root": image_root,
        "batch_size": batch_size,
        "look": None if look is None else dict(look),
        **({} if part is None else {"part": dict(part)}),
    }


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with keys such as "settings.threshold"."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    return {
        name: leaf
        for key, inner in value.items()
        for name, leaf in flatten(inner, f"{prefix}.{key}" if prefix else key).items()
    }


LABELS_DEPEND_ON = ("labeler", "encoder", "vocabulary", "categories", "settings", "look")


def header_difference(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    where: tuple[str, str] = ("in the store", "now"),
    parts: Sequence[str] = LABELS_DEPEND_ON,
) -> list[str]:
    """Readable lines, one for each setting in which two headers differ. where: what the two are called."""
    lines = []
    for part in parts:
        if part not in old:  # a store of an earlier release
            continue
        before, after = flatten({part: old.get(part)}), flatten({part: new.get(part)})
        for key in sorted(before.keys() | after.keys()):
            if before.get(key) != after.get(key):
                lines.append(f"{key}: {before.get(key)!r} {where[0]}, {after.get(key)!r} {where[1]}")
    return lines


def _other_images(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    ids = [(header.get("part") or {}).get("ids") for header in (old, new)]
    return " (the images are others than before)" if None not in ids and ids[0] != ids[1] else ""


class StoreWriter:
    """Appends rows to a store; a context manager.

    Args:
        folder: created if needed.
        header: see `make_header`. With an existing store, both must agree in everything but `state`.
        resume: continue an existing store; False refuses one.
        rank: number of this process among those that write into the store; each writes shards of its own.
        shard_size: rows a shard, hence the rows lost by a kill at the worst moment.

    finished: image ids with a row already. header: the header in force (that of the store, when resuming). repaired:
    files of images that failed in an earlier run and have a row now.
    Raises StoreError for a folder with other contents, for other settings (listing them), for an unwanted resume; and
    on entering, when another run is writing into the folder.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        header: dict[str, Any],
        resume: bool = True,
        rank: int = 0,
        shard_size: int = 50,
    ) -> None:
        self.folder = Path(folder)
        self.rank, self.shard_size = rank, shard_size
        self.header = header
        self._lock = contextlib.ExitStack()
        self.resumed = (self.folder / "header.json").is_file()
        if self.resumed:
            self._check(header, resume)
        elif self.folder.is_dir() and any(not name.startswith(".") for name in os.listdir(self.folder)):
            raise StoreError(
                f"{self.folder} is not empty and holds no pseudo-label store; choose another output folder"
            )
        self.finished = self._finished_ids() if self.resumed else set()
        self._next_shard = self._count_shards()
        self.repaired: set[str] = set()
        self._rows: list[str] = []
        self._features: list[np.ndarray | None] = []
        self.about_features: dict[str, Any] | None = None  # of the features that are added, for `features.json`
        first = self.rank == 0
        self.failures_file = self.folder / ("failures.jsonl" if first else f"failures-{self.rank:05d}.jsonl")
        before = read_failures(self.folder) if self.resumed else []
        self._failed_before = {entry["file"] for entry in before}
        self._failures = {entry["file"]: entry for entry in before} if first else {}
        self._failures_changed = False

    def _check(self, header: dict[str, Any], resume: bool) -> None:
        old = read_header(self.folder)
        if not resume:
            raise StoreError(
                f"{self.folder} already holds a pseudo-label store; resume it or choose another output folder"
            )
        difference = header_difference(old, header)
        if old["settings_hash"] != header["settings_hash"] or difference:
            listed = "; ".join(difference) or "the header was edited by hand"
            raise StoreError(f"{self.folder} was labeled with other settings ({listed}); choose another output folder")
        if old.get("part") != header.get("part"):
            raise StoreError(
                f"{self.folder} is for {described(old.get('part'))}, not for {described(header.get('part'))}"
                f"{_other_images(old, header)}; choose another output folder"
            )
        if old.get("image_root") != header.get("image_root"):
            raise StoreError(
                f"{self.folder} has image_root {old.get('image_root')!r}, not {header.get('image_root')!r}; keep one"
            )
        if old.get("batch_size") not in (None, header["batch_size"]):
            logger.warning(
                "%s was begun with batches of %s images, now %s: rows may differ in their last digits.",
                self.folder,
                old["batch_size"],
                header["batch_size"],
            )
        self.header = old

    def _finished_ids(self) -> set[int | str]:
        ids: set[int | str] = set()
        for file in shard_files(self.folder):
            with open(file, encoding="utf-8") as stream:
                for number, line in enumerate(stream, start=1):
                    try:
                        ids.add(json.loads(line)["image_id"])
                    except (ValueError, KeyError, TypeError) as error:
                        raise DataError(
                            f"is not a row ({error})",
                            file=file,
                            row=f"line {number}",
                            remedy="Delete this shard; labeling again makes its rows.",
                        ) from error
        return ids

    def _count_shards(self) -> int:
        if not self.resumed:
            return 0
        numbers = [re.match(r"rows-(\d+)-(\d+)", os.path.basename(file)).groups() for file in shard_files(self.folder)]
        return 1 + max((int(number) for rank, number in numbers if int(rank) == self.rank), default=-1)

    def start(self, state: Mapping[str, Any]) -> None:
        """The header of a new store gets what the labeler calibrated; rank 0 writes it. Nothing to do when resuming."""
        if not self.resumed:
            self.header["state"] = dict(state)
            if self.rank == 0:
                write_json(self.folder / "header.json", self.header, indent=1)

    def state_of(self, store: str | os.PathLike[str]) -> dict[str, Any]:
        """What another store was calibrated to. Raises StoreError unless it has the settings of this one."""
        other = read_header(store)
        if difference := header_difference(other, self.header, ("there", "here")):
            more = f"; and {len(difference) - _LISTED} more" if len(difference) > _LISTED else ""
            listed = "; ".join(difference[:_LISTED]) + more
            raise StoreError(f"{store} was labeled with other settings ({listed}): its calibration does not fit")
        return dict(other.get("state", {}))

    def unfinish(self) -> None:
        """The run is not at its end (any more)."""
        (self.folder / FINISHED).unlink(missing_ok=True)

    def finish(self, images: int) -> None:
        """All `images` have a row or are listed as failures."""
        write_json(self.folder / FINISHED, {"images": images}, indent=None)

    def check_header_is_there(self) -> None:
        """Raises StoreError where another machine's rank 0 wrote the header into a folder of its own."""
        if not (self.folder / "header.json").is_file():
            raise StoreError(
                f"{self.folder} has no header.json on the machine of process {self.rank}; "
                "the output folder must be shared among the machines"
            )

    def add(self, row: Mapping[str, Any], file: str) -> None:
        """Append a row (JSON values only) of the image `file`."""
        self.add_block([json.dumps(row)], [file])

    def add_block(
        self, lines: Sequence[str], files: Sequence[str], features: Sequence[np.ndarray | None] | None = None
    ) -> None:
        """Append rows, as JSON, of the images `files`, which stay together in one shard. Clears earlier failures.

        features: the vectors of the masks of each row, see `features.save_features`.
        """
        self._rows += lines
        self._features += [None] * len(lines) if features is None else features
        cleared = [file for file in files if self._failures.pop(file, None)]
        self._failures_changed |= bool(cleared)
        self.repaired |= self._failed_before.intersection(files)
        if len(self._rows) >= self.shard_size:
            self.flush()

    def fail(self, file: str, row: int | str, reason: str) -> None:
        """Note an image that could not be labeled."""
        self._failures[file] = {"file": file, "row": row, "reason": reason}
        self._failures_changed = True

    def merge_failures(self, repaired: Collection[str] = ()) -> None:
        """One `failures.jsonl`, without the `repaired` images. For rank 0, while no other process writes: when an
        earlier run is taken up, and when all others have flushed."""
        self.flush()
        others = list(self.folder.glob("failures-*.jsonl"))
        if not others and not repaired:
            return
        merged = {entry["file"]: entry for entry in read_failures(self.folder)}
        self._failures = {file: entry for file, entry in merged.items() if file not in repaired}
        self._failures_changed = True
        self.flush()
        for file in others:
            file.unlink()

    def image_reference(self, row: Row, number: int, image_root: str | None, save: bool) -> str:
        """What a row calls its image: an absolute path, or one relative to `image_root`.

        An image in memory is saved, with `save`, as `images/{number}`: the content of an image file as it is, any
        other as PNG. Raises StoreError when it must not be saved, or the path lies outside of `image_root`.
        """
        image = row["image"]
        if isinstance(image, (bytes, Image.Image)):
            if not save:
                raise StoreError(
                    f"{row['file_name']}: the image is in no file, and a store refers to image files. "
                    "Let the images be saved beside their labels, or save them first."
                )
            image = self._save_image(image, number)
        path = os.path.abspath(os.fspath(image))
        if image_root is None:
            return path
        relative = os.path.relpath(path, os.path.abspath(image_root))
        if relative.startswith(os.pardir):
            raise StoreError(f"{path}: lies outside image_root {image_root}. Leave image_root out.")
        return relative.replace(os.sep, "/")

    def _save_image(self, image: bytes | Image.Image, number: int) -> Path:
        if isinstance(image, Image.Image):
            content = io.BytesIO()
            image.save(content, "PNG")
            image = content.getvalue()
        with Image.open(io.BytesIO(image)) as opened:
            suffix = SUFFIXES.get(opened.format, f".{opened.format.lower()}")
        path = self.folder / "images" / f"{number:09d}{suffix}"
        with replacing(path, "wb") as stream:
            stream.write(image)
        return path

    def flush(self) -> None:
        """Write the waiting rows as a shard, and the failures."""
        if self._rows:
            name = f"rows-{self.rank:05d}-{self._next_shard:05d}.jsonl"
            # First: a shard that is read has its features.
            if save_features(self.folder, name, self._features) and self.about_features is not None:
                write_json(self.folder / ABOUT, self.about_features)
                self.about_features = None  # once
            write_text(self.folder / name, "\n".join(self._rows) + "\n")
            self._rows, self._features, self._next_shard = [], [], self._next_shard + 1
        if self._failures_changed:  # else another process may be about to merge the file
            write_json_lines(self.failures_file, self._failures.values())
            self._failures_changed = False

    def __enter__(self) -> StoreWriter:
        if self.rank == 0:
            advice = "choose another output folder (several processes of one run: --processes N)"
            self._lock.enter_context(only_run(self.folder, advice))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Rows that are complete are kept whatever stopped the run, unless the disk itself is the trouble.
        try:
            if not isinstance(error, OSError):
                self.flush()
        finally:
            self._lock.close()
