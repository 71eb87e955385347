"""K-Net's targets, costs and terms against brute force."""

import pytest
import torch
from torch.nn import functional as F

from uplvp_hf.models import losses_knet
from uplvp_hf.models.losses_knet import KNetLoss, KNetStageOutput, count_cells, semantic_targets, soft_targets

B, N, K, SIZE = 2, 6, 3, (8, 12)


def blobs(count, seed, height=32, width=48):
    """Overlapping bool masks (count, height, width) whose borders lie anywhere."""
    noise = torch.randn(count, 1, 5, 5, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, (height, width), mode="bilinear")[:, 0] > 0.4


@pytest.fixture
def case():
    """Stage outputs, initial masks, class maps and labels of two images."""
    generator = torch.Generator().manual_seed(0)
    masks = [2 * torch.randn(B, N, *SIZE, generator=generator) for _ in range(3)]
    layers = [
        KNetStageOutput(torch.randn(B, N, K, generator=generator), mask, torch.zeros(B, N, 4)) for mask in masks[1:]
    ]
    class_maps = torch.randn(B, K, *SIZE, generator=generator)
    labels = [torch.tensor([2, 0, 1]), torch.tensor([1, 1])]
    return masks[0], class_maps, layers, [blobs(3, 1), blobs(2, 2)], labels


@pytest.mark.parametrize("size", [(8, 12), (7, 11), (16, 24)])
def test_soft_targets_are_bilinear_interpolation(size):
    masks = blobs(40, 0)
    expected = F.interpolate(masks[None].float(), size=size, mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(soft_targets(masks, size), expected, rtol=0, atol=1e-6)
    assert soft_targets(masks[:0], size).shape == (0, *size)


@pytest.mark.parametrize("rule", ["majority", "touched"])
def test_class_map_targets_cell_by_cell(rule):
    masks, labels = soft_targets(blobs(4, 3), SIZE), torch.tensor([1, 0, 2, 1])
    assert ((masks > 0) & (masks < 0.5)).any() and (masks > 0).sum(0).max() > 1  # part cells, overlaps
    expected = torch.zeros(K, *SIZE)
    for row in range(SIZE[0]):
        for column in range(SIZE[1]):
            for mask, label in zip(masks, labels.tolist(), strict=True):
                if rule == "majority" and mask[row, column] >= 0.5:
                    expected[label, row, column] = 1
                if rule == "touched" and mask[row, column] > 0:
                    expected[:, row, column] = 0
                    expected[label, row, column] = 1
    found = semantic_targets(masks, labels, K, rule)
    assert torch.equal(found, expected)
    assert count_cells(blobs(4, 3), rule) == int(expected.amax(0).sum())
    assert semantic_targets(masks[:0], labels[:0], K, rule).sum() == 0


def brute_cost(probability, target, class_logits=None, label=None, cells=slice(None)):
    """Weighted cost of one kernel and one object."""
    p, t = probability.flatten()[cells].double(), target.flatten()[cells].double()
    agreement = (p * t + (1 - p) * (1 - t)).mean()
    dice = 2 * (p * t).sum() / (p.square().sum() + t.square().sum() + 2e-3)
    cost = -agreement - 4 * dice
    if class_logits is not None:
        q = class_logits[label].double().sigmoid()
        cost = cost + 2 * (-0.25 * (1 - q) ** 2 * q.log() + 0.75 * q**2 * (1 - q).log())
    return cost.item()


@pytest.mark.parametrize("padding", [False, True])
def test_costs_pair_by_pair(case, padding):
    initial, _, layers, mask_labels, labels = case
    targets = [soft_targets(masks, SIZE) for masks in mask_labels]
    valid = torch.ones(B, *SIZE, dtype=torch.bool)
    if padding:
        valid[0, :, 7:], valid[1, 5:] = False, False
        targets = [target * real for target, real in zip(targets, valid, strict=True)]
    texts = [torch.randn(B, N, K) for _ in layers]
    masks = [initial, *(layer.mask_logits for layer in layers)]
    for text in (None, texts):
        costs = KNetLoss().costs(masks, layers, targets, labels, valid if padding else None, text)
        for i in range(B):
            cells = valid[i].flatten()
            assert costs[i].shape == (2, N, len(labels[i]))
            for query in range(N):
                for target, label in enumerate(labels[i].tolist()):
                    first = brute_cost(initial[i, query].sigmoid(), targets[i][target], cells=cells)
                    assert costs[i][0, query, target].item() == pytest.approx(first, abs=1e-5)
                    logits = layers[0].class_logits[i, query]
                    probability = layers[0].mask_logits[i, query].sigmoid()
                    second = brute_cost(probability, targets[i][target], logits, label, cells)
                    if text is not None:
                        both = brute_cost(probability, targets[i][target], text[0][i, query], label, cells)
                        second += both - brute_cost(probability, targets[i][target], cells=cells)
                    assert costs[i][1, query, target].item() == pytest.approx(second, abs=1e-5)


def test_terms_follow_the_assignment_of_the_stage_before(case):
    initial, class_maps, layers, mask_labels, labels = case
    losses, matches = KNetLoss()(initial, class_maps, layers, mask_labels, labels)
    targets = [soft_targets(masks, SIZE) for masks in mask_labels]
    masks = [initial, *(layer.mask_logits for layer in layers)]
    costs = KNetLoss().costs(masks, layers, targets, labels)
    names = [("initial_mask", "initial_dice"), ("mask_0", "dice_0"), ("mask_1", "dice_1")]
    # The first stage takes the initial masks' pairs, the second those of the first stage's predictions.
    for (mask_name, dice_name), mask, match in zip(names, masks, [matches[0], *matches], strict=True):
        entropy, dice = [], []
        for i, (queries, ids) in enumerate(match):
            for query, target in zip(queries.tolist(), ids.tolist(), strict=True):
                logits, wanted = mask[i, query].flatten(), targets[i][target].flatten()
                p = logits.sigmoid()
                entropy.append(-(wanted * p.log() + (1 - wanted) * (1 - p).log()).mean())
                dice.append(1 - 2 * (p * wanted).sum() / (p.square().sum() + wanted.square().sum() + 2e-3))
        assert len(entropy) == 5
        torch.testing.assert_close(losses[mask_name], sum(entropy) / 5)
        torch.testing.assert_close(losses[dice_name], 4 * sum(dice) / 5)
    for stage, match in enumerate(matches):
        total = 0.0
        for i, (queries, ids) in enumerate(match):
            assert costs[i][stage][queries, ids].sum() <= costs[i][stage][: len(ids)].diagonal().sum()
            wanted = torch.zeros(N, K)
            wanted[queries, labels[i][ids]] = 1
            p = layers[stage].class_logits[i].sigmoid()
            total -= (0.25 * wanted * (1 - p) ** 2 * p.log() + 0.75 * (1 - wanted) * p**2 * (1 - p).log()).sum()
        torch.testing.assert_close(losses[f"class_{stage}"], 2 * total / 5)


def test_text_head_and_guide(case):
    initial, class_maps, layers, mask_labels, labels = case
    texts = [layer.class_logits.clone().requires_grad_() for layer in layers]
    losses, _ = KNetLoss(text_class_weight=3.0)(initial, class_maps, layers, mask_labels, labels, text_logits=texts)
    plain, _ = KNetLoss()(initial, class_maps, layers, mask_labels, labels)
    assert set(losses) - set(plain) == {"text_class_0", "text_class_1"}
    torch.testing.assert_close(losses["text_class_0"] / 3, losses["class_0"] / 2)  # the same logits
    losses["text_class_1"].backward()
    assert not texts[0].grad.any() and texts[1].grad.abs().sum() > 0

    def guide(cost, image):  # object g of every image to kernel 5 - g
        assert cost.shape == (2, N, len(labels[image])) and not cost.requires_grad
        wanted = torch.ones_like(cost)
        for target in range(cost.shape[2]):
            wanted[:, 5 - target, target] = 0
        return wanted

    guided, matches = KNetLoss()(initial, class_maps, layers, mask_labels, labels, label_guide=guide)
    for match in matches:
        for queries, ids in match:
            assert (queries + ids == 5).all()
    assert guided["initial_mask"] == plain["initial_mask"]  # the kernel head keeps its own assignment
    assert guided["mask_0"] != plain["mask_0"]


def test_one_transfer_for_matching(case, monkeypatch):
    calls = []
    solve = losses_knet.hungarian
    monkeypatch.setattr(losses_knet, "hungarian", lambda costs: calls.append(len(costs)) or solve(costs))
    KNetLoss()(*case)
    assert calls == [B]


def test_padding_takes_no_part(case):
    """Whatever the logits are beyond the image, and however much there is of it."""
    initial, class_maps, layers, mask_labels, labels = case
    plain, matches = KNetLoss()(initial, class_maps, layers, mask_labels, labels)

    def enlarge(maps):
        return F.pad(maps, (0, 4, 0, 8), value=3.0)

    larger = [KNetStageOutput(layer.class_logits, enlarge(layer.mask_logits), layer.queries) for layer in layers]
    pixel_mask = F.pad(torch.ones(B, 32, 48), (0, 16, 0, 32))
    padded, again = KNetLoss()(
        enlarge(initial),
        enlarge(class_maps),
        larger,
        [F.pad(m, (0, 16, 0, 32)) for m in mask_labels],
        labels,
        pixel_mask,
    )
    torch.testing.assert_close(padded, plain)
    for one, other in zip(matches, again, strict=True):
        assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(one, other, strict=True))
