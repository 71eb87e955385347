"""QueryInst of mmdetection 2.x -> `QueryInstForInstanceSegmentation`.

Backbones: ResNet 18 to 152. Sizes are read from the configuration, so shrunken networks convert too.
"""

import re
from typing import Any

from .naming import Names
from .resnet import resnet_config

_BOX, _STAGE = "roi_head.bbox_head.#.", r"model.stages.\1."
_MASK, _HEAD = "roi_head.mask_head.#.", r"model.mask_heads.\1."
_CONV = "instance_interactive_conv"


def _predictor_layer(match: re.Match) -> str | None:
    """Linear layer, norm and ReLU stand in one list there: `cls_fcs.4.weight` -> `class_layers.1.norm.weight`."""
    layer, part = divmod(int(match[3]), 3)
    kind = {"cls": "class", "reg": "box"}[match[2]]
    return None if part == 2 else f"model.stages.{match[1]}.{kind}_layers.{layer}.{('linear', 'norm')[part]}.{match[4]}"


_NAMES = Names(
    "QueryInst",
    "model.backbone.",
    {
        "neck.lateral_convs.#.conv.*": r"model.neck.lateral.\1.\2",
        "neck.fpn_convs.#.conv.*": r"model.neck.output.\1.\2",
        "rpn_head.init_proposal_bboxes.weight": "model.proposal_boxes.weight",
        "rpn_head.init_proposal_features.weight": "model.proposal_features.weight",
        _BOX + "(cls|reg)_fcs.#.*": _predictor_layer,
        _BOX + "attention.attn.in_proj_(weight|bias)": _STAGE + r"attention.in_proj.\2",
        _BOX + "attention.attn.out_proj.*": _STAGE + r"attention.out_proj.\2",
        _BOX + "(attention_norm|ffn_norm).*": _STAGE + r"\2.\3",
        _BOX + f"{_CONV}.dynamic_layer.*": _STAGE + r"dynamic_conv.kernels.\2",
        _BOX + f"{_CONV}.(norm_in|norm_out).*": _STAGE + r"dynamic_conv.\2.\3",
        _BOX + f"{_CONV}.fc_layer.*": _STAGE + r"dynamic_projection.\2",
        _BOX + f"{_CONV}.fc_norm.*": _STAGE + r"dynamic_projection_norm.\2",
        _BOX + f"{_CONV}_norm.*": _STAGE + r"dynamic_norm.\2",
        _BOX + "ffn.layers.0.0.*": _STAGE + r"fc1.\2",
        _BOX + "ffn.layers.1.*": _STAGE + r"fc2.\2",
        _BOX + "fc_cls.*": _STAGE + r"class_predictor.\2",
        _BOX + "fc_reg.*": _STAGE + r"box_predictor.\2",
        _MASK + f"{_CONV}.dynamic_layer.*": _HEAD + r"dynamic_conv.kernels.\2",
        _MASK + f"{_CONV}.(norm_in|norm_out).*": _HEAD + r"dynamic_conv.\2.\3",
        _MASK + "convs.#.conv.*": _HEAD + r"convs.\2.conv.\3",
        _MASK + "convs.#.bn.*": _HEAD + r"convs.\2.norm.\3",
        _MASK + "upsample.*": _HEAD + r"upsample.\2",
        _MASK + "conv_logits.*": _HEAD + r"class_masks.\2",
    },
)
convert_mmdet_queryinst = _NAMES.convert
queryinst_name = _NAMES.name


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
        _NAMES.require(f"every stage of {name}", entries, [entries[0]] * stages)
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
    _NAMES.require("the neck's type", config["neck"]["type"], "FPN")
    _NAMES.require("the neck's levels", config["neck"]["num_outs"], 4)
    _NAMES.require("stage_loss_weights", [float(w) for w in head["stage_loss_weights"]], [1.0] * head["num_stages"])
    _NAMES.require("dropout", float(box.get("dropout", 0.0)), 0.0)
    _NAMES.require("class_agnostic", bool(mask.get("class_agnostic", False)), False)
    _NAMES.require("means of the box coder", [float(m) for m in box["bbox_coder"]["target_means"]], [0.0] * 4)
    _NAMES.require("clip_border", box["bbox_coder"].get("clip_border", True), False)
    for extractor in (box_roi, mask_roi):
        _NAMES.require("featmap_strides", list(extractor["featmap_strides"]), [4, 8, 16, 32])
        for name, default in (("finest_scale", 56), ("out_channels", box["in_channels"])):
            _NAMES.require(name, extractor.get(name, default), box_roi.get(name, default))
        _NAMES.require(
            "sampling_ratio", extractor["roi_layer"]["sampling_ratio"], box_roi["roi_layer"]["sampling_ratio"]
        )
    _NAMES.require("width of the mask head", mask["conv_out_channels"], box["in_channels"])
    _NAMES.require("dynamic width of the mask head", mask["dynamic_conv_cfg"]["feat_channels"],
             box["dynamic_conv_cfg"]["feat_channels"])  # fmt: skip
    _NAMES.require("mask_size", train["mask_size"], 2 * mask_roi["roi_layer"]["output_size"])
    _NAMES.require("pos_weight", train["pos_weight"], 1)
    for name, entry, kind in (
        ("loss_cls", box["loss_cls"], "FocalLoss"),
        ("loss_bbox", box["loss_bbox"], "L1Loss"),
        ("loss_iou", box["loss_iou"], "GIoULoss"),
        ("loss_mask", mask["loss_mask"], "DiceLoss"),
        ("assigner", train["assigner"], "HungarianAssigner"),
    ):
        _NAMES.require(name, entry["type"], kind)


def _per_stage(entry: list | dict, stages: int) -> list:
    """One entry for all stages, or one each."""
    return list(entry) if isinstance(entry, list | tuple) else [entry] * stages
