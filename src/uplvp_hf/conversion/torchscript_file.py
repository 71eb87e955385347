"""The tensors of a TorchScript archive, such as OpenAI's CLIP, without running anything that it carries.

`torch.jit.load` would run the archive's own methods of loading; here its pickle is read with a short list of names that
may occur in it, and its code not at all.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


class _Module:
    """An object of the archive: its attributes."""


def is_torchscript(path: Path) -> bool:
    """Whether a file is an archive of `torch.jit.save`: constants and code beside the data."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers by their full names. Raises UnpicklingError for a name that is not expected, and what a
    damaged archive raises."""
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl"))
        content = _Reader(archive, name.removesuffix("data.pkl")).load()
    found: dict[str, Tensor] = {}
    _collect(content, "", found)
    return found


def _collect(value: Any, name: str, found: dict[str, Tensor]) -> None:
    if isinstance(value, Tensor):
        found[name] = value
    elif isinstance(value, _Module):
        for key, part in vars(value).items():
            _collect(part, f"{name}.{key}" if name else key, found)


class _Reader(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}data.pkl")))
        self.archive, self.root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        plain: dict[tuple[str, str], Callable] = {
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("collections", "OrderedDict"): OrderedDict,
            ("torch.jit._pickle", "restore_type_tag"): lambda value, _: value,
        }
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if module == "torch" and name in _STORAGES:
            return name
        if module == "torch.jit._pickle" and name.startswith("build_") and name.endswith("list"):
            return list
        if (module, name) not in plain:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which weights do not need")
        return plain[module, name]

    def persistent_load(self, place: Any) -> Tensor:
        """A storage: one row of numbers."""
        _, kind, key, _, count = place
        dtype = _STORAGES[kind]
        content = bytearray(self.archive.read(f"{self.root}data/{key}"))
        return torch.frombuffer(content, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)


def _tensor(storage: Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
    return storage.as_strided(tuple(size), tuple(stride), offset)


__all__ = ["is_torchscript", "read_torchscript"]
