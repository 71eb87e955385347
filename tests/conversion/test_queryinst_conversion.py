"""Conversion of mmdetection's QueryInst: names without place and settings that cannot be had are refused."""

import copy

import pytest
import torch

from uplvp_hf.conversion.queryinst import config_from_mmdet_queryinst, convert_mmdet_queryinst, queryinst_name
from uplvp_hf.models.configuration_queryinst import QueryInstConfig
from uplvp_hf.models.modeling_queryinst import QueryInstForInstanceSegmentation


def test_every_tensor_without_place_is_named():
    state = {name: torch.zeros(1) for name in (
        "rpn_head.init_proposal_bboxes.weight", "backbone.patch_embed.weight", "roi_head.bbox_head.0.cls_fcs.2.weight",
        "roi_head.bbox_head.0.iou.weight",
    )}  # fmt: skip
    with pytest.raises(ValueError) as error:
        convert_mmdet_queryinst(state)
    assert all(name in str(error.value) for name in list(state)[1:]) and "init_proposal" not in str(error.value)


def test_predictor_layers_are_counted_in_threes():
    assert queryinst_name("roi_head.bbox_head.3.reg_fcs.7.bias") == "model.stages.3.box_layers.2.norm.bias"
    assert queryinst_name("roi_head.bbox_head.0.cls_fcs.3.weight") == "model.stages.0.class_layers.1.linear.weight"


@pytest.mark.golden
def test_names_cover_the_whole_model(golden):
    """With the settings of the recording and with others: another depth, width, number of stages and layers."""
    config = golden("queryinst")[1]["config"]
    settings = config_from_mmdet_queryinst(config)
    assert settings["num_stages"] == config["roi_head"]["num_stages"]
    recorded = {name.removeprefix("state.") for name in golden("queryinst")[0] if name.startswith("state.")}
    model = QueryInstForInstanceSegmentation(QueryInstConfig(**settings))
    ours = {name for name in model.state_dict() if not name.endswith("num_batches_tracked")}
    assert {queryinst_name(name) for name in recorded} == ours


@pytest.mark.golden
@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("backbone", "type"), "SwinTransformer", "ResNet"),
        (("roi_head", "stage_loss_weights"), [1, 2, 1], "stage_loss_weights"),
        (("roi_head", "bbox_head", -1, "num_classes"), -7, "every stage of bbox_head"),
        (("roi_head", "mask_head", slice(None), "class_agnostic"), True, "class_agnostic"),
        (("roi_head", "bbox_head", slice(None), "dropout"), 0.1, "dropout"),
        (("roi_head", "mask_roi_extractor", "finest_scale"), 1, "finest_scale"),
        (("train_cfg", "rcnn", slice(None), "mask_size"), 1, "mask_size"),
    ],
)
def test_settings_that_cannot_be_had(golden, where, value, message):
    config = copy.deepcopy(golden("queryinst")[1]["config"])
    if -1 in where and config["roi_head"]["num_stages"] == 1:
        pytest.skip("the recording has a single stage")
    targets = [config]
    for key in where[:-1]:
        targets = targets[0][key] if isinstance(key, slice) else [target[key] for target in targets]
    for target in targets:
        target[where[-1]] = value
    with pytest.raises(ValueError, match=message):
        config_from_mmdet_queryinst(config)
