"""The report: its numbers against counts by hand, and pages for odd stores."""

import itertools
import json
import math
import re

import numpy as np
import pytest
from labeling_helpers import image_folder

from uplvp_hf.data import DataError, load_dataset_rows, read_store
from uplvp_hf.labeling.cutting.proposals import Proposals
from uplvp_hf.labeling.labelers.mask_file import MaskFileLabeler
from uplvp_hf.labeling.pipeline import Labeler, label_images
from uplvp_hf.labeling.quality import proposal_quality
from uplvp_hf.labeling.report import AREA_EDGES, SCORE_EDGES, Statistics, write_report


class Squares(Labeler):
    """As many squares as the image's number modulo 4; `calls` is one score an image."""

    name, encoder_name, vocabulary, license = "squares", "none at all", ("bear", "<deer>"), "cc-by-4.0"
    settings = {"sizes": [8, 16], "nested": {"depth": 2}}

    def __call__(self, images, rows=None):
        return [self.propose(image, int(row["file_name"][:3])) for image, row in zip(images, rows)]

    def propose(self, image, number):
        masks = np.zeros((number % 4, image.height, image.width), dtype=bool)
        for k, mask in enumerate(masks):
            mask[: 8 * (k + 1), : 8 * (k + 1)] = True
        scores = [(number + 1) / 20 + 0.1 * k for k in range(len(masks))]
        return Proposals.build(list(masks), scores, (image.height, image.width), [k % 2 for k in range(len(masks))])


@pytest.fixture
def store(tmp_path):
    dataset = image_folder(tmp_path / "images", 12)
    (tmp_path / "images" / "005.png").write_bytes(b"not an image at all")
    label_images(dataset, Squares(), None, tmp_path / "labels", progress=False, batch_size=2, shard_size=2)
    return tmp_path / "labels"


def outside(page):
    """What the page would load from elsewhere."""
    found = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'>\s]*)|url\(["']?([^"')]*)""", page)
    return ["".join(pair) for pair in found if not "".join(pair).startswith(("data:", "#"))]


def words(page):
    """Lower case, without the images, in which any letters may occur."""
    return re.sub(r'data:image[^"]*', "", page).lower()


def test_numbers(store, tmp_path):
    numbers = write_report(store, tmp_path / "report.html")
    kept = [k for k in range(12) if k != 5]
    counts = [k % 4 for k in kept]
    assert (numbers["done"], numbers["failed"]) == (11, 1)
    assert numbers["instances"] == sum(counts) and numbers["empty"] == counts.count(0)
    assert numbers["instances_per_image"] == pytest.approx(sum(counts) / 11)
    bear, deer = numbers["classes"]
    assert bear["instances"] == sum((c + 1) // 2 for c in counts) and deer["instances"] == sum(c // 2 for c in counts)
    assert bear["images"] == sum(c > 0 for c in counts) and deer["images"] == sum(c > 1 for c in counts)
    scores = [(k + 1) / 20 + 0.1 for k in kept if k % 4 > 1]
    assert deer["mean_score"] == pytest.approx(np.mean(scores))
    assert deer["mean_area"] == pytest.approx(16 * 16 / (64 * 96))
    assert numbers["quality"] is None and json.dumps(numbers)
    page = (tmp_path / "report.html").read_text()
    assert outside(page) == [] and "nan" not in words(page)
    for text in (
        "squares",
        "none at all",
        "cc-by-4.0",
        "nested.depth",
        "8, 16",
        "&lt;deer&gt;",
        "005.png",
        "is not an image",
    ):
        assert text in page
    assert "<deer>" not in page and str(store) in page
    assert page.count("data:image/jpeg") == 8 + 3  # all with masks, since none is shown twice, and those without


def test_statistics_by_hand(store):
    statistics, rows = Statistics(), read_store(store).rows
    for row in rows:
        statistics.add(row)
    scores = [score for row in rows for score in row["objects"]["score"]]
    shares = [area / (64 * 96) for row in rows for area in row["objects"]["area"]]
    for values, edges, got in ((scores, SCORE_EDGES, statistics.scores), (shares, AREA_EDGES, statistics.areas)):
        want = [sum(low <= v < high or (high == edges[-1] and v == high) for v in values)
                for low, high in itertools.pairwise(edges)]  # fmt: skip
        assert got.tolist() == want and sum(want) == len(values)
    means = [np.mean(row["objects"]["score"]) if row["objects"]["score"] else math.nan for row in rows]
    ranked = sorted((k for k in range(len(rows)) if not math.isnan(means[k])), key=lambda k: -means[k])
    chosen = statistics.examples(2)
    assert chosen["best"] == ranked[:2] and chosen["worst"] == ranked[-2:]
    assert set(chosen["median"]) <= set(ranked[2:-2]) and len(chosen["median"]) == 2
    middle = {abs(ranked.index(k) - (len(ranked) - 1) / 2) for k in chosen["median"]}
    assert max(middle) <= 1.5
    assert all(math.isnan(means[k]) for k in chosen["empty"]) and len(chosen["empty"]) == 2


@pytest.mark.parametrize("count", range(8))
def test_no_example_is_shown_twice(count):
    statistics = Statistics()
    for k in range(count):
        objects = {"score": [k / 10], "area": [5], "category_id": [1]}
        statistics.add({"objects": objects, "width": 10, "height": 10})
    chosen = statistics.examples(3)
    shown = [number for numbers in chosen.values() for number in numbers]
    assert len(shown) == len(set(shown)) and len(shown) >= min(count, 3)


def test_against_the_truth(scenes_dir, tmp_path):
    truth = load_dataset_rows(scenes_dir)
    plain = load_dataset_rows(scenes_dir / "images")
    label_images(plain, MaskFileLabeler(truth, top=2), None, tmp_path / "labels", progress=False)
    numbers = write_report(tmp_path / "labels", tmp_path / "report.html", truth=scenes_dir)
    want = proposal_quality(read_store(tmp_path / "labels"), truth)
    for key, value in want.items():
        assert numbers["quality"][key] == pytest.approx(value)
    total = sum(len(row["objects"]["score"]) for row in truth.rows)
    assert numbers["quality"]["precision"] == 1 and numbers["quality"]["recall"] < 1
    assert numbers["quality"]["instances"] == total > numbers["instances"]
    assert 0 < numbers["quality"]["ap"] < 1 == numbers["quality"]["class_accuracy"]
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/jpeg") == 2 * 6 and "Against the truth" in page and outside(page) == []
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="share neither"):
        write_report(tmp_path / "labels", tmp_path / "r.html", truth=image_folder(tmp_path / "other", 2))
    assert not (tmp_path / "r.html").exists()


def test_no_instance_and_no_image(scenes_dir, tmp_path):
    dataset = image_folder(tmp_path / "images", 2)

    class Nothing(Squares):
        def propose(self, image, number):
            return Proposals.build([], [], (image.height, image.width), [])

    label_images(dataset, Nothing(), None, tmp_path / "nothing", progress=False)
    numbers = write_report(tmp_path / "nothing", tmp_path / "report.html", truth=dataset)
    assert (numbers["done"], numbers["instances"], numbers["empty"]) == (2, 0, 2)
    assert numbers["quality"]["recall"] is None and numbers["classes"][0]["mean_score"] is None
    page = (tmp_path / "report.html").read_text()
    assert "nan" not in words(page) and "Images without any mask" in page and "Best mean score" not in page

    for row in dataset.rows:
        with open(row["image"], "wb"):
            pass
    label_images(dataset, Nothing(), None, tmp_path / "none", progress=False, max_failed=1.0)
    for truth in (None, scenes_dir):
        numbers = write_report(tmp_path / "none", tmp_path / "report.html", truth=truth, other=scenes_dir)
        assert numbers["agreement"] is None
        assert (numbers["done"], numbers["failed"], numbers["quality"]) == (0, 2, None)
        assert "nan" not in words((tmp_path / "report.html").read_text())


def test_images_that_are_gone_are_named(store, tmp_path):
    (tmp_path / "images" / "011.png").unlink()
    write_report(store, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert re.search(r"011\.png: 3 masks, mean score 0\.70 \([^)]*(no such|missing|cannot)", page)
    assert page.count("data:image/jpeg") == 10
    with pytest.raises(DataError, match=r"header\.json"):
        write_report(tmp_path / "images", tmp_path / "other.html")


def test_large_images_are_made_small(tmp_path):
    from PIL import Image

    (tmp_path / "images").mkdir()
    Image.new("RGB", (3000, 1000), "green").save(tmp_path / "images" / "001.jpg")
    label_images(load_dataset_rows(tmp_path / "images"), Squares(), None, tmp_path / "labels", progress=False)
    write_report(tmp_path / "labels", tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 100_000
