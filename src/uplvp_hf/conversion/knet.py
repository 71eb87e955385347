"""K-Net of the original code (on mmdetection 2.x), and UPLVP's K-Nets -> `KNetForInstanceSegmentation`.

Backbones: ResNet 18 to 152. Sizes are read from the configuration and the tensors, so shrunken networks convert too.
"""

import re
from typing import Any

import torch
from torch import Tensor

from ..models.errors import UserError
from .resnet import resnet_config, resnet_name

_STAGE = r"roi_head\.mask_head\.(\d+)\."
_OURS = r"model.stages.\1."

# Pattern over the whole original name -> our name. Group 1, 2, ... as in `re.sub`.
_RULES = [
    (r"neck\.lateral_convs\.(\d+)\.conv\.(.+)", r"model.pyramid.lateral.\1.\2"),
    (r"neck\.fpn_convs\.(\d+)\.conv\.(.+)", r"model.pyramid.output.\1.\2"),
    (
        r"rpn_head\.localization_fpn\.convs_all_levels\.(\d+)\.conv(\d+)\.conv\.(.+)",
        r"model.semantic_pyramid.levels.\1.\2.conv.\3",
    ),
    (
        r"rpn_head\.localization_fpn\.convs_all_levels\.(\d+)\.conv(\d+)\.gn\.(.+)",
        r"model.semantic_pyramid.levels.\1.\2.norm.\3",
    ),
    (r"rpn_head\.localization_fpn\.conv_pred\.conv\.(.+)", r"model.semantic_pyramid.localization.conv.\1"),
    (r"rpn_head\.localization_fpn\.conv_pred\.gn\.(.+)", r"model.semantic_pyramid.localization.norm.\1"),
    (r"rpn_head\.localization_fpn\.aux_convs\.0\.conv\.(.+)", r"model.semantic_pyramid.semantic.conv.\1"),
    (r"rpn_head\.localization_fpn\.aux_convs\.0\.gn\.(.+)", r"model.semantic_pyramid.semantic.norm.\1"),
    (r"rpn_head\.loc_convs\.(\d+)\.conv\.(.+)", r"model.kernel_head.localization.\1.conv.\2"),
    (r"rpn_head\.loc_convs\.(\d+)\.gn\.(.+)", r"model.kernel_head.localization.\1.norm.\2"),
    (r"rpn_head\.seg_convs\.(\d+)\.conv\.(.+)", r"model.kernel_head.semantic.\1.conv.\2"),
    (r"rpn_head\.seg_convs\.(\d+)\.gn\.(.+)", r"model.kernel_head.semantic.\1.norm.\2"),
    (r"rpn_head\.conv_seg\.(.+)", r"model.kernel_head.classifier.\1"),
    (_STAGE + r"attention\.attn\.out_proj\.(.+)", _OURS + r"self_attn.out_proj.\2"),
    (_STAGE + r"attention_norm\.(.+)", _OURS + r"self_attn_norm.\2"),
    (_STAGE + r"feat_transform\.conv\.(.+)", _OURS + r"feature_transform.\2"),
    (_STAGE + r"ffn\.layers\.0\.0\.(.+)", _OURS + r"fc1.\2"),
    (_STAGE + r"ffn\.layers\.1\.(.+)", _OURS + r"fc2.\2"),
    (_STAGE + r"ffn_norm\.(.+)", _OURS + r"feedforward_norm.\2"),
    (_STAGE + r"cls_fcs\.(\d+)\.(.+)", _OURS + r"class_layers.\2.\3"),
    (_STAGE + r"fc_cls\.(.+)", _OURS + r"classifier.\2"),
    (_STAGE + r"mask_fcs\.(\d+)\.(.+)", _OURS + r"mask_layers.\2.\3"),
    (_STAGE + r"fc_mask\.(.+)", _OURS + r"mask_kernel.\2"),
]
# Parts of a kernel updator, ours by theirs.
_UPDATE = {
    "dynamic_layer": "feature_projection",
    "input_layer": "kernel_projection",
    "update_gate": "feature_gate",
    "norm_in": "feature_gate_norm",
    "input_gate": "kernel_gate",
    "input_norm_in": "kernel_gate_norm",
    "norm_out": "feature_norm",
    "input_norm_out": "kernel_norm",
    "fc_layer": "output",
    "fc_norm": "output_norm",
}


def convert_mmdet_knet(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of an original K-Net -> that of `KNetForInstanceSegmentation`. No tensor is copied.

    `num_batches_tracked` of batch norms is left out. Raises UserError naming every tensor that has no place in ours.
    """
    converted: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in state.items():
        if name.endswith("num_batches_tracked"):
            continue
        found = _convert(name, tensor)
        converted.update(found)
        if not found:
            unknown.append(name)
    if unknown:
        raise UserError(f"{len(unknown)} tensors have no place in a K-Net with a ResNet: {', '.join(unknown)}.")
    return converted


def _convert(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One tensor under our name: none if it has no place, three for the packed attention projection."""
    if name.startswith("backbone."):
        part = resnet_name(name.removeprefix("backbone."))
        return {f"model.backbone.{part}": tensor} if part else {}
    if name == "rpn_head.init_kernels.weight":
        return {"model.kernel_head.kernels.weight": tensor.flatten(1)}  # 1 x 1 filters
    for pattern, ours in _RULES:
        match = re.fullmatch(pattern, name)
        if match:
            return {match.expand(ours): tensor}
    match = re.fullmatch(_STAGE + r"kernel_update_conv\.(\w+)\.(.+)", name)
    if match and match[2] in _UPDATE:
        return {f"model.stages.{match[1]}.update.{_UPDATE[match[2]]}.{match[3]}": tensor}
    match = re.fullmatch(_STAGE + r"attention\.attn\.in_proj_(weight|bias)", name)
    if match:
        parts = zip("qkv", torch.chunk(tensor, 3), strict=True)
        return {f"model.stages.{match[1]}.self_attn.{which}_proj.{match[2]}": part for which, part in parts}
    return {}


def config_from_mmdet_knet(config: dict[str, Any]) -> dict[str, Any]:
    """`model` section of an original K-Net configuration -> keyword arguments of `KNetConfig`.

    Class maps are then trained as in the original (`semantic_targets="touched"`). Raises UserError for a backbone
    other than ResNet, and for settings that our K-Net cannot take: panoptic heads, weak losses, other strides, kernels
    larger than 1 x 1, stages that differ.
    """
    head, iterative = config["rpn_head"], config["roi_head"]
    stages = iterative["mask_head"]
    stage, fpn = stages[0], head["localization_fpn"]
    _check_structure(config)
    assigners = [config["train_cfg"]["rpn"]["assigner"], *(part["assigner"] for part in config["train_cfg"]["rcnn"])]
    _require("the assigners' costs", [_costs(one) for one in assigners], [_costs(assigners[0])] * len(assigners))
    losses = {name: stage[f"loss_{name}"]["loss_weight"] for name in ("cls", "mask", "dice")}
    _require("loss weights of the head", [head[f"loss_{k}"]["loss_weight"] for k in ("mask", "dice")],
             [losses["mask"], losses["dice"]])  # fmt: skip
    costs, clip = _costs(assigners[0]), stage.get("loss_cls_clip", {})
    return {
        "backbone_config": resnet_config(config["backbone"]),
        "num_labels": stage["num_classes"],
        "num_queries": head["num_proposals"],
        "hidden_size": stage["in_channels"],
        "num_stages": iterative["num_stages"],
        "num_attention_heads": stage["num_heads"],
        "intermediate_size": stage["feedforward_channels"],
        "num_localization_layers": head["num_loc_convs"],
        "num_semantic_layers": head["num_seg_convs"],
        "num_class_layers": stage["num_cls_fcs"],
        "num_mask_layers": stage["num_mask_fcs"],
        "norm_groups": fpn["norm_cfg"]["num_groups"],
        "dropout": stage.get("dropout", 0.0),
        "class_weight": losses["cls"],
        "mask_weight": losses["mask"],
        "dice_weight": losses["dice"],
        "semantic_weight": head["loss_seg"]["loss_weight"],
        "class_cost": costs["cls_cost"],
        "mask_cost": costs["mask_cost"],
        "dice_cost": costs["dice_cost"],
        "focal_alpha": stage["loss_cls"]["alpha"],
        "focal_gamma": stage["loss_cls"]["gamma"],
        "dice_eps": stage["loss_dice"].get("eps", 1e-3),
        "text_class_weight": clip.get("loss_weight", 2.0),
        "text_class_cost": assigners[-1].get("cls_cost_clip", {}).get("weight", 2.0),
        "semantic_targets": "touched",
    }


def _costs(assigner: dict[str, Any]) -> dict[str, float]:
    return {name: assigner[name]["weight"] for name in ("cls_cost", "mask_cost", "dice_cost")}


def _check_structure(config: dict[str, Any]) -> None:
    """What our K-Net does in one way only."""
    head, iterative = config["rpn_head"], config["roi_head"]
    stages, fpn = iterative["mask_head"], head["localization_fpn"]
    stage = stages[0]
    _require("stages", [_sizes(one) for one in stages], [_sizes(stage)] * iterative["num_stages"])
    _require(
        "stage weights",
        list(iterative.get("stage_loss_weights", [1] * iterative["num_stages"])),
        [1] * iterative["num_stages"],
    )
    channels = stage["in_channels"]
    found = [stage["out_channels"], head["in_channels"], head["out_channels"], config["neck"]["out_channels"]]
    found += [fpn[name] for name in ("in_channels", "feat_channels", "out_channels")]
    found += [stage["kernel_updator_cfg"][name] for name in ("in_channels", "feat_channels", "out_channels")]
    _require("channels of all parts", found, [channels] * len(found))
    _require("groups of both norms", head["norm_cfg"]["num_groups"], fpn["norm_cfg"]["num_groups"])
    _require("classes of head and stages", head["num_classes"], stage["num_classes"])
    _require("levels", (config["neck"]["num_outs"], fpn["start_level"], fpn["end_level"], fpn["upsample_times"]),
             (4, 0, 3, 2))  # fmt: skip
    encoding = fpn["positional_encoding"]
    _require("position encoding", (encoding["num_feats"], encoding.get("normalize")), (channels // 2, True))
    for what, value, needed in [
        ("fusion by concatenation", fpn.get("fuse_by_cat", False), False),
        ("coordinates", fpn.get("cat_coors", False), False),
        ("auxiliary convolutions", fpn.get("num_aux_convs"), 1),
        ("kernel size", (head["conv_kernel_size"], stage["conv_kernel_size"]), (1, 1)),
        ("strides", (head["feat_downsample_stride"], stage["mask_upsample_stride"]), (2, 2)),
        ("refinement of features", head.get("feat_refine", False), False),
        ("hard masks", head.get("use_binary", True), True),
        ("kernels with object features", head.get("proposal_feats_with_obj", True), True),
        ("stuff masks", head.get("cat_stuff_mask", False), False),
        ("mask losses", [stage[f"loss_{kind}"]["type"] for kind in ("cls", "mask", "dice")],
         ["FocalLoss", "CrossEntropyLoss", "DiceLoss"]),
        ("focal losses", {(loss["alpha"], loss["gamma"]) for loss in (stage["loss_cls"], head["loss_seg"])},
         {(stage["loss_cls"]["alpha"], stage["loss_cls"]["gamma"])}),
    ]:  # fmt: skip
        _require(what, value, needed)


def _sizes(stage: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in stage.items() if name != "batch_size"}


def _require(what: str, found: Any, needed: Any) -> None:
    if found != needed:
        raise UserError(f"This K-Net cannot be converted: {what} must be {needed}, got {found}.")
