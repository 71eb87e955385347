"""CocoMaskMap against pycocotools on random data with everything in it that trips evaluators."""

import tracemalloc
from pathlib import Path

import evaluate
import numpy as np
import pytest
from coco_cases import NAMES, hard_data, pycocotools_stats, random_data, random_rle

from uplvp_hf.evaluation import coco_map
from uplvp_hf.evaluation.coco_map import CocoMaskMap


@pytest.mark.parametrize("class_agnostic", [False, True])
@pytest.mark.parametrize(
    "make, seed", [(random_data, 0), (random_data, 1), (hard_data, 2), (hard_data, 3), (hard_data, 4)]
)
def test_equals_pycocotools_to_the_last_digit(make, seed, class_agnostic):
    pairs = make(seed, images=25)
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
    pairs = random_data(5, images=5)
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


def test_memory_is_bounded():
    """No mask is kept: an image of 100 detections takes kilobytes, however large it is."""
    generator = np.random.default_rng(6)
    noise = [random_rle(generator, 150, 200)[0] for _ in range(6)]
    reference = {"category_id": [1, 2, 3], "segmentation": noise[:3]}
    prediction = {"scores": [0.5] * 100, "labels": [1] * 100, "rle": [noise[k % 6] for k in range(100)]}
    assert 100 * np.mean([len(rle["counts"]) for rle in noise]) > 200_000
    metric = CocoMaskMap()
    metric.add(prediction={**prediction, "image_id": -1}, reference={**reference, "image_id": -1})  # lazy imports
    tracemalloc.start()
    for image_id in range(20):
        metric.add(prediction={**prediction, "image_id": image_id}, reference={**reference, "image_id": image_id})
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 20 * 12_000 and peak - kept < 1_000_000
    values = [value for image in metric.records().values() for value in vars(image).values()]
    assert all(isinstance(value, np.ndarray) and value.dtype != object for value in values)


def test_errors_name_the_image():
    rle, _ = random_rle(np.random.default_rng(0), 20, 20)
    other, _ = random_rle(np.random.default_rng(0), 20, 30)
    reference = {"image_id": 4, "category_id": [5], "segmentation": [rle]}
    prediction = {"image_id": 4, "scores": [0.3], "labels": [5], "rle": [rle]}
    metric = CocoMaskMap()
    with pytest.raises(ValueError, match="No image"):
        metric.compute()
    with pytest.raises(ValueError, match="prediction for image 5"):
        metric.add(prediction={**prediction, "image_id": 5}, reference=reference)
    with pytest.raises(ValueError, match="Image 4: 2 scores for 1 masks"):
        metric.add(prediction={**prediction, "scores": [1, 2]}, reference=reference)
    with pytest.raises(ValueError, match="Image 4: masks of different sizes"):
        metric.add(prediction={**prediction, "rle": [other]}, reference=reference)
    with pytest.raises(ValueError, match="must be COCO RLE"):
        metric.add(prediction={**prediction, "rle": [[[0, 0, 4, 4, 0, 4]]]}, reference=reference)
    with pytest.raises(ValueError, match="Image 4: scores that are not finite"):
        metric.add(prediction={**prediction, "scores": [float("nan")]}, reference=reference)
    metric.add(prediction=prediction, reference=reference)
    with pytest.raises(ValueError, match="Image 4 was added before"):
        metric.add(prediction=prediction, reference=reference)


def test_without_comparisons_across_classes():
    pairs = hard_data(8, images=10)
    whole, quick = CocoMaskMap(), CocoMaskMap()
    quick.across_classes = False
    for prediction, reference in pairs:
        for metric in (whole, quick):
            metric.add(prediction=prediction, reference=reference)
    with pytest.raises(ValueError, match="different classes were not compared"):
        quick.compute(details=True)
    assert quick.compute() == whole.compute()


@pytest.mark.parametrize("counts", ["zzzz~", "a", "", "1P", b"11a", "1 1"])
def test_malformed_run_lengths_are_refused(counts):
    good = random_rle(np.random.default_rng(0), 20, 30)[0]
    reference = {"image_id": 4, "category_id": [1], "segmentation": [good]}
    masks = [good, {"size": good["size"], "counts": counts}]
    bad = {"image_id": 4, "scores": [0.5] * 2, "labels": [1] * 2, "rle": masks}
    with pytest.raises(ValueError, match="Image 4: the counts of an RLE are malformed or cut off"):
        CocoMaskMap().add(prediction=bad, reference=reference)
