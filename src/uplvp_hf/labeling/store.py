"""Writing a pseudo-label store: a header, append-only shards of one row a line, and a list of failures.

    folder/header.json               schema version, labeler, settings and their hash, encoder, vocabulary, categories
    folder/rows-00000-00000.jsonl    rows of rank 0, finished shards only
    folder/failures.jsonl            pictures that could not be labelled (failures-00001.jsonl for rank 1, ...)

Every file is written under a temporary name, synced and renamed, so that a kill or a full disk leaves finished shards
valid; at most the rows of one unfinished shard are made again. Reading is `uplvp_hf.data.read_store`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ..data.errors import DataError
from ..data.store_reader import SCHEMA_VERSION, read_header, shard_files
from ..files import write_json, write_text


class StoreError(ValueError):
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
) -> dict[str, Any]:
    """A header; `settings` must survive JSON. `state` (calibration) is filled in by the pipeline, outside the hash."""
    settings = json.loads(json.dumps(settings))
    return {
        "schema_version": SCHEMA_VERSION,
        "labeler": labeler,
        "encoder": encoder,
        "vocabulary": list(vocabulary),
        "categories": [dict(category) for category in categories],
        "settings": settings,
        "settings_hash": settings_hash(labeler, encoder, vocabulary, settings),
        "state": {},
        "image_root": image_root,
    }


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    return {
        name: leaf
        for key, inner in value.items()
        for name, leaf in _flatten(inner, f"{prefix}.{key}" if prefix else key).items()
    }


def header_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Readable lines, one for each setting in which two headers differ."""
    lines = []
    for part in ("labeler", "encoder", "vocabulary", "categories", "settings"):
        before, after = _flatten({part: old.get(part)}), _flatten({part: new.get(part)})
        for key in sorted(before.keys() | after.keys()):
            if before.get(key) != after.get(key):
                lines.append(f"{key}: {before.get(key)!r} in the store, {after.get(key)!r} now")
    return lines


class StoreWriter:
    """Appends rows to a store; a context manager.

    Args:
        folder: created if needed.
        header: see `make_header`. With an existing store, both must agree in everything but `state`.
        resume: continue an existing store; False refuses one.
        rank: number of this process among those that write into the store; each writes shards of its own.
        shard_size: rows a shard, hence the rows lost by a kill at the worst moment.

    finished: image ids with a row already. header: the header in force (that of the store, when resuming).
    Raises StoreError for a folder with other contents, for other settings (listing them), for an unwanted resume.
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
        self.resumed = (self.folder / "header.json").is_file()
        if self.resumed:
            self._check(header, resume)
        elif self.folder.is_dir() and any(not name.startswith(".") for name in os.listdir(self.folder)):
            raise StoreError(
                f"{self.folder} is not empty and holds no pseudo-label store; choose another output folder"
            )
        self.finished = self._finished_ids() if self.resumed else set()
        self._next_shard = self._count_shards()
        self._rows: list[str] = []
        self._failures_file = self.folder / ("failures.jsonl" if rank == 0 else f"failures-{rank:05d}.jsonl")
        self._failures = self._read_failures()

    def _check(self, header: dict[str, Any], resume: bool) -> None:
        old = read_header(self.folder)
        if not resume:
            raise StoreError(
                f"{self.folder} already holds a pseudo-label store; resume it or choose another output folder"
            )
        difference = header_difference(old, header)
        if old["settings_hash"] != header["settings_hash"] or difference:
            listed = "; ".join(difference) or "the header was edited by hand"
            raise StoreError(f"{self.folder} was labelled with other settings ({listed}); choose another output folder")
        if old.get("image_root") != header.get("image_root"):
            raise StoreError(
                f"{self.folder} has image_root {old.get('image_root')!r}, not {header.get('image_root')!r}; keep one"
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
                            remedy="Delete this shard; labelling again makes its rows.",
                        ) from error
        return ids

    def _count_shards(self) -> int:
        if not self.resumed:
            return 0
        numbers = [re.match(r"rows-(\d+)-(\d+)", os.path.basename(file)).groups() for file in shard_files(self.folder)]
        return 1 + max((int(number) for rank, number in numbers if int(rank) == self.rank), default=-1)

    def _read_failures(self) -> dict[str, dict[str, Any]]:
        if not self._failures_file.is_file():
            return {}
        entries = [json.loads(line) for line in self._failures_file.read_text(encoding="utf-8").splitlines() if line]
        return {entry["file"]: entry for entry in entries}

    def start(self, state: Mapping[str, Any]) -> None:
        """Write the header of a new store, with what the labeler calibrated. Nothing to do when resuming."""
        if not self.resumed:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.header["state"] = dict(state)
            write_json(self.folder / "header.json", self.header, indent=1)

    def add(self, row: Mapping[str, Any], file: str) -> None:
        """Append a row (JSON values only). Clears an earlier failure of the picture `file`."""
        self._rows.append(json.dumps(row))
        self._failures.pop(file, None)
        if len(self._rows) >= self.shard_size:
            self.flush()

    def fail(self, file: str, row: int | str, reason: str) -> None:
        """Note a picture that could not be labelled."""
        self._failures[file] = {"file": file, "row": row, "reason": reason}

    def flush(self) -> None:
        """Write the waiting rows as a shard, and the failures."""
        if self._rows:
            name = f"rows-{self.rank:05d}-{self._next_shard:05d}.jsonl"
            write_text(self.folder / name, "\n".join(self._rows) + "\n")
            self._rows, self._next_shard = [], self._next_shard + 1
        if self._failures or self._failures_file.exists():
            lines = [json.dumps(entry) + "\n" for entry in self._failures.values()]
            write_text(self._failures_file, "".join(lines))

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Rows that are complete are kept whatever stopped the run, unless the disk itself is the trouble.
        if not isinstance(error, OSError):
            self.flush()
