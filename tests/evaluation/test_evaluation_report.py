"""Quality of an image, the best and worst of them, and the page."""

import base64
import csv
import io
import re

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from test_predictor import Oracle, truncated

from uplvp_hf.data import load_dataset_rows
from uplvp_hf.data.synthetic import write_scenes
from uplvp_hf.evaluation import as_prediction, as_reference, evaluate_model
from uplvp_hf.evaluation.coco_map import compare
from uplvp_hf.evaluation.examples import Examples, image_quality
from uplvp_hf.evaluation.report import CLASS_COLUMNS, draw_precision, write_class_table, write_evaluation_page
from uplvp_hf.models.image_processing_uplvp import UplvpImageProcessor


def bar(start, length, size=100):
    """A mask of 100 rows by `length` columns."""
    mask = np.zeros((size, size), dtype=np.uint8, order="F")
    mask[:, start : start + length] = 1
    rle = coco_mask.encode(mask)
    return {"size": [size, size], "counts": rle["counts"].decode()}


def image(found, truth, image_id=1):
    """found: (mask, class, score); truth: (mask, class, crowd)."""
    prediction = {"image_id": image_id, "rle": [m for m, _, _ in found], "labels": [c for _, c, _ in found]}
    prediction["scores"] = [score for _, _, score in found]
    reference = {
        "image_id": image_id,
        "segmentation": [m for m, _, _ in truth],
        "category_id": [c for _, c, _ in truth],
    }
    return prediction, {**reference, "iscrowd": [crowd for _, _, crowd in truth]}


def quality(found, truth, **options):
    return image_quality(compare(*image(found, truth)), 0.5, **options)


def test_quality_of_an_image():
    whole, other = bar(0, 20), bar(50, 20)
    assert quality([(whole, 1, 0.9), (other, 2, 0.5)], [(whole, 1, 0), (other, 2, 0)]).value == 1
    assert quality([], []).value is None and quality([(whole, 1, 0.4)], []).value is None
    assert quality([(whole, 1, 0.9)], []).value == 0 == quality([], [(whole, 1, 0)]).value
    # IoU 16 / 20 of one match, and one annotation missed: 2 x .8 / (1 + 2)
    found = quality([(bar(0, 16), 1, 0.9)], [(whole, 1, 0), (other, 1, 0)])
    assert found.value == pytest.approx(1.6 / 3) and (found.matched, found.detections, found.annotations) == (1, 1, 2)
    assert quality([(bar(0, 9), 1, 0.9)], [(whole, 1, 0)]).value == 0  # IoU .45
    # the wrong class
    assert quality([(whole, 2, 0.9)], [(whole, 1, 0)]).value == 0
    assert quality([(whole, 2, 0.9)], [(whole, 1, 0)], class_agnostic=True).value == 1
    # Of two detections one is a match. On a crowd they do not count, however many.
    assert quality([(whole, 1, 0.9), (whole, 1, 0.8)], [(whole, 1, 0)]).value == pytest.approx(2 / 3)
    crowd = [(other, 1, 1), (whole, 1, 0)]
    assert quality([(whole, 1, 0.9), (bar(50, 4), 1, 0.8), (bar(60, 4), 1, 0.8)], crowd).value == 1
    assert quality([(bar(50, 4), 2, 0.8)], crowd[:1]).value == 0


def filled(qualities, count, numbers=None):
    """Examples of images with one annotation of 20 columns, of which `quality x 20` are found."""
    examples = Examples(count=count)
    for number, share in enumerate(qualities) if numbers is None else numbers:
        found = [(bar(0, round(20 * share)), 1, 0.9), (bar(90, 5), 1, 0.1)]
        examples.add(*image(found[0 if share else 1 :], [(bar(0, 20), 1, 0)], f"p{number:02}"))
    return examples


def shown(examples):
    return {name: [entry["image_id"] for entry in entries] for name, entries in examples.groups().items()}


def test_best_and_worst_are_those_of_a_full_sort():
    generator = np.random.default_rng(0)
    shares = (generator.integers(10, 21, 40) / 20).tolist()
    order = sorted(range(40), key=lambda k: (-shares[k], k))
    expected = {"best": [f"p{k:02}" for k in order[:4]], "worst": [f"p{k:02}" for k in order[::-1][:4]]}
    assert shown(filled(shares, 4)) == expected
    first, second = (filled(None, 4, [(k, shares[k]) for k in range(start, 40, 2)]) for start in (0, 1))
    second.merge(first)
    assert shown(second) == expected and second.rated == 40
    assert len(second._best) == len(second._worst) == 4
    entry = second.groups()["best"][0]
    assert entry["scores"] == [0.9] and len(entry["rle"]) == 1  # what is below the threshold is not kept


def test_no_image_is_shown_twice():
    assert shown(filled([1.0, 0.5, 0.75], 6)) == {"best": ["p00"], "worst": ["p01", "p02"]}
    assert shown(filled([1.0], 6)) == {"best": ["p00"], "worst": []}
    assert shown(filled([], 6)) == {"best": [], "worst": []}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of an oracle on six scenes, one of which cannot be decoded; its class names need escaping."""
    folder = tmp_path_factory.mktemp("page")
    dataset = truncated(load_dataset_rows(write_scenes(folder / "scenes", count=6, seed=1, size=96)), 2, folder)
    dataset.categories[0]["name"] = "<b>bold</b>"
    whole = dataset.subset([0, 1, 3, 4, 5])
    model, examples = Oracle(whole), Examples(count=2)

    def keep(row, result):
        examples.add(as_prediction(row, result, dataset.category_ids), as_reference(row))

    processor = UplvpImageProcessor(size={"longest_edge": 192})
    metrics = evaluate_model(model, processor, dataset, progress=False, details=True, on_result=keep)
    source = {"model": "runs/oracle", "data": "scenes", "split": None, "metric": "coco"}
    names = {category["id"]: category["name"] for category in dataset.categories}
    write_evaluation_page(folder / "report.html", metrics, examples, dataset, names, source)
    write_class_table(folder / "per_class.csv", metrics)
    return folder, metrics, dataset


def test_page_holds_numbers_and_images(page):
    folder, metrics, _ = page
    text = (folder / "report.html").read_text()
    assert f"<b>{100 * metrics['AP']:.1f}</b><span>AP</span>" in text
    assert "&lt;b&gt;bold&lt;/b&gt;" in text and "<b>bold</b>" not in text
    assert "cut.png" in text and "cannot be decoded" in text
    assert not re.search(r"(src|href)=\"(?!data:|#)", text)  # nothing is loaded from elsewhere
    assert text.count("<svg") == 2 and "None" not in text and "<td>split</td>" not in text
    uris = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', text)
    assert len(uris) == 2 * 4  # two best, two worst; prediction and truth
    sizes = {Image.open(io.BytesIO(base64.b64decode(uri))).size for uri in uris}
    assert sizes == {(480, 480)}  # 96 px, enlarged by draw_instances
    assert "quality 0.9" in text or "quality 1.0" in text


def test_curve_ends_at_the_numbers(page):
    _, metrics, _ = page
    curves = {
        line.get_label(): line.get_xydata() for line in draw_precision(metrics["details"]["curves"]).axes[0].lines
    }
    assert curves.keys() == {"mean of IoU .50 to .95", "IoU .50", "IoU .75"}
    assert len(curves["IoU .50"]) == 101
    assert np.mean(curves["IoU .50"][:, 1]) == pytest.approx(metrics["AP50"], abs=1e-3)


def test_class_table(page):
    folder, _, dataset = page
    with open(folder / "per_class.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert tuple(rows[0]) == CLASS_COLUMNS and [int(row["id"]) for row in rows] == dataset.category_ids
    whole = [row["objects"]["category_id"] for k, row in enumerate(dataset.rows) if k != 2]
    for row in rows:
        assert int(row["annotations"]) == sum(ids.count(int(row["id"])) for ids in whole)
        assert (row["AP"] == "") == (row["annotations"] == "0")


def test_page_without_images_or_classes(page, tmp_path):
    _, metrics, dataset = page
    details = {**metrics["details"], "classes": [], "curves": None}
    bare = {**metrics, "details": details, "failures": []}
    source = {"model": "m", "data": "d", "split": "val", "metric": "cityscapes"}
    write_evaluation_page(tmp_path / "page.html", bare, Examples(), dataset, {}, source)
    text = (tmp_path / "page.html").read_text()
    assert "<img" not in text and text.count("<svg") == 1 and "Left out" not in text and "split\nval" in text
