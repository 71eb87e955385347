"""ResNet 18 to 152 under the names of mmdetection and torchvision -> `ResNetBackbone` of transformers."""

import re
from typing import Any

from ..models.errors import UserError

# depth -> (type of block in transformers, blocks a stage)
RESNETS = {
    18: ("basic", [2, 2, 2, 2]),
    34: ("basic", [3, 4, 6, 3]),
    50: ("bottleneck", [3, 4, 6, 3]),
    101: ("bottleneck", [3, 4, 23, 3]),
    152: ("bottleneck", [3, 8, 36, 3]),
}


# Settings that ours has in one way only.
_PLAIN = {
    "strides": [1, 2, 2, 2], "dilations": [1, 1, 1, 1], "num_stages": 4, "out_indices": [0, 1, 2, 3],
    "deep_stem": False, "avg_down": False, "dcn": None, "plugins": None,
}  # fmt: skip


_LAYERS = {"conv": "convolution", "bn": "normalization"}


def resnet_name(name: str) -> str | None:
    """Name of a tensor inside the backbone (`layer1.0.conv2.weight`) -> ours, None if it has no place."""
    if match := re.fullmatch(r"(conv|bn)1\.(.+)", name):
        return f"embedder.embedder.{_LAYERS[match[1]]}.{match[2]}"
    match = re.fullmatch(r"layer(\d+)\.(\d+)\.(?:(conv|bn)(\d)|downsample\.([01]))\.(.+)", name)
    if match is None:
        return None
    stage, layer, kind, number, shortcut, rest = match.groups()
    part = f"layer.{int(number) - 1}.{_LAYERS[kind]}" if kind else f"shortcut.{[*_LAYERS.values()][int(shortcut)]}"
    return f"encoder.stages.{int(stage) - 1}.layers.{layer}.{part}.{rest}"


def resnet_config(backbone: dict[str, Any]) -> dict[str, Any]:
    """`backbone` section of an mmdetection configuration -> settings of a transformers `ResNetConfig`.

    Raises UserError for another backbone than the ResNets of `RESNETS`, and for variants that transformers' ResNet
    does not have, some of which would leave no trace in the weights.
    """
    if backbone["type"] != "ResNet" or backbone.get("depth") not in RESNETS:
        raise UserError(f"Only ResNet {', '.join(map(str, RESNETS))} can be converted, got {backbone['type']}.")
    for name, plain in _PLAIN.items():
        value = backbone.get(name) or plain
        if (list(value) if isinstance(value, tuple) else value) != plain:
            raise UserError(f"This ResNet cannot be converted: {name} must be {plain}, got {value}.")
    kind, depths = RESNETS[backbone["depth"]]
    width = backbone.get("base_channels", 64) * (4 if kind == "bottleneck" else 1)
    return {
        "model_type": "resnet",
        "layer_type": kind,
        "depths": depths,
        "embedding_size": backbone.get("stem_channels") or backbone.get("base_channels", 64),
        "hidden_sizes": [width * 2**stage for stage in range(4)],
        "downsample_in_bottleneck": backbone.get("style", "pytorch") == "caffe",
        "out_features": [f"stage{index + 1}" for index in backbone.get("out_indices", range(4))],
    }
