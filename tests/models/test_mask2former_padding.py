"""Predictions of an image depend neither on its canvas nor on its batch mates, at every layer."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import Mask2FormerConfig, TimmBackboneConfig

from uplvp_hf.models.modeling_mask2former import Mask2FormerSegmenter

CANVAS = (160, 224)
SIZES = ((96, 128), (70, 101), (160, 33), (131, 224), (40, 40))  # whole multiples of 32 and not


def build(settings, backbone=None, **timm_kwargs):
    torch.manual_seed(0)
    config = Mask2FormerConfig(**{key: value for key, value in settings.items() if key != "model_type"})
    if backbone is not None:
        config.backbone_config = TimmBackboneConfig(backbone=backbone, out_indices=[1, 2, 3, 4], **timm_kwargs)
    model = Mask2FormerSegmenter(config).eval()
    generator = torch.Generator().manual_seed(1)
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            module.bias.data.normal_(std=0.2, generator=generator)
            module.weight.data.uniform_(0.7, 1.3, generator=generator)
        if name.endswith(
            ("sampling_offsets", "self_attn.attention_weights")
        ):  # fresh ones look the same way everywhere
            module.weight.data.normal_(std=0.5, generator=generator)
    return model


def canvases(fill=0.0):
    pixels = torch.randn(len(SIZES), 3, *CANVAS, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(len(SIZES), *CANVAS)
    for row, (height, width) in zip(mask, SIZES, strict=True):
        row[:height, :width] = 1
    return torch.where(mask[:, None] > 0, pixels, fill), mask


def alone(pixels, mask, index):
    height, width = SIZES[index]
    canvas = (-(-height // 32) * 32, -(-width // 32) * 32)
    return pixels[index : index + 1, :, : canvas[0], : canvas[1]], mask[index : index + 1, : canvas[0], : canvas[1]]


@torch.no_grad()
def run(model, pixels, mask):
    features = model.encode(pixels, mask)
    return features, model.decode(features, model.initial_queries(features))


@pytest.mark.parametrize(
    ("backbone", "timm_kwargs"),
    [
        (None, {}),
        ("resnet10t", {}),
        ("mobilenetv2_050", {}),
        ("mobilenetv2_050", {"timm_kwargs": {"pad_type": "same"}}),
    ],
)
def test_an_image_alone_gets_the_logits_it_gets_in_a_padded_batch(tiny_segmenter, backbone, timm_kwargs, assert_close):
    model = build(tiny_segmenter("resnet", encoder_layers=2), backbone, **timm_kwargs)
    pixels, mask = canvases()
    many, layers = run(model, pixels, mask)
    _, careless = run(model, pixels, None)
    assert len(layers) == 4
    for index, (height, width) in enumerate(SIZES):
        single, own = run(model, *alone(pixels, mask, index))
        for level, features in enumerate((*single.levels, single.mask_features, single.prompt_map)):
            stride = (32, 16, 8, 4, 32)[level]
            cells = (slice(-(-height // stride)), slice(-(-width // stride)))
            other = (*many.levels, many.mask_features, many.prompt_map)[level]
            # Rounding grows with the size of what is summed up: a share of the largest value of the map.
            tolerance = 1e-4 * features.abs().max().item()
            torch.testing.assert_close(
                other[index][(..., *cells)], features[0][(..., *cells)], rtol=0, atol=tolerance, msg=f"{index} {level}"
            )
        cells = (..., slice(-(-height // 4)), slice(-(-width // 4)))
        for one, batch, unmasked in zip(own, layers, careless, strict=True):
            assert_close(batch.class_logits[index], one.class_logits[0], 1e-4)
            assert_close(batch.mask_logits[index][cells], one.mask_logits[0][cells], 1e-4)
            assert (unmasked.mask_logits[index][cells] - one.mask_logits[0][cells]).abs().max() > 1e-2


def test_what_stands_on_the_padding_does_not_matter(tiny_segmenter):
    model = build(tiny_segmenter("resnet"))
    (_, black), (_, white) = (run(model, *canvases(fill)) for fill in (0.0, 1e3))
    for one, other in zip(black, white, strict=True):
        assert torch.equal(one.class_logits, other.class_logits) and torch.equal(one.mask_logits, other.mask_logits)


def test_masks_end_at_the_border_as_maps_end(tiny_segmenter):
    """Resized to pixels and cropped, the logits of an image are the same on every canvas."""
    model = build(tiny_segmenter("resnet"))
    pixels, mask = canvases()
    logits = run(model, pixels, mask)[1][-1].mask_logits
    large = F.interpolate(logits, CANVAS, mode="bilinear")
    for index, (height, width) in enumerate(SIZES):
        image, own = alone(pixels, mask, index)
        small = F.interpolate(run(model, image, own)[1][-1].mask_logits, image.shape[-2:], mode="bilinear")
        torch.testing.assert_close(large[index, :, :height, :width], small[0, :, :height, :width], rtol=0, atol=1e-4)


def test_pixel_decoder_masks_padding_behind_a_window_backbone(tiny_segmenter):
    """Swin gives the same maps on both canvases where the image ends with a window, so everything is equal."""
    model = build(tiny_segmenter("swin"))
    image = torch.randn(1, 3, 128, 128)
    canvas, mask = torch.zeros(1, 3, 192, 256), torch.zeros(1, 192, 256)
    canvas[..., :128, :128], mask[:, :128, :128] = image, 1
    (small, one), (large, other) = run(model, image, torch.ones(1, 128, 128)), run(model, canvas, mask)
    torch.testing.assert_close(large.prompt_map[..., :4, :4], small.prompt_map, rtol=0, atol=1e-5)
    torch.testing.assert_close(large.mask_features[..., :32, :32], small.mask_features, rtol=0, atol=2e-5)
    for layer, padded in zip(one, other, strict=True):
        torch.testing.assert_close(padded.class_logits, layer.class_logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(padded.mask_logits[..., :32, :32], layer.mask_logits, rtol=0, atol=1e-4)


def test_a_repeated_step_gives_the_same_bits(tiny_segmenter):
    pixels, mask = canvases()
    masks = [torch.rand(3, *CANVAS, generator=torch.Generator().manual_seed(i)) > 0.5 for i in range(len(SIZES))]
    steps = []
    for _ in range(2):
        model = build(tiny_segmenter("resnet"))
        torch.manual_seed(3)
        features = model.encode(pixels, mask)
        layers = model.decode(features, model.initial_queries(features))
        terms, _ = model.loss(layers, features, masks, [torch.tensor([0, 1, 0])] * len(masks))
        sum(terms.values()).backward()
        steps.append([*terms.values(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(steps[0]) > 100 and all(torch.equal(*pair) for pair in zip(*steps, strict=True))
