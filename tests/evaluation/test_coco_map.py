"""CocoMaskMap against pycocotools on random data with everything in it that trips evaluators."""

import contextlib
import io
from pathlib import Path

import evaluate
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from uplvp_hf.evaluation import coco_map
from uplvp_hf.evaluation.coco_map import CocoMaskMap

NAMES = ["AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L", "AR1", "AR10", "AR100", "AR_S", "AR_M", "AR_L"]
CATEGORIES = [3, 17, 44, 90]  # sparse; 90 has no annotation


def random_rle(generator, height, width, box=None):
    mask = np.zeros((height, width), dtype=np.uint8)
    if box is None:
        h, w = generator.integers(4, height), generator.integers(4, width)
        y, x = generator.integers(0, height - h + 1), generator.integers(0, width - w + 1)
        box = [y, x, h, w]
    y, x, h, w = box
    mask[y : y + h, x : x + w] = generator.random((h, w)) < 0.9
    rle = coco_mask.encode(np.asfortranarray(mask))
    return {"size": [height, width], "counts": rle["counts"].decode()}, box


def random_data(seed, pictures=40, many=False):
    """Pairs for the metric. Scores have two digits, so that many are equal; half the detections are near an object."""
    generator = np.random.default_rng(seed)
    pairs = []
    for image_id in generator.permutation(np.arange(pictures) * 7 + 2).tolist():
        height, width = generator.integers(40, 200, 2).tolist()
        boxes, reference = [], {"image_id": image_id, "category_id": [], "segmentation": [], "iscrowd": [], "area": []}
        for _ in range(generator.integers(0, 7)):
            rle, box = random_rle(generator, height, width)
            category = int(generator.choice(CATEGORIES[:3]))
            boxes.append((box, category))
            reference["category_id"].append(category)
            reference["segmentation"].append(rle)
            reference["iscrowd"].append(int(generator.random() < 0.15))
            reference["area"].append(float(coco_mask.area(rle)) * generator.uniform(0.8, 1.2))
        prediction = {"image_id": image_id, "scores": [], "labels": [], "rle": []}
        for _ in range(generator.integers(0, 260 if many else 14)):
            box, category = None, int(generator.choice(CATEGORIES))
            if boxes and generator.random() < 0.6:
                (y, x, h, w), near = boxes[generator.integers(len(boxes))]
                category = near if generator.random() < 0.9 else category
                box = [y, x, max(1, h - generator.integers(0, 3)), max(1, w - generator.integers(0, 3))]
            prediction["rle"].append(random_rle(generator, height, width, box)[0])
            prediction["labels"].append(category)
            prediction["scores"].append(round(float(generator.random()), 2))
        pairs.append((prediction, reference))
    return pairs


def pycocotools_stats(pairs, class_agnostic=False):
    """The 12 numbers and AP by category, through the public interface only."""
    annotations, results = [], []
    for prediction, reference in pairs:
        keys = ("category_id", "segmentation", "iscrowd", "area")
        for values in zip(*(reference[key] for key in keys)):
            annotations.append(dict(zip(keys, values), image_id=reference["image_id"], id=len(annotations) + 1))
        for score, label, rle in zip(prediction["scores"], prediction["labels"], prediction["rle"]):
            results.append(
                {"image_id": prediction["image_id"], "category_id": label, "segmentation": dict(rle), "score": score}
            )
    truth = COCO()
    truth.dataset = {
        "images": [{"id": reference["image_id"], "height": 1, "width": 1} for _, reference in pairs],
        "annotations": [dict(annotation, segmentation=dict(annotation["segmentation"])) for annotation in annotations],
        "categories": [{"id": category, "name": str(category)} for category in CATEGORIES],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluator = COCOeval(truth, truth.loadRes(results), "segm")
        evaluator.params.useCats = int(not class_agnostic)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    per_class = {}
    if not class_agnostic:
        for index, category in enumerate(CATEGORIES):
            values = evaluator.eval["precision"][:, :, index, 0, 2]
            per_class[category] = float(np.mean(values[values > -1])) if (values > -1).any() else None
    return evaluator.stats, per_class


@pytest.mark.parametrize("class_agnostic", [False, True])
@pytest.mark.parametrize("seed, many", [(0, False), (1, False), (2, False), (3, True)])
def test_equals_pycocotools_to_the_last_digit(seed, many, class_agnostic):
    pairs = random_data(seed, pictures=15 if many else 40, many=many)
    metric = CocoMaskMap()
    for prediction, reference in pairs:
        metric.add(prediction=prediction, reference=reference)
    found = metric.compute(class_agnostic=class_agnostic)
    stats, per_class = pycocotools_stats(pairs, class_agnostic)
    assert {name: -1 if found[name] is None else found[name] for name in NAMES} == dict(zip(NAMES, stats.tolist()))
    assert 0.05 < found["AP"] < 0.95
    assert found["per_class"] == {category: ap for category, ap in per_class.items() if ap is not None}


def test_loads_by_path_without_the_package(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    metric = evaluate.load(str(Path(coco_map.__file__)), module_type="metric")
    assert type(metric).__name__ == "CocoMaskMap" and type(metric) is not CocoMaskMap
    pairs = random_data(5, pictures=5)
    predictions, references = zip(*pairs)
    found = metric.compute(predictions=list(predictions), references=list(references))
    assert found["AP"] == pycocotools_stats(pairs)[0][0]


def test_perfect_and_missing():
    rle, _ = random_rle(np.random.default_rng(0), 100, 100, [10, 10, 50, 50])
    reference = {"image_id": "a", "category_id": [5], "segmentation": [rle]}
    metric = CocoMaskMap()
    metric.add(prediction={"image_id": "a", "scores": [0.3], "labels": [5], "rle": [rle]}, reference=reference)
    result = metric.compute()
    assert result["AP"] == pytest.approx(1) and result["per_class"] == {5: result["AP"]}
    assert result["AP_M"] == pytest.approx(1) and result["AP_S"] is None and result["AP_L"] is None
    nothing = {"image_id": "a", "scores": [], "labels": [], "rle": []}
    result = metric.compute(predictions=[nothing], references=[reference])
    assert result["AP"] == 0 and result["AR100"] == 0
    no_truth = {"image_id": "a", "category_id": [], "segmentation": []}
    result = metric.compute(predictions=[nothing], references=[no_truth])
    assert result["AP"] is None and result["AR1"] is None and result["per_class"] == {}


def test_more_than_255_masks():
    rle, _ = random_rle(np.random.default_rng(0), 20, 20)
    many = {"image_id": 1, "scores": [0.5] * 300, "labels": [1] * 300, "rle": [rle] * 300}
    reference = {"image_id": 1, "category_id": [1] * 280, "segmentation": [rle] * 280}
    assert CocoMaskMap().compute(predictions=[many], references=[reference])["AR100"] == pytest.approx(100 / 280)


def test_masks_are_not_kept():
    metric = CocoMaskMap()
    for prediction, reference in random_data(1, pictures=3):
        metric.add(prediction=prediction, reference=reference)
    kept = [value for picture in metric._pictures.values() for value in vars(picture).values()]
    assert kept and all(isinstance(value, np.ndarray) and value.dtype != object for value in kept)


def test_errors_name_the_picture():
    rle, _ = random_rle(np.random.default_rng(0), 20, 20)
    other, _ = random_rle(np.random.default_rng(0), 20, 30)
    reference = {"image_id": 4, "category_id": [5], "segmentation": [rle]}
    prediction = {"image_id": 4, "scores": [0.3], "labels": [5], "rle": [rle]}
    metric = CocoMaskMap()
    with pytest.raises(ValueError, match="No picture"):
        metric.compute()
    with pytest.raises(ValueError, match="prediction for picture 5"):
        metric.add(prediction={**prediction, "image_id": 5}, reference=reference)
    with pytest.raises(ValueError, match="Picture 4: 2 scores for 1 masks"):
        metric.add(prediction={**prediction, "scores": [1, 2]}, reference=reference)
    with pytest.raises(ValueError, match="Picture 4: masks of different sizes"):
        metric.add(prediction={**prediction, "rle": [other]}, reference=reference)
    with pytest.raises(ValueError, match="must be COCO RLE"):
        metric.add(prediction={**prediction, "rle": [[[0, 0, 4, 4, 0, 4]]]}, reference=reference)
    metric.add(prediction=prediction, reference=reference)
    with pytest.raises(ValueError, match="Picture 4 was added before"):
        metric.add(prediction=prediction, reference=reference)
