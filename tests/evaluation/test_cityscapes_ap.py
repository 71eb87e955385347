"""CityscapesAP against the released evaluation of the benchmark (cityscapesscripts) on random label maps."""

import numpy as np
import pytest
from PIL import Image
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


def official(images, folder):
    """Per category {"ap", "ap50%"} by cityscapesscripts, from the files that a participant hands in; nan: no object."""
    from cityscapesscripts.evaluation import evalInstanceLevelSemanticLabeling as evaluation
    from cityscapesscripts.helpers.labels import id2label

    road, static = 7, 4  # a class without instances, and one that is ignored
    predictions, truths = [], []
    for number, (_, ids, found) in enumerate(images):
        stored = np.where(ids == 0, road, np.where(ids == 1, static, ids)).astype(np.uint16)
        truths.append(str(folder / f"{number}_instanceIds.png"))
        Image.fromarray(stored).save(truths[-1])
        lines = []
        for k, (mask, category, score) in enumerate(found):
            Image.fromarray(mask.astype(np.uint8) * 255).save(folder / f"{number}_{k}.png")
            lines.append(f"{number}_{k}.png {category} {score!r}\n")
        predictions.append(str(folder / f"{number}.txt"))
        (folder / f"{number}.txt").write_text("".join(lines))
    args = evaluation.args
    args.quiet, args.JSONOutput, args.predictionPath = True, False, str(folder)
    args.gtInstancesFile = str(folder / "gtInstances.json")
    evaluation.setInstanceLabels(args)
    instances = evaluation.getGtInstances(truths, args)
    matches = evaluation.matchGtWithPreds(predictions, truths, instances, args)
    averages = evaluation.computeAverages(evaluation.evaluateMatches(matches, args), args)
    by_category = {c: averages["classes"][id2label[c].name] for c in CLASSES}
    return averages, by_category


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


def agree(ours, theirs):
    """Equal to 1e-12; what has no object to find is None here and nan there."""
    return (ours is None and np.isnan(theirs)) or ours == pytest.approx(float(theirs), abs=1e-12)


@pytest.fixture(autouse=True)
def numpy_of_the_package(monkeypatch):
    """cityscapesscripts 2.3.0 calls `in1d`, which numpy 2.4 no longer has."""
    monkeypatch.setattr(np, "in1d", np.isin, raising=False)


@pytest.mark.filterwarnings("ignore:Mean of empty slice")
@pytest.mark.parametrize("seed, count", [(0, 12), (1, 12), (2, 12), (3, 12), (4, 3), (5, 3), (6, 3)])
def test_equals_the_released_evaluation(seed, count, tmp_path):
    """Small sets too: there the first point of the curve counts most, which the package changed in its version 2."""
    generator = np.random.default_rng(seed)
    images = [random_image(generator, number) for number in range(count)]
    found = computed(images, details=True)
    averages, by_category = official(images, tmp_path)
    for c in CLASSES:
        row = found["details"]["classes"].get(c, {"AP": None, "AP50": None})
        assert agree(row["AP"], by_category[c]["ap"]) and agree(row["AP50"], by_category[c]["ap50%"]), c
    assert agree(found["AP"], averages["allAp"]) and agree(found["AP50"], averages["allAp50%"])
    assert count < 12 or 0.02 < found["AP"] < found["AP50"] < 0.98


def test_class_agnostic_is_one_class(tmp_path):
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
    _, by_category = official([merged(image) for image in images], tmp_path)
    assert agree(found["AP"], by_category[24]["ap"]) and agree(found["AP50"], by_category[24]["ap50%"])
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
    # A more confident false positive. Recall stays 0 until the level of precision .5, so the curve is a line from the
    # false positive (precision 0) to it; the first point of precision 1 spans no recall.
    assert case([(big, 0)], [(big, 0.5), (far, 0.9)])["AP"] == pytest.approx(0.25)
    # One level alone: a line from precision 1 to .5. The rule before version 2 gave .5.
    assert case([(big, 0)], [(big, 0.9), (far, 0.9)])["AP"] == pytest.approx(0.75)
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
