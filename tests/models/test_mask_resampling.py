"""Masks on a coarse grid to masks of another size: against `interpolate`, and the short way against the plain one."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch.nn import functional as F

from uplvp_hf.models import mask_resampling
from uplvp_hf.models.mask_resampling import (
    mask_flips,
    mask_windows,
    resampling_axis,
    resized_flips,
    resized_masks,
    signed_values,
    window_flips,
)
from uplvp_hf.models.masks import rle_from_borders


def whole(values, rows, columns):
    """Every pixel by the rule, without windows or bands."""
    t = torch.from_numpy(columns.share)
    values = values[..., columns.low] * (1 - t) + values[..., columns.high] * t
    t = torch.from_numpy(rows.share)[:, None]
    return values[:, rows.low] * (1 - t) + values[:, rows.high] * t > 0


def blobs(count, height, width, generator):
    coarse = torch.randn(1, count, max(1, height // 4), max(1, width // 4), generator=generator) * 4 - 2
    return F.interpolate(coarse, (height, width), mode="bicubic")[0]


@pytest.mark.parametrize("seed", range(8))
def test_all_ways_give_the_same_bits(seed, monkeypatch):
    """Up and down, images that end within a cell, exact zeros, infinities, masks everywhere and nowhere."""
    monkeypatch.setattr(mask_resampling, "PIXELS_PER_BAND", 64)
    generator = torch.Generator().manual_seed(seed)
    for trial in range(25):
        height, width = torch.randint(1, 30, (2,), generator=generator).tolist()
        target = torch.randint(1, 90, (2,), generator=generator).tolist()
        spare = torch.randint(0, 4, (2,), generator=generator).tolist()
        values = blobs(4, height, width, generator)
        if trial % 2:
            values = torch.randn(4, height, width, generator=generator)
        if trial % 3 == 0:
            values = values.round()
        values[2], values[3] = (torch.inf, -torch.inf) if trial % 5 == 0 else (5.0, -5.0)
        values = signed_values(values, 0.0)
        rows = resampling_axis(height, 4 * height - spare[0], target[0], 4)
        columns = resampling_axis(width, 4 * width - spare[1], target[1], 4)
        expected = whole(values, rows, columns)
        assert torch.equal(torch.stack(list(resized_masks(values, rows, columns))), expected)
        for mask, flips in zip(expected.numpy(), resized_flips(values, rows, columns), strict=True):
            encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            assert rle_from_borders(flips, *target) == {"size": target, "counts": encoded["counts"].decode()}


@pytest.mark.parametrize("target", [(160, 240), (333, 517), (17, 23)])
def test_values_are_those_of_interpolate(target):
    """On an image that ends with a cell; pixels whose value is next to zero may differ by rounding."""
    values = blobs(6, 40, 60, torch.Generator().manual_seed(0))
    rows, columns = resampling_axis(40, 160, target[0], 4), resampling_axis(60, 240, target[1], 4)
    found = torch.stack(list(resized_masks(values, rows, columns)))
    expected = F.interpolate(values[None], target, mode="bilinear", align_corners=False)[0]
    sure = expected.abs() > 1e-3
    assert sure.float().mean() > 0.99 and found.any() and not found.all()
    assert torch.equal(found[sure], (expected > 0)[sure])


def test_an_image_that_ends_within_a_cell():
    """Pixel centers of the target lie where they lie in the source, measured from its upper left corner."""
    axis = resampling_axis(cells=4, source=13, target=26, stride=4)
    place = axis.low + axis.share
    expected = ((np.arange(26) + 0.5) * 13 / 26 / 4 - 0.5).clip(0, 3)
    np.testing.assert_allclose(place, expected, atol=1e-6)
    assert place[-1] < 3  # half a source pixel before 13, a fourth of a cell after the center of the last but one


@pytest.mark.parametrize("bound", [-np.inf, -1.5, 0.0, 2.0, np.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_signs_tell_what_is_above_the_bound(bound, dtype):
    values = torch.tensor([-torch.inf, -1.5, 0.0, 1e-7, 2.0, 300.0, torch.inf], dtype=dtype)
    signed = signed_values(values, bound)
    assert signed.dtype == torch.float32 and signed.isfinite().all()
    finite = values.isfinite()
    assert torch.equal((signed > 0)[finite], (values.float() > bound)[finite])


def test_little_is_computed():
    """A small mask on a large image: rows and columns that it cannot reach are not interpolated."""
    values = torch.full((1, 100, 100), -5.0)
    values[0, 40:44, 60:66] = 5.0
    axis = resampling_axis(100, 400, 1000, 4)
    (window,) = mask_windows(values, axis, axis)
    assert window.rows == (40, 43) and window.columns == (60, 65)
    assert window.bottom - window.top <= 6 * 10 and window.right - window.left <= 8 * 10
    (mask,) = resized_masks(values, axis, axis)
    assert mask[405:435, 605:655].all() and not mask[:395].any() and not mask[:, 665:].any()
    assert mask_windows(-values.abs(), axis, axis) == [None]
    assert len(mask_flips(values[0].numpy(), None, axis, axis)) == 0


@pytest.mark.parametrize("top, left", [(0, 0), (3, 5), (6, 11)])
def test_runs_of_a_mask_within_an_image(top, left):
    part = np.random.default_rng(top).random((4, 5)) > 0.4
    image = np.zeros((10, 16), dtype=np.uint8)
    image[top : top + 4, left : left + 5] = part
    expected = coco_mask.encode(np.asfortranarray(image))["counts"].decode()
    assert rle_from_borders(window_flips(part, top, left, (10, 16)), 10, 16)["counts"] == expected
