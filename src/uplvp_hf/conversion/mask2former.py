"""Mask2Former of mmdetection 2.x -> `Mask2FormerSegmenter` (the names of transformers' Mask2Former).

Backbones: ResNet 18 to 152. Sizes are read from the configuration and the tensors, so shrunken networks convert too.
"""

from typing import Any

from torch import Tensor

from .naming import Names
from .resnet import resnet_config

_PIXEL, _MODULE = "model.pixel_level_module.decoder.", "model.transformer_module."
_THERE = "panoptic_head.pixel_decoder."
_ENCODER, _OUR_ENCODER = _THERE + "encoder.layers.#.", _PIXEL + r"encoder.layers.\1."
_DECODER, _OUR_DECODER = "panoptic_head.transformer_decoder.layers.#.", _MODULE + r"decoder.layers.\1."

_NAMES = Names(
    "Mask2Former",
    "model.pixel_level_module.encoder.",
    {
        _THERE + "input_convs.#.conv.*": _PIXEL + r"input_projections.\1.0.\2",
        _THERE + "input_convs.#.gn.*": _PIXEL + r"input_projections.\1.1.\2",
        _THERE + "level_encoding.weight": _PIXEL + "level_embed",
        _THERE + "mask_feature.*": _PIXEL + r"mask_projection.\1",
        # Of four maps three go through the encoder, so one is left for the pyramid.
        _THERE + "lateral_convs.0.conv.*": _PIXEL + r"adapter_1.0.\1",
        _THERE + "lateral_convs.0.gn.*": _PIXEL + r"adapter_1.1.\1",
        _THERE + "output_convs.0.conv.*": _PIXEL + r"layer_1.0.\1",
        _THERE + "output_convs.0.gn.*": _PIXEL + r"layer_1.1.\1",
        _ENCODER + "attentions.0.*": _OUR_ENCODER + r"self_attn.\2",
        _ENCODER + "norms.0.*": _OUR_ENCODER + r"self_attn_layer_norm.\2",
        _ENCODER + "norms.1.*": _OUR_ENCODER + r"final_layer_norm.\2",
        **{
            f"{there}ffns.0.layers.{part}.*": rf"{ours}{linear}.\2"
            for there, ours in ((_ENCODER, _OUR_ENCODER), (_DECODER, _OUR_DECODER))
            for part, linear in (("0.0", "fc1"), ("1", "fc2"))
        },
        "panoptic_head.query_embed.weight": _MODULE + "queries_embedder.weight",
        "panoptic_head.query_feat.weight": _MODULE + "queries_features.weight",
        "panoptic_head.level_embed.weight": _MODULE + "level_embed.weight",
        "panoptic_head.decoder_input_projs.#.(?:conv.)?*": _MODULE + r"input_projections.\1.\2",
        "panoptic_head.cls_embed.*": r"class_predictor.\1",
        "panoptic_head.transformer_decoder.post_norm.*": _MODULE + r"decoder.layernorm.\1",
        _DECODER + "attentions.0.attn.*": _OUR_DECODER + r"cross_attn.\2",
        _DECODER + "attentions.1.attn.in_proj_(weight|bias)": _OUR_DECODER + r"self_attn.{qkv}_proj.\2",
        _DECODER + "attentions.1.attn.out_proj.*": _OUR_DECODER + r"self_attn.out_proj.\2",
        _DECODER + "norms.0.*": _OUR_DECODER + r"cross_attn_layer_norm.\2",
        _DECODER + "norms.1.*": _OUR_DECODER + r"self_attn_layer_norm.\2",
        _DECODER + "norms.2.*": _OUR_DECODER + r"final_layer_norm.\2",
        # Linear layers with a ReLU between them are 0, 2, 4 there.
        "panoptic_head.mask_embed.#.*": lambda match: (
            f"{_MODULE}decoder.mask_predictor.mask_embedder.{int(match[1]) // 2}.0.{match[2]}"
        ),
    },
)


def convert_mmdet_mask2former(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As `Names.convert`. The weights of the classes in the loss follow from the configuration and are left out."""
    return _NAMES.convert(
        {name: tensor for name, tensor in state.items() if name != "panoptic_head.loss_cls.class_weight"}
    )


def config_from_mmdet(config: dict[str, Any]) -> dict[str, Any]:
    """`model` section of an mmdetection Mask2Former configuration -> keyword arguments of `Mask2FormerConfig`.

    Raises UserError for a backbone other than ResNet, and for settings that transformers' Mask2Former cannot take:
    other loss than matching weights, other than 32 groups, 3 levels or 4 sampling points a level.
    """
    head, train = config["panoptic_head"], config["train_cfg"]
    pixel = head["pixel_decoder"]
    encoder, decoder = pixel["encoder"], head["transformer_decoder"]
    encoder_layer, decoder_layer = encoder["transformerlayers"], decoder["transformerlayers"]
    classes = head["num_things_classes"] + head["num_stuff_classes"]
    weights = {name: head[f"loss_{name}"]["loss_weight"] for name in ("cls", "mask", "dice")}
    costs = {name: train["assigner"][f"{name}_cost"]["weight"] for name in ("cls", "mask", "dice")}
    _NAMES.require("loss weights equal to matching costs", weights, costs)
    _NAMES.require("groups of the pixel decoder's norms", pixel["norm_cfg"], {"type": "GN", "num_groups": 32})
    _NAMES.require("feature levels", (head["num_transformer_feat_level"], pixel["num_outs"]), (3, 3))
    _NAMES.require("sampling points a level", encoder_layer["attn_cfgs"]["num_points"], 4)
    _NAMES.require("heads", encoder_layer["attn_cfgs"]["num_heads"], decoder_layer["attn_cfgs"]["num_heads"])
    class_weight = head["loss_cls"].get("class_weight") or [1.0] * classes + [0.1]
    _NAMES.require("weights of the true classes", list(class_weight[:-1]), [1.0] * classes)
    return {
        "backbone_config": resnet_config(config["backbone"]),
        "num_labels": classes,
        "feature_strides": list(head["strides"]),
        "feature_size": head["feat_channels"],
        "hidden_dim": head["feat_channels"],
        "mask_feature_size": head["out_channels"],
        "encoder_layers": encoder["num_layers"],
        "encoder_feedforward_dim": encoder_layer["ffn_cfgs"]["feedforward_channels"],
        # transformers counts the prediction before the first layer
        "decoder_layers": decoder["num_layers"] + 1,
        "dim_feedforward": decoder_layer["ffn_cfgs"]["feedforward_channels"],
        "num_attention_heads": decoder_layer["attn_cfgs"]["num_heads"],
        "num_queries": head["num_queries"],
        "enforce_input_projection": bool(head.get("enforce_decoder_input_project", False)),
        "class_weight": weights["cls"],
        "mask_weight": weights["mask"],
        "dice_weight": weights["dice"],
        "no_object_weight": class_weight[-1],
        "train_num_points": train["num_points"],
        "oversample_ratio": train["oversample_ratio"],
        "importance_sample_ratio": train["importance_sample_ratio"],
    }
