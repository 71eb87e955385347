"""K-Net of the original code (on mmdetection 2.x), and UPLVP's K-Nets -> `KNetForInstanceSegmentation`.

Backbones: ResNet 18 to 152. Sizes are read from the configuration and the tensors, so shrunken networks convert too.
"""

from typing import Any

from torch import Tensor

from .naming import Names
from .resnet import resnet_config

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
_NORM = {"conv": "conv", "gn": "norm"}
_FPN, _PYRAMID = "rpn_head.localization_fpn.", "model.semantic_pyramid."
_STAGE, _OURS = "roi_head.mask_head.#.", r"model.stages.\1."

_NAMES = Names(
    "K-Net",
    "model.backbone.",
    {
        "neck.lateral_convs.#.conv.*": r"model.pyramid.lateral.\1.\2",
        "neck.fpn_convs.#.conv.*": r"model.pyramid.output.\1.\2",
        **{
            there: here
            for part, ours in _NORM.items()
            for there, here in {
                f"{_FPN}convs_all_levels.#.conv#.{part}.*": rf"{_PYRAMID}levels.\1.\2.{ours}.\3",
                f"{_FPN}conv_pred.{part}.*": rf"{_PYRAMID}localization.{ours}.\1",
                f"{_FPN}aux_convs.0.{part}.*": rf"{_PYRAMID}semantic.{ours}.\1",
                f"rpn_head.loc_convs.#.{part}.*": rf"model.kernel_head.localization.\1.{ours}.\2",
                f"rpn_head.seg_convs.#.{part}.*": rf"model.kernel_head.semantic.\1.{ours}.\2",
            }.items()
        },
        "rpn_head.init_kernels.weight": "model.kernel_head.kernels.weight",
        "rpn_head.conv_seg.*": r"model.kernel_head.classifier.\1",
        _STAGE + "attention.attn.in_proj_(weight|bias)": _OURS + r"self_attn.{qkv}_proj.\2",
        _STAGE + "attention.attn.out_proj.*": _OURS + r"self_attn.out_proj.\2",
        _STAGE + "attention_norm.*": _OURS + r"self_attn_norm.\2",
        _STAGE + "feat_transform.conv.*": _OURS + r"feature_transform.\2",
        _STAGE + "ffn.layers.0.0.*": _OURS + r"fc1.\2",
        _STAGE + "ffn.layers.1.*": _OURS + r"fc2.\2",
        _STAGE + "ffn_norm.*": _OURS + r"feedforward_norm.\2",
        **{f"{_STAGE}kernel_update_conv.{part}.*": rf"{_OURS}update.{ours}.\2" for part, ours in _UPDATE.items()},
        _STAGE + "cls_fcs.#.*": _OURS + r"class_layers.\2.\3",
        _STAGE + "fc_cls.*": _OURS + r"classifier.\2",
        _STAGE + "mask_fcs.#.*": _OURS + r"mask_layers.\2.\3",
        _STAGE + "fc_mask.*": _OURS + r"mask_kernel.\2",
    },
)


def convert_mmdet_knet(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As `Names.convert`; kernels are 1 x 1 filters there."""
    converted = _NAMES.convert(state)
    kernels = "model.kernel_head.kernels.weight"
    return converted | ({kernels: converted[kernels].flatten(1)} if kernels in converted else {})


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
    _NAMES.require("the assigners' costs", [_costs(one) for one in assigners], [_costs(assigners[0])] * len(assigners))
    losses = {name: stage[f"loss_{name}"]["loss_weight"] for name in ("cls", "mask", "dice")}
    _NAMES.require("loss weights of the head", [head[f"loss_{k}"]["loss_weight"] for k in ("mask", "dice")],
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
    _NAMES.require("stages", [_sizes(one) for one in stages], [_sizes(stage)] * iterative["num_stages"])
    _NAMES.require(
        "stage weights",
        list(iterative.get("stage_loss_weights", [1] * iterative["num_stages"])),
        [1] * iterative["num_stages"],
    )
    channels = stage["in_channels"]
    found = [stage["out_channels"], head["in_channels"], head["out_channels"], config["neck"]["out_channels"]]
    found += [fpn[name] for name in ("in_channels", "feat_channels", "out_channels")]
    found += [stage["kernel_updator_cfg"][name] for name in ("in_channels", "feat_channels", "out_channels")]
    _NAMES.require("channels of all parts", found, [channels] * len(found))
    _NAMES.require("groups of both norms", head["norm_cfg"]["num_groups"], fpn["norm_cfg"]["num_groups"])
    _NAMES.require("classes of head and stages", head["num_classes"], stage["num_classes"])
    _NAMES.require("levels", (config["neck"]["num_outs"], fpn["start_level"], fpn["end_level"], fpn["upsample_times"]),
             (4, 0, 3, 2))  # fmt: skip
    encoding = fpn["positional_encoding"]
    _NAMES.require("position encoding", (encoding["num_feats"], encoding.get("normalize")), (channels // 2, True))
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
        _NAMES.require(what, value, needed)


def _sizes(stage: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in stage.items() if name != "batch_size"}
