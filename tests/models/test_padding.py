"""An image alone has the features that it has inside a larger padded batch."""

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoBackbone, ResNetConfig, TimmBackbone, TimmBackboneConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from uplvp_hf.models.padding import extend_edges, padding_masked, upsample, valid_cells

CANVAS = (128, 160)
SIZES = ((64, 96), (50, 71), (128, 33), (97, 160), (1, 1))  # whole multiples of 32 and not


def randomize(module):
    """Weights and running statistics away from the values that hide mistakes (zero biases, unit variances)."""
    generator = torch.Generator().manual_seed(0)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(std=0.2, generator=generator)
            layer.running_var.uniform_(0.5, 2.0, generator=generator)
        for name, parameter in layer.named_parameters(recurse=False):
            if "bias" in name or parameter.dim() == 1:
                parameter.data.normal_(mean=0.3, std=0.3, generator=generator)
    return module


def resnet(kind="basic"):
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 2, 1, 1], layer_type=kind,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    return AutoBackbone.from_config(config)


def timm(name, **kwargs):
    config = TimmBackboneConfig(backbone=name, use_pretrained_backbone=False, out_indices=[1, 2, 3, 4])
    return TimmBackbone(config, **kwargs)


class Stack(nn.Module):
    """Convolutions, group norms and pooling as in feature pyramids and kernel heads."""

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.GroupNorm(4, 8), nn.ReLU(), nn.MaxPool2d(2))
        self.average = nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False), nn.Conv2d(8, 8, 1))
        self.inner = nn.Sequential(
            nn.Conv2d(8, 16, 5, padding=2), nn.GroupNorm(2, 16), nn.AvgPool2d(3, 1, 1), nn.SiLU()
        )
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        first = self.down(x)
        second = self.average(first)
        return [first, second, self.inner(second) * self.pool(second).mean(1, keepdim=True)]


BACKBONES = {
    "transformers-resnet": lambda: resnet(),
    "transformers-resnet-bottleneck": lambda: resnet("bottleneck"),
    "timm-resnet": lambda: timm("resnet18"),
    "timm-resnet-d": lambda: timm("resnet18d"),
    "timm-resnet-se": lambda: timm("seresnet18"),
    "timm-mobilenetv2": lambda: timm("mobilenetv2_050"),
    "timm-mobilenetv2-same": lambda: timm("mobilenetv2_050", pad_type="same"),
    "timm-mobilenetv3": lambda: timm("mobilenetv3_small_050"),
    "group-norm-stack": Stack,
}


@pytest.fixture(scope="module")
def networks():
    made = {}

    def get(name):
        if name not in made:
            torch.manual_seed(0)
            made[name] = randomize(BACKBONES[name]()).eval()
        return made[name]

    return get


def feature_maps(network, pixels):
    output = network(pixels)
    return output if isinstance(output, list) else list(output.feature_maps)


def padded_batch(sizes=SIZES, canvas=CANVAS, channels=3):
    """Random values everywhere, on the padding too: it must not matter what stands there."""
    pixels = torch.randn(len(sizes), channels, *canvas, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(len(sizes), *canvas)
    for row, (height, width) in zip(mask, sizes, strict=True):
        row[:height, :width] = 1
    return pixels, mask


def alone(pixels, mask, index):
    """One image on a canvas of its size rounded up to 32."""
    height, width = (int(side) for side in (mask[index].any(1).sum(), mask[index].any(0).sum()))
    canvas = (-(-height // 32) * 32, -(-width // 32) * 32)
    image = F.pad(pixels[index, :, :height, :width], (0, canvas[1] - width, 0, canvas[0] - height))
    own = torch.zeros(1, *canvas)
    own[:, :height, :width] = 1
    return image[None], own


@pytest.mark.parametrize("name", BACKBONES)
def test_an_image_alone_equals_the_same_image_in_a_padded_batch(networks, name):
    network = networks(name)
    pixels, mask = padded_batch()
    worst = 0.0
    with torch.no_grad():
        with padding_masked(network, mask):
            together = feature_maps(network, pixels)
        careless = feature_maps(network, pixels * mask[:, None])
        for index, (height, width) in enumerate(SIZES):
            image, own = alone(pixels, mask, index)
            with padding_masked(network, own):
                single = feature_maps(network, image)
            for level, (one, many) in enumerate(zip(single, together, strict=True)):
                stride = image.shape[-1] // one.shape[-1]
                rows, columns = -(-height // stride), -(-width // stride)
                inside = (slice(rows), slice(columns))
                scale = one[0][(slice(None), *inside)].abs().max().clamp(min=1)
                difference = (one[0][(slice(None), *inside)] - many[index][(slice(None), *inside)]).abs().max()
                assert difference <= 1e-5 * scale, (level, difference)
                harm = (many[index] - careless[level][index])[(slice(None), *inside)].abs().max() / scale
                worst = max(worst, float(harm))
    assert worst > 1e-2  # without the masks padding does matter


@pytest.mark.parametrize("name", BACKBONES)
def test_without_padding_nothing_changes(networks, name, monkeypatch):
    network = networks(name)
    pixels, mask = padded_batch()
    with torch.no_grad():
        plain = feature_maps(network, pixels)
        for none in (None, torch.ones_like(mask), torch.ones_like(mask, dtype=torch.int64)):
            with padding_masked(network, none):
                assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in network.modules())
                assert all(torch.equal(*pair) for pair in zip(feature_maps(network, pixels), plain, strict=True))
        # On accelerators masks are not read, so the masked way is taken; it keeps the bits too.
        monkeypatch.setattr("uplvp_hf.models.padding.is_padded", lambda mask: True)
        with padding_masked(network, torch.ones_like(mask)):
            for masked, expected in zip(feature_maps(network, pixels), plain, strict=True):
                assert torch.equal(masked, expected)


def test_group_norm_statistics_are_those_of_the_image():
    norm = randomize(nn.GroupNorm(3, 6))
    x, (height, width) = 5 + torch.randn(2, 6, 8, 10), (5, 7)
    mask = torch.ones(2, 32, 40)
    mask[0, 4 * height - 3 :], mask[0, :, 4 * width :] = 0, 0
    with torch.no_grad(), padding_masked(norm, mask):
        normed = norm(x)
    expected = F.group_norm(x[:1, :, :height, :width], 3, norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(normed[:1, :, :height, :width], expected)
    assert torch.equal(normed[1], norm(x)[1])


def test_valid_cells_round_up():
    mask = torch.zeros(1, 64, 96)
    mask[:, :33, :40] = 1
    for size, rows, columns in (((16, 24), 9, 10), ((2, 3), 2, 2), ((64, 96), 33, 40), ((1, 1), 1, 1)):
        expected = torch.zeros(1, *size, dtype=torch.bool)
        expected[:, :rows, :columns] = True
        assert torch.equal(valid_cells(mask, size), expected)


def test_upsampling_sees_the_image_only():
    x, mask = torch.randn(2, 3, 4, 6), torch.zeros(2, 32, 48)
    mask[0, :24, :40], mask[1, :17] = 1, 1
    result = upsample(x, (8, 12), mask)
    for index, (rows, columns) in enumerate(((3, 5), (3, 6))):
        expected = F.interpolate(x[index : index + 1, :, :rows, :columns], scale_factor=2, mode="bilinear")[0]
        torch.testing.assert_close(result[index, :, : 2 * rows, : 2 * columns], expected)
    assert torch.equal(upsample(x, (8, 12), torch.ones(2, 32, 48)), F.interpolate(x, (8, 12), mode="bilinear"))
    extended = extend_edges(x, mask)
    assert torch.equal(extended[0, :, 3, :5], x[0, :, 2, :5]) and torch.equal(extended[0, :, 3, 5], x[0, :, 2, 4])


def test_gradients_stop_at_the_border(networks):
    """The loss of one image moves neither its padding nor depends on it."""
    network = networks("group-norm-stack")
    pixels, mask = padded_batch(sizes=((64, 96), (50, 71)))
    gradients = []
    for fill in (0.0, 100.0):
        filled = torch.where(mask[:, None] > 0, pixels, fill).requires_grad_()
        network.zero_grad()
        with padding_masked(network, mask):
            maps = feature_maps(network, filled)
        sum((m * valid_cells(mask, m.shape[-2:])[:, None]).square().sum() for m in maps).backward()
        assert (filled.grad * (1 - mask[:, None])).abs().max() == 0
        gradients.append([filled.grad, *(p.grad.clone() for p in network.parameters())])
    for one, other in zip(*gradients, strict=True):
        assert torch.isfinite(one).all()
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["transformers-resnet", "timm-mobilenetv2-same", "group-norm-stack"])
def test_bfloat16_autocast(networks, name):
    network = networks(name)
    pixels, mask = padded_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16), padding_masked(network, mask):
        maps = feature_maps(network, pixels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert [m.dtype for m in maps] == [m.dtype for m in feature_maps(network, pixels)]
    sum(m.float().square().mean() for m in maps).backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


class Block(GradientCheckpointingLayer):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4)

    def forward(self, x):
        return self.norm(self.conv(x)).tanh()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_are_recomputed_under_the_same_masks(reentrant):
    torch.manual_seed(0)
    network = randomize(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Block(), Block())).train()
    pixels, mask = padded_batch()
    gradients = []
    for checkpointing in (False, True):
        for block in network[1:]:
            block.gradient_checkpointing = checkpointing
            block._gradient_checkpointing_func = lambda function, *args: torch.utils.checkpoint.checkpoint(
                function, *args, use_reentrant=reentrant
            )
        network.zero_grad()
        with padding_masked(network, mask):
            first = network(pixels)
        with padding_masked(network, mask.flip(0)):  # a second pass before the gradients of the first
            second = network(pixels)
        (first.square().mean() + second.sum()).backward()
        gradients.append([parameter.grad.clone() for parameter in network.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in network.modules())


def test_hooks_are_removed_after_an_error_and_blocks_nest(networks):
    network = networks("transformers-resnet")
    pixels, mask = padded_batch()
    with torch.no_grad():
        with padding_masked(network, mask):
            expected = feature_maps(network, pixels)
            with pytest.raises(RuntimeError, match="broken"), padding_masked(network, mask):
                raise RuntimeError("broken")
            with padding_masked(network, mask):
                nested = feature_maps(network, pixels)
            after = feature_maps(network, pixels)
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(expected, nested, after, strict=True))
        with pytest.raises(ValueError, match="5 images"), padding_masked(network, mask):
            network(pixels[:2])
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in network.modules())


def test_other_threads_are_left_alone(networks):
    network = networks("transformers-resnet")
    pixels, mask = padded_batch()
    results = []
    with torch.no_grad(), padding_masked(network, mask):
        thread = threading.Thread(target=lambda: results.append(feature_maps(network, pixels)))
        thread.start()
        thread.join()
    plain = feature_maps(network, pixels)
    assert all(torch.equal(*pair) for pair in zip(results[0], plain, strict=True))


def test_export_without_a_mask_is_unaffected(networks):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = networks("group-norm-stack")

        def forward(self, x):
            with padding_masked(self.network, None):
                return upsample(self.network(x)[0], x.shape[-2:], None)

    pixels, _ = padded_batch()
    model = Wrapped().eval()
    exported = torch.export.export(model, (pixels,), strict=False).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(pixels), model(pixels))
