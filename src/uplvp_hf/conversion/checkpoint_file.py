"""Reading checkpoints of other code bases without running code that they carry, and telling what they are."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..models.errors import UserError
from .torchscript_file import is_torchscript, read_torchscript

# Where code bases keep the weights inside a checkpoint, in the order in which they are looked for.
_WRAPPERS = ("state_dict", "model", "model_state_dict")

RESAVE = (
    "Open it once where it was made and save the tensors alone: "
    "`torch.save({k: torch.as_tensor(v) for k, v in weights.items()}, 'weights.pth')`"
)


class CheckpointError(UserError):
    """A checkpoint that cannot be read or converted; the message names the file and what to do."""


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a checkpoint; see `open_checkpoint`."""
    return open_checkpoint(path)[0]


def open_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], list[str] | None]:
    """The tensors of a checkpoint by their original names, and the names of its classes where it says them
    (mmdetection's `meta.CLASSES`), else None.

    Reads safetensors, files of `torch.save` with `weights_only=True` (a pickle that wants to run code is refused), and
    the tensors of TorchScript archives, whose code is not run.
    Weights wrapped in `state_dict`, `model` or `model_state_dict` are unwrapped; the rest of such a file is left out.
    Raises CheckpointError for a missing, damaged or unsafe file, and for one without tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file.")
    if path.suffix == ".safetensors":
        try:
            return _apart(load_file(path)), None
        except SafetensorError as error:
            raise CheckpointError(f"{path} is no readable safetensors file: {error}.") from error
    try:
        if is_torchscript(path):
            return _apart(read_torchscript(path)), None
        with torch.serialization.safe_globals(_numpy_scalars()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises whatever it meets; the reason is passed on
        reason = str(error).strip().split("\n")[0][:200]
        raise CheckpointError(
            f"{path} cannot be opened as plain weights ({type(error).__name__}: {reason}). {RESAVE}."
        ) from error
    return _unwrap(content, path), _class_names(content)


def _class_names(content: Any) -> list[str] | None:
    meta = content.get("meta") if isinstance(content, dict) else None
    names = meta.get("CLASSES") if isinstance(meta, dict) else None
    known = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    return list(names) if known and names and len(set(names)) == len(names) else None


def _numpy_scalars() -> list[Any]:
    """What unpickles a number of numpy, such as the best score that mmcv notes beside the weights. Runs no code."""
    scalar = np._core.multiarray.scalar if hasattr(np, "_core") else getattr(np, "core").multiarray.scalar  # noqa: B009
    kinds = [type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?")]
    return [(scalar, f"numpy.{place}.multiarray.scalar") for place in ("core", "_core")] + [np.dtype, *kinds]


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    for key in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not tensors:
        raise CheckpointError(f"{path} holds no named tensors; keys tried: {', '.join(_WRAPPERS)} and the file itself.")
    return _apart(tensors)


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor with a storage of its own: the report tells by it what became of a tensor."""
    seen, apart = set(), {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if place in seen or tensor.numel() == 0 else tensor
        seen.add(place)
    return apart


# What a checkpoint is, by a name that only it has. The first that is found decides.
_SIGNS = {
    "knet": r"(module\.)?rpn_head\.init_kernels\.weight",
    "queryinst": r"(module\.)?rpn_head\.init_proposal_bboxes\.weight",
    "mask2former-mmdet": r"(module\.)?panoptic_head\.query_feat\.weight",
    "mask2former-detectron2": r"(module\.)?sem_seg_head\.predictor\.query_feat\.weight",
    "denseclip": r"(module\.)?text_encoder\.token_embedding\.weight",
    "clip": r"(module\.)?(visual\.(class_embedding|attnpool\.positional_embedding)|visual_projection\.weight)",
    "timm-clip-resnet": r"head\.pos_embed",
    "resnet": r"(?:.*\.)?layer1\.0\.conv1\.weight",
}
FORMATS = tuple(_SIGNS)


def detect_format(state: dict[str, Tensor]) -> str:
    """One of `FORMATS`: `resnet` stands for any backbone in torchvision's names, supervised or self-supervised.

    Raises CheckpointError when the names are not known.
    """
    for kind, sign in _SIGNS.items():
        if any(re.fullmatch(sign, name) for name in state):
            return kind
    first = ", ".join(list(state)[:3])
    raise CheckpointError(f"The names of this checkpoint are not known ({first}, ...); known are {', '.join(FORMATS)}.")
