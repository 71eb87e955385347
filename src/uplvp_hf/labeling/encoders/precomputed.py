"""Dense features that another program computed, such as OpenSeg's, in place of an image tower.

A folder with one file an image, or one file with one array an image; safetensors or npz (or npy in a folder).
Images are found by their relative path, with or without suffix, else by the file name without suffix, else by their
`image_id` (last: running numbers may look like another image's name). The grid must cover exactly the image: crop
what an encoder padded (OpenSeg: the valid part of its square) before writing.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from ...data.dataset import Row
from ...data.errors import DataError
from ...models.errors import UserError

SUFFIXES = (".safetensors", ".npz", ".npy")
LAYOUTS = ("dhw", "hwd")


class PrecomputedFeatures:
    """Features by row of the dataset.

    Args:
        path: the folder or the file. layout: "dhw" for arrays (D, h, w), "hwd" for (h, w, D); a leading axis of one is
            dropped. name: of the encoder, for the store's header; None: the path's last part.
        device: where the features go. license: of the encoder's weights, if known.

    Arrays are read when their image's turn comes. Raises UserError when the path is missing, holds nothing readable,
    or for an unknown layout.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        layout: str = "dhw",
        name: str | None = None,
        device: str | torch.device = "cpu",
        license: str | None = None,
    ) -> None:
        if layout not in LAYOUTS:
            raise UserError(f"layout {layout!r} of features is unknown; use one of {', '.join(LAYOUTS)}")
        self.path, self.layout, self.device, self.license = Path(path), layout, torch.device(device), license
        self.name = name or self.path.name
        if self.path.is_dir():
            self._readers = self._index_folder()
        elif self.path.is_file() and self.path.suffix in (".safetensors", ".npz"):
            self._readers = self._index_file()
        else:
            raise UserError(f"features {path}: neither a folder nor a .safetensors or .npz file")
        if not self._readers:
            raise UserError(f"features {path}: no {', '.join(SUFFIXES)} file in it")

    def __len__(self) -> int:
        return len(self._readers)

    def __call__(self, rows: Sequence[Row], dimension: int | None = None) -> list[torch.Tensor]:
        """Unit-length features of images: one (D, h, w) float32 a row.

        Raises DataError, which concerns one image: no array for it, a file that is cut off, values that are not
        finite. Raises UserError, which concerns them all: a wrong number of axes, or `dimension` (of the text
        embeddings) not met.
        """
        return [self._load(row, dimension) for row in rows]

    def _index_folder(self) -> dict[str, Callable[[], np.ndarray | torch.Tensor]]:
        readers: dict[str, Callable[[], np.ndarray | torch.Tensor]] = {}
        doubled: set[str] = set()
        for file in sorted(self.path.rglob("*")):
            if file.suffix not in SUFFIXES or not file.is_file():
                continue
            reader = _reader(file)
            readers[file.relative_to(self.path).with_suffix("").as_posix()] = reader
            if file.parent != self.path:  # the bare stem too, where only one file has it
                doubled |= {file.stem} & readers.keys()
                readers.setdefault(file.stem, reader)
        for stem in doubled:
            if not any((self.path / (stem + suffix)).is_file() for suffix in SUFFIXES):
                del readers[stem]
        return readers

    def _index_file(self) -> dict[str, Callable[[], np.ndarray | torch.Tensor]]:
        if self.path.suffix == ".npz":
            with np.load(self.path, allow_pickle=False) as content:
                keys = list(content.files)
        else:
            keys = _safetensors(self.path, lambda file: list(file.keys()))
        return {key: _reader(self.path, key) for key in keys}

    def _load(self, row: Row, dimension: int | None) -> torch.Tensor:
        keys = _keys(row)
        key = next((key for key in keys if key in self._readers), None)
        if key is None:
            raise DataError(
                f"features {self.path}: nothing for image {row['file_name']!r} (image id {row['image_id']!r}); "
                f"looked for {', '.join(keys)}"
            )
        values = torch.as_tensor(self._readers[key]())
        where = f"features {self.path}, {key!r}"
        if values.ndim == 4 and values.shape[0] == 1:
            values = values[0]
        if values.ndim != 3:
            raise UserError(f"{where}: shape {tuple(values.shape)} is not {' x '.join(self.layout)}")
        if self.layout == "hwd":
            values = values.permute(2, 0, 1)
        if dimension is not None and values.shape[0] != dimension:
            other = LAYOUTS[1 - LAYOUTS.index(self.layout)]
            raise UserError(
                f"{where}: {values.shape[0]} channels, the text embeddings have {dimension}; give text of the same "
                f"encoder, or layout={other!r} if the channels are on another axis"
            )
        values = values.to(self.device, torch.float32)
        if not torch.isfinite(values).all():
            raise DataError(f"{where}: has values that are not finite")
        return F.normalize(values, dim=0)


def _keys(row: Row) -> list[str]:
    name = PurePosixPath(str(row["file_name"]).replace(os.sep, "/"))
    return list(dict.fromkeys([name.with_suffix("").as_posix(), str(name), name.stem, str(row["image_id"])]))


def _reader(file: Path, key: str | None = None) -> Callable[[], np.ndarray | torch.Tensor]:
    """Reads one array of a file when called; `key` None: the only one, or the one called "features"."""

    def read() -> np.ndarray | torch.Tensor:
        if file.suffix in (".npy", ".npz"):
            return _numpy(file, key)
        return _safetensors(file, lambda opened: opened.get_tensor(_only(file, opened.keys()) if key is None else key))

    return read


def _numpy(file: Path, key: str | None) -> np.ndarray:
    try:
        content = np.load(file, allow_pickle=False)
        if file.suffix == ".npy":
            return content
        with content:
            name = _only(file, content.files) if key is None else key
            return content[name]
    except (EOFError, zipfile.BadZipFile, ValueError) as error:
        if str(error).startswith("features "):
            raise
        raise DataError(
            f"features {file}: cannot be read ({' '.join(str(error).split())}); compute it again"
        ) from error


def _only(file: Path, keys: Sequence[str]) -> str:
    keys = list(keys)
    if "features" in keys:
        return "features"
    if len(keys) != 1:
        raise UserError(f"features {file}: holds {len(keys)} arrays; call the one to use 'features'")
    return keys[0]


def _safetensors(path: Path, use: Callable):
    try:
        with safe_open(path, "pt") as file:
            return use(file)
    except SafetensorError as error:
        raise DataError(f"features {path}: not a safetensors file ({error})") from error
