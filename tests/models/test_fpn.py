"""The feature pyramid against torchvision's, which has the same arithmetic."""

import torch
from torchvision.ops import FeaturePyramidNetwork

from uplvp_hf.models.backbones import ConvNormAct, FeaturePyramid


def test_equals_torchvision():
    torch.manual_seed(0)
    channels = [4, 8, 12, 16]
    ours, theirs = FeaturePyramid(channels, 6), FeaturePyramidNetwork(channels, 6)
    for index in range(4):
        theirs.inner_blocks[index][0].load_state_dict(ours.lateral[index].state_dict())
        theirs.layer_blocks[index][0].load_state_dict(ours.output[index].state_dict())
    maps = [torch.randn(2, count, 25 // 2**index + 1, 32 // 2**index) for index, count in enumerate(channels)]
    expected = theirs({str(index): map_ for index, map_ in enumerate(maps)})
    for map_, wanted in zip(ours(maps), expected.values(), strict=True):
        torch.testing.assert_close(map_, wanted, rtol=1e-5, atol=1e-6)


def test_init_rule():
    torch.manual_seed(0)
    module = FeaturePyramid([64, 128], 96)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(7)
    module.init_weights()
    for conv, fan in [(module.lateral[1], 128 + 96), (module.output[0], 9 * (96 + 96))]:
        assert (conv.bias == 0).all()
        assert abs(conv.weight.std().item() / (2 / fan) ** 0.5 - 1) < 0.05  # Xavier: variance 2 / (fan in + fan out)


def test_block_halves_rounded_up():
    block = ConvNormAct(4, 8, stride=2, groups=2)
    out = block(torch.randn(1, 4, 13, 8))
    assert out.shape == (1, 8, 7, 4) and (out >= 0).all() and block.conv.bias is None
