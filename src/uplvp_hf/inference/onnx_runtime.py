"""An exported ONNX model that can take the model's place in post-processing and `predict_dataset`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SemanticSegmenterOutput

from uplvp_hf.models.query_segmenter import SegmenterOutput

from ..models.errors import UserError


def open_session(file: str | os.PathLike[str], device: str | torch.device | None = None) -> Any:
    """An `onnxruntime.InferenceSession`: on CUDA where `device` says so and onnxruntime was built for it, else the CPU.

    Raises UserError without onnxruntime, or for a file that it cannot run.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"{os.fspath(file)} needs onnxruntime: pip install 'uplvp_hf[onnx]'") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    wanted = ["CPUExecutionProvider"]
    if device is not None and torch.device(device).type == "cuda":
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise UserError(f"onnxruntime has no CUDA here ({device}): pip install onnxruntime-gpu, or use the CPU.")
        wanted.insert(0, ("CUDAExecutionProvider", {"device_id": torch.device(device).index or 0}))
    try:
        return onnxruntime.InferenceSession(os.fspath(file), options, providers=wanted)
    except Exception as error:  # onnxruntime raises classes of its own, all plain exceptions
        raise UserError(f"{os.fspath(file)} cannot be run: {str(error).splitlines()[0]}") from error


def run_session(session: Any, pixel_values: Tensor, pixel_mask: Tensor) -> dict[str, Tensor]:
    """Outputs by name, on the CPU. pixel_values (B, 3, H, W), pixel_mask (B, H, W), of the exported canvas."""
    inputs = {"pixel_values": pixel_values.float().cpu().numpy(), "pixel_mask": pixel_mask.long().cpu().numpy()}
    names = [output.name for output in session.get_outputs()]
    return {name: torch.from_numpy(value) for name, value in zip(names, session.run(names, inputs), strict=True)}


class OnnxSemanticSegmenter(nn.Module):
    """A `model.onnx` of a semantic segmenter in place of the model, for `segment_image` with windows of its size.

    config: the model's `IcpcConfig`; window: side of what the file takes, pixels.
    """

    def __init__(self, session: Any, config: Any):
        super().__init__()
        self.session, self.config = session, config
        self.window = int(session.get_inputs()[0].shape[-1])
        self.anchor = nn.Parameter(torch.zeros(()), requires_grad=False)  # where and in what type inputs are wanted

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str], device: str | None = None) -> OnnxSemanticSegmenter:
        """Opens a folder of `uplvp export --format onnx`; raises UserError as `open_session`."""
        from uplvp_hf.models.configuration_icpc import IcpcConfig

        session = open_session(Path(directory) / "model.onnx", device)
        return cls(session, IcpcConfig.from_pretrained(directory)).eval()

    def forward(self, pixel_values: Tensor) -> SemanticSegmenterOutput:
        """pixel_values (B, 3, S, S), S the window -> logits (B, K, S / 4, S / 4)."""
        if tuple(pixel_values.shape[-2:]) != (self.window, self.window):
            raise UserError(
                f"a window of {tuple(pixel_values.shape[-2:])} for a model exported at {self.window} x {self.window}: "
                "use its window, or export with another --size."
            )
        logits = self.session.run(["logits"], {"pixel_values": pixel_values.float().cpu().numpy()})[0]
        return SemanticSegmenterOutput(logits=torch.from_numpy(logits))


class OnnxSegmenter(nn.Module):
    """A `model.onnx` of `uplvp export` in place of the model: same call, same output fields, no gradients.

    config: the model's `UplvpConfig`. canvas: (height, width) that images have to be padded to; the image processor
    in the folder does so. `to(device)` has no effect: the device is chosen where the model is opened.
    """

    def __init__(self, session: Any, config: Any):
        super().__init__()
        self.session, self.config = session, config
        self.canvas = tuple(session.get_inputs()[0].shape[-2:])
        self.anchor = nn.Parameter(torch.zeros(()), requires_grad=False)  # where and in what type inputs are wanted

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str], device: str | None = None) -> OnnxSegmenter:
        """Opens a folder of `uplvp export --format onnx`; raises ValueError as `open_session`."""
        from uplvp_hf.models.configuration_uplvp import UplvpConfig

        directory = Path(directory)
        session = open_session(directory / "model.onnx", device)
        return cls(session, UplvpConfig.from_pretrained(directory)).eval()

    def _apply(self, fn, recurse: bool = True):
        return self

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None, **unused) -> SegmenterOutput:
        """pixel_values (B, 3, H, W) with H, W = `canvas`; pixel_mask (B, H, W), default: no padding."""
        if tuple(pixel_values.shape[-2:]) != self.canvas:
            raise UserError(
                f"images of {tuple(pixel_values.shape[-2:])} for a model exported at {self.canvas} (height, width): "
                "use the image processor in its folder, or export with another --size."
            )
        if pixel_mask is None:
            pixel_mask = torch.ones(len(pixel_values), *self.canvas, dtype=torch.int64)
        return SegmenterOutput(**run_session(self.session, pixel_values, pixel_mask))
