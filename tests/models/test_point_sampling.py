"""Losses at sampled points and gradients by rows, against the same written with autograd."""

import pytest
import torch
from torch.nn import functional as F

from uplvp_hf.models.point_sampling import (
    BinaryMasks,
    PointSampler,
    mask_products,
    point_terms,
    sample_points,
    takes_rows,
)


def test_sampling_bool_masks_equals_sampling_dense_maps():
    masks = torch.rand(4, 37, 21) > 0.5
    ids, points = torch.tensor([3, 0, 0, 2, 1]), torch.rand(5, 400, 2)
    points[:, :4] = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.5, 0.999]])
    dense = sample_points(masks[ids].float()[:, None], points)[:, 0]
    torch.testing.assert_close(BinaryMasks(masks).sample(ids, points), dense, rtol=0, atol=2e-5)


@pytest.fixture
def scene():
    """Logits of 2 images x 12 queries, 19 matched pairs (more than two chunks), 15 masks."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 12, 20, 24, generator=generator).requires_grad_()
    pairs = torch.randperm(24, generator=generator)[:19].sort().values
    masks = torch.rand(15, 80, 96, generator=generator) > 0.6
    return logits, pairs // 12, pairs % 12, masks, torch.randint(0, 15, (19,), generator=generator)


def sampler(points=50, **options):
    return PointSampler(points, 3.0, 0.75, **options)


def written_out(logits, image, query, masks, ids, drawn, points=50):
    """The two sums, with dense targets and autograd: PointRend's sampling, mask by mask."""
    entropy, dice = 0.0, 0.0
    for m in range(len(ids)):
        map_, target = logits[image[m], query[m]][None, None], masks[ids[m]][None, None].float()
        with torch.no_grad():
            value = sample_points(map_, drawn["oversample"][m][None])[0, 0]
            chosen = drawn["oversample"][m][value.abs().argsort()[: int(0.75 * points)]]
        place = torch.cat([chosen, drawn["uniform"][m]])[None]
        value, wanted = sample_points(map_, place)[0, 0], sample_points(target, place)[0, 0]
        entropy = entropy + F.binary_cross_entropy_with_logits(value, wanted)
        probability = value.sigmoid()
        dice = dice + 1 - (2 * (probability * wanted).sum() + 1) / (probability.sum() + wanted.sum() + 1)
    return entropy, dice


def drawing(extent=None):
    generator = torch.Generator().manual_seed(1)
    numbers = {}

    def draw(layer, kind, image, shape):
        assert (layer, image) == (7, -1)
        numbers[kind] = torch.rand(shape, generator=generator)
        return numbers[kind]

    return draw, numbers


@pytest.mark.parametrize("weights", [(1.0, 1.0), (5.0, 0.0), (-0.3, 2.0)])
def test_terms_and_gradients_equal_those_written_out(scene, weights):
    logits, image, query, masks, ids = scene
    draw, drawn = drawing()
    ours = point_terms(logits, image, query, BinaryMasks(masks), ids, sampler(layer=7, draw=draw))
    theirs = written_out(logits, image, query, masks, ids, drawn)
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=1e-5, atol=1e-5)
    gradients = [
        torch.autograd.grad(sum(w * term for w, term in zip(weights, terms, strict=True)), logits)[0]
        for terms in (ours, theirs)
    ]
    assert gradients[1].abs().max() > 1e-3
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_points_stay_on_the_image(scene):
    logits, image, query, *_ = scene
    extent = torch.rand(19, 2) * 0.8 + 0.1
    for chosen, place, value in sampler(extent=extent).chunks(logits[image, query].detach()):
        assert (place <= extent[chosen, None]).all() and (place >= 0).all()
        assert (place.amax(1) > 0.8 * extent[chosen]).all()
        again = sample_points(logits[image, query][chosen, None], place)[:, 0]
        torch.testing.assert_close(value, again)


def test_uncertain_points_are_the_least_certain_and_the_rest_uniform(scene):
    logits, image, query, *_ = scene
    maps = logits[image, query].detach()
    draw, drawn = drawing()
    points = torch.cat([place for _, place, _ in sampler(points=400, layer=7, draw=draw).chunks(maps)])
    distance = sample_points(maps[:, None], drawn["oversample"])[:, 0].abs()
    limit = distance.sort(1).values[:, 299]
    chosen = sample_points(maps[:, None], points[:, :300])[:, 0].abs()
    assert (chosen.amax(1) <= limit + 1e-6).all()
    assert all(len(set(map(tuple, row.tolist()))) == 300 for row in points[:, :300])
    assert torch.equal(points[:, 300:], drawn["uniform"])


def test_hard_points_are_the_wrong_ones_first():
    """Of a map that is sure of a neighbor too, hard points lie on the neighbor; uncertain ones hardly do."""
    truth = torch.zeros(1, 32, 32, dtype=torch.bool)
    truth[:, 4:28, 2:12] = True
    maps = torch.full((1, 32, 32), -9.0)
    maps[:, 4:28, 2:12] = maps[:, 4:28, 16:26] = 9.0  # the right object, and its neighbor
    on_neighbor = {}
    for hard in (False, True):
        torch.manual_seed(0)
        made = sampler(points=400)
        made.hard = hard
        ((_, place, value),) = made.chunks(maps, BinaryMasks(truth), torch.zeros(1, dtype=torch.int64))
        torch.testing.assert_close(value, sample_points(maps[:, None], place)[:, 0])
        on_neighbor[hard] = float(((place[..., 0] > 0.5) & (value > 8)).float().mean())
    area = 24 * 10 / 32**2
    assert on_neighbor[False] < area and on_neighbor[True] > 2 * area


@pytest.mark.parametrize("value", [0.0, 3.0, float("nan")])
def test_equal_or_lost_logits_still_give_every_mask_its_points(value):
    maps = torch.full((3, 8, 8), value)
    maps[2] = torch.randn(8, 8)
    for _, place, logits in sampler().chunks(maps):
        assert place.shape == (3, 50, 2) and logits.shape == (3, 50)


@pytest.fixture
def product():
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(2, 6, 5, 7, generator=generator).requires_grad_()
    embeddings = [torch.randn(2, 4, 6, generator=generator).requires_grad_() for _ in range(3)]
    plain = [torch.einsum("bqc,bchw->bqhw", embedding, features) for embedding in embeddings]
    return features, embeddings, plain


def both_gradients(product, losses):
    """Gradients of a loss over all layers' mask logits, through `mask_products` and through plain products."""
    features, embeddings, plain = product
    ours = mask_products(features, embeddings, [masks.detach() for masks in plain])
    assert all(torch.equal(*pair) for pair in zip(ours, plain, strict=True)) and all(map(takes_rows, ours))
    return [
        torch.autograd.grad(losses(masks), [features, *embeddings], allow_unused=True, retain_graph=True)
        for masks in (ours, plain)
    ]


def matched(masks):
    """A loss of a few rows of each layer, whose gradient comes by rows where that is possible."""
    total = 0.0
    for layer, logits in enumerate(masks):
        generator = torch.Generator().manual_seed(layer)
        draw = lambda _, kind, image, shape, generator=generator: torch.rand(shape, generator=generator)  # noqa: E731
        image, query = torch.tensor([0, 1, 1]), torch.tensor([layer, 3, 0])
        targets = BinaryMasks(torch.ones(1, 20, 28))
        terms = point_terms(logits, image, query, targets, torch.zeros(3).long(), sampler(draw=draw))
        total = total + terms[0] + 2 * terms[1]
    return total


@pytest.mark.parametrize(
    "losses",
    [
        matched,
        lambda masks: sum(layer.square().sum() for layer in masks),
        lambda masks: matched(masks) + masks[1].sin().sum(),
        lambda masks: masks[2][0, 1].sum(),
    ],
    ids=["rows", "dense", "rows and dense", "one layer"],
)
def test_gradients_of_mask_products(product, losses):
    ours, theirs = both_gradients(product, losses)
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert not one.is_sparse
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
