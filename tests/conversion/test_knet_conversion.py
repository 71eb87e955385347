"""Conversion of K-Net: what it takes and what it refuses. Values are compared in tests/models/test_knet_golden.py."""

import copy

import pytest
import torch

from uplvp_hf.conversion.knet import config_from_mmdet_knet, convert_mmdet_knet
from uplvp_hf.models.configuration_knet import KNetConfig
from uplvp_hf.models.modeling_knet import KNetForInstanceSegmentation


def original_config(depth=18, base=4, channels=16, classes=7, queries=9, stages=2, mask_layers=2):
    """`model` section in the original's terms, with sizes unlike those of the recordings."""
    norm, focal = {"type": "GN", "num_groups": 4}, {"type": "FocalLoss", "alpha": 0.25, "gamma": 2.0}
    mask, dice = {"type": "CrossEntropyLoss", "loss_weight": 1.5}, {"type": "DiceLoss", "loss_weight": 3.0}
    same = {"in_channels": channels, "feat_channels": channels, "out_channels": channels}
    stage = {
        "num_classes": classes, "num_heads": 8, "num_cls_fcs": 1, "num_mask_fcs": mask_layers, "in_channels": channels,
        "feedforward_channels": 40, "out_channels": channels, "dropout": 0.0, "conv_kernel_size": 1,
        "mask_upsample_stride": 2, "kernel_updator_cfg": same, "loss_mask": mask, "loss_dice": dice,
        "loss_cls": {**focal, "loss_weight": 1.0},
    }  # fmt: skip
    costs = {"cls_cost": {"weight": 1.0}, "mask_cost": {"weight": 0.5}, "dice_cost": {"weight": 2.0}}
    fpn = {
        **same, "start_level": 0, "end_level": 3, "upsample_times": 2, "num_aux_convs": 1, "norm_cfg": norm,
        "positional_encoding": {"num_feats": channels // 2, "normalize": True},
    }  # fmt: skip
    return {
        "backbone": {"type": "ResNet", "depth": depth, "base_channels": base},
        "neck": {"out_channels": channels, "num_outs": 4},
        "rpn_head": {
            "conv_kernel_size": 1, "feat_downsample_stride": 2, "num_loc_convs": 2, "num_seg_convs": 1,
            "norm_cfg": norm, "localization_fpn": fpn, "num_proposals": queries, "in_channels": channels,
            "out_channels": channels, "num_classes": classes, "loss_mask": mask, "loss_dice": dice,
            "loss_seg": {**focal, "loss_weight": 0.5},
        },
        "roi_head": {"num_stages": stages, "stage_loss_weights": [1] * stages, "mask_head": [stage] * stages},
        "train_cfg": {"rpn": {"assigner": costs}, "rcnn": [{"assigner": costs}] * stages},
    }  # fmt: skip


def original_names(stages=2, mask_layers=2):
    """Names of the heads' tensors in the original, from its published layout."""
    norm = ["gn.weight", "gn.bias"]
    block = ["conv.weight", *norm]
    names = [f"neck.{part}.{i}.conv.{k}" for part in ("lateral_convs", "fpn_convs") for i in range(4)
             for k in ("weight", "bias")]  # fmt: skip
    fpn = "rpn_head.localization_fpn."
    for level, count in enumerate((1, 1, 2, 3)):
        names += [f"{fpn}convs_all_levels.{level}.conv{i}.{k}" for i in range(count) for k in block]
    names += [f"{fpn}{part}.{k}" for part in ("conv_pred", "aux_convs.0") for k in block]
    names += [f"rpn_head.{part}.{k}" for part in ("loc_convs.0", "loc_convs.1", "seg_convs.0") for k in block]
    names += ["rpn_head.init_kernels.weight", "rpn_head.conv_seg.weight", "rpn_head.conv_seg.bias"]
    for stage in range(stages):
        linear = ["attention.attn.out_proj", "attention_norm", "feat_transform.conv", "ffn.layers.0.0", "ffn.layers.1"]
        linear += ["ffn_norm", "fc_cls", "fc_mask", "cls_fcs.1", *(f"mask_fcs.{3 * i + 1}" for i in range(mask_layers))]
        linear += [f"kernel_update_conv.{part}" for part in (
            "dynamic_layer", "input_layer", "input_gate", "update_gate", "fc_layer", "norm_in", "norm_out",
            "input_norm_in", "input_norm_out", "fc_norm")]  # fmt: skip
        inside = [f"{part}.{k}" for part in linear for k in ("weight", "bias")]
        inside += ["attention.attn.in_proj_weight", "attention.attn.in_proj_bias", "cls_fcs.0.weight"]
        inside += [f"mask_fcs.{3 * i}.weight" for i in range(mask_layers)]
        names += [f"roi_head.mask_head.{stage}.{name}" for name in inside]
    return names


def test_other_sizes_have_a_place_for_every_tensor():
    settings = config_from_mmdet_knet(original_config())
    assert settings["mask_cost"] == 0.5 and settings["dice_weight"] == 3.0 and settings["num_localization_layers"] == 2
    model = KNetForInstanceSegmentation(KNetConfig(**settings))
    converted = convert_mmdet_knet({name: torch.zeros(3, 1, 1, 1) for name in original_names()})
    heads = {name for name in model.state_dict() if not name.startswith("model.backbone.")}
    assert set(converted) == heads
    assert model.config.num_labels == 7 and model.model.kernel_head.kernels.weight.shape == (9, 16)


def test_tensors_without_a_place_are_named():
    strange = {
        "rpn_head.init_kernels_pos.weight": torch.zeros(1),
        "roi_head.mask_head.0.fc_mask_pos.bias": torch.ones(1),
    }
    with pytest.raises(ValueError, match=r"2 tensors .*init_kernels_pos\.weight, .*fc_mask_pos\.bias"):
        convert_mmdet_knet({**strange, "neck.fpn_convs.0.conv.bias": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"backbone\.patch_embed"):
        convert_mmdet_knet({"backbone.patch_embed.projection.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("backbone", "type"), "SwinTransformer", "ResNet"),
        (("rpn_head", "cat_stuff_mask"), True, "stuff masks"),
        (("rpn_head", "conv_kernel_size"), 3, "kernel size"),
        (("rpn_head", "localization_fpn", "fuse_by_cat"), True, "concatenation"),
        (("rpn_head", "loss_mask", "loss_weight"), 9.0, "loss weights of the head"),
        (("roi_head", "stage_loss_weights"), [1, 2], "stage weights"),
        (("train_cfg", "rpn", "assigner", "dice_cost", "weight"), 1.0, "costs"),
        (("neck", "out_channels"), 32, "channels"),
    ],
)
def test_settings_that_ours_cannot_take_are_refused(place, value, message):
    config = copy.deepcopy(original_config())
    config["rpn_head"]["loss_mask"] = dict(config["rpn_head"]["loss_mask"])
    config["train_cfg"] = {
        "rpn": copy.deepcopy(config["train_cfg"]["rpn"]), "rcnn": copy.deepcopy(config["train_cfg"]["rcnn"])
    }  # fmt: skip
    part = config
    for name in place[:-1]:
        part = part[name]
    part[place[-1]] = value
    with pytest.raises(ValueError, match=message):
        config_from_mmdet_knet(config)
