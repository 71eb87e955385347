"""Features that carry positions: the same wherever the canvas ends, nothing at the start, and not for transformers."""

import math

import pytest
import torch

from uplvp_hf.export.native import to_native
from uplvp_hf.models.configuration_uplvp import UplvpConfig
from uplvp_hf.models.errors import UserError
from uplvp_hf.models.modeling_uplvp import UplvpForInstanceSegmentation
from uplvp_hf.models.positions import fourier_features


def model_of(tiny_segmenter, **changes):
    torch.manual_seed(0)
    config = UplvpConfig(segmenter_config=tiny_segmenter(**changes), id2label={0: "a", 1: "b"})
    return UplvpForInstanceSegmentation(config).eval()


def test_waves_of_the_centers_of_cells():
    extent = torch.tensor([[1.0, 1.0], [0.5, 0.75]])
    waves = fourier_features((4, 8), extent, 3)
    for image, row, column, octave in ((0, 1, 5, 2), (1, 2, 3, 0), (1, 0, 0, 1)):
        x = (column + 0.5) / (8 * extent[image, 0].item())
        y = (row + 0.5) / (4 * extent[image, 1].item())
        rate = math.pi * 2**octave
        expected = [math.sin(rate * x), math.cos(rate * x), math.sin(rate * y), math.cos(rate * y)]
        assert waves[image, octave::3, row, column].tolist() == pytest.approx(expected, abs=1e-5)


def test_positions_start_at_nothing_and_do_not_see_the_canvas(tiny_segmenter, tmp_path):
    plain, model = model_of(tiny_segmenter), model_of(tiny_segmenter, position_octaves=3)
    report = model.load_state_dict(plain.state_dict(), strict=False)
    assert sorted(report.missing_keys) == ["segmenter.positions.maps.level", "segmenter.positions.maps.mask"]
    pixels = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        before, after = (one(pixel_values=pixels).masks_queries_logits for one in (plain, model))
        assert torch.equal(before, after)
        for matrix in model.segmenter.positions.parameters():
            matrix.normal_()
        alone = model(pixel_values=pixels).masks_queries_logits
        assert (alone - before).abs().max() > 0.1 * before.abs().max()
        canvas, mask = torch.zeros(1, 3, 128, 128), torch.zeros(1, 128, 128, dtype=torch.int64)
        canvas[..., :96, :64], mask[..., :96, :64] = pixels, 1
        padded = model(pixel_values=canvas, pixel_mask=mask).masks_queries_logits[..., :24, :16]
        torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))
        model.save_pretrained(tmp_path / "model")
        again = UplvpForInstanceSegmentation.from_pretrained(tmp_path / "model").eval()
        assert torch.equal(again(pixel_values=pixels).masks_queries_logits, alone)
    with pytest.raises(UserError, match="position_octaves"):
        to_native(model, tmp_path / "plain")
