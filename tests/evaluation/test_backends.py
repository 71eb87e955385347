"""Every backend against pycocotools through its public interface."""

import numpy as np
import pytest
from coco_cases import hard_data, pycocotools_stats, random_data

from uplvp_hf.evaluation import backends
from uplvp_hf.evaluation.backends import BACKENDS, LibraryMap, make_evaluator, resolve_backend
from uplvp_hf.evaluation.coco_map import NAMES


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param not in ("streaming", "pycocotools"):
        pytest.importorskip(request.param)
    return request.param


def computed(backend, pairs, **options):
    evaluator = make_evaluator(backend)
    for prediction, reference in pairs:
        evaluator.add(prediction=prediction, reference=reference)
    return evaluator.compute(**options)


@pytest.mark.parametrize("class_agnostic", [False, True])
@pytest.mark.parametrize("make, seed", [(random_data, 11), (hard_data, 12)])
def test_equals_pycocotools_to_the_last_digit(backend, make, seed, class_agnostic):
    pairs = make(seed, images=12)
    stats, per_class = pycocotools_stats(pairs, class_agnostic)
    found = computed(backend, pairs, class_agnostic=class_agnostic)
    assert [-1 if found[name] is None else found[name] for name in NAMES] == stats.tolist()
    assert found["per_class"] == {category: ap for category, ap in per_class.items() if ap is not None}


def test_details_are_equal_for_all(backend):
    pairs = hard_data(13, images=10)
    found, streamed = (computed(name, pairs, details=True)["details"] for name in (backend, "streaming"))
    assert found == streamed
    agnostic, _ = pycocotools_stats(pairs, class_agnostic=True)
    assert list(found["class_agnostic"].values()) == agnostic.tolist()
    _, per_class = pycocotools_stats(pairs)
    found_ap = {category: row["AP"] for category, row in found["classes"].items() if row["annotations"]}
    assert found_ap == {category: ap for category, ap in per_class.items() if ap is not None}
    crowds = sum(sum(reference["iscrowd"]) for _, reference in pairs)
    assert sum(row["crowds"] for row in found["classes"].values()) == crowds > 0
    assert sum(row["detections"] for row in found["classes"].values()) == sum(len(p["rle"]) for p, _ in pairs)
    assert np.mean(found["curves"]["precision"]["mean"]) == pytest.approx(computed(backend, pairs)["AP"])


def test_text_ids_and_images_without_anything(backend):
    pairs = random_data(14, images=8)
    for prediction, reference in pairs:
        name = f"image {reference['image_id']:04}"  # in the order of the numbers
        prediction["image_id"] = reference["image_id"] = name
    pairs.append(({"image_id": "void", "scores": [], "labels": [], "rle": []}, empty_reference("void")))
    found = computed(backend, pairs)
    assert [found[name] for name in NAMES] == pycocotools_stats(pairs)[0].tolist()


def empty_reference(image_id):
    return {"image_id": image_id, "category_id": [], "segmentation": [], "iscrowd": [], "area": []}


def test_nothing_detected_and_nothing_annotated(backend):
    pairs = random_data(15, images=4)
    silent = [({**p, "scores": [], "labels": [], "rle": []}, r) for p, r in pairs]
    found = computed(backend, silent, details=True)
    assert found["AP"] == 0 and found["AR100"] == 0 and set(found["per_class"].values()) == {0}
    bare = [(p, empty_reference(r["image_id"])) for p, r in pairs]
    found = computed(backend, bare, details=True)
    assert all(found[name] is None for name in NAMES) and found["per_class"] == {}
    assert found["details"]["curves"] is None
    assert all(row["AP"] is None and row["annotations"] == 0 for row in found["details"]["classes"].values())


def test_records_of_two_evaluators_give_the_numbers_of_one(backend):
    pairs = hard_data(16, images=7)
    first, second = make_evaluator(backend), make_evaluator(backend)
    for number, (prediction, reference) in enumerate(pairs):
        (first, second)[number % 2].add(prediction=prediction, reference=reference)
    second.extend(first.records())
    assert second.compute(details=True) == computed(backend, pairs, details=True)
    with pytest.raises(ValueError, match="No image was added"):
        second.compute()
    first.extend({})
    with pytest.raises(ValueError, match="was added before"):
        first.extend(first.records())


def test_names(monkeypatch):
    with pytest.raises(ValueError, match="no evaluation backend 'rust', only streaming, pycocotools"):
        resolve_backend("rust")
    with pytest.raises(ValueError, match="no metric 'voc'"):
        make_evaluator(metric="voc")
    with pytest.raises(ValueError, match="'pycocotools' has no Cityscapes AP"):
        make_evaluator("pycocotools", "cityscapes")
    found = importlib_without(monkeypatch, "hotcoco")
    with pytest.raises(ValueError, match=r"'hotcoco' is not installed: pip install uplvp_hf\[fast_eval\]"):
        resolve_backend("hotcoco")
    assert resolve_backend("fastest") == "streaming"
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: found("json"))
    assert resolve_backend("fastest") == "hotcoco"
    assert isinstance(make_evaluator("pycocotools"), LibraryMap)


def importlib_without(monkeypatch, *missing):
    found = backends.importlib.util.find_spec
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None if name in missing else found(name))
    return found
