"""QueryInst of mmdetection 2.x -> `QueryInstForInstanceSegmentation`.

Backbones: ResNet 18 to 152. Sizes are read from the configuration, so shrunken networks convert too.
"""

import re
from typing import Any

from torch import Tensor

from ..models.errors import UserError
from .resnet import resnet_config, resnet_name

# Pattern over the whole name in mmdetection -> our name. \1, \2, ... are the groups.
_RULES = [
    (r"neck\.lateral_convs\.(\d+)\.conv\.(.+)", r"model.neck.lateral.\1.\2"),
    (r"neck\.fpn_convs\.(\d+)\.conv\.(.+)", r"model.neck.output.\1.\2"),
    (r"rpn_head\.init_proposal_bboxes\.weight", "model.proposal_boxes.weight"),
    (r"rpn_head\.init_proposal_features\.weight", "model.proposal_features.weight"),
]
# The same within a stage of the box head and of the mask head.
_BOX_RULES = [
    (r"attention\.attn\.in_proj_(weight|bias)", r"attention.in_proj.\1"),
    (r"attention\.attn\.out_proj\.(.+)", r"attention.out_proj.\1"),
    (r"(attention_norm|ffn_norm)\.(.+)", r"\1.\2"),
    (r"instance_interactive_conv\.dynamic_layer\.(.+)", r"dynamic_conv.kernels.\1"),
    (r"instance_interactive_conv\.(norm_in|norm_out)\.(.+)", r"dynamic_conv.\1.\2"),
    (r"instance_interactive_conv\.fc_layer\.(.+)", r"dynamic_projection.\1"),
    (r"instance_interactive_conv\.fc_norm\.(.+)", r"dynamic_projection_norm.\1"),
    (r"instance_interactive_conv_norm\.(.+)", r"dynamic_norm.\1"),
    (r"ffn\.layers\.0\.0\.(.+)", r"fc1.\1"),
    (r"ffn\.layers\.1\.(.+)", r"fc2.\1"),
    (r"fc_cls\.(.+)", r"class_predictor.\1"),
    (r"fc_reg\.(.+)", r"box_predictor.\1"),
]
_MASK_RULES = [
    (r"instance_interactive_conv\.dynamic_layer\.(.+)", r"dynamic_conv.kernels.\1"),
    (r"instance_interactive_conv\.(norm_in|norm_out)\.(.+)", r"dynamic_conv.\1.\2"),
    (r"convs\.(\d+)\.conv\.(.+)", r"convs.\1.conv.\2"),
    (r"convs\.(\d+)\.bn\.(.+)", r"convs.\1.norm.\2"),
    (r"upsample\.(.+)", r"upsample.\1"),
    (r"conv_logits\.(.+)", r"class_masks.\1"),
]


def convert_mmdet_queryinst(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of an mmdetection QueryInst -> that of `QueryInstForInstanceSegmentation`. No tensor is copied.

    `num_batches_tracked` of batch norms is left out. Raises UserError naming every tensor that has no place in our
    model.
    """
    converted: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in state.items():
        if name.endswith("num_batches_tracked"):
            continue
        ours = queryinst_name(name)
        if ours is None:
            unknown.append(name)
        else:
            converted[ours] = tensor
    if unknown:
        raise UserError(
            f"{len(unknown)} tensors have no place in a QueryInst with a ResNet: {', '.join(unknown)}. Other backbones "
            "are not converted."
        )
    return converted


def queryinst_name(name: str) -> str | None:
    """Name of a tensor in mmdetection -> ours, None if it has no place."""
    if name.startswith("backbone."):
        part = resnet_name(name.removeprefix("backbone."))
        return f"model.backbone.{part}" if part else None
    match = re.fullmatch(r"roi_head\.(bbox|mask)_head\.(\d+)\.(.+)", name)
    if not match:
        return _first(_RULES, name)
    kind, stage, part = match.groups()
    ours = _predictor_layer(part) if kind == "bbox" else None
    ours = ours or _first(_BOX_RULES if kind == "bbox" else _MASK_RULES, part)
    return ours and f"model.{'stages' if kind == 'bbox' else 'mask_heads'}.{stage}.{ours}"


def _first(rules: list[tuple[str, str]], name: str) -> str | None:
    for pattern, ours in rules:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(ours)
    return None


def _predictor_layer(name: str) -> str | None:
    """`cls_fcs.4.weight` -> `class_layers.1.norm.weight`: linear layer, norm and ReLU stand in one list there."""
    match = re.fullmatch(r"(cls|reg)_fcs\.(\d+)\.(.+)", name)
    if not match or int(match[2]) % 3 == 2:
        return None
    part = ("linear", "norm")[int(match[2]) % 3]
    return f"{'class' if match[1] == 'cls' else 'box'}_layers.{int(match[2]) // 3}.{part}.{match[3]}"


def config_from_mmdet_queryinst(config: dict[str, Any]) -> dict[str, Any]:
    """`model` section of an mmdetection QueryInst configuration -> keyword arguments of `QueryInstConfig`.

    `num_labels` is among them. Padding is masked, unlike in mmdetection: set `mask_padding=False` for its very numbers
    on padded batches. Raises UserError for a backbone other than ResNet, and for settings that our model does not
    have: stages that differ, stage weights other than 1, class-agnostic masks, dropout, other losses.
    """
    head, train = config["roi_head"], config["train_cfg"]["rcnn"]
    stages = head["num_stages"]
    boxes, masks = _per_stage(head["bbox_head"], stages), _per_stage(head["mask_head"], stages)
    train = _per_stage(train, stages)
    for name, entries in (("bbox_head", boxes), ("mask_head", masks), ("train_cfg.rcnn", train)):
        _require(f"every stage of {name}", entries, [entries[0]] * stages)
    box, mask, assigner = boxes[0], masks[0], train[0]["assigner"]
    box_roi, mask_roi = head["bbox_roi_extractor"], head["mask_roi_extractor"]
    _check(config, head, box, mask, train[0])
    return {
        "num_labels": box["num_classes"],
        "backbone_config": resnet_config(config["backbone"]),
        "num_queries": config["rpn_head"]["num_proposals"],
        "hidden_size": box["in_channels"],
        "num_stages": stages,
        "num_attention_heads": box["num_heads"],
        "intermediate_size": box["feedforward_channels"],
        "dynamic_channels": box["dynamic_conv_cfg"]["feat_channels"],
        "num_class_layers": box["num_cls_fcs"],
        "num_box_layers": box["num_reg_fcs"],
        "num_mask_layers": mask["num_convs"],
        "box_pool_size": box_roi["roi_layer"]["output_size"],
        "mask_pool_size": mask_roi["roi_layer"]["output_size"],
        "pool_sampling_ratio": box_roi["roi_layer"]["sampling_ratio"],
        "finest_scale": box_roi.get("finest_scale", 56),
        "box_deviations": box["bbox_coder"]["target_stds"],
        "class_weight": box["loss_cls"]["loss_weight"],
        "box_weight": box["loss_bbox"]["loss_weight"],
        "giou_weight": box["loss_iou"]["loss_weight"],
        "mask_weight": mask["loss_mask"]["loss_weight"],
        "class_cost": assigner["cls_cost"]["weight"],
        "box_cost": assigner["reg_cost"]["weight"],
        "giou_cost": assigner["iou_cost"]["weight"],
        "focal_alpha": box["loss_cls"].get("alpha", 0.25),
        "focal_gamma": box["loss_cls"].get("gamma", 2.0),
        "dice_eps": mask["loss_mask"].get("eps", 1e-3),
    }


def _check(config: dict, head: dict, box: dict, mask: dict, train: dict) -> None:
    """What our model does not have."""
    box_roi, mask_roi = head["bbox_roi_extractor"], head["mask_roi_extractor"]
    _require("the neck's type", config["neck"]["type"], "FPN")
    _require("the neck's levels", config["neck"]["num_outs"], 4)
    _require("stage_loss_weights", [float(w) for w in head["stage_loss_weights"]], [1.0] * head["num_stages"])
    _require("dropout", float(box.get("dropout", 0.0)), 0.0)
    _require("class_agnostic", bool(mask.get("class_agnostic", False)), False)
    _require("means of the box coder", [float(m) for m in box["bbox_coder"]["target_means"]], [0.0] * 4)
    _require("clip_border", box["bbox_coder"].get("clip_border", True), False)
    for extractor in (box_roi, mask_roi):
        _require("featmap_strides", list(extractor["featmap_strides"]), [4, 8, 16, 32])
        for name, default in (("finest_scale", 56), ("out_channels", box["in_channels"])):
            _require(name, extractor.get(name, default), box_roi.get(name, default))
        _require("sampling_ratio", extractor["roi_layer"]["sampling_ratio"], box_roi["roi_layer"]["sampling_ratio"])
    _require("width of the mask head", mask["conv_out_channels"], box["in_channels"])
    _require("dynamic width of the mask head", mask["dynamic_conv_cfg"]["feat_channels"],
             box["dynamic_conv_cfg"]["feat_channels"])  # fmt: skip
    _require("mask_size", train["mask_size"], 2 * mask_roi["roi_layer"]["output_size"])
    _require("pos_weight", train["pos_weight"], 1)
    for name, entry, kind in (
        ("loss_cls", box["loss_cls"], "FocalLoss"),
        ("loss_bbox", box["loss_bbox"], "L1Loss"),
        ("loss_iou", box["loss_iou"], "GIoULoss"),
        ("loss_mask", mask["loss_mask"], "DiceLoss"),
        ("assigner", train["assigner"], "HungarianAssigner"),
    ):
        _require(name, entry["type"], kind)


def _per_stage(entry: list | dict, stages: int) -> list:
    """One entry for all stages, or one each."""
    return list(entry) if isinstance(entry, list | tuple) else [entry] * stages


def _require(what: str, found: Any, needed: Any) -> None:
    if found != needed:
        raise UserError(f"This QueryInst cannot be converted: {what} must be {needed}, got {found}.")
