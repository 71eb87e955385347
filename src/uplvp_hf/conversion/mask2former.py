"""Mask2Former of mmdetection 2.x -> `Mask2FormerSegmenter` (the names of transformers' Mask2Former).

Backbones: ResNet 18 to 152. Sizes are read from the configuration and the tensors, so shrunken networks convert too.
"""

import re
from typing import Any

import torch
from torch import Tensor

from ..models.errors import UserError
from .resnet import resnet_config, resnet_name

_ENCODER = "model.pixel_level_module.encoder."
_PIXEL = "model.pixel_level_module.decoder."
_DECODER = "model.transformer_module."

# Pattern over the whole name in mmdetection -> our name. Group 1, 2, ... as in `re.sub`.
_RULES = [
    (r"panoptic_head\.pixel_decoder\.input_convs\.(\d+)\.conv\.(.+)", _PIXEL + r"input_projections.\1.0.\2"),
    (r"panoptic_head\.pixel_decoder\.input_convs\.(\d+)\.gn\.(.+)", _PIXEL + r"input_projections.\1.1.\2"),
    (r"panoptic_head\.pixel_decoder\.level_encoding\.weight", _PIXEL + "level_embed"),
    (r"panoptic_head\.pixel_decoder\.mask_feature\.(.+)", _PIXEL + r"mask_projection.\1"),
    (
        r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\.attentions\.0\.(.+)",
        _PIXEL + r"encoder.layers.\1.self_attn.\2",
    ),
    (r"panoptic_head\.query_embed\.weight", _DECODER + "queries_embedder.weight"),
    (r"panoptic_head\.query_feat\.weight", _DECODER + "queries_features.weight"),
    (r"panoptic_head\.level_embed\.weight", _DECODER + "level_embed.weight"),
    (r"panoptic_head\.decoder_input_projs\.(\d+)\.(?:conv\.)?(.+)", _DECODER + r"input_projections.\1.\2"),
    (r"panoptic_head\.cls_embed\.(.+)", r"class_predictor.\1"),
    (r"panoptic_head\.transformer_decoder\.post_norm\.(.+)", _DECODER + r"decoder.layernorm.\1"),
    (
        r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.attentions\.0\.attn\.(.+)",
        _DECODER + r"decoder.layers.\1.cross_attn.\2",
    ),
    (
        r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.attentions\.1\.attn\.(out_proj\..+)",
        _DECODER + r"decoder.layers.\1.self_attn.\2",
    ),
]
_NORMS = {
    "pixel_decoder.encoder": ["self_attn_layer_norm", "final_layer_norm"],
    "transformer_decoder": ["cross_attn_layer_norm", "self_attn_layer_norm", "final_layer_norm"],
}
_STACKS = {"pixel_decoder.encoder": _PIXEL + "encoder.layers.", "transformer_decoder": _DECODER + "decoder.layers."}


def convert_mmdet_mask2former(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of an mmdetection Mask2Former -> that of `Mask2FormerSegmenter`. No tensor is copied.

    What mmdetection does not store is absent from the result: `criterion.empty_weight` (follows from the configuration)
    and `num_batches_tracked` of batch norms.

    Raises UserError naming every tensor that has no place in our model.
    """
    lateral = re.compile(r"panoptic_head\.pixel_decoder\.lateral_convs\.\d+\.conv\.weight")
    laterals = sum(bool(lateral.fullmatch(name)) for name in state)
    converted: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in state.items():
        if name.endswith("num_batches_tracked") or name == "panoptic_head.loss_cls.class_weight":
            continue
        found = _convert(name, tensor, laterals)
        converted.update(found)
        if not found:
            unknown.append(name)
    if unknown:
        raise UserError(
            f"{len(unknown)} tensors have no place in a Mask2Former with a ResNet: {', '.join(unknown[:5])}"
            f"{', ...' if len(unknown) > 5 else ''}. Other backbones are not converted."
        )
    return converted


def _convert(name: str, tensor: Tensor, laterals: int) -> dict[str, Tensor]:
    """One tensor under our name: none if it has no place, three for a packed attention projection."""
    for pattern, ours in _RULES:
        match = re.fullmatch(pattern, name)
        if match:
            return {match.expand(ours): tensor}
    if name.startswith("backbone."):
        part = resnet_name(name.removeprefix("backbone."))
        return {_ENCODER + part: tensor} if part else {}
    match = re.fullmatch(r"panoptic_head\.mask_embed\.(\d+)\.(.+)", name)
    if match:  # linear layers with a ReLU between them: 0, 2, 4
        return {f"{_DECODER}decoder.mask_predictor.mask_embedder.{int(match[1]) // 2}.0.{match[2]}": tensor}
    match = re.fullmatch(r"panoptic_head\.pixel_decoder\.(lateral|output)_convs\.(\d+)\.(conv|gn)\.(.+)", name)
    if match:  # ours are counted from the high resolution, mmdetection's from the low
        ours = {"lateral": "adapter", "output": "layer"}[match[1]]
        place = {"conv": 0, "gn": 1}[match[3]]
        return {f"{_PIXEL}{ours}_{laterals - int(match[2])}.{place}.{match[4]}": tensor}
    match = re.fullmatch(r"panoptic_head\.(pixel_decoder\.encoder|transformer_decoder)\.layers\.(\d+)\.(.+)", name)
    return _layer_part(match[1], match[2], match[3], tensor) if match else {}


def _layer_part(stack: str, layer: str, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Within a transformer layer: feed-forward, norms, and the packed self-attention of the decoder."""
    prefix = f"{_STACKS[stack]}{layer}."
    match = re.fullmatch(r"ffns\.0\.layers\.(0\.0|1)\.(.+)", name)
    if match:
        return {f"{prefix}{'fc1' if match[1] == '0.0' else 'fc2'}.{match[2]}": tensor}
    match = re.fullmatch(r"norms\.(\d)\.(.+)", name)
    if match and int(match[1]) < len(_NORMS[stack]):
        return {f"{prefix}{_NORMS[stack][int(match[1])]}.{match[2]}": tensor}
    match = re.fullmatch(r"attentions\.1\.attn\.in_proj_(weight|bias)", name)
    if match and stack == "transformer_decoder":
        return {
            f"{prefix}self_attn.{which}_proj.{match[1]}": part
            for which, part in zip("qkv", torch.chunk(tensor, 3), strict=True)
        }
    return {}


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
    _require("loss weights equal to matching costs", weights, costs)
    _require("groups of the pixel decoder's norms", pixel["norm_cfg"], {"type": "GN", "num_groups": 32})
    _require("feature levels", (head["num_transformer_feat_level"], pixel["num_outs"]), (3, 3))
    _require("sampling points a level", encoder_layer["attn_cfgs"]["num_points"], 4)
    _require("heads", encoder_layer["attn_cfgs"]["num_heads"], decoder_layer["attn_cfgs"]["num_heads"])
    class_weight = head["loss_cls"].get("class_weight") or [1.0] * classes + [0.1]
    _require("weights of the true classes", list(class_weight[:-1]), [1.0] * classes)
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


def _require(what: str, found: Any, needed: Any) -> None:
    if found != needed:
        raise UserError(f"This Mask2Former cannot be converted: {what} must be {needed}, got {found}.")
