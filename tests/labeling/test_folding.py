"""Folding batch norms into convolutions changes no output."""

import pytest
import timm
import torch
from torch import nn

from uplvp_hf.labeling.encoders.folding import fold_batch_norms


def randomize(model):
    """Statistics and affine parameters that a forgotten factor would show in."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return model.eval()


def norms(model):
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("name", ["mobilenetv2_035", "resnet18"])
def test_outputs_stay(name):
    torch.manual_seed(0)
    model = randomize(timm.create_model(name))
    pixels = torch.randn(2, 3, 64, 96)
    folded = fold_batch_norms(model, pixels[:1, :, :64, :64])
    assert norms(model) > 15 and norms(folded) == 0
    with torch.no_grad():
        for a, b in zip(folded.forward_intermediates(pixels)[1], model.forward_intermediates(pixels)[1]):
            torch.testing.assert_close(a, b, atol=1e-4 * float(b.abs().max()), rtol=1e-3)


class Shared(nn.Module):
    """A convolution whose output is also read without the norm: it must stay as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.convolution(x)
        return y + self.norm(y)


def test_what_cannot_be_folded_is_left_alone():
    model = randomize(Shared())
    assert fold_batch_norms(model, torch.randn(1, 3, 8, 8)) is model and norms(model) == 1
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    assert fold_batch_norms(plain, torch.randn(1, 3, 8, 8)) is plain
