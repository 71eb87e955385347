"""Dense features that another program computed, such as OpenSeg's, in place of an image tower.

A folder with one file an image, or one file with one array an image; safetensors or npz (or npy in a folder).
Images are found by their relative path, with or without suffix, else by the file name without suffix, else by their
`image_id` (last: running numbers may look like another image's name). The grid must cover exactly the image: crop
what an encoder padded (OpenSeg: the valid part of its square) before writing.
"""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

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
        # {what an image may be called: file, name of the array in it; None: the only one}
        self._places: dict[str, tuple[Path, str | None]] = {}
        if self.path.is_dir():
            files = sorted(file for file in self.path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
            counts = Counter(file.stem for file in files)
            self._places = {file.stem: (file, None) for file in files if counts[file.stem] == 1}
            self._places |= {file.relative_to(self.path).with_suffix("").as_posix(): (file, None) for file in files}
        elif self.path.is_file() and self.path.suffix in (".safetensors", ".npz"):
            with _opened(self.path) as content:
                self._places = {key: (self.path, key) for key in list(content.keys())}
        else:
            raise UserError(f"features {path}: neither a folder nor a .safetensors or .npz file")
        if not self._places:
            raise UserError(f"features {path}: no {', '.join(SUFFIXES)} file in it")

    def __len__(self) -> int:
        return len(self._places)

    def __call__(self, rows: Sequence[Row], dimension: int | None = None) -> list[torch.Tensor]:
        """Unit-length features of images: one (D, h, w) float32 a row.

        Raises DataError, which concerns one image: no array for it, a file that is cut off, values that are not
        finite. Raises UserError, which concerns them all: a wrong number of axes, or `dimension` (of the text
        embeddings) not met.
        """
        return [self._load(row, dimension) for row in rows]

    def _load(self, row: Row, dimension: int | None) -> torch.Tensor:
        name = PurePosixPath(str(row["file_name"]).replace(os.sep, "/"))
        keys = dict.fromkeys([name.with_suffix("").as_posix(), str(name), name.stem, str(row["image_id"])])
        key = next((key for key in keys if key in self._places), None)
        if key is None:
            raise DataError(
                f"features {self.path}: nothing for image {row['file_name']!r} (image id {row['image_id']!r}); "
                f"looked for {', '.join(keys)}"
            )
        values = torch.as_tensor(_read(*self._places[key]))
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


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """The arrays of a file by name; of a .npy the array itself. Raises DataError where it cannot be read."""
    try:
        with contextlib.ExitStack() as stack:
            if file.suffix == ".npy":
                yield np.load(file, allow_pickle=False)
            elif file.suffix == ".npz":
                yield stack.enter_context(np.load(file, allow_pickle=False))
            else:
                yield stack.enter_context(safe_open(file, "pt"))
    except UserError:
        raise
    except (EOFError, zipfile.BadZipFile, SafetensorError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"features {file}: cannot be read ({reason}); compute it again") from error


def _read(file: Path, key: str | None) -> Any:
    """One array of a file; `key` None: the only one, or the one called "features"."""
    with _opened(file) as content:
        if isinstance(content, np.ndarray):
            return content
        keys = list(content.keys())
        if key is None and len(keys) != 1 and "features" not in keys:
            raise UserError(f"features {file}: holds {len(keys)} arrays; call the one to use 'features'")
        name = key or ("features" if "features" in keys else keys[0])
        return content.get_tensor(name) if hasattr(content, "get_tensor") else content[name]
