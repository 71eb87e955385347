"""Mask2Former in the names of its first release (detectron2) -> `Mask2FormerSegmenter`. Backbones: ResNet."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from ..models.errors import UserError
from .resnet import resnet_name

_PIXEL = "model.pixel_level_module.decoder."
_MODULE = "model.transformer_module."
_ENCODER_LAYER = r"sem_seg_head\.pixel_decoder\.transformer\.encoder\.layers\.(\d+)\."
_PREDICTOR = r"sem_seg_head\.predictor\."

# Pattern over the whole name -> our name. Both count pyramid levels from the high resolution (adapter_1 is stride 4).
_RULES = [
    (r"sem_seg_head\.pixel_decoder\.input_proj\.(\d+)\.([01])\.(.+)", _PIXEL + r"input_projections.\1.\2.\3"),
    (r"sem_seg_head\.pixel_decoder\.transformer\.level_embed", _PIXEL + "level_embed"),
    (r"sem_seg_head\.pixel_decoder\.mask_features\.(.+)", _PIXEL + r"mask_projection.\1"),
    (r"sem_seg_head\.pixel_decoder\.(adapter|layer)_(\d+)\.norm\.(.+)", _PIXEL + r"\1_\2.1.\3"),
    (r"sem_seg_head\.pixel_decoder\.(adapter|layer)_(\d+)\.(weight|bias)", _PIXEL + r"\1_\2.0.\3"),
    (_ENCODER_LAYER + r"self_attn\.(.+)", _PIXEL + r"encoder.layers.\1.self_attn.\2"),
    (_ENCODER_LAYER + r"linear([12])\.(.+)", _PIXEL + r"encoder.layers.\1.fc\2.\3"),
    (_ENCODER_LAYER + r"norm1\.(.+)", _PIXEL + r"encoder.layers.\1.self_attn_layer_norm.\2"),
    (_ENCODER_LAYER + r"norm2\.(.+)", _PIXEL + r"encoder.layers.\1.final_layer_norm.\2"),
    (_PREDICTOR + r"query_embed\.(.+)", _MODULE + r"queries_embedder.\1"),
    (_PREDICTOR + r"query_feat\.(.+)", _MODULE + r"queries_features.\1"),
    (_PREDICTOR + r"level_embed\.(.+)", _MODULE + r"level_embed.\1"),
    (_PREDICTOR + r"input_proj\.(\d+)\.(weight|bias)", _MODULE + r"input_projections.\1.\2"),
    (_PREDICTOR + r"decoder_norm\.(.+)", _MODULE + r"decoder.layernorm.\1"),
    (_PREDICTOR + r"class_embed\.(.+)", r"class_predictor.\1"),
    (_PREDICTOR + r"mask_embed\.layers\.(\d+)\.(.+)", _MODULE + r"decoder.mask_predictor.mask_embedder.\1.0.\2"),
    (
        _PREDICTOR + r"transformer_cross_attention_layers\.(\d+)\.multihead_attn\.(.+)",
        _MODULE + r"decoder.layers.\1.cross_attn.\2",
    ),
    (
        _PREDICTOR + r"transformer_cross_attention_layers\.(\d+)\.norm\.(.+)",
        _MODULE + r"decoder.layers.\1.cross_attn_layer_norm.\2",
    ),
    (
        _PREDICTOR + r"transformer_self_attention_layers\.(\d+)\.self_attn\.(out_proj\..+)",
        _MODULE + r"decoder.layers.\1.self_attn.\2",
    ),
    (
        _PREDICTOR + r"transformer_self_attention_layers\.(\d+)\.norm\.(.+)",
        _MODULE + r"decoder.layers.\1.self_attn_layer_norm.\2",
    ),
    (_PREDICTOR + r"transformer_ffn_layers\.(\d+)\.linear([12])\.(.+)", _MODULE + r"decoder.layers.\1.fc\2.\3"),
    (_PREDICTOR + r"transformer_ffn_layers\.(\d+)\.norm\.(.+)", _MODULE + r"decoder.layers.\1.final_layer_norm.\2"),
]
_PACKED = _PREDICTOR + r"transformer_self_attention_layers\.(\d+)\.self_attn\.in_proj_(weight|bias)"


def torchvision_name(name: str) -> str:
    """A tensor of detectron2's ResNet (`res2.0.conv1.norm.weight`) in torchvision's names (`layer1.0.bn1.weight`)."""
    name = name.removeprefix("stem.")
    name = re.sub(r"^res(\d+)\.", lambda match: f"layer{int(match[1]) - 1}.", name)
    name = re.sub(r"shortcut\.norm\.", "downsample.1.", name)
    name = re.sub(r"shortcut\.", "downsample.0.", name)
    return re.sub(r"conv(\d)\.norm\.", r"bn\1.", name)


def convert_detectron2_mask2former(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of the original Mask2Former -> that of `Mask2FormerSegmenter`. No tensor is copied.

    Raises UserError naming the tensors that have no place in our model (other backbones than ResNet among them).
    """
    converted: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in state.items():
        found = _convert(name, tensor)
        converted.update(found)
        if not found:
            unknown.append(name)
    if unknown:
        raise UserError(
            f"{len(unknown)} tensors have no place in a Mask2Former with a ResNet: {', '.join(unknown[:5])}"
            f"{', ...' if len(unknown) > 5 else ''}. Checkpoints with a Swin backbone are on the Hub as "
            "transformers models already (facebook/mask2former-swin-*)."
        )
    return converted


def _convert(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if name.startswith("backbone."):
        ours = resnet_name(torchvision_name(name.removeprefix("backbone.")))
        return {f"model.pixel_level_module.encoder.{ours}": tensor} if ours else {}
    packed = re.fullmatch(_PACKED, name)
    if packed:
        layer = f"{_MODULE}decoder.layers.{packed[1]}.self_attn."
        parts = zip("qkv", torch.chunk(tensor, 3), strict=True)
        return {f"{layer}{which}_proj.{packed[2]}": part for which, part in parts}
    for pattern, ours in _RULES:
        match = re.fullmatch(pattern, name)
        if match:
            return {match.expand(ours): tensor}
    return {}
