"""Hits, repeats, merges and splits at every score threshold, against a version that counts pixels of dense masks."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from uplvp_hf.evaluation.coco_map import compare
from uplvp_hf.evaluation.findings import GRID, Findings, storable_threshold

SIDE = 24


def rectangle(generator):
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    (top, left), (height, width) = generator.integers(0, SIDE - 6, 2), generator.integers(3, 14, 2)
    mask[top : top + height, left : left + width] = True
    return mask


def pair(found, truth, image_id=0):
    """found: (mask, class, score); truth: (mask, class, crowd)."""

    def encoded(mask):
        return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))

    prediction = {"image_id": image_id, "rle": [encoded(m) for m, _, _ in found], "labels": [c for _, c, _ in found]}
    prediction["scores"] = [score for _, _, score in found]
    reference = {
        "image_id": image_id,
        "segmentation": [encoded(m) for m, _, _ in truth],
        "category_id": [c for _, c, _ in truth],
        "iscrowd": [crowd for _, _, crowd in truth],
    }
    return prediction, reference


def computed(images, threshold=0.5, **options):
    findings = Findings(**options)
    for number, (found, truth) in enumerate(images):
        prediction, reference = pair(found, truth, number)
        findings.add(compare(prediction, reference), prediction, reference)
    return findings.compute(threshold)


def overlap(one, other):
    return (one & other).sum() / (one | other).sum()


def counted(found, truth, threshold):
    """The same by looking at the masks, at one threshold: (hits, detections that count, merges, repeats, objects), the
    latter a list of (found, merged, split)."""
    kept = sorted((one for one in found if one[2] >= threshold), key=lambda one: -one[2])
    objects = [one for one in truth if not one[2]]
    taken, hits, counting, merges, repeats = {}, 0, 0, 0, 0
    for number, (mask, label, _) in enumerate(kept):
        own = [k for k, one in enumerate(objects) if one[1] == label]
        near = [k for k in own if overlap(mask, objects[k][0]) >= 0.5]
        free = [k for k in near if k not in taken]
        if free:
            taken[max(free, key=lambda k: overlap(mask, objects[k][0]))] = number
            hits += 1
        on_crowd = any(c and one == label and (mask & m).sum() >= 0.5 * mask.sum() for m, one, c in truth)
        counting += bool(free) or not on_crowd
        repeats += bool(near) and not free
        merges += sum((mask & objects[k][0]).sum() >= 0.5 * objects[k][0].sum() for k in own) >= 2
    states = []
    for k, (area, label, _) in enumerate(objects):
        same = [mask for mask, one, _ in kept if one == label]
        big = [m for m in same if sum(2 * (m & o[0]).sum() >= o[0].sum() for o in objects if o[1] == label) >= 2]
        pieces = [
            m
            for m in same
            if 2 * (m & area).sum() >= m.sum() and 10 * (m & area).sum() >= area.sum() and overlap(m, area) < 0.5
        ]
        apart = [m for m in pieces[1:] if 2 * (m & pieces[0]).sum() < min(m.sum(), pieces[0].sum())]
        lost = k not in taken
        states.append((not lost, lost and any(2 * (m & area).sum() >= area.sum() for m in big), lost and bool(apart)))
    return hits, counting, merges, repeats, states


def scenes(count=60):
    generator = np.random.default_rng(3)
    for _ in range(count):
        truth = [
            (rectangle(generator), int(generator.integers(2)), int(generator.random() < 0.15))
            for _ in range(generator.integers(0, 7))
        ]
        found = [(rectangle(generator), int(generator.integers(2)), 0.0) for _ in range(generator.integers(0, 8))]
        for mask, label, _ in truth:  # near the truth, its halves, and joined with others
            cut = mask & (np.arange(SIDE) < np.nonzero(mask)[1].mean())
            parts = ((mask, 0.3), (cut, 0.8), (mask & ~cut, 0.8), (mask | truth[0][0], 0.4))
            found += [(one, label, 0.0) for one, share in parts if generator.random() < share]
        scores = (generator.permutation(len(found)) / 40 + 0.1).round(2).tolist()
        yield [(m, c, score) for (m, c, _), score in zip(found, scores) if m.any()], truth


@pytest.mark.parametrize("class_agnostic", [False, True])
def test_counts_are_those_of_dense_masks(class_agnostic):
    images = list(scenes())
    if class_agnostic:
        flat = [([(m, 0, s) for m, _, s in found], [(m, 0, c) for m, _, c in truth]) for found, truth in images]
    else:
        flat = images
    merged = split = 0
    for threshold in (0.0, 0.2, 0.5):
        at = computed(images, threshold, class_agnostic=class_agnostic)["at"][0]
        expected = [counted(found, truth, threshold) for found, truth in flat]
        hits, detections, merges, repeats = (sum(one[k] for one in expected) for k in range(4))
        objects = [states for *_, states in expected]
        annotations = sum(map(len, objects))
        assert (at["detections"], at["merges"], at["repeats"]) == (detections, merges, repeats)
        assert at["precision"] == pytest.approx(hits / detections) and at["recall"] == pytest.approx(hits / annotations)
        assert at["f1"] == pytest.approx(2 * hits / (detections + annotations))
        limits = {"1": [1], "2": [2], "3 to 5": [3, 4, 5], "6 or more": range(6, 99), "2 or more": range(2, 99)}
        assert {row["objects"] for row in at["by_objects"]} <= set(limits)
        for row in at["by_objects"]:
            group = [states for states in objects if len(states) in limits[row["objects"]]]
            states = [state for own in group for state in own]
            assert (row["images"], row["annotations"]) == (len(group), len(states)) and len(group) > 0
            for k, name in enumerate(("found", "merged", "split")):
                assert row[name] == pytest.approx(sum(state[k] for state in states) / len(states)), (name, threshold)
        merged, split = merged + merges, split + sum(state[2] for own in objects for state in own)
    assert merged > 20 and split > 0  # such cases were there


def test_curve_and_best_threshold():
    images = list(scenes(12))
    found = computed(images)
    curve = found["curve"]
    for place in range(0, 101, 4):
        threshold = GRID[place]
        own = [counted(*image, threshold) for image in images]
        hits, detections = sum(one[0] for one in own), sum(one[1] for one in own)
        assert curve["detections"][place] == detections
        annotations = sum(len(one[4]) for one in own)
        assert curve["f1"][place] == pytest.approx(2 * hits / (detections + annotations)), threshold
    best = curve["threshold"].index(found["best_threshold"])
    assert curve["f1"][best] == max(curve["f1"]) == pytest.approx(found["at"][1]["f1"])
    # In the middle of equal ones: between the worst hit, .6, and the best false one, .2.
    whole, other = np.zeros((SIDE, SIDE), dtype=bool), np.zeros((SIDE, SIDE), dtype=bool)
    whole[:9], other[12:] = True, True
    one = ([(whole, 0, 0.6), (other, 0, 0.2)], [(whole, 0, 0)])
    assert computed([one])["best_threshold"] == pytest.approx(0.41)
    assert storable_threshold(computed([one])) is None  # chosen on one object
    assert storable_threshold(computed([one] * 20)) == pytest.approx(0.41)
    nothing = computed([([(other, 0, 0.2)], [(whole, 0, 0)])])
    assert nothing["best_threshold"] is None and len(nothing["at"]) == 1
    assert computed([([], [])])["at"][0]["f1"] == 0


def test_calibration_is_exact_for_scores_that_are_probabilities():
    """Of the detections of a score s a share s is right."""
    whole, empty = np.zeros((SIDE, SIDE), dtype=bool), np.zeros((SIDE, SIDE), dtype=bool)
    whole[:9], empty[12:] = True, True
    right = [(share, k < share) for share in (3, 8) for k in range(10)]
    images = [([(whole if found else empty, 0, share / 10)], [(whole, 0, 0)]) for share, found in right]
    calibration = computed(images)["calibration"]
    assert [(row["detections"], row["precision"]) for row in calibration["bins"]] == [(10, 0.3), (10, 0.8)]
    assert calibration["error"] == pytest.approx(0, abs=1e-9)
    surer = [([(mask, label, score + 0.15) for mask, label, score in found], truth) for found, truth in images]
    assert computed(surer)["calibration"]["error"] == pytest.approx(0.15)
