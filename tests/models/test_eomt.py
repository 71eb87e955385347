"""EoMT in our three steps: transformers' weights in, its predictions and its state dict out."""

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    EomtConfig,
    EomtDinov3Config,
    EomtDinov3ForUniversalSegmentation,
    EomtForUniversalSegmentation,
)

from uplvp_hf.models.configuration_uplvp import UplvpConfig
from uplvp_hf.models.errors import UserError
from uplvp_hf.models.modeling_eomt import EomtDinov3Segmenter, EomtSegmenter
from uplvp_hf.models.modeling_uplvp import UplvpForInstanceSegmentation, UplvpForPreTraining
from uplvp_hf.models.vit_weights import resized_patches

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_blocks": 2, "num_queries": 7,
    "patch_size": 16, "image_size": 64, "train_num_points": 48, "id2label": {0: "cat", 1: "dog", 2: "horse"},
}  # fmt: skip
NATIVE = {
    "eomt": (EomtConfig, EomtForUniversalSegmentation, EomtSegmenter, {"mlp_ratio": 2}),
    "eomt_dinov3": (
        EomtDinov3Config, EomtDinov3ForUniversalSegmentation, EomtDinov3Segmenter,
        {"intermediate_size": 48, "pos_embed_rescale": None},
    ),
}  # fmt: skip


@pytest.fixture(params=NATIVE)
def pair(request, tmp_path):
    """transformers' model and ours, loaded from what it saves."""
    config, native, ours, more = NATIVE[request.param]
    torch.manual_seed(0)
    model = native(config(**SIZES, **more)).eval()
    model.save_pretrained(tmp_path / "native")
    return model, ours.from_pretrained(tmp_path / "native").eval()


def recorded(native, pixels):
    """(masks, classes) of every prediction that the native model makes on its way."""
    found, predict = [], native.predict
    native.predict = lambda tokens: found.append(predict(tokens)) or found[-1]
    native(pixels)
    native.predict = predict
    return found


@pytest.mark.parametrize("shares", [(1.0, 1.0), (0.0, 1.0), (0.0, 0.0)], ids=["masked", "half", "annealed"])
@torch.no_grad()
def test_predictions_are_those_of_transformers(pair, tmp_path, shares):
    native, ours = pair
    native.attn_mask_probs.copy_(torch.tensor(shares))
    ours.load_state_dict(native.state_dict())
    pixels = torch.randn(2, 3, 64, 64)
    expected = recorded(native, pixels)
    _, _, layers = ours.run(pixels)
    assert len(layers) == len(expected) == 1 + sum(share > 0 for share in shares)
    for layer, (masks, classes) in zip(layers, expected, strict=True):
        torch.testing.assert_close(layer.mask_logits, masks, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.class_logits, classes, rtol=1e-5, atol=1e-5)
    ours.save_pretrained(tmp_path / "back")
    again, info = type(native).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.state_dict().keys() == ours.state_dict().keys() == native.state_dict().keys()
    assert torch.equal(again.eval()(pixels).masks_queries_logits, native(pixels).masks_queries_logits)


@torch.no_grad()
def test_masks_that_are_gone_are_the_path_without_predictions_on_the_way(pair):
    """Training predicts before every block, but nobody's attention depends on it where the mask is annealed."""
    ours, pixels = pair[1], torch.randn(2, 3, 64, 64)
    ours.attn_mask_probs.zero_()
    (only,), layers = ours.eval().run(pixels)[2], ours.train().run(pixels)[2]
    assert len(layers) == ours.num_stages == 3
    torch.testing.assert_close(layers[-1].mask_logits, only.mask_logits, rtol=1e-5, atol=1e-5)


def test_masks_fade_block_by_block(pair):
    ours = pair[1]
    ours.anneal(0.9)
    assert ours.mask_shares() == [1, 1]  # nobody asked for it
    ours.anneal_masks(0.2, 0.6)
    expected = {0.0: (1, 1), 0.2: (1, 1), 0.3: (0.5**0.9, 1), 0.4: (0, 1), 0.5: (0, 0.5**0.9), 0.6: (0, 0), 1: (0, 0)}
    for share, shares in expected.items():
        ours.anneal(share)
        assert ours.mask_shares() == pytest.approx(shares, abs=1e-6)
        assert ours.train().mask_shares() == pytest.approx(shares, abs=1e-6)  # from the buffer, which is saved
    ours.anneal_masks(0.2, 0.6)
    ours.anneal(0.0)
    assert ours.mask_shares() == [0, 0]  # what is gone stays away
    with pytest.raises(UserError, match="the lower first"):
        ours.anneal_masks(0.6, 0.2)


def test_other_canvases(pair):
    ours, small, wide = pair[1], torch.randn(1, 3, 32, 32), torch.randn(1, 3, 32, 80)
    if isinstance(ours, EomtSegmenter):
        for pixels in (small, wide):
            with pytest.raises(UserError, match="64 x 64 pixels, not 32 x"):
                ours(pixels)
        table = ours.embeddings.position_embeddings.weight.detach().clone()
        ours.fit_canvas(32)
        maps = table.T.view(1, 32, 4, 4)
        expected = F.interpolate(maps, size=(2, 2), mode="bicubic", antialias=True).flatten(2)[0].T
        torch.testing.assert_close(ours.embeddings.position_embeddings.weight, expected)
    else:
        assert ours(wide).masks_queries_logits.shape == (1, 7, 8, 20)
        with pytest.raises(UserError, match="not whole patches"):
            ours(torch.randn(1, 3, 32, 50))
        ours.fit_canvas(32)
    assert ours(small).masks_queries_logits.shape == (1, 7, 8, 8) and ours.config.image_size == 32
    again = type(pair[0])(ours.config)
    again.load_state_dict(ours.state_dict())
    torch.testing.assert_close(again.eval()(small).masks_queries_logits, ours(small).masks_queries_logits)
    with pytest.raises(UserError, match="multiples of 16"):
        ours.fit_canvas(40)


def test_gradients_reach_prompts_and_zeros_change_nothing(pair):
    ours, pixels, stages = pair[1], torch.randn(2, 3, 64, 64), []
    prompts = torch.zeros(2, 7, 32, requires_grad=True)

    def inject(queries, features, stage):
        stages.append(stage)
        return queries + prompts

    layers, plain = ours.run(pixels, None, inject)[2], ours.run(pixels)[2]
    assert stages == [0, 1] and torch.equal(layers[-1].mask_logits, plain[-1].mask_logits)
    layers[-1].mask_logits.square().sum().backward()
    assert prompts.grad.abs().amin((0, 2)).gt(0).all()


def test_a_self_supervised_vit_is_a_start(pair):
    """Its own tokens come out of the blocks without queries, at a new size of patches and canvas too."""
    ours = pair[1]
    shared = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_register_tokens": 4}
    torch.manual_seed(1)
    if isinstance(ours, EomtSegmenter):
        config = Dinov2WithRegistersConfig(**shared, mlp_ratio=2, patch_size=8, image_size=40)
        source, pixels = Dinov2WithRegistersModel(config).eval(), None
    else:
        source = DINOv3ViTModel(
            DINOv3ViTConfig(**shared, intermediate_size=48, image_size=64, layer_norm_eps=1e-6)
        ).eval()
        pixels = torch.randn(2, 3, 64, 64)
    unused = ours.load_encoder(source)
    assert unused == ["embeddings.mask_token"]
    if pixels is not None:
        hidden = source(pixels, output_hidden_states=True).hidden_states[2]
        torch.testing.assert_close(ours.encode(pixels).tokens, hidden, rtol=1e-4, atol=1e-5)
    else:  # the class token took its position along
        token = source.embeddings.cls_token + source.embeddings.position_embeddings[:, :1]
        assert torch.equal(ours.embeddings.cls_token, token)
        assert torch.equal(ours.layers[3].mlp.fc2.weight, source.encoder.layer[3].mlp.fc2.weight)
    with pytest.raises(UserError, match="do not fit"):
        ours.load_encoder(DINOv3ViTModel(DINOv3ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)))


def test_dinov2_with_smaller_patches_sees_the_same_enlarged():
    """Images that are enlarged patch by patch give the tokens of the images themselves."""
    torch.manual_seed(0)
    kernel, patches = torch.randn(5, 3, 8, 8), torch.randn(6, 3, 8, 8)
    larger = F.interpolate(patches, size=(16, 16), mode="bicubic", align_corners=False)
    expected = F.conv2d(patches, kernel)
    torch.testing.assert_close(F.conv2d(larger, resized_patches(kernel, 16)), expected, rtol=1e-3, atol=1e-3)
    assert resized_patches(kernel, 8) is kernel


def test_differences_to_a_dinov3_are_refused(tmp_path):
    config, native, ours, more = NATIVE["eomt_dinov3"]
    model = native(config(**SIZES, **more))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e-3)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="base is missing"):
        ours.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="base is missing"):
        UplvpForPreTraining.from_segmenter_pretrained(str(tmp_path))


def test_other_strides_are_refused():
    with pytest.raises(UserError, match="quarter of the canvas"):
        EomtSegmenter(EomtConfig(**{**SIZES, "patch_size": 8}))
    assert EomtSegmenter(EomtConfig(**{**SIZES, "patch_size": 8, "num_upscale_blocks": 1}))


def test_a_checkpoint_of_transformers_goes_on_with_other_classes(pair, tmp_path):
    native = pair[0]
    native.save_pretrained(tmp_path)
    model = UplvpForInstanceSegmentation.from_pretraining(str(tmp_path), {0: "horse", 1: "fox"})
    head, before = model.segmenter.class_predictor.weight, native.class_predictor.weight
    assert torch.equal(head[0], before[2]) and torch.equal(head[2], before[3])  # horse, "no object"
    assert model.transfer_report.new_classes == ["fox"] and not model.transfer_report.reinitialized
    assert isinstance(model.config, UplvpConfig)
