"""Layers in float32, whatever the type of their weights: sums over whole objects are beyond the range of float16."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def in_float32(layer: nn.Linear | nn.LayerNorm, x: Tensor) -> Tensor:
    """The layer's result in float32. A layer with weights of this type, or with quantized ones, which are no tensors,
    is simply called."""
    if not isinstance(layer.weight, Tensor) or layer.weight.dtype == torch.float32:
        return layer(x.float())
    weight, bias = layer.weight.float(), layer.bias.float()
    if isinstance(layer, nn.Linear):
        return F.linear(x.float(), weight, bias)
    return F.layer_norm(x.float(), layer.normalized_shape, weight, bias, layer.eps)
