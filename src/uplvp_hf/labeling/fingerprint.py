"""What labels were made from, as a hash for the store's header."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from ..data import InstanceDataset, shard_files


def fingerprint(source: str | os.PathLike[str] | InstanceDataset) -> str:
    """sha256 of what the masks are read from, or of examples, so that a run is not continued with
    others."""
    digest = hashlib.sha256()
    if isinstance(source, InstanceDataset):
        for row in source.rows:
            digest.update(repr((row["image_id"], row["file_name"], row["objects"])).encode())
        return digest.hexdigest()
    path = Path(source)
    if (path / "header.json").is_file():
        files = [path / "header.json", *map(Path, shard_files(path))]
    elif (path / "annotations").is_dir():
        files = sorted((path / "annotations").glob("*.json"))
    elif path.is_dir():
        files = sorted(file for kind in ("*.parquet", "*.arrow", "*.json") for file in path.rglob(kind))
    else:
        files = [path] if path.is_file() else []
    return hash_files(files)


def hash_files(files: Sequence[Path]) -> str:
    """sha256 of the content of files, in the given order."""
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
