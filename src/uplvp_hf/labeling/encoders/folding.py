"""Frozen batch norms become part of the convolutions before them: the same network in less time."""

from __future__ import annotations

import copy
import logging

import torch
from torch import nn

logger = logging.getLogger(__name__)


@torch.no_grad()
def fold_batch_norms(model: nn.Module, pixels: torch.Tensor, tolerance: float = 1e-3) -> nn.Module:
    """Fold every batch norm whose input is a convolution's output into that convolution.

    Args:
        model: in eval mode, not to be trained again. Activations inside of timm's norm layers are kept.
        pixels: (B, 3, H, W) on which pairs are found (a norm sees the very tensor that a convolution returned) and on
            which the result is compared with the original.
        tolerance: greatest difference of any output, as a share of the largest value.

    Returns a folded copy, or `model` itself where nothing can be folded or the outputs would differ.
    """
    folded = copy.deepcopy(model)
    pairs = _find_pairs(folded, pixels)
    if not pairs:
        return model
    parents = {child: (parent, name) for parent in folded.modules() for name, child in parent.named_children()}
    for norm, convolution in pairs.items():
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        bias = 0.0 if convolution.bias is None else convolution.bias
        convolution.weight.mul_(scale.view(-1, 1, 1, 1))
        convolution.bias = nn.Parameter(norm.bias + (bias - norm.running_mean) * scale, requires_grad=False)
        parent, name = parents[norm]
        setattr(parent, name, getattr(norm, "act", nn.Identity()))
    before, after = model(pixels), folded(pixels)
    if float((before - after).abs().max()) > tolerance * float(before.abs().max()):
        logger.warning("batch norms cannot be folded into this network: its outputs would differ")
        return model
    return folded


def _find_pairs(model: nn.Module, pixels: torch.Tensor) -> dict[nn.BatchNorm2d, nn.Conv2d]:
    """{norm: the convolution before it}, each of them used once in a forward pass."""
    outputs: dict[int, tuple[nn.Conv2d, torch.Tensor]] = {}  # the tensors are kept, so that no id is used twice
    pairs: dict[nn.BatchNorm2d, nn.Conv2d] = {}
    uses: dict[nn.Module, int] = {}

    def after_convolution(module: nn.Conv2d, _: tuple, output: torch.Tensor) -> None:
        outputs[id(output)] = (module, output)
        uses[module] = uses.get(module, 0) + 1

    def before_norm(module: nn.BatchNorm2d, inputs: tuple) -> None:
        uses[module] = uses.get(module, 0) + 1
        if id(inputs[0]) in outputs and module.affine and module.track_running_stats:
            pairs[module] = outputs[id(inputs[0])][0]

    hooks = [m.register_forward_hook(after_convolution) for m in model.modules() if isinstance(m, nn.Conv2d)]
    hooks += [m.register_forward_pre_hook(before_norm) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    try:
        model(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    return {norm: convolution for norm, convolution in pairs.items() if uses[norm] == uses[convolution] == 1}
