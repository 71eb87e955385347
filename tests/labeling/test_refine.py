"""Pixel-adaptive refinement against loops over pixels."""

import numpy as np
import pytest
import torch

from uplvp_hf.labeling.cutting.refine import pamr


def by_loops(image, maps, iterations, dilations):
    """image (3, H, W), maps (K, H, W) numpy: the method, one pixel at a time."""
    height, width = maps.shape[1:]
    steps = [(a * d, b * d) for d in dilations for a in (-1, 0, 1) for b in (-1, 0, 1) if a or b]
    weights, places = {}, {}
    for y in range(height):
        for x in range(width):
            near = [(min(max(y + a, 0), height - 1), min(max(x + b, 0), width - 1)) for a, b in steps]
            colors = np.stack([image[:, v, u] for v, u in near])  # (P, 3)
            spread = np.concatenate([colors, np.repeat(image[None, :, y, x], len(dilations), 0)]).std(axis=0, ddof=1)
            logits = -(np.abs(colors - image[:, y, x]) / (0.1 * spread + 1e-8)).mean(axis=1)
            share = np.exp(logits - logits.max())
            weights[y, x], places[y, x] = share / share.sum(), near
    for _ in range(iterations):
        mixed = np.zeros_like(maps)
        for (y, x), near in places.items():
            mixed[:, y, x] = sum(w * maps[:, v, u] for w, (v, u) in zip(weights[y, x], near))
        maps = mixed
    return maps


def test_equals_the_loops():
    rng = np.random.default_rng(0)
    images, maps = rng.random((2, 3, 7, 9)), rng.random((2, 2, 7, 9))
    got = pamr(torch.tensor(images), torch.tensor(maps), iterations=3, dilations=(1, 3))
    for k in range(2):
        np.testing.assert_allclose(got[k].numpy(), by_loops(images[k], maps[k], 3, (1, 3)), atol=2e-5)


def test_a_wrong_outline_moves_to_the_edge_of_the_image():
    image = torch.zeros(1, 3, 32, 64)
    image[..., 30:] = 0.8
    image += 0.02 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    soft = torch.zeros(1, 2, 32, 64)
    soft[:, 0, :, 36:] = 1
    soft[:, 1] = 1 - soft[:, 0]
    refined = pamr(image, soft)
    assert torch.equal(refined[0, 0] > 0.5, (torch.arange(64) >= 30).expand(32, 64))
    torch.testing.assert_close(refined.sum(dim=1), torch.ones(1, 32, 64))


def test_flat_images_sizes_and_refusals():
    maps = torch.rand(1, 1, 6, 8)
    assert torch.isfinite(pamr(torch.full((1, 3, 6, 8), 0.5), maps)).all()
    assert pamr(torch.rand(1, 3, 60, 80), maps).shape == maps.shape
    with pytest.raises(ValueError, match="2 images but maps of 1"):
        pamr(torch.rand(2, 3, 6, 8), maps)
    with pytest.raises(ValueError, match="at least 1 pixel"):
        pamr(torch.rand(1, 3, 6, 8), maps, dilations=(0,))
