"""Pooling, matching and injecting prompts, kernel supervision, assignments: against brute force."""

import itertools
import math

import numpy as np
import pytest
import torch

from uplvp_hf.models.losses import LayerOutput, kernel_supervision
from uplvp_hf.models.matching import hungarian, match_prompts
from uplvp_hf.models.prompts import PromptFusion, Prompts, box_weights, inject_prompts, kept_prompts, pool_prompts


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def brute_force_pooling(feature, mask, pooling):
    """Average over pixels of the cell that each lies in, one by one; or over cells from int(x1 / s) to int(x2 / s)."""
    ys, xs = np.nonzero(mask.numpy())
    if len(ys) == 0:
        return None
    cell_y, cell_x = mask.shape[0] // feature.shape[1], mask.shape[1] // feature.shape[2]
    if pooling == "box":
        y1, y2, x1, x2 = ys.min() // cell_y, (ys.max() + 1) // cell_y, xs.min() // cell_x, (xs.max() + 1) // cell_x
        y2, x2 = y2 + 2 * (y1 == y2), x2 + 2 * (x1 == x2)
        return feature[:, y1:y2, x1:x2].mean((1, 2))
    values = [feature[:, y // cell_y, x // cell_x] for y, x in zip(ys, xs, strict=True)]
    return torch.stack(values).mean(0)


def odd_masks(height=64, width=96):
    masks = torch.zeros(5, height, width, dtype=torch.bool)
    masks[0, 5:40, 10:70] = True
    masks[1, 33, 95] = True  # one pixel, far smaller than a cell
    masks[2, [0, 63], [0, 95]] = True  # two corners: mask and box differ most
    masks[4] = torch.rand(height, width) > 0.7
    return masks  # number 3 is empty


@pytest.mark.parametrize("pooling", ["mask", "box"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooling_equals_brute_force(pooling, dtype):
    features = torch.randn(3, 7, 2, 3).to(dtype)
    masks = [odd_masks(), torch.zeros(0, 64, 96, dtype=torch.bool), odd_masks()[[4, 1]]]
    prompts = pool_prompts(features, masks, pooling=pooling)
    assert prompts.vectors.shape == (3, 5, 7) and prompts.vectors.dtype == torch.float32
    assert prompts.valid.tolist() == [[True, True, True, False, True], [False] * 5, [True, True] + [False] * 3]
    assert prompts.source.tolist() == [[0, 1, 2, -1, 4], [-1] * 5, [0, 1, -1, -1, -1]]
    for i, image in enumerate(masks):
        for k, mask in enumerate(image):
            expected = brute_force_pooling(features[i].float(), mask, pooling)
            expected = torch.zeros(7) if expected is None else expected
            torch.testing.assert_close(prompts.vectors[i, k], expected, rtol=1e-5, atol=1e-5)
    assert (prompts.vectors[~prompts.valid] == 0).all()


def test_pooling_is_exact_under_autocast_and_detached():
    features, masks = torch.randn(1, 7, 2, 3, requires_grad=True), [odd_masks()]
    exact = pool_prompts(features, masks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pool_prompts(features, masks).vectors, exact.vectors)
    assert not exact.vectors.requires_grad


def test_the_best_prompts_by_score_are_kept_in_their_order():
    features, masks = torch.randn(2, 4, 2, 3), [odd_masks()[[0, 1, 2, 4]], odd_masks()[:1]]
    scores = [torch.tensor([0.1, 0.9, 0.3, 0.8]), torch.tensor([0.5])]
    every = pool_prompts(features, masks)
    best = pool_prompts(features, masks, scores, max_prompts=3)
    assert best.source.tolist() == [[1, 2, 3], [0, -1, -1]]
    torch.testing.assert_close(best.vectors[0], every.vectors[0, 1:])
    assert pool_prompts(features, masks, None, max_prompts=2).source.tolist() == [[0, 1], [0, -1]]


def test_cosine_matching_equals_brute_force():
    queries, vectors = torch.randn(3, 12, 6), torch.randn(3, 5, 6)
    valid = torch.tensor([[True] * 5, [False, True, False, True, True], [False] * 5])
    match = match_prompts(queries, vectors, valid)
    for i, n in itertools.product(range(3), range(12)):
        candidates = [j for j in range(5) if valid[i, j]]
        q = queries[i, n].tolist()

        def cosine(j, i=i, q=q):
            p = vectors[i, j].tolist()
            return sum(a * b for a, b in zip(q, p, strict=True)) / math.hypot(*q) / math.hypot(*p)

        assert match[i, n] == (max(candidates, key=cosine) if candidates else -1)


def test_cosine_matching_ignores_scale_and_follows_permutations():
    queries, vectors = torch.randn(2, 30, 6), torch.randn(2, 7, 6)
    valid = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    match = match_prompts(queries, vectors, valid)
    scaled = match_prompts(queries * torch.rand(2, 30, 1) * 100, vectors * (torch.rand(2, 7, 1) + 0.01), valid)
    assert torch.equal(scaled, match)
    order = torch.randperm(7)
    permuted = match_prompts(queries, vectors[:, order], valid[:, order])
    assert torch.equal(order[permuted], match)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(match_prompts(queries, vectors, valid), match)
    twins = match_prompts(queries, vectors[:, [2, 2, 2]], torch.ones(2, 3, dtype=torch.bool))
    assert (twins == 0).all()  # ties go to the lowest index


def test_sequential_matching_gives_equal_runs_for_every_size():
    for queries, prompts in itertools.product(range(1, 70), range(1, 25)):
        valid = torch.ones(1, prompts, dtype=torch.bool)
        match = match_prompts(torch.zeros(1, queries, 1), torch.zeros(1, prompts, 1), valid, "sequential")
        assert match[0].tolist() == [n * prompts // queries for n in range(queries)], (queries, prompts)
    valid = torch.tensor([[False, True, False, True], [False] * 4])
    match = match_prompts(torch.zeros(2, 4, 1), torch.zeros(2, 4, 1), valid, "sequential")
    assert match.tolist() == [[1, 1, 3, 3], [-1] * 4]


def test_random_matching_is_uniform_over_valid_prompts():
    valid = torch.tensor([[True, False, True, True], [False] * 4])
    match = match_prompts(torch.zeros(2, 6000, 1), torch.zeros(2, 4, 1), valid, "random")
    counts = torch.bincount(match[0], minlength=4)
    assert counts[1] == 0 and (counts[[0, 2, 3]] - 2000).abs().max() < 5 * math.sqrt(6000 * 2 / 9)
    assert (match[1] == -1).all()
    none = match_prompts(torch.zeros(2, 3, 1), torch.zeros(2, 4, 1), valid, "none")
    assert (none == -1).all()
    with pytest.raises(ValueError, match="nearest"):
        match_prompts(torch.zeros(2, 3, 1), torch.zeros(2, 4, 1), valid, "nearest")


def test_injection_adds_prompts_to_a_share_of_queries_without_rescaling():
    queries, vectors = torch.randn(2, 4000, 3), torch.randn(2, 5, 3)
    match = torch.randint(0, 5, (2, 4000))
    match[1, :7] = -1
    full = inject_prompts(queries, vectors, match, kept_prompts(match, 0.0))
    for n in range(20):
        expected = queries[1, n] + (vectors[1, match[1, n]] if n >= 7 else 0)
        torch.testing.assert_close(full[1, n], expected)
    dropped = inject_prompts(queries, vectors, match, kept_prompts(match, 0.3))
    changed = (dropped != queries).any(-1)
    assert torch.equal(dropped[changed], full[changed]) and torch.equal(dropped[~changed], queries[~changed])
    for share in changed.float().mean(1):  # each image draws its own
        assert share.item() == pytest.approx(0.7, abs=0.04)
    assert not torch.equal(changed[0, 7:], changed[1, 7:])
    assert torch.equal(inject_prompts(queries, vectors, match, kept_prompts(match, 1.0)), queries)
    drawn = torch.rand(match.shape)
    assert torch.equal(kept_prompts(match, 0.3, drawn), (drawn > 0.3) & (match >= 0))


def test_fusion_starts_as_the_sum_and_leaves_the_others_alone():
    fusion, queries, vectors = PromptFusion(4), torch.randn(2, 6, 4), torch.randn(2, 3, 4)
    fusion.init_weights()
    match, keep = torch.randint(0, 3, (2, 6)), torch.rand(2, 6) > 0.5
    fused = inject_prompts(queries, vectors, match, keep, fusion)
    torch.testing.assert_close(fused, inject_prompts(queries, vectors, match, keep))
    assert torch.equal(fused[~keep], queries[~keep])
    torch.nn.init.normal_(fusion.linear.weight)
    fused = inject_prompts(queries, vectors, match, keep, fusion)
    weight, bias = fusion.linear.weight, fusion.linear.bias
    n = keep[0].nonzero()[0].item()
    expected = weight[:, :4] @ queries[0, n] + weight[:, 4:] @ vectors[0, match[0, n]] + bias
    torch.testing.assert_close(fused[0, n], expected)
    nothing = inject_prompts(queries, vectors[:, :0], torch.full((2, 6), -1), torch.zeros(2, 6, dtype=bool), fusion)
    assert torch.equal(nothing, queries) and nothing.requires_grad


@pytest.mark.parametrize("count", [1, 3, 7, 12, 20, 25])
def test_slots_repeat_prompts_in_runs_and_then_the_first_once_more(count):
    """Written out as two loops, for one image with `count` prompts of which one slot in between is not valid."""
    valid = torch.ones(2, count + 1, dtype=torch.bool)
    valid[0, 1] = valid[1] = False
    source = torch.where(valid, torch.arange(count + 1), -1)
    vectors = torch.randn(2, count + 1, 4) * valid[..., None]
    slots = Prompts(vectors, valid, source).to_slots(20)
    places = [0, *range(2, count + 1)][:20]
    expected = [place for place in places for _ in range(20 // len(places))]
    expected += places[: 20 - len(expected)]
    assert slots.source[0].tolist() == expected and slots.valid[0].all() and not slots.valid[1].any()
    assert torch.equal(slots.vectors[0], vectors[0, expected])
    assert not Prompts(vectors[:, :0], valid[:, :0], source[:, :0]).to_slots(20).valid.any()


def test_box_cells_are_cut_to_whole_ones_and_widened_when_empty():
    boxes = torch.tensor([[0, 0, 64, 64], [40, 33, 60, 130], [150, 150, 160, 160], [31, 5, 33, 64]])
    weights = box_weights(boxes, (5, 5), (32.0, 32.0))
    cells = [[tuple(cell) for cell in weight.nonzero().tolist()] for weight in weights]
    assert cells[0] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert cells[1] == [(y, x) for y in (1, 2, 3) for x in (1, 2)]  # columns 1..1 are widened by two
    assert cells[2] == [(4, 4)]  # clipped at the border
    assert cells[3] == [(0, 0), (1, 0)]


def test_kernel_supervision_equals_a_loop():
    layers = [LayerOutput(torch.zeros(2, 9, 2), torch.zeros(2, 9, 1, 1), torch.randn(2, 9, 4)) for _ in range(3)]
    for layer in layers:
        layer.queries.requires_grad_()
    vectors = torch.randn(2, 3, 4, requires_grad=True)
    source = torch.tensor([[0, 2, 3], [1, -1, -1]])  # mask 1 of image 0 and mask 0 of image 1 have no prompt
    matches = [
        [(torch.tensor([1, 4, 6, 8]), torch.randperm(4)), (torch.tensor([0, 5]), torch.randperm(2))] for _ in layers
    ]
    prompts = Prompts(vectors, source >= 0, source).of_mask(4)
    assert prompts.tolist() == [[0, -1, 1, 2], [-1, 0, -1, -1]]
    loss = kernel_supervision(layers, matches, vectors, prompts)
    total, pairs = 0.0, 0
    for layer, match in zip(layers, matches, strict=True):
        for i, (query, target) in enumerate(match):
            for n, j in zip(query.tolist(), target.tolist(), strict=True):
                for p in range(3):
                    if source[i, p] == j:
                        total += 1 - torch.cosine_similarity(layer.queries[i, n], vectors[i, p], dim=0)
                        pairs += 1
    assert pairs == 3 * 4
    torch.testing.assert_close(loss, total / pairs)
    torch.testing.assert_close(kernel_supervision(layers, matches, vectors, prompts, num_pairs=5), total / 5)
    loss.backward()
    assert vectors.grad is None  # the target is not trained
    touched = [(layer.queries.grad.abs().sum(-1) > 0).sum().item() for layer in layers]
    assert touched == [4, 4, 4]


def test_kernel_supervision_without_pairs_touches_the_queries():
    layer = LayerOutput(torch.zeros(1, 4, 2), torch.zeros(1, 4, 1, 1), torch.randn(1, 4, 4, requires_grad=True))
    empty = (torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    for vectors, source in [
        (torch.zeros(1, 0, 4), torch.zeros(1, 0, dtype=torch.int64)),
        (torch.zeros(1, 2, 4), torch.tensor([[-1, -1]])),
        (torch.zeros(1, 2, 4), torch.zeros(1, 0, dtype=torch.int64)),
    ]:
        loss = kernel_supervision([layer], [[empty]], vectors, source)
        loss.backward()
        assert loss == 0 and layer.queries.grad is not None and (layer.queries.grad == 0).all()


def test_hungarian_is_optimal_and_survives_nan():
    costs = [torch.randn(2, 5, 3), torch.randn(2, 5, 0), torch.randn(2, 3, 4)]
    matches = hungarian(costs)
    assert [len(query) for query, _ in matches[0]] == [3, 0, 3]
    for layer in range(2):
        query, target = matches[layer][0]
        best = min(
            sum(costs[0][layer, n, j].item() for j, n in enumerate(rows))
            for rows in itertools.permutations(range(5), 3)
        )
        assert costs[0][layer, query, target].sum().item() == pytest.approx(best, abs=1e-5)
        query, target = matches[layer][2]  # more objects than queries
        assert query.tolist() == [0, 1, 2] and len(set(target.tolist())) == 3
    broken = costs[0].clone()
    broken[0, 2] = float("nan")
    broken[0, 0, 1] = float("inf")
    with pytest.warns(UserWarning, match="Non-finite"):
        matches = hungarian([broken])
    query, target = matches[0][0]
    assert 2 not in query.tolist() and (0, 1) not in zip(query.tolist(), target.tolist(), strict=True)
    with pytest.warns(UserWarning):
        assert len(hungarian([torch.full((1, 4, 2), float("nan"))])[0][0][0]) == 2
