"""One store of several, which machines without a shared disk labeled: `uplvp label --merge`.

Every store is read twice, one file of rows at a time: first all is checked, then it is copied, into a folder beside the
output, which gets the output's name when it is complete. Memory holds 16 bytes an image, and the ids of one store.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..data.errors import DataError
from ..data.fields import read_json, require
from ..data.store_features import ABOUT, read_features
from ..data.store_reader import FINISHED, read_failures, read_header, shard_files, stream_store
from ..files import new_folder, replacing
from .merge_checks import check_headers, missing
from .processes import Processes
from .progress import Progress
from .store import StoreError, StoreWriter

_SAVED = re.compile(r"\d{9}(-\d{9})*\.\w+")  # names of images that were in no file, see `StoreWriter.image_reference`


@dataclass
class Source:
    """A store that is merged.

    about: what computed its features, None where it has none. finished: how many images it says it is for, None where
    its run has not come to an end.
    """

    path: Path
    header: dict[str, Any]
    about: dict[str, Any] | None
    failures: list[dict[str, Any]]
    finished: int | None
    images: int = 0  # that have a row

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Source:
        """Raises DataError for what is no store."""
        folder = Path(path)
        header = read_header(folder)
        about, finished = (
            read_json(str(file)) if file.is_file() else None for file in (folder / ABOUT, folder / FINISHED)
        )
        if finished is not None:
            require(finished, ["images"], str(folder / FINISHED), None)
            finished = finished["images"]
        return cls(folder, header, about, read_failures(folder), finished)

    def saved_image(self, image: str) -> Path | None:
        """Where the store keeps the image that a row calls `image`; None for an image that is a file of its own. The
        store may have been moved since."""
        *_, folder, name = ("", *image.replace(os.sep, "/").split("/"))
        file = self.path / "images" / name
        return file if folder == "images" and _SAVED.fullmatch(name) and file.is_file() else None

    def lines(self) -> Iterator[tuple[str, dict[str, Any], np.ndarray | None]]:
        """(line, the same parsed, vectors of its masks) of every row."""
        for file in shard_files(self.path):
            with open(file, encoding="utf-8") as stream:
                lines = [line.rstrip("\n") for line in stream if line.strip()]
            rows = [json.loads(line) for line in lines]
            vectors: Any = [None] * len(rows)
            if self.about is not None:
                vectors = read_features(self.path, file, [len(row["objects"]["category_id"]) for row in rows])
            yield from zip(lines, rows, vectors)


@dataclass
class MergeSummary:
    """images: rows of the merged store. repeated: rows that were in a second store too, with equal labels. failed: in
    its failure list."""

    output: str
    stores: int
    images: int = 0
    repeated: int = 0
    failed: int = 0
    instances: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def merge_stores(
    stores: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    image_root: str | os.PathLike[str] | None = None,
    force: bool = False,
    progress: bool = True,
    shard_size: int = 50,
) -> MergeSummary:
    """Make one store of `stores`, which stay as they are. Parts of one dataset (`label_images(..., part=)`) give the
    store of a single run over all of it, to the byte where no image failed and each part was labeled by one process;
    else the same rows, in files of other lengths.

    Args:
        output: a folder that does not exist yet, or an empty one. It appears when it is complete.
        image_root: folder that the images lie in now, where the stores name different ones, or one that is gone.
        force: also merge stores that are not finished, or not all parts.
        shard_size: rows a shard, as of `label_images`.

    Raises StoreError, naming the stores, where their settings, classes, calibration or features differ, where one is
    not finished, and where the labels of an image that two of them have differ; DataError for faulty rows and features
    that do not fit; FileExistsError for an output that is not empty.
    """
    _check_names(stores)
    sources = sorted(map(Source.open, stores), key=lambda source: (source.header.get("part") or {}).get("number", 0))
    header = check_headers([(str(source.path), source.header) for source in sources], image_root)
    about = _about(sources)
    with new_folder(output) as draft:
        merge = _Merge(sources, Path(os.path.abspath(output)), draft, header["image_root"], progress)
        merge.check()
        lacking = [text for source in sources for text in missing(str(source.path), source)]
        lacking += _missing_parts(sources)
        if lacking and not force:
            raise StoreError(f"{'; '.join(lacking)}. Use --force to merge what there is")
        with StoreWriter(draft, header, shard_size=shard_size) as writer:
            writer.start(header["state"])
            writer.about_features = about
            merge.copy(writer, header["batch_size"] or 1)
            if not lacking:
                writer.finish(merge.summary.images + merge.summary.failed)
        return merge.summary


def _check_names(stores: Sequence[str | os.PathLike[str]]) -> None:
    seen: set[str] = set()
    for store in stores:
        if not os.path.isdir(store):
            raise StoreError(f"{store}: no such folder")
        if (path := os.path.realpath(store)) in seen:
            raise StoreError(f"{store} is named twice")
        seen.add(path)
    if len(seen) < 2:
        raise StoreError("merging needs two stores or more")


def _missing_parts(sources: Sequence[Source]) -> list[str]:
    """Which parts of the dataset no store is for."""
    parts = [source.header["part"] for source in sources if source.header.get("part")]
    if not parts:
        return []
    of = parts[0]["of"]
    absent = sorted(set(range(1, of + 1)) - {part["number"] for part in parts})
    return [f"no store is for part {', '.join(f'{number}/{of}' for number in absent)}"] if absent else []


def _about(sources: Sequence[Source]) -> dict[str, Any] | None:
    """What computed the features of all stores that have masks. Raises StoreError where they differ."""
    has = next((source for source in sources if source.about is not None), None)
    for other in sources:
        if has is None or other.about == has.about:
            continue
        if other.about is not None:
            raise StoreError(f"features: {has.about} in {has.path}, {other.about} in {other.path}; keep one kind")
        if any(row["objects"]["category_id"] for _, row, _ in other.lines()):
            raise StoreError(
                f"{has.path} has features of its masks, {other.path} has none: run `uplvp label {other.path} "
                f"--features`, or delete {ABOUT} and features-*.npy in {has.path}"
            )
    return None if has is None else has.about


@dataclass
class _Merge:
    """output: the final folder; it is written in `draft`."""

    sources: Sequence[Source]
    output: Path
    draft: Path
    image_root: str | None
    progress: bool
    repeated: set[int] = field(default_factory=set)  # hashes of ids and paths that occur more than once
    seen: dict[Any, tuple[bytes, str]] = field(default_factory=dict)  # of these images: digest of the labels, store
    named: dict[str, Any] = field(default_factory=dict)  # path of such an image: its id

    def check(self) -> None:
        """Reads all rows and features. Raises DataError for what is faulty; finds what occurs more than once."""
        hashes = array("Q")
        with Progress("checking", None, self.progress, Processes()) as bar:
            for source in self.sources:
                if not shard_files(source.path):
                    continue
                features = None if source.about is None else source.path
                for row in stream_store(source.path, self.image_root, features=features):
                    hashes.append(_hash("id", row["image_id"]))
                    if source.saved_image(row["image"]) is None:
                        hashes.append(_hash("path", row["image"]))
                    source.images += 1
                    bar.update()
        found, counts = np.unique(np.frombuffer(hashes, np.uint64), return_counts=True)
        self.repeated = set(found[counts > 1].tolist())

    def copy(self, writer: StoreWriter, batch_size: int) -> None:
        """Writes rows, features, saved images and failures. Raises StoreError for labels that contradict each other."""
        self.summary = MergeSummary(str(self.output), len(self.sources))
        for entry in (entry for source in self.sources for entry in source.failures):
            writer.fail(entry["file"], entry["row"], entry["reason"])
        lines: list[str] = []
        files: list[str] = []
        vectors: list[np.ndarray | None] = []
        with Progress("merging", sum(source.images for source in self.sources), self.progress, Processes()) as bar:
            for source in self.sources:
                for line, row, own in source.lines():
                    bar.update()
                    if self._is_repeated(source, row, own):
                        self.summary.repeated += 1
                        continue
                    new, file = self._with_image(source, line, row)
                    lines.append(new)
                    files.append(file)
                    masks = len(row["objects"]["category_id"])
                    vectors.append(own if masks else np.zeros((0, 0), np.float16))
                    self.summary.images += 1
                    self.summary.instances += masks
                    if len(lines) == batch_size:  # what an undisturbed run keeps together
                        writer.add_block(lines, files, vectors)
                        lines, files, vectors = [], [], []
            writer.add_block(lines, files, vectors)
        writer.flush()
        self.summary.failed = len(read_failures(self.draft))

    def _is_repeated(self, source: Source, row: dict[str, Any], vectors: np.ndarray | None) -> bool:
        """Whether a row of this image was written before. Raises StoreError where it says something else."""
        image_id, path = row["image_id"], self._path(row["image"])
        own_file = source.saved_image(row["image"]) is None
        if own_file and _hash("path", path) in self.repeated:
            before = self.named.setdefault(path, image_id)
            if before != image_id:
                raise StoreError(
                    f"{path} is image {before!r} and image {image_id!r} ({source.path}); keep one of the two"
                )
        if _hash("id", image_id) not in self.repeated:
            return False
        labels = {key: row.get(key) for key in ("width", "height", "as_stored", "objects")}
        digest = hashlib.blake2b(json.dumps(labels, sort_keys=True).encode(), digest_size=16)
        digest.update(b"" if vectors is None or not len(vectors) else np.ascontiguousarray(vectors).tobytes())
        before, store = self.seen.setdefault(image_id, (digest.digest(), str(source.path)))
        if before != digest.digest():
            raise StoreError(
                f"image {image_id!r} ({row['file_name']}) has other labels in {source.path} than in {store}; take it "
                "out of one, or label both with the same images and settings"
            )
        return store != str(source.path)

    def _path(self, image: str) -> str:
        if os.path.isabs(image):
            return image
        return os.path.normpath(os.path.join(self.image_root or "", image))

    def _with_image(self, source: Source, line: str, row: dict[str, Any]) -> tuple[str, str]:
        """The line with the place of its image in the merged store, and what failure lists call the image."""
        saved, image = source.saved_image(row["image"]), row["image"]
        if saved is not None:
            name = saved.name
            if (self.draft / "images" / name).exists():  # the stores are of different datasets
                name = f"{self.summary.images:09d}-{saved.name}"
            with open(saved, "rb") as content, replacing(self.draft / "images" / name, "wb") as stream:
                shutil.copyfileobj(content, stream)
            image = str(self.output / "images" / name)
        if os.path.isabs(image) and self.image_root is not None:
            image = _below(self.image_root, image, saved is not None, str(source.path))
        if image != row["image"]:
            line = json.dumps({**row, "image": image})
        return line, row["file_name"] if saved is not None else self._path(image)


def _below(root: str, image: str, otherwise: bool, store: str) -> str:
    """A path relative to `root`; `otherwise` as it is where it lies elsewhere. Raises DataError if that may not be."""
    relative = os.path.relpath(image, root)
    if not relative.startswith(os.pardir):
        return relative.replace(os.sep, "/")
    if not otherwise:
        raise DataError(f"{image} lies outside of run.image_root={root}", file=store, remedy="Leave it out.")
    return image


def _hash(kind: str, value: Any) -> int:
    digest = hashlib.blake2b(json.dumps([kind, value]).encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little")
