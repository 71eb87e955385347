"""Normalized cuts against scipy's generalized eigenproblem and against every possible cut."""

import itertools

import numpy as np
import pytest
import scipy.linalg
import torch
from labeling_helpers import FixedEncoder, blob_image, tiny_encoder
from PIL import Image

from uplvp_hf.labeling.cutting import normalized_cut as cuts
from uplvp_hf.labeling.labelers import maskcut
from uplvp_hf.labeling.labelers.maskcut import NcutLabeler


def cut_cost(weights, side):
    side = np.asarray(side, bool)
    cut = weights[side][:, ~side].sum()
    return cut / weights[side].sum() + cut / weights[~side].sum()


def three_regions(noise=0.3):
    """Features of orthogonal directions in three regions of a 12 x 20 grid, and the regions."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(16, 3, generator=generator))[0].T * 4
    region = torch.zeros(12, 20, dtype=torch.int64)
    region[:, 7:], region[5:, 13:] = 1, 2
    features = directions[region] + noise * torch.randn(12, 20, 16, generator=generator)
    return features.permute(2, 0, 1), region


def test_eigenvector_is_scipys():
    generator = torch.Generator().manual_seed(0)
    weights = cuts.affinity(torch.randn(3, 14, 4, generator=generator), tau=0.2, eps=0.05)
    got = cuts.second_eigenvector(weights).double().numpy()
    for w, vector in zip(weights.double().numpy(), got):
        degree = np.diag(w.sum(axis=1))
        want = scipy.linalg.eigh(degree - w, degree)[1][:, 1]
        assert np.abs(np.abs(vector @ degree @ want) - 1) < 1e-4  # parallel, both of length 1 under D


def test_best_cut_is_the_best_of_all_thresholds():
    generator = torch.Generator().manual_seed(1)
    for size in (9, 7):
        weights = torch.rand(size, size, generator=generator)
        weights = weights + weights.T
        order = torch.randn(size, generator=generator)
        threshold, cost = cuts.best_cut(weights, order, min_cells=2)
        w, o = weights.numpy(), order.numpy()
        sides = [o > t for t in o if 2 <= (o > t).sum() <= len(o) - 2]
        assert cost == pytest.approx(min(cut_cost(w, side) for side in sides), rel=1e-4)
        assert cut_cost(w, o > threshold) == pytest.approx(cost, rel=1e-4)


def test_two_groups_are_cut_where_no_other_cut_is_cheaper():
    features = torch.tensor([[1.0, 0], [1, 0.1], [1, -0.1], [0, 1], [0.1, 1], [0.05, 1], [-0.1, 1]])
    (parts,) = cuts.split_by_ncut(features.T[:, None], torch.ones(1, 1, 7, dtype=torch.bool), max_parts=2)
    weights = cuts.affinity(features, 0.2).numpy()
    every = [s for s in itertools.product([0, 1], repeat=7) if 0 < sum(s) < 7]
    best = min(cut_cost(weights, side) for side in every)
    assert cut_cost(weights, parts[0].flatten().numpy()) == pytest.approx(best, rel=1e-4)
    assert [part.flatten().tolist() for part in parts] == [[False] * 3 + [True] * 4, [True] * 3 + [False] * 4]


@pytest.mark.parametrize("max_cells", [512, 60])
def test_regions_are_recovered(max_cells):
    features, region = three_regions(0.1)
    masks = torch.stack([torch.ones_like(region, dtype=torch.bool), region != 2, region == 1, region > 9])
    parts = cuts.split_by_ncut(features, masks, max_cells=max_cells)
    assert [len(p) for p in parts] == [3, 2, 1, 1]
    for mask, own in zip(masks, parts):
        assert torch.equal(torch.stack(own).sum(dim=0), mask.long())  # a partition
    wanted = sorted([(region == k) for k in range(3)], key=lambda mask: -int(mask.sum()))
    assert all(torch.equal(a, b) for a, b in zip(parts[0], wanted))


def test_limits_of_splitting():
    features, region = three_regions()
    whole = torch.ones(1, 12, 20, dtype=torch.bool)
    assert len(cuts.split_by_ncut(features, whole, max_parts=1)[0]) == 1
    assert len(cuts.split_by_ncut(features, whole, max_parts=2)[0]) == 2
    smallest = int((region == 2).sum())
    assert min(p.sum() for p in cuts.split_by_ncut(features, whole, min_cells=smallest + 5)[0]) >= smallest + 5
    one_way = features + 40  # all cosines near 1
    assert len(cuts.split_by_ncut(one_way, whole)[0]) == 1
    assert len(cuts.split_by_ncut(one_way, whole, center=True)[0]) == 3
    with pytest.raises(ValueError, match="do not lie on features"):
        cuts.split_by_ncut(features, whole[:, 1:])


def test_cost_of_given_sides():
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(2, 8, 8, generator=generator)
    weights = weights + weights.transpose(1, 2)
    sides = torch.rand(2, 8, generator=generator) > 0.5
    for w, side, got in zip(weights.numpy(), sides.numpy(), maskcut.cut_cost(weights, sides)):
        assert got == pytest.approx(cut_cost(w, side), rel=1e-4)


def two_objects():
    """(1, 12, 16, 20) features: a background and two objects, (3:9, 2:7) and (8:14, 11:18), of other directions."""
    generator = torch.Generator().manual_seed(2)
    directions = torch.linalg.qr(torch.randn(12, 3, generator=generator))[0].T
    region = torch.zeros(16, 20, dtype=torch.int64)
    region[3:9, 2:7], region[8:14, 11:18] = 1, 2
    features = directions[region] + 0.02 * torch.randn(16, 20, 12, generator=generator)
    return features.permute(2, 0, 1)[None], region


def test_objects_are_cut_out_one_after_another():
    features, region = two_objects()
    found, soft, scores = maskcut.cut_out(features.expand(2, -1, -1, -1), masks=4)
    for masks, values in zip(found, scores):
        assert sorted(int(mask.sum()) for mask in masks) == [0, 0, 30, 42]
        assert {tuple(region[mask].unique().tolist()) for mask in masks if mask.any()} == {(1,), (2,)}
        assert (values[:2] > 0.9).all() and (values[2:] == -1).all()
    assert torch.equal((soft > 0) & (scores >= 0)[..., None, None], found)


def test_foreground_avoids_the_corners():
    """Where the object is the larger part, the corners tell which side is background."""
    features, _ = two_objects()
    inside = torch.zeros(16, 20, dtype=torch.bool)
    inside[2:14, 2:18] = True
    large = torch.where(inside, features[0, :, :1, :1], features[0, :, 8:9, 12:13])[None]
    found, _, _ = maskcut.cut_out(large, masks=1)
    assert torch.equal(found[0, 0], inside)


def test_small_masks_are_rejected():
    features, _ = two_objects()
    found, _, scores = maskcut.cut_out(features, min_area=35 / 320)
    assert found[0].flatten(1).sum(dim=1).max() in (0, 42) and (scores[0] >= 0).sum() <= 1
    flat, _, none = maskcut.cut_out(torch.ones(1, 4, 6, 6))
    assert ((none == -1) | flat.any(dim=3).any(dim=2)).all()


@pytest.mark.parametrize("refine", [None, "pamr"])
def test_labeler_enlarges_its_masks(refine):
    features, _ = two_objects()
    labeler = NcutLabeler(FixedEncoder(features[0]), image_size=320, refine=refine)
    image = np.full((160, 200, 3), 30, np.uint8)
    image[30:90, 20:70], image[80:140, 110:180] = (200, 40, 40), (40, 200, 40)
    (found,) = labeler([Image.fromarray(image)])
    assert found.masks.shape == (2, 160, 200) and (found.scores > 0.9).all()
    for area in (np.s_[30:90, 20:70], np.s_[80:140, 110:180]):
        want = np.zeros((160, 200), bool)
        want[area] = True
        best = max((mask & want).sum() / (mask | want).sum() for mask in found.masks)
        assert best > (0.85 if refine is None else 0.95)


def test_labeler_keeps_images_in_their_place():
    images = [blob_image(0), blob_image(1, 64, 80), blob_image(2)]
    labeler = NcutLabeler(tiny_encoder(), image_size=160, center=True, tau=0.0)
    together = labeler(images)
    assert sum(len(p) for p in together) > 0
    for image, found in zip(images, together):
        (alone,) = labeler([image])
        assert found.masks.shape == alone.masks.shape and (found.masks != alone.masks).mean() < 0.01
    assert labeler.settings["dtype"] == "float32"
    assert labeler.settings["tau"] == 0.0 and labeler.settings["masks"] == 3
    with pytest.raises(ValueError, match="`refine` must be one of pamr, got `crf`"):
        NcutLabeler(tiny_encoder(), refine="crf")
