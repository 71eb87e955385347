"""Conversion of backbones against torchvision, whose ResNets mmdetection's are named after."""

import pytest
import torch
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from transformers import AutoBackbone, AutoConfig

from uplvp_hf.conversion import convert_mmdet_mask2former
from uplvp_hf.conversion.resnet import resnet_config

PREFIX = "model.pixel_level_module.encoder."


@pytest.mark.parametrize(("depth", "block", "blocks"), [(18, BasicBlock, [2, 2, 2, 2]), (50, Bottleneck, [3, 4, 6, 3])])
def test_resnets_give_the_features_of_torchvision(depth, block, blocks, close):
    torch.manual_seed(0)
    theirs = ResNet(block, blocks).eval()
    with torch.no_grad():
        for name, value in [*theirs.named_parameters(), *theirs.named_buffers()]:
            if "running_var" in name or (value.dim() == 1 and "weight" in name):
                value.uniform_(0.5, 1.5)
            elif value.dim() == 1:
                value.uniform_(-0.2, 0.2)
    settings = resnet_config({"type": "ResNet", "depth": depth})
    ours = AutoBackbone.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings)).eval()
    state = {f"backbone.{k}": v for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    converted = convert_mmdet_mask2former(state)
    assert all(name.startswith(PREFIX) for name in converted)
    missing, unexpected = ours.load_state_dict({k.removeprefix(PREFIX): v for k, v in converted.items()}, strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(image))))
        for index, map_ in enumerate(ours(image).feature_maps):
            x = getattr(theirs, f"layer{index + 1}")(x)
            close(map_, x)


@pytest.mark.parametrize(
    ("name", "value"),
    [("dilations", (1, 1, 1, 2)), ("strides", [1, 2, 2, 1]), ("avg_down", True), ("dcn", {"type": "DCN"})],
)
def test_variants_that_ours_lacks_are_refused(name, value):
    plain = {"type": "ResNet", "depth": 50, "strides": (1, 2, 2, 2), "dcn": None}
    assert resnet_config(plain)["depths"] == [3, 4, 6, 3]
    with pytest.raises(ValueError, match=f"{name} must be"):
        resnet_config({**plain, name: value})
