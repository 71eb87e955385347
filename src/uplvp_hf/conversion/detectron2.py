"""Mask2Former in the names of its first release (detectron2) -> `Mask2FormerSegmenter`. Backbones: ResNet."""

from __future__ import annotations

import re

from .naming import Names

_PIXEL, _MODULE = "model.pixel_level_module.decoder.", "model.transformer_module."
_THERE, _PREDICTOR = "sem_seg_head.pixel_decoder.", "sem_seg_head.predictor."
_ENCODER_LAYER = _THERE + "transformer.encoder.layers.#."
_CROSS, _SELF, _FFN = (
    _PREDICTOR + f"transformer_{kind}_layers.#." for kind in ("cross_attention", "self_attention", "ffn")
)


def torchvision_name(name: str) -> str:
    """A tensor of detectron2's ResNet (`res2.0.conv1.norm.weight`) in torchvision's names (`layer1.0.bn1.weight`)."""
    name = name.removeprefix("stem.")
    name = re.sub(r"^res(\d+)\.", lambda match: f"layer{int(match[1]) - 1}.", name)
    name = re.sub(r"shortcut\.norm\.", "downsample.1.", name)
    name = re.sub(r"shortcut\.", "downsample.0.", name)
    return re.sub(r"conv(\d)\.norm\.", r"bn\1.", name)


# Both count pyramid levels from the high resolution (adapter_1 is stride 4).
_NAMES = Names(
    "Mask2Former",
    "model.pixel_level_module.encoder.",
    {
        _THERE + "input_proj.#.#.*": _PIXEL + r"input_projections.\1.\2.\3",
        _THERE + "transformer.level_embed": _PIXEL + "level_embed",
        _THERE + "mask_features.*": _PIXEL + r"mask_projection.\1",
        _THERE + "(adapter|layer)_#.norm.*": _PIXEL + r"\1_\2.1.\3",
        _THERE + "(adapter|layer)_#.(weight|bias)": _PIXEL + r"\1_\2.0.\3",
        _ENCODER_LAYER + "self_attn.*": _PIXEL + r"encoder.layers.\1.self_attn.\2",
        _ENCODER_LAYER + "linear#.*": _PIXEL + r"encoder.layers.\1.fc\2.\3",
        _ENCODER_LAYER + "norm1.*": _PIXEL + r"encoder.layers.\1.self_attn_layer_norm.\2",
        _ENCODER_LAYER + "norm2.*": _PIXEL + r"encoder.layers.\1.final_layer_norm.\2",
        _PREDICTOR + "query_embed.*": _MODULE + r"queries_embedder.\1",
        _PREDICTOR + "query_feat.*": _MODULE + r"queries_features.\1",
        _PREDICTOR + "level_embed.*": _MODULE + r"level_embed.\1",
        _PREDICTOR + "input_proj.#.(weight|bias)": _MODULE + r"input_projections.\1.\2",
        _PREDICTOR + "decoder_norm.*": _MODULE + r"decoder.layernorm.\1",
        _PREDICTOR + "class_embed.*": r"class_predictor.\1",
        _PREDICTOR + "mask_embed.layers.#.*": _MODULE + r"decoder.mask_predictor.mask_embedder.\1.0.\2",
        _CROSS + "multihead_attn.*": _MODULE + r"decoder.layers.\1.cross_attn.\2",
        _CROSS + "norm.*": _MODULE + r"decoder.layers.\1.cross_attn_layer_norm.\2",
        _SELF + "self_attn.in_proj_(weight|bias)": _MODULE + r"decoder.layers.\1.self_attn.{qkv}_proj.\2",
        _SELF + "self_attn.out_proj.*": _MODULE + r"decoder.layers.\1.self_attn.out_proj.\2",
        _SELF + "norm.*": _MODULE + r"decoder.layers.\1.self_attn_layer_norm.\2",
        _FFN + "linear#.*": _MODULE + r"decoder.layers.\1.fc\2.\3",
        _FFN + "norm.*": _MODULE + r"decoder.layers.\1.final_layer_norm.\2",
    },
    torchvision_name,
    "Checkpoints with a Swin backbone are on the Hub as transformers models already (facebook/mask2former-swin-*).",
)
convert_detectron2_mask2former = _NAMES.convert
