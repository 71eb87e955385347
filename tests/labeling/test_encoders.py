"""Loading backbones: refusals, weights, class activation, padding."""

import pytest
import timm
import torch
from labeling_helpers import blob_picture
from safetensors.torch import save_file

from uplvp_hf.labeling.encoders import fit_longest, load_encoder


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
    pixels = whole.pixels([blob_picture(0), blob_picture(1)], (64, 96))
    encoded = whole(pixels)
    assert encoded.maps[-1].shape[2:] == (2, 3)
    torch.testing.assert_close(encoded.logits, whole.classify(pixels))
    headless = load_encoder("timm:mobilenetv2_035", weights / "trunk.safetensors")
    assert headless.num_classes == 0 and headless(pixels).logits is None
    torch.testing.assert_close(headless(pixels).maps[-1], encoded.maps[-1])
    with pytest.raises(ValueError, match="no classifier head"):
        headless.classify(pixels)


def test_same_padding_moves_the_cells(weights):
    """TensorFlow's padding equals symmetric padding of a picture moved by 1 px at each of the five strides: 31 px."""
    same = load_encoder("timm:mobilenetv2_035", weights / "whole.safetensors", pad_type="same")
    plain = load_encoder("timm:mobilenetv2_035", weights / "whole.safetensors")
    assert same.cell_offset(32) == pytest.approx(15.5 / 32) and plain.cell_offset(32) == 0
    pixels = torch.randn(1, 3, 1024 + 31, 1024 + 31, generator=torch.Generator().manual_seed(0))
    a = same(pixels[..., :1024, :1024]).maps[-1]
    b = plain(pixels[..., 31:, 31:]).maps[-1]
    inner = slice(14, 18)
    torch.testing.assert_close(a[..., inner, inner], b[..., inner, inner], atol=1e-4, rtol=1e-3)


def test_transformers_backbone_folder(tmp_path):
    from transformers import ResNetBackbone, ResNetConfig

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic")
    torch.manual_seed(0)
    ResNetBackbone(config).save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path))
    maps = encoder(encoder.pixels([blob_picture(0)], (64, 96))).maps
    assert [tuple(m.shape[1:]) for m in maps] == [(8, 16, 24), (16, 8, 12), (24, 4, 6), (32, 2, 3)]
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError):
        load_encoder(str(tmp_path))
    assert load_encoder(str(tmp_path), allow_random=True).num_classes == 0


def test_fit_longest():
    assert fit_longest(640, 480, 384) == (288, 384)
    assert fit_longest(20, 1000, 256) == (256, 32)
