"""A model as one graph: tensors in, tensors out, on a fixed canvas, for any number of images.

Tracing is `torch.export` in its non-strict mode: padding is masked by hooks on the layers, which strict mode (Dynamo)
does not follow. While a model is traced every image counts as padded, so the graph is right for padded and for full
images.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..models.errors import UserError

INPUTS = ("pixel_values", "pixel_mask")
# What post-processing reads of a model's output, in this order; those that a model has not are left out.
OUTPUTS = ("class_queries_logits", "masks_queries_logits", "class_scores", "boxes", "roi_mask_logits")


class TensorModel(nn.Module):
    """A segmenter whose output is a dict of the tensors that post-processing reads, and nothing else."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> dict[str, Tensor]:
        """pixel_values (B, 3, H, W) float32, pixel_mask (B, H, W) int64, 1 on the image and 0 on padding, which is at
        the bottom and on the right -> `OUTPUTS` by name, as `SegmenterOutput` describes them."""
        output = self.model(pixel_values=pixel_values, pixel_mask=pixel_mask)
        return {name: output[name] for name in OUTPUTS if output.get(name) is not None}


def canvas_of(processor: Any, longest_edge: int | None = None) -> tuple[int, int]:
    """The smallest (height, width) that holds every image that `processor` resizes, in multiples of its `size_divisor`.

    longest_edge: in place of the processor's own size, which has to be given where it is not bounded (a shortest edge
    alone). Raises UserError without such a bound.
    """
    size = dict(processor.size)
    if longest_edge is not None:
        height = width = longest_edge
    elif size.get("height") and size.get("width"):
        height, width = size["height"], size["width"]
    elif size.get("longest_edge"):
        height = width = size["longest_edge"]
    else:
        raise UserError(f"size={size} does not bound the longer side of an image: give --size, such as --size 1024.")
    step = processor.size_divisor
    return math.ceil(height / step) * step, math.ceil(width / step) * step


def trace(model: nn.Module, canvas: tuple[int, int]) -> torch.export.ExportedProgram:
    """The graph of `TensorModel(model)` for any number of images on `canvas` (height, width).

    The model is to be in evaluation mode, in float32, on the CPU. Raises UserError where it is not.
    """
    parameter = next(model.parameters())
    if model.training or parameter.dtype != torch.float32 or parameter.device.type != "cpu":
        raise UserError(f"export needs model.eval().float().cpu(); this is {parameter.dtype} on {parameter.device}.")
    # Two images, because torch.export takes a size of 1 for a constant.
    pixel_values, pixel_mask = torch.zeros(2, 3, *canvas), torch.ones(2, *canvas, dtype=torch.int64)
    batch = torch.export.Dim("batch", min=1)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # about parts of torch and transformers that nobody here can change
        return torch.export.export(
            TensorModel(model), (pixel_values, pixel_mask), dynamic_shapes=({0: batch}, {0: batch}), strict=False
        )
