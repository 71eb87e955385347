"""Exporting a semantic segmenter: one window in, logits of the classes out.

The canvas is a square window, and images are cut into windows, not padded: the prompts are made from what the network
sees, and gray margins would be part of it.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from uplvp_hf.files import replacing, write_json, writing

from ..models.errors import UserError
from .graph_file import DESCRIPTION, FILES, save_program

INPUT, OUTPUT = "pixel_values", "logits"


class LogitsModel(nn.Module):
    """A semantic segmenter: pixel_values (B, 3, S, S) -> logits (B, K, S / 4, S / 4)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values).logits


def export_semantic(
    model: nn.Module, processor: Any, directory: Path, form: str, side: int | None, opset: int, check: bool
) -> dict[str, Any]:
    """Writes an `IcpcForSemanticSegmentation` and its image processor to a folder, as ONNX or as torch's own file.

    side: of the square window, pixels, a multiple of 32; by default the processor's shorter side, rounded up. The rest
    as for `export_model`, which checks the arguments and calls this. Returns the content of `export.json`.
    """
    side = side or math.ceil(dict(processor.size).get("shortest_edge", 512) / 32) * 32
    if side % 32:
        raise UserError(f"the window of a semantic segmenter is a multiple of 32 pixels, not {side}.")
    tensors = LogitsModel(model)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # about parts of torch and transformers that nobody here can change
        example = torch.zeros(2, 3, side, side)  # torch.export takes a size of 1 for a constant
        program = torch.export.export(
            tensors, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), strict=False
        )
    directory.mkdir(parents=True, exist_ok=True)
    with writing(directory / "config.json"):
        model.config.save_pretrained(directory)
    with writing(directory / "preprocessor_config.json"):
        processor.save_pretrained(directory)
    file = directory / FILES[form]
    with replacing(file, "wb") as stream, writing(file):
        save_program(program, stream, form, opset, [INPUT], [OUTPUT])
    description: dict[str, Any] = {
        "format": form, "file": FILES[form], "canvas": [side, side], "inputs": {INPUT: [None, 3, side, side]},
        "outputs": [OUTPUT], "torch": torch.__version__, **({"opset": opset} if form == "onnx" else {}),
    }  # fmt: skip
    if check:
        description |= _differences(tensors, file, side)
    write_json(directory / DESCRIPTION, description)
    return description


@torch.no_grad()
def _differences(model: LogitsModel, file: Path, side: int) -> dict[str, dict[str, float]]:
    """Largest |a - b| / max(1, |a|) of the logits, a of the model, b of the file, opened anew, and of the model for
    pixels that are rounded otherwise."""
    if file.suffix == ".onnx":
        from uplvp_hf.inference.onnx_runtime import open_session

        session = open_session(file)

        def run(pixels: Tensor) -> Tensor:
            return torch.from_numpy(session.run([OUTPUT], {INPUT: pixels.numpy()})[0])

    else:
        run = torch.export.load(file).module()
    generator, step = torch.Generator().manual_seed(0), 1 + torch.finfo(torch.float32).eps
    largest = own = 0.0
    for count in (1, 3):
        pixels = torch.randn(count, 3, side, side, generator=generator)
        ours = model(pixels)
        scale = ours.abs().clamp(min=1)
        largest = max(largest, ((ours - run(pixels)).abs() / scale).max().item())
        own = max(own, ((ours - model(pixels * step)).abs() / scale).max().item())
    return {"largest_difference": {OUTPUT: largest}, "own_rounding": {OUTPUT: own}}


__all__ = ["INPUT", "OUTPUT", "LogitsModel", "export_semantic"]
