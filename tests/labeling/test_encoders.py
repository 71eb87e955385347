"""Loading backbones: refusals, weights, class activation, padding."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
from labeling_helpers import blob_image
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTForImageClassification, ViTModel

from uplvp_hf.labeling.encoders.backbone import load_classifier, load_encoder
from uplvp_hf.labeling.encoders.pixels import fit_longest, group_by_size, images_to_pixels
from uplvp_hf.models.errors import UserError


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    model = timm.create_model("mobilenetv2_035", num_classes=1000)
    folder = tmp_path_factory.mktemp("weights")
    save_file(model.state_dict(), folder / "whole.safetensors")
    trunk = {k: v for k, v in model.state_dict().items() if not k.startswith(("classifier", "conv_head", "bn2"))}
    save_file(trunk, folder / "trunk.safetensors")
    save_file({"blocks.0.0.conv_dw.weight": torch.zeros(1)}, folder / "other.safetensors")
    return folder


def test_random_backbones_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no trained weights.*--backbone-weights"):
        load_encoder("timm:mobilenetv2_035")
    assert load_encoder("timm:mobilenetv2_035", allow_random=True).num_classes == 1000
    with pytest.raises(ValueError, match="timm cannot build 'nonsense'"):
        load_encoder("timm:nonsense", allow_random=True)


def test_weights_that_do_not_fit(weights):
    for file, message in [("missing.safetensors", "no such file"), ("other.safetensors", "do not fit")]:
        with pytest.raises(ValueError, match=message):
            load_encoder("timm:mobilenetv2_035", weights / file)
    (weights / "text.safetensors").write_text("no weights at all")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_encoder("timm:mobilenetv2_035", weights / "text.safetensors")


def test_classifier_and_headless(weights):
    whole = load_encoder("timm:mobilenetv2_035", weights / "whole.safetensors")
    pixels = whole.pixels([blob_image(0), blob_image(1)], (64, 96))
    maps = whole(pixels)
    assert maps[-1].shape[2:] == (2, 3)
    torch.testing.assert_close(whole.classify(pixels), whole.model.forward_head(whole.model.forward_features(pixels)))
    some = whole(pixels, stages=(-2, -1))
    assert len(some) == 2 and torch.equal(some[0], maps[-2]) and torch.equal(some[1], maps[-1])
    with pytest.raises(ValueError, match="has 5 feature maps: stage 7"):
        whole(pixels, stages=(7,))
    headless = load_encoder("timm:mobilenetv2_035", weights / "trunk.safetensors")
    assert headless.num_classes == 0
    torch.testing.assert_close(headless(pixels)[-1], maps[-1])
    with pytest.raises(ValueError, match="no classifier head"):
        headless.classify(pixels)
    with pytest.raises(ValueError, match="no classifier head"):
        load_classifier("timm:mobilenetv2_035", weights / "trunk.safetensors")


def test_same_padding_moves_the_cells(weights):
    """TensorFlow's padding equals symmetric padding of an image moved by 1 px at each of the five strides: 31 px."""
    same = load_encoder("timm:mobilenetv2_035", weights / "whole.safetensors", pad_type="same")
    plain = load_encoder("timm:mobilenetv2_035", weights / "whole.safetensors")
    assert same.cell_offset(32) == pytest.approx(15.5 / 32) and plain.cell_offset(32) == 0
    pixels = torch.randn(1, 3, 1024 + 31, 1024 + 31, generator=torch.Generator().manual_seed(0))
    a = same(pixels[..., :1024, :1024])[-1]
    b = plain(pixels[..., 31:, 31:])[-1]
    inner = slice(14, 18)
    torch.testing.assert_close(a[..., inner, inner], b[..., inner, inner], atol=1e-4, rtol=1e-3)


def test_transformers_backbone_folder(tmp_path):
    from transformers import ResNetBackbone, ResNetConfig

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic")
    torch.manual_seed(0)
    ResNetBackbone(config).save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path))
    maps = encoder(encoder.pixels([blob_image(0)], (64, 96)))
    assert [tuple(m.shape[1:]) for m in maps] == [(8, 16, 24), (16, 8, 12), (24, 4, 6), (32, 2, 3)]
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError):
        load_encoder(str(tmp_path))
    assert load_encoder(str(tmp_path), allow_random=True).num_classes == 0


def drop_tensor(folder, part):
    """Remove the first tensor whose name contains `part` from a saved model."""
    state = load_file(folder / "model.safetensors")
    del state[next(key for key in state if part in key)]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_dinov2_folder(tmp_path):
    config = Dinov2Config(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14)
    torch.manual_seed(0)
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path))
    assert encoder.size_multiple == 14 and encoder.fit(100, 70, 140) == (98, 140)
    pixels = encoder.pixels([blob_image(0)], (70, 98))
    (last,) = encoder(pixels, stages=(-1,))
    tokens = model(pixels).last_hidden_state[:, 1:]
    torch.testing.assert_close(last.flatten(2).transpose(1, 2), tokens, atol=1e-5, rtol=1e-5)
    drop_tensor(tmp_path, "layer.1.mlp.fc1.weight")
    with pytest.raises(ValueError, match=r"1 tensors are not in the checkpoint, such as .*fc1"):
        load_encoder(str(tmp_path))


def test_plain_vit_folder(tmp_path):
    """What DINO's checkpoints are: a ViTModel, which AutoBackbone does not read."""
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32)
    config.patch_size = 8
    torch.manual_seed(0)
    model = ViTModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path))
    pixels = encoder.pixels([blob_image(0)], encoder.fit(96, 64, 72))
    maps = encoder(pixels)
    assert [tuple(m.shape) for m in maps] == [(1, 32, 6, 9)] * 2
    output = model(pixels, interpolate_pos_encoding=True)
    torch.testing.assert_close(maps[-1].flatten(2).transpose(1, 2), output.last_hidden_state[:, 1:])
    drop_tensor(tmp_path, "layernorm_before.weight")
    with pytest.raises(ValueError, match="not in the checkpoint"):
        load_encoder(str(tmp_path))


def test_timm_vision_transformer_of_any_size():
    encoder = load_encoder("timm:vit_tiny_patch16_224", allow_random=True)
    assert (encoder.size_multiple, encoder.fixed_size) == (16, None)
    size = encoder.fit(90, 60, 96)
    assert size == (64, 96)
    assert encoder(encoder.pixels([blob_image(0)], size), stages=(-1,))[0].shape == (1, 192, 4, 6)


def test_transformers_classifier(tmp_path):
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32)
    config.patch_size, config.id2label = 8, {0: "bear", 1: "deer", 2: "otter"}
    torch.manual_seed(0)
    model = ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    classifier = load_classifier(str(tmp_path))
    assert classifier.id2label == {0: "bear", 1: "deer", 2: "otter"} and classifier.num_classes == 3
    pixels = classifier.pixels([blob_image(0), blob_image(1)], classifier.fit(96, 64, 48))
    want = model(pixels, interpolate_pos_encoding=True).logits
    torch.testing.assert_close(classifier.classify(pixels), want)
    with pytest.raises(ValueError, match="load_encoder gives feature maps"):
        classifier(pixels)
    drop_tensor(tmp_path, "classifier.weight")
    with pytest.raises(ValueError, match=r"classifier\.weight"):
        load_classifier(str(tmp_path))
    with pytest.raises(ValueError, match="a folder holds its own"):
        load_classifier(str(tmp_path), pad_type="same")


def test_weights_with_a_configuration_say_how_they_see(weights, tmp_path):
    shutil.copy(weights / "whole.safetensors", tmp_path / "own.safetensors")
    own = {"pretrained_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.2], "pad_type": "same"}}
    (tmp_path / "own.json").write_text(json.dumps(own))
    encoder = load_encoder("timm:mobilenetv2_035", tmp_path / "own.safetensors")
    look = {"network": "timm:mobilenetv2_035", "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2] * 3}
    assert encoder.look == look | {"pad_type": "same"} and encoder.cell_offset(32) > 0
    assert load_encoder("timm:mobilenetv2_035", weights / "whole.safetensors").look["pad_type"] == ""
    with pytest.raises(UserError, match=r"pad_type is '', but .*own\.safetensors was trained with 'same'"):
        load_encoder("timm:mobilenetv2_035", tmp_path / "own.safetensors", pad_type="")


def test_imagenet_names(weights):
    names = load_classifier("timm:mobilenetv2_035", weights / "whole.safetensors").id2label
    assert len(names) == 1000 and names[292].startswith("tiger")


def test_pixels_and_groups():
    images = [blob_image(0), blob_image(1, 64, 96), blob_image(2)]
    got = images_to_pixels(images[:1], (64, 96), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    want = np.asarray(images[0], np.float64) / 255
    want = ((want - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]).transpose(2, 0, 1)[None]
    np.testing.assert_allclose(got.numpy(), want, atol=1e-5)
    assert group_by_size(images, 96) == {(64, 96): [0, 2], (96, 64): [1]}
    assert group_by_size(images, 96, lambda *_: (7, 7)) == {(7, 7): [0, 1, 2]}


def test_fit_longest():
    assert fit_longest(640, 480, 384) == (288, 384)
    assert fit_longest(20, 1000, 256) == (256, 32)
