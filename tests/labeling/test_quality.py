"""Proposal quality against sums over plain boolean arrays."""

import math

import numpy as np
import pytest

from uplvp_hf.data.dataset import InstanceDataset, empty_objects
from uplvp_hf.data.rle import encode_masks
from uplvp_hf.labeling.quality import proposal_quality


def dataset(pictures, names, key="image_id"):
    rows = []
    for number, (masks, labels, crowd) in enumerate(pictures):
        objects = empty_objects()
        objects["segmentation"] = encode_masks(np.array(masks)) if len(masks) else []
        objects["category_id"], objects["iscrowd"] = list(labels), list(crowd)
        rows.append({"image_id": number, "file_name": f"{number}.png", "width": 12, "height": 10, "objects": objects})
    return InstanceDataset(rows, [{"id": k, "name": name} for k, name in names.items()])


def test_against_brute_force():
    rng = np.random.default_rng(0)

    def picture(count, crowd=False):
        masks = rng.random((count, 10, 12)) > rng.uniform(0.2, 0.8)
        return masks, rng.integers(1, 3, count), [int(crowd and k == 0) for k in range(count)]

    true = [picture(3, crowd=True), picture(0), picture(2), picture(2)]
    predicted = [picture(4), picture(2), picture(0), picture(3)]
    got = proposal_quality(dataset(predicted, {1: "a", 2: "b"}), dataset(true, {1: "b", 2: "a"}), threshold=0.45)
    for suffix in ("", "_named"):
        best_true, best_proposal = [], []
        for (true_masks, true_labels, crowd), (masks, labels, _) in zip(true, predicted):
            pairs = np.zeros((len(masks), len(true_masks)))
            for i, a in enumerate(masks):
                for j, b in enumerate(true_masks):
                    counts = not suffix or labels[i] != true_labels[j]  # ids 1 and 2 carry swapped names
                    pairs[i, j] = counts * (a & b).sum() / (a | b).sum()
            pairs = pairs[:, np.array(crowd) == 0] if len(crowd) else pairs
            best_true += [max(column, default=0) for column in pairs.T]
            best_proposal += [max(row, default=0) for row in pairs]
        assert got["mean_best_iou" + suffix] == pytest.approx(np.mean(best_true))
        assert got["recall" + suffix] == pytest.approx(np.mean(np.array(best_true) >= 0.45))
        assert got["precision" + suffix] == pytest.approx(np.mean(np.array(best_proposal) >= 0.45))
    assert (got["pictures"], got["instances"], got["proposals"]) == (4, 6, 9)


def test_perfect_and_empty():
    masks = np.zeros((2, 10, 12), bool)
    masks[0, :3], masks[1, 5:] = True, True
    true = dataset([(masks, [1, 2], [0, 0])], {1: "a", 2: "b"})
    assert proposal_quality(true, true)["recall_named"] == 1
    nothing = proposal_quality(dataset([([], [], [])], {1: "a"}), true)
    assert nothing["recall"] == 0 and math.isnan(nothing["precision"])
    stranger = dataset([([], [], [])], {1: "a"})
    stranger.rows[0].update(image_id="x", file_name="x.png")
    with pytest.raises(ValueError, match="share neither"):
        proposal_quality(stranger, true)
