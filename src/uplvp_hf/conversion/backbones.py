"""Backbones in torchvision's names, supervised or self-supervised (MoCo, DenseCL, SwAV) -> `ResNetBackbone`."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from ..models.errors import UserError
from .resnet import resnet_name

# Where the code bases keep the network that is fine-tuned afterwards. The momentum encoder of MoCo is not it.
_PREFIXES = ("module.encoder_q.", "encoder_q.", "backbone.", "module.backbone.", "module.", "")
_HEADS = r"(fc|head|projection_head|prototypes|neck|queue|bn_neck)(\d*)\b.*"


def convert_resnet_backbone(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a transformers `ResNetBackbone`, and {original name: reason} of those left out. Nothing is copied.

    Raises UserError when there is no ResNet, or for tensors of the backbone that have no place.
    """
    prefix = next((p for p in _PREFIXES if f"{p}layer1.0.conv1.weight" in state), None)
    if prefix is None:
        raise UserError(f"No ResNet in torchvision's names in this checkpoint; it begins with {list(state)[:3]}.")
    converted, dropped, unknown = {}, {}, []
    for name, tensor in state.items():
        inner = name.removeprefix(prefix)
        if not name.startswith(prefix):
            dropped[name] = "not of the backbone that is fine-tuned"
        elif re.fullmatch(_HEADS, inner):
            dropped[name] = "head of the pre-training task or classifier"
        elif inner.endswith("num_batches_tracked"):
            dropped[name] = "counter that inference does not read"
        elif ours := resnet_name(inner):
            converted[ours] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise UserError(f"{len(unknown)} tensors have no place in a ResNet: {', '.join(unknown[:5])}.")
    return converted, dropped


def resnet_config_of(state: dict[str, Tensor]) -> dict[str, Any]:
    """Settings of `ResNetConfig` read off the tensors of a `ResNetBackbone` (names without prefix).

    The stride of a bottleneck block lies in its 3x3 convolution, as in torchvision; the weights cannot tell.
    Raises UserError for wide or grouped bottlenecks, which transformers' ResNet does not have.
    """
    stages: dict[int, set[int]] = {}
    for name in state:
        match = re.match(r"encoder\.stages\.(\d+)\.layers\.(\d+)\.", name)
        if match:
            stages.setdefault(int(match[1]), set()).add(int(match[2]))
    first = "encoder.stages.0.layers.0.layer."
    last = 2 if f"{first}2.convolution.weight" in state else 1
    width = "encoder.stages.{}.layers.0.layer.{}.convolution.weight"
    inner, outer = state[f"{first}1.convolution.weight"], state[f"{first}{last}.convolution.weight"]
    if last == 2 and (outer.shape[0] != 4 * inner.shape[0] or inner.shape[0] != inner.shape[1]):
        raise UserError(
            f"A bottleneck of {inner.shape[0]} and {outer.shape[0]} channels is wide or grouped; only plain ResNets "
            "(18, 34, 50, 101, 152 and shrunken ones) can be converted."
        )
    return {
        "model_type": "resnet",
        "layer_type": "bottleneck" if last == 2 else "basic",
        "depths": [len(stages[stage]) for stage in sorted(stages)],
        "embedding_size": state["embedder.embedder.convolution.weight"].shape[0],
        "hidden_sizes": [state[width.format(stage, last)].shape[0] for stage in sorted(stages)],
        "downsample_in_bottleneck": False,
        "out_features": [f"stage{stage + 1}" for stage in sorted(stages)],
    }
