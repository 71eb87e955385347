"""A user's own mask source, by module and function."""

import json

import numpy as np
import pytest
import torch
from labeling_helpers import image_folder

from uplvp_hf.data import read_store
from uplvp_hf.labeling.cutting.proposals import Proposals
from uplvp_hf.labeling.labelers.plugin import PluginLabeler, find_factory, load_plugin, settings_of_factory
from uplvp_hf.labeling.pipeline import label_images
from uplvp_hf.settings import ConfigError, build_settings

MODULE = """
import numpy as np

calls = []


def bright(level: int = 200):
    def source(images, rows):
        calls.append([row["image_id"] for row in rows])
        return [{"masks": [np.asarray(image.convert("L")) > level]} for image in images]

    return source


class Named:
    name, encoder_name, license = "named", "nothing", "mit"
    vocabulary = ["bear", "deer"]

    def __init__(self, share=0.5):
        self.share = share
        self.settings = {"kind": "halves"}

    def measure(self, images, rows):
        return [float(np.asarray(image).mean()) for image in images]

    def calibrate(self, statistics):
        return {"mean": sum(statistics) / len(statistics)}

    def restore(self, state):
        self.mean = state["mean"]

    def __call__(self, images, rows):
        results = []
        for image in images:
            left = np.zeros((image.height, image.width), bool)
            left[:, : int(self.share * image.width)] = self.mean > 0
            results.append({"masks": np.stack([left, ~left]), "scores": [0.5, 0.25], "labels": [1, 0]})
        return results


number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_source.py").write_text(MODULE)
    (tmp_path / "needy_source.py").write_text("import surely_not_installed_anywhere\n")
    monkeypatch.chdir(tmp_path)
    yield
    import sys

    sys.modules.pop("my_source", None)


def test_a_function_is_a_source(module, tmp_path):
    images = image_folder(tmp_path / "images", 3)
    source = load_plugin("my_source:bright", {"level": 100})
    summary = label_images(images, source, None, tmp_path / "labels", batch_size=2, progress=False)
    assert (summary.done, summary.instances) == (3, 3)
    stored = read_store(tmp_path / "labels")
    for index in range(3):
        assert (stored.mask(index, 0) == (np.asarray(images.load_image(index).convert("L")) > 100)).all()
        assert stored[index]["objects"]["score"] == [1.0]
    settings = json.loads((tmp_path / "labels" / "header.json").read_text())["settings"]
    assert settings["source"] == "my_source:bright" and settings["options"] == {"level": 100}
    import my_source

    assert sorted(name for names in my_source.calls for name in names) == [row["image_id"] for row in images.rows]
    with pytest.raises(ValueError, match=r"options\.level: 100 in the store, 90 now"):
        label_images(images, load_plugin("my_source:bright", {"level": 90}), None, tmp_path / "labels")


def test_a_class_with_names_and_calibration(module, tmp_path):
    images = image_folder(tmp_path / "images", 3)
    source = load_plugin("my_source:Named", {"share": 0.25})
    assert (source.name, source.encoder_name, source.license) == ("named", "nothing", "mit")
    label_images(images, source, None, tmp_path / "labels", progress=False)
    stored = read_store(tmp_path / "labels")
    header = json.loads((tmp_path / "labels" / "header.json").read_text())
    want = np.mean([np.asarray(images.load_image(k)).mean() for k in range(3)])
    assert header["state"]["mean"] == pytest.approx(want) and header["settings"]["kind"] == "halves"
    names = [stored.id2label[stored.category_ids.index(k)] for k in stored[0]["objects"]["category_id"]]
    assert names == ["deer", "bear"] and stored[0]["objects"]["area"] == [24 * 64, 72 * 64]


@pytest.mark.parametrize(
    "reference, message",
    [
        ("nowhere_at_all:x", "no module nowhere_at_all"),
        ("my_source:missing", r"no function 'missing'; it has \['bright', 'Named'\]"),
        ("my_source:number", "no function 'number'"),
        ("needy_source:x", "its module needs surely_not_installed_anywhere"),
    ],
)
def test_what_cannot_be_found(module, reference, message):
    with pytest.raises(ValueError, match=message):
        find_factory(reference)


def test_options_must_be_json(module):
    with pytest.raises(ValueError, match="options must be JSON values"):
        load_plugin("my_source:bright", {"level": {1, 2}})


MASK = np.ones((64, 96), bool)


@pytest.mark.parametrize(
    "results, message",
    [
        ([], "0 results for 1 images"),
        (None, "must return one result an image, got None"),
        ([{"masks": None}], "000.png: masks must be an array or a list, got None"),
        ([{"masks": [MASK], "score": [0.5]}], "000.png: a result has masks, scores and labels, not 'score'"),
        ([3], "000.png: a result is a Proposals or has 'masks', got int"),
        ([{"masks": [MASK[:5]]}], r"000.png: a mask must be bool \(64, 96\) \(height, width\), got bool \(5, 96\)"),
        ([{"masks": [MASK * 0.5]}], "got float64"),
        ([{"masks": [MASK], "scores": [0.1, 0.2]}], "scores must be 1 numbers from 0 to 1"),
        ([{"masks": [MASK], "scores": [float("nan")]}], "scores must be 1 numbers"),
        ([{"masks": [MASK], "scores": ["high"]}], "scores must be 1 numbers"),
        ([{"masks": [MASK], "labels": [0]}], "labels, but the source has no vocabulary"),
    ],
)
def test_wrong_results_are_named(tmp_path, results, message):
    dataset = image_folder(tmp_path, 1)
    source = PluginLabeler(lambda images, rows: results, "my:source")
    with pytest.raises(ValueError, match=message) as caught:
        source([dataset.load_image(0)], dataset.rows)
    assert str(caught.value).startswith("labeler my:source")


def test_labels_are_checked_and_empty_masks_left_out(tmp_path):
    dataset = image_folder(tmp_path, 1)

    given = {}

    def propose(images, rows):
        masks = torch.from_numpy(np.stack([MASK, ~MASK, MASK]))
        return [{"masks": masks, "scores": torch.tensor([0.5, 0.6, 0.7]), **given}]

    propose.vocabulary = ["bear", "deer"]
    source = PluginLabeler(propose, "my:source")
    image = [dataset.load_image(0)]
    given["labels"] = [1, 0, -1]
    (found,) = source(image, dataset.rows)
    assert isinstance(found, Proposals) and found.labels.tolist() == [1, -1] and len(found) == 2
    assert found.scores.tolist() == pytest.approx([0.5, 0.7])
    for given["labels"] in ([0, 1, 2], [0, 1], [0.5, 0, 0], None):
        with pytest.raises(ValueError, match="labels"):
            source(image, dataset.rows)


def test_options_that_are_needed(tmp_path, monkeypatch):
    (tmp_path / "needy.py").write_text(
        "def source(level: int):\n    return lambda images, rows: [{'masks': [], 'scores': []} for _ in images]\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="needy:source: missing a required argument: 'level'"):
        load_plugin("needy:source")
    assert load_plugin("needy:source", {"level": 3}).settings["options"] == {"level": 3}
    kind = settings_of_factory("needy:source")
    assert build_settings(kind, {"level": "3"}).options == {"level": 3}
    with pytest.raises(ConfigError, match=r"`labeler.level` has to be given"):
        build_settings(kind, {}, "labeler.")


def test_calibration_must_be_json():
    class Source:
        vocabulary = "abc"

        def __call__(self, images, rows):
            return []

        def measure(self, images, rows):
            return [np.float32(1)]

    with pytest.raises(ValueError, match="vocabulary must be a list of class names, got 'abc'"):
        PluginLabeler(Source(), "my:source")
    Source.vocabulary = ["abc"]
    with pytest.raises(ValueError, match="my:source: measure must return JSON values"):
        PluginLabeler(Source(), "my:source").measure([])
