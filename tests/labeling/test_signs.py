"""Signs of a failing mask source: each appears where it should, and none on sound labels."""

import json

import numpy as np
import pytest

from uplvp_hf.commands import label
from uplvp_hf.data.synthetic import write_scenes
from uplvp_hf.labeling.report import Statistics, write_report
from uplvp_hf.labeling.signs import LEAST_IMAGES, Signs

NAMES = {1: "bear", 2: "deer", 3: "otter"}
SIDE = 100


def row(boxes, scores=None, classes=None):
    """A row whose masks are full rectangles (x, y, width, height) in an image of 100 x 100 pixels."""
    count = len(boxes)
    objects = {
        "area": [width * height for _, _, width, height in boxes],
        "bbox": [list(box) for box in boxes],
        "score": list(scores) if scores is not None else [0.3 + 0.6 * k / max(count, 1) for k in range(count)],
        "category_id": list(classes) if classes is not None else [1 + k % 3 for k in range(count)],
    }
    return {"width": SIDE, "height": SIDE, "objects": objects}


def sound(seed, count=3):
    rng = np.random.default_rng(seed)
    boxes = [(int(x), int(y), int(w), int(h)) for x, y, w, h in rng.integers(5, 45, (count, 4))]
    return row(boxes, rng.uniform(0.2, 1, count))


def texts(rows, **options):
    signs, statistics = Signs(), Statistics()
    for one in rows:
        signs.add(one)
        statistics.add(one)
    return signs.texts(statistics.per_image, statistics.per_class, NAMES, **options)


def test_sound_masks_show_no_sign():
    assert texts([sound(seed) for seed in range(40)], agreement=0.8) == []


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([row([])] * 25 + [sound(seed) for seed in range(20)], {}, "56% of the images have no mask"),
        ([row([(20 + k % 3, 20, 60, 60), (0, 0, 9, 9)], [0.1 + k / 40, 0.9]) for k in range(30)], {}, "same place"),
        ([row([(0, 0, 90, 90 - k)] * 2, [0.2, 0.9]) for k in range(20)], {}, "100% of the masks cover more than 60%"),
        ([sound(seed, count=1) for seed in range(30)], {}, "100% of the images have exactly one mask"),
        ([sound(seed) | {"objects": sound(seed)["objects"] | {"score": [1.0] * 3}} for seed in range(30)], {},
         "do not vary (all about 1.00)"),
        ([sound(seed) | {"objects": sound(seed)["objects"] | {"category_id": [2] * 3}} for seed in range(30)], {},
         "100% of the masks are called deer, one of 3 classes"),
        ([sound(seed) for seed in range(30)], {"agreement": 0.2}, "Another source agrees little (mean best IoU 0.20)"),
    ],
)  # fmt: skip
def test_each_sign(rows, options, words):
    assert any(words in text for text in texts(rows, **options))


def test_few_images_say_nothing():
    rows = [row([])] * LEAST_IMAGES
    assert texts(rows) and texts(rows[1:]) == []


@pytest.mark.slow
def test_the_page_and_the_command_say_them(tmp_path, capsys):
    """The center-box baseline is a failing source: the page says so, and a second source disagrees."""
    write_scenes(tmp_path / "scenes", 24, seed=3)
    truth = next((tmp_path / "scenes" / "annotations").glob("*.json"))
    images = str(tmp_path / "scenes" / "images")
    store, true_store = str(tmp_path / "boxes"), str(tmp_path / "true")
    assert label.main([images, "--output", true_store, "--labeler", "file", "--masks", str(truth), "--quiet"]) == 0
    assert label.main([images, "--output", store, "--labeler", "center_box", "--quiet"]) == 0
    numbers = write_report(store, tmp_path / "page.html", other=true_store)
    assert numbers["agreement"] < 0.3
    said = " ".join(numbers["signs"])
    assert "same place" in said and "Another source" in said and "exactly one mask" in said
    page = (tmp_path / "page.html").read_text()
    assert "Look closely" in page and "same place" in page
    sound_page = write_report(true_store, tmp_path / "true.html")
    assert not any("same place" in sign for sign in sound_page["signs"])
    capsys.readouterr()
    assert label.main([store, "--report", f"output.other={true_store}"]) == 0
    captured = capsys.readouterr()
    assert "Look closely at the masks: " in captured.err
    assert json.loads(captured.out.splitlines()[-1])["report"].endswith("report.html")
