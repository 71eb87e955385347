"""Writing a traced program as a file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import IO

import torch

from ..models.errors import UserError

DESCRIPTION = "export.json"
FILES = {"onnx": "model.onnx", "torch": "model.pt2", "native": "model.safetensors", "mask2former": "model.safetensors"}


def save_program(
    program: torch.export.ExportedProgram,
    stream: IO[bytes],
    form: str,
    opset: int,
    inputs: Sequence[str],
    outputs: Sequence[str],
) -> None:
    """Writes a program as ONNX, with these names of inputs and outputs, or as torch's own file.

    stream: an open file with a name. Raises UserError without the packages that ONNX needs.
    """
    if form == "torch":
        torch.export.save(program, stream)
        return
    try:
        import onnxruntime  # noqa: F401 (a file that nothing here can run is of little use)
        import onnxscript  # noqa: F401 (torch's exporter is written with it)
    except ImportError as error:
        raise UserError(f"ONNX needs a package: pip install 'uplvp_hf[onnx]' ({error})") from error
    # The exporter tells at length what it does, and at the level of warnings what it could not fold.
    logs = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        onnx_program = torch.onnx.export(
            program, dynamo=True, opset_version=opset, input_names=list(inputs), output_names=list(outputs),
            verbose=False,
        )  # fmt: skip
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
    onnx_program.save(stream.name)


__all__ = ["DESCRIPTION", "FILES", "save_program"]
