"""Text embeddings of class names in a file: one format for labelers and for the text class head of pre-training."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..files import replacing
from ..models.errors import UserError


def write_text_matrix(
    path: str | os.PathLike[str], vectors: torch.Tensor, names: Sequence[str], **metadata: str
) -> None:
    """Writes safetensors: `text_embeds` (T, D) float32, and `names`, a JSON list of T names, in the metadata beside
    further words such as the encoder's name. Raises UserError when the names do not fit the vectors."""
    if len(names) != len(vectors):
        raise UserError(f"{path}: {len(vectors)} text embeddings but {len(names)} names")
    tensors = {"text_embeds": vectors.float().cpu().contiguous()}
    with replacing(path, "wb") as stream:
        stream.write(save(tensors, metadata={**metadata, "names": json.dumps(list(names))}))


def read_text_matrix(
    path: str | os.PathLike[str], names: Sequence[str] | str | os.PathLike[str] | None = None
) -> tuple[torch.Tensor, list[str]]:
    """Vectors (T, D) and their T names.

    Args:
        path: safetensors with one matrix, (T, D) or (D, T), or one matrix called `text_embeds` among others.
        names: the T names, or a JSON file with a list of them. None: the metadata's `names` (a JSON list), else the
            file NAME.json beside NAME.safetensors.

    Raises UserError naming the file and what is wrong: no names, no or several matrices, sizes that do not fit, names
    that occur twice.
    """
    path = os.fspath(path)
    matrix, metadata = _read_matrix(path)
    known = _read_names(path, names, metadata)
    if len(known) not in matrix.shape:
        raise UserError(f"text embeddings {path}: {len(known)} names for a matrix of {tuple(matrix.shape)}")
    doubled = [name for name in known if known.count(name) > 1]
    if doubled:
        raise UserError(f"text embeddings {path}: the name {doubled[0]!r} occurs twice")
    return (matrix if matrix.shape[0] == len(known) else matrix.T), known


def _read_matrix(path: str) -> tuple[torch.Tensor, dict[str, str]]:
    if not os.path.isfile(path):
        raise UserError(f"text embeddings {path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            keys = file.keys()
            shapes = {key: file.get_slice(key).get_shape() for key in keys}
            matrices = [key for key, shape in shapes.items() if len(shape) == 2]
            key = "text_embeds" if "text_embeds" in matrices else matrices[0] if len(matrices) == 1 else None
            if key is None:
                raise UserError(f"text embeddings {path}: needs one matrix, has tensors of shapes {shapes}")
            return file.get_tensor(key), file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"text embeddings {path}: not a safetensors file ({error})") from error


def _read_names(path: str, names: Sequence[str] | str | os.PathLike[str] | None, metadata: dict[str, str]) -> list[str]:
    where = path
    if names is not None and not isinstance(names, (str, os.PathLike)):
        return list(names)
    if names is None and "names" in metadata:
        content = metadata["names"]
    else:
        where = os.fspath(names) if names is not None else os.path.splitext(path)[0] + ".json"
        if not os.path.isfile(where):
            raise UserError(
                f"text embeddings {path}: no names in its metadata and no file {where}; give a JSON list of the names"
            )
        with open(where, encoding="utf-8") as stream:
            content = stream.read()
    try:
        values = json.loads(content)
    except json.JSONDecodeError as error:
        raise UserError(f"names in {where}: not JSON ({error})") from error
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise UserError(f"names in {where}: must be a JSON list of words")
    return values
