"""Proposal quality against sums over plain boolean arrays."""

import copy
import math

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from uplvp_hf.data.dataset import InstanceDataset, empty_objects
from uplvp_hf.labeling.quality import precision_by_score, proposal_quality
from uplvp_hf.models.masks import encode_masks


def dataset(images, names, key="image_id"):
    rows = []
    for number, (masks, labels, crowd) in enumerate(images):
        objects = empty_objects()
        objects["segmentation"] = encode_masks(np.array(masks)) if len(masks) else []
        objects["category_id"], objects["iscrowd"] = list(labels), list(crowd)
        rows.append({"image_id": number, "file_name": f"{number}.png", "width": 12, "height": 10, "objects": objects})
    return InstanceDataset(rows, [{"id": k, "name": name} for k, name in names.items()])


def test_against_brute_force():
    rng = np.random.default_rng(0)

    def image(count, crowd=False):
        masks = rng.random((count, 10, 12)) > rng.uniform(0.2, 0.8)
        return masks, rng.integers(1, 3, count), [int(crowd and k == 0) for k in range(count)]

    true = [image(3, crowd=True), image(0), image(2), image(2)]
    predicted = [image(4), image(2), image(0), image(3)]
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
    assert (got["images"], got["instances"], got["proposals"]) == (4, 6, 9)


def thirds():
    """Three disjoint thirds of an image."""
    masks = np.zeros((3, 10, 12), bool)
    for k in range(3):
        masks[k, :, 4 * k : 4 * k + 4] = True
    return masks


def test_class_accuracy_of_covering_proposals():
    masks = thirds()
    off = np.zeros((10, 12), bool)
    off[0, 0] = True  # covers nothing: its name does not count
    true = dataset([(masks, [1, 1, 2], [0, 0, 0])], {1: "a", 2: "b"})
    predicted = dataset([([masks[0], masks[1], masks[1], off], [1, 1, 2, 2], [0] * 4)], {1: "a", 2: "b"})
    assert proposal_quality(predicted, true)["class_accuracy"] == pytest.approx(2 / 3)
    assert math.isnan(proposal_quality(dataset([([off], [1], [0])], {1: "a"}), true)["class_accuracy"])


def test_average_precision_is_pycocotools():
    rng = np.random.default_rng(3)
    base = thirds()
    true = dataset([(base, [1, 1, 2], [0, 0, 0]), (base[:2], [2, 2], [0, 1])], {1: "b", 2: "a"})
    entries, scores = [], []
    for _ in range(2):
        masks = np.concatenate([base, base]) ^ (rng.random((6, 10, 12)) < 0.15)
        entries.append((masks, rng.integers(1, 3, 6), [0] * 6))
        scores.append(rng.random(6).round(3).tolist())
    predicted = dataset(entries, {1: "a", 2: "b"})  # the ids carry swapped names
    for row, values in zip(predicted.rows, scores):
        row["objects"]["score"] = values
    got = proposal_quality(predicted, true, average_precision=True)

    annotations, results = [], []
    for row in true.rows:
        o = row["objects"]
        for rle, label, crowd in zip(o["segmentation"], o["category_id"], o["iscrowd"]):
            box = coco_mask.toBbox(rle).tolist()
            entry = {"id": len(annotations) + 1, "image_id": row["image_id"], "category_id": label, "bbox": box}
            annotations.append(entry | {"segmentation": rle, "iscrowd": crowd, "area": float(coco_mask.area(rle))})
    for row in predicted.rows:
        o = row["objects"]
        for rle, label, score in zip(o["segmentation"], o["category_id"], o["score"]):
            results.append(
                {"image_id": row["image_id"], "category_id": 3 - int(label), "segmentation": rle, "score": score}
            )
    truth = COCO()
    images = [{"id": row["image_id"], "width": 12, "height": 10} for row in true.rows]
    truth.dataset = {"images": images, "annotations": annotations, "categories": [{"id": 1}, {"id": 2}]}
    truth.createIndex()
    for suffix, use_classes in (("", 0), ("_named", 1)):
        evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), "segm")
        evaluation.params.useCats = use_classes
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert got["ap" + suffix] == pytest.approx(evaluation.stats[0])
        assert got["ap50" + suffix] == pytest.approx(evaluation.stats[1])
    assert 0 < got["ap_named"] < got["ap50"] < 1


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


def test_precision_by_score():
    """Two groups of three masks, by hand: of the low scores one covers its object, of the high ones all do, one of them
    with the wrong name."""
    masks = thirds()
    truth = dataset([(masks, [1, 1, 2], [0, 0, 0]), (masks[:1], [1], [0])], {1: "a", 2: "b"})
    none = np.zeros((10, 12), bool)
    none[0, 0] = True
    ours = dataset([([masks[0], none, masks[2], masks[1]], [1, 1, 1, 1], [0] * 4), ([none, masks[0]], [1, 1], [0] * 2)],
                   {1: "a", 2: "b"})  # fmt: skip
    for row, scores in zip(ours.rows, ([0.9, 0.1, 0.8, 0.3], [0.2, 0.7]), strict=True):
        row["objects"]["score"] = scores
    low, high = precision_by_score(ours, truth, groups=2)
    assert low == {"least": 0.1, "most": 0.3, "proposals": 3, "precision": 1 / 3, "precision_named": 1 / 3}
    assert high == {"least": 0.7, "most": 0.9, "proposals": 3, "precision": 1.0, "precision_named": 2 / 3}
    for row in ours.rows:
        row["objects"]["score"] = [0.5] * len(row["objects"]["segmentation"])
    assert precision_by_score(ours, truth) == []  # scores that are all alike tell nothing apart
