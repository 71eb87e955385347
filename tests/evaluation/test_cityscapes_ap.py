"""CityscapesAP against a slow version on dense label maps, written from the benchmark's description."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from uplvp_hf.evaluation.backends import make_evaluator
from uplvp_hf.evaluation.cityscapes_ap import CityscapesAP

CLASSES = (24, 26, 33)


def rle(mask):
    found = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": found["counts"].decode()}


def random_image(generator, image_id, size=64):
    """A label map with instances, groups, tiny instances and void, and detections (mask, class, confidence)."""
    ids = np.zeros((size, size), dtype=np.int64)  # 0: background, 1: void, 1000 c + k: instance, c: group
    for k in range(generator.integers(0, 9)):
        c = int(generator.choice(CLASSES))
        h, w = generator.integers(3, 34, 2)
        y, x = generator.integers(0, size - h), generator.integers(0, size - w)
        ids[y : y + h, x : x + w] = generator.choice([1000 * c + k, 1000 * c + k, 1000 * c + k, c, 1])
    found = []
    shapes = [key for key in np.unique(ids) if key]
    for _ in range(generator.integers(0, 14)):
        mask, c = np.zeros((size, size), dtype=bool), int(generator.choice(CLASSES))
        if shapes and generator.random() < 0.8:
            key = int(generator.choice(shapes))
            c = key // 1000 or (key if key > 1 else c)
            mask = np.roll(ids == key, generator.integers(-2, 3, 2), (0, 1)) & (generator.random(ids.shape) < 0.97)
        elif generator.random() < 0.9:
            y, x = generator.integers(0, size - 20, 2)
            mask[y : y + 20, x : x + 17] = True
        found.append((mask, c, round(float(generator.random()), 1)))
    return image_id, ids, found


def slow_ap(images, category, threshold):
    """One class at one threshold, pixel by pixel; the integral as the benchmark writes it, a product with step widths
    that come from a convolution."""
    labels, confidences, missed, annotated = [], [], 0, 0
    for _, ids, found in images:
        mine = [(mask, score) for mask, c, score in found if c == category and mask.any()]
        keys = [key for key in np.unique(ids) if key and category in (key, key // 1000)]
        counts = {key: bool(key >= 1000 and (ids == key).sum() >= 100) for key in keys}

        def overlap(mask, key, ids=ids):
            return (mask & (ids == key)).sum() / (mask | (ids == key)).sum()

        for key in (key for key in keys if counts[key]):
            annotated += 1
            scores = sorted(score for mask, score in mine if overlap(mask, key) > threshold)
            missed += not scores
            confidences += scores
            labels += [0] * (len(scores) - 1) + [1] * bool(scores)
        for mask, score in mine:
            if any(overlap(mask, key) > threshold for key in keys):
                continue
            outside = (mask & (ids == 1)).sum()
            for key in keys:
                shared = (mask & (ids == key)).sum()
                outside += shared * (key < 1000) + shared * ((ids == key).sum() < 100)
            if outside / mask.sum() <= threshold:
                labels.append(0)
                confidences.append(score)
    if not annotated:
        return None
    labels, confidences = np.array(labels), np.array(confidences)
    precision, recall = [], []
    for level in sorted(set(confidences.tolist())):
        true = (labels * (confidences >= level)).sum()
        precision.append(true / (confidences >= level).sum())
        recall.append(true / (labels.sum() + missed))
    if not precision:
        return 0.0
    precision, recall = [*precision, precision[-1]], [*recall, 0.0]
    steps = np.convolve([recall[0], *recall, 0.0], [-0.5, 0, 0.5], "valid")
    return float(np.dot(precision, steps))


def as_coco(image):
    image_id, ids, found = image
    prediction = {"image_id": image_id, "rle": [rle(mask) for mask, _, _ in found]}
    prediction |= {"labels": [c for _, c, _ in found], "scores": [score for _, _, score in found]}
    keys = [int(key) for key in np.unique(ids) if key > 1]
    reference = {"image_id": image_id, "segmentation": [rle(ids == key) for key in keys]}
    reference["category_id"] = [key // 1000 or key for key in keys]
    reference["iscrowd"] = [int(key < 1000) for key in keys]
    reference["void"] = [rle(ids == 1)] if (ids == 1).any() else []
    return prediction, reference


def computed(images, **options):
    metric = CityscapesAP()
    for image in images:
        prediction, reference = as_coco(image)
        metric.add(prediction=prediction, reference=reference)
    return metric.compute(**options)


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_slow_version(seed):
    generator = np.random.default_rng(seed)
    images = [random_image(generator, number) for number in range(12)]
    found = computed(images, details=True)
    expected = {c: [slow_ap(images, c, t) for t in np.arange(0.5, 1, 0.05)] for c in CLASSES}
    assert 0.02 < found["AP"] < found["AP50"] < 0.98
    for c in CLASSES:
        assert found["per_class"][c] == pytest.approx(np.mean(expected[c]), abs=1e-12)
        assert found["details"]["classes"][c]["AP50"] == pytest.approx(expected[c][0], abs=1e-12)
    assert found["AP"] == pytest.approx(np.mean(list(expected.values())), abs=1e-12)
    assert found["AP50"] == pytest.approx(np.mean([values[0] for values in expected.values()]), abs=1e-12)


def test_class_agnostic_is_one_class():
    generator = np.random.default_rng(7)
    images = []
    for number in range(8):
        _, ids, found = random_image(generator, number)
        images.append((number, np.where((ids > 1) & (ids < 1000), 1, ids), found))  # groups become void

    def merged(image):
        image_id, ids, found = image
        one = np.where(ids >= 1000, ids % 1000 + 24000 + 100 * (ids // 1000 - 24), ids)
        return image_id, one, [(mask, 24, score) for mask, _, score in found]

    found = computed(images, class_agnostic=True)
    assert found["per_class"] == {} and 0 < found["AP"] < 1
    assert found["AP50"] == pytest.approx(slow_ap([merged(p) for p in images], 24, 0.5), abs=1e-12)
    assert computed(images, details=True)["details"]["class_agnostic"]["AP"] == found["AP"]


def square(size, side, y=0, x=0):
    mask = np.zeros((size, size), dtype=bool)
    mask[y : y + side, x : x + side] = True
    return mask


def case(truth, found, void=()):
    prediction = {"image_id": 1, "rle": [rle(m) for m, _ in found], "labels": [5] * len(found)}
    prediction["scores"] = [score for _, score in found]
    reference = {"image_id": 1, "segmentation": [rle(m) for m, _ in truth], "category_id": [5] * len(truth)}
    reference |= {"iscrowd": [crowd for _, crowd in truth], "void": [rle(m) for m in void]}
    metric = make_evaluator(metric="cityscapes")
    metric.add(prediction=prediction, reference=reference)
    return metric.compute()


def test_rules_one_by_one():
    big, far = square(60, 20), square(60, 20, 35, 35)
    assert case([(big, 0)], [(big, 0.9)])["AP"] == pytest.approx(1)
    assert case([(big, 0)], [])["AP"] == 0
    assert case([(square(60, 9), 0)], [(square(60, 9), 0.9)])["AP"] is None  # 81 px are not judged
    # A more confident false positive: the one level of precision .5 and the artificial first point of precision 0.
    assert case([(big, 0)], [(big, 0.5), (far, 0.9)])["AP"] == pytest.approx(0.25)
    assert case([(big, 0)], [(big, 0.5), (far, 0.9)], void=[far])["AP"] == pytest.approx(1)
    assert case([(big, 0), (far, 1)], [(big, 0.5), (far, 0.9)])["AP"] == pytest.approx(1)
    # Of two detections of one object the second is false: it comes later, at full recall.
    assert case([(big, 0)], [(big, 0.9), (big, 0.5)])["AP"] == pytest.approx(1)
    # An overlap of exactly .5 is none.
    half = big.copy()
    half[:10] = False
    assert case([(big, 0)], [(half, 0.9)])["AP50"] == 0


def test_two_processes_and_errors():
    generator = np.random.default_rng(3)
    images = [random_image(generator, f"city_{number}") for number in range(5)]
    first, second = CityscapesAP(), CityscapesAP()
    for number, image in enumerate(images):
        prediction, reference = as_coco(image)
        (first, second)[number % 2].add(prediction=prediction, reference=reference)
    second.extend(first.records())
    assert len(second) == 5
    assert second.compute() == computed(images)
    with pytest.raises(ValueError, match="No image was added"):
        second.compute()
    with pytest.raises(ValueError, match="Image 'city_0' was added before"):
        first.extend(first.records())
