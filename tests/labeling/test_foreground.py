"""The foreground labeler: its linear algebra against plain solvers, its batches against single images."""

import numpy as np
import pytest
import torch
from labeling_helpers import FixedEncoder, blob_image, tiny_encoder

from uplvp_hf.labeling.labelers.foreground import ForegroundLabeler, Ridge, foreground_maps, principal_map


def test_principal_map_is_the_first_principal_component():
    features = torch.randn(3, 20, 6, 8, generator=torch.Generator().manual_seed(0))
    features[:, :, 2:5, 3:6] += torch.linspace(-2, 2, 20)[:, None, None]
    for feature, got in zip(features, principal_map(features)):
        cells = feature.flatten(1).T - feature.flatten(1).mean(dim=1)
        left, values, _ = torch.linalg.svd(cells, full_matrices=False)
        want = (left[:, 0] * values[0]).view(6, 8)
        sign = (want * got).sum().sign()
        torch.testing.assert_close(got * sign, want, atol=1e-3, rtol=1e-3)


def test_the_component_is_signed_like_the_norm():
    features = torch.rand(2, 5, 6, 8, generator=torch.Generator().manual_seed(0))
    features[:, :, 2:5, 3:6] *= 4
    norm, both = foreground_maps(features, 1.0)
    assert ((norm * (both - norm)).mean(dim=(1, 2)) > 0).all()
    alone, same = foreground_maps(features, 0.0)
    assert torch.equal(alone, same) and torch.equal(alone, norm)


def test_ridge_is_the_normal_equation():
    torch.manual_seed(0)
    inputs, target = torch.randn(60, 5), torch.randn(6, 10)
    stacked = torch.cat([inputs, (0.3 * 60) ** 0.5 * torch.eye(5)])  # ridge as least squares with extra rows
    weights = torch.linalg.lstsq(stacked, torch.cat([target.flatten(), torch.zeros(5)])[:, None]).solution
    want = (inputs @ weights).view(6, 10)
    want = (want - want.mean()) / want.std()
    both = Ridge(torch.stack([inputs.T, torch.randn(5, 60)]), 0.3).fit_predict(torch.stack([target, target]))
    torch.testing.assert_close(both[0], want, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("refine", [False, True])
def test_foreground_batches_equal_single_images(refine):
    labeler = ForegroundLabeler(tiny_encoder(), norm_sizes=(64, 96), component_sizes=(96,), refine=refine, grid=48)
    images = [blob_image(0), blob_image(1, 64, 80), blob_image(2)]
    for image, together in zip(images, labeler(images)):
        (alone,) = labeler([image])
        assert together.masks.shape[1:] == image.size[::-1]
        assert (together.masks == alone.masks).all()
        assert together.scores == pytest.approx(alone.scores, abs=1e-5)
        assert ((together.scores >= 0.5) & (together.scores <= 1)).all()


def test_strong_cells_are_found():
    feature = torch.full((3, 8, 12), 0.1)
    feature[:, 3:6, 4:8] = torch.tensor([1.0, 2.0, 1.5])[:, None, None]
    labeler = ForegroundLabeler(FixedEncoder(feature), norm_sizes=(96,), component_sizes=(96,), refine=False)
    (found,) = labeler([blob_image(0, 120, 80)])
    want = np.zeros((80, 120), bool)
    want[30:60, 40:80] = True
    assert len(found) == 1 and (found.masks[0] & want).sum() / (found.masks[0] | want).sum() > 0.85


def test_refusals_and_settings():
    with pytest.raises(ValueError, match="both empty"):
        ForegroundLabeler(tiny_encoder(), norm_sizes=(), component_sizes=())
    with pytest.raises(ValueError, match="`refine` needs `fine_stages`"):
        ForegroundLabeler(tiny_encoder(), fine_stages=())
    assert ForegroundLabeler(tiny_encoder()).settings["fine_stages"] == [-3, -2]
    assert ForegroundLabeler(tiny_encoder()).settings["dtype"] == "float32"
