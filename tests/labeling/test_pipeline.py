"""The store and the pipeline: resuming, failures, refusals, names."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import label_tiny
import numpy as np
import processes
import pytest
from labeling_helpers import image_folder, tiny_clip, tiny_encoder

from uplvp_hf.data import DataError, decode_segmentation, encode_masks, load_dataset_rows, read_store
from uplvp_hf.labeling import store as store_module
from uplvp_hf.labeling.labelers.dense_clip import DenseClipLabeler
from uplvp_hf.labeling.labelers.foreground import ForegroundLabeler
from uplvp_hf.labeling.naming.agnostic import AgnosticNamer
from uplvp_hf.labeling.naming.classifier import ClassifierNamer
from uplvp_hf.labeling.pipeline import label_images
from uplvp_hf.labeling.store import StoreError
from uplvp_hf.models.errors import UserError
from uplvp_hf.settings import ConfigError

CLASS_MAP = {"bear": [0, 3], "deer": [1], "otter": [5]}
QUIET = {"progress": False, "shard_size": 3, "batch_size": 2}


def foreground(**options):
    return ForegroundLabeler(
        tiny_encoder(), norm_sizes=(64,), component_sizes=(64,), grid=48, min_area=0.001, **options
    )


def classifier_namer(mode="image"):
    return ClassifierNamer(tiny_encoder(), class_map=CLASS_MAP, mode=mode, image_size=64)


def rows_of(folder):
    return {row["image_id"]: row for row in read_store(folder).rows}


class Killed(BaseException):
    pass


def test_a_killed_run_resumes_to_the_same_rows(tmp_path, monkeypatch):
    dataset = image_folder(tmp_path / "images", 11)
    whole = label_images(dataset, foreground(), classifier_namer(), tmp_path / "whole", **QUIET)
    assert (whole.done, whole.skipped, whole.failed) == (11, 0, 0) and whole.instances > 0

    real = os.replace

    def dies_at_the_third_shard(source, target):
        if str(target).endswith("00002.jsonl"):
            raise Killed
        real(source, target)

    monkeypatch.setattr(store_module.os, "replace", dies_at_the_third_shard)
    monkeypatch.setattr(store_module.StoreWriter, "__exit__", lambda *_: None)  # a kill leaves no time to tidy up
    with pytest.raises(Killed):
        label_images(dataset, foreground(), classifier_namer(), tmp_path / "killed", **QUIET)
    monkeypatch.undo()
    assert len(rows_of(tmp_path / "killed")) == 8  # two finished shards of two whole batches each, all readable
    (tmp_path / "killed" / ".rows-00000-00002.jsonl.1.tmp").write_text('{"half a row')

    rest = label_images(dataset, foreground(), classifier_namer(), tmp_path / "killed", **QUIET)
    assert (rest.done, rest.skipped) == (3, 8)
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")
    again = label_images(dataset, foreground(), classifier_namer(), tmp_path / "killed", **QUIET)
    assert (again.done, again.skipped) == (0, 11)


def test_a_full_disk_keeps_what_was_written(tmp_path, monkeypatch):
    dataset = image_folder(tmp_path / "images", 11)
    writes = []
    real = os.fsync

    def full(descriptor):
        writes.append(descriptor)
        if len(writes) > 6:  # header, two shards with their features, and what made these
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(store_module.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        label_images(dataset, foreground(), None, tmp_path / "labels", **QUIET)
    monkeypatch.undo()
    assert len(rows_of(tmp_path / "labels")) == 8
    assert not [name for name in os.listdir(tmp_path / "labels") if name.endswith(".tmp")]
    assert label_images(dataset, foreground(), None, tmp_path / "labels", **QUIET).done == 3


def test_an_interrupt_keeps_the_rows_in_hand(tmp_path):
    dataset = image_folder(tmp_path / "images", 4)
    labeler = foreground()
    calls = []

    class Interrupted(ForegroundLabeler):
        def begin(self, images, rows=None):
            calls.append(len(images))
            if len(calls) == 2:
                raise KeyboardInterrupt
            return super().begin(images, rows)

    labeler.__class__ = Interrupted
    with pytest.raises(KeyboardInterrupt):
        label_images(dataset, labeler, None, tmp_path / "labels", **QUIET)
    assert len(rows_of(tmp_path / "labels")) == 2


def test_truncated_images_are_listed_and_tried_again(tmp_path):
    dataset = image_folder(tmp_path / "images", 5)
    broken = tmp_path / "images" / "002.png"
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 2])
    summary = label_images(dataset, foreground(), None, tmp_path / "labels", **QUIET)
    assert (summary.done, summary.failed) == (4, 1)
    stored = read_store(tmp_path / "labels")
    assert "002.png" not in {row["image_id"] for row in stored.rows}
    (failure,) = stored.failures
    assert failure["file"] == str(broken) and "decoded" in failure["reason"]
    broken.write_bytes(content)
    assert label_images(dataset, foreground(), None, tmp_path / "labels", **QUIET).done == 1
    stored = read_store(tmp_path / "labels")
    assert len(stored) == 5 and stored.failures == []


def test_other_settings_are_refused_with_the_difference(tmp_path):
    dataset = image_folder(tmp_path / "images", 2)
    label_images(dataset, foreground(), None, tmp_path / "labels", **QUIET)
    with pytest.raises(StoreError, match=r"settings.strength: 3.0 in the store, 0.5 now"):
        label_images(dataset, foreground(strength=0.5), None, tmp_path / "labels", **QUIET)
    with pytest.raises(StoreError, match=r"settings.namer.name: None in the store, 'classifier' now"):
        label_images(dataset, foreground(), classifier_namer(), tmp_path / "labels", **QUIET)
    with pytest.raises(StoreError, match="already holds"):
        label_images(dataset, foreground(), None, tmp_path / "labels", resume=False, **QUIET)
    with pytest.raises(StoreError, match="is not empty"):
        label_images(dataset, foreground(), None, tmp_path / "images", **QUIET)


def test_rows_are_complete(tmp_path):
    dataset = image_folder(tmp_path / "images", 5)
    label_images(dataset, foreground(), None, tmp_path / "labels", image_root=tmp_path, **QUIET)
    line = json.loads((tmp_path / "labels" / "rows-00000-00000.jsonl").read_text().splitlines()[1])
    assert line["image"] == "images/001.png"
    stored = read_store(tmp_path / "labels")
    assert len(stored) == 5 and [category["name"] for category in stored.categories] == ["object"]
    for index, row in enumerate(stored.rows):
        assert (row["width"], row["height"]) == stored.load_image(index).size == (96, 64)
        for k in range(len(row["objects"]["score"])):
            mask = decode_segmentation(row["objects"]["segmentation"][k], 64, 96)
            y, x = np.nonzero(mask)
            box = [x.min(), y.min(), x.max() + 1 - x.min(), y.max() + 1 - y.min()]
            assert row["objects"]["bbox"][k] == box and row["objects"]["area"][k] == mask.sum()


def lines_of(folder):
    return b"".join(file.read_bytes() for file in sorted(folder.glob("rows-*.jsonl"))).splitlines()


SCRIPT = Path(__file__).with_name("label_tiny.py")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """30 images, one of them broken, and their labels by one process in one go."""
    folder = tmp_path_factory.mktemp("undisturbed")
    image_folder(folder / "images", 30)
    (folder / "images" / "013.png").write_bytes((folder / "images" / "013.png").read_bytes()[:3000])
    summary = label_tiny.run(folder / "images", folder / "labels")
    assert (summary.done, summary.failed) == (29, 1) and summary.instances > 29
    return folder


@pytest.mark.slow
def test_a_run_that_is_killed_from_outside_ends_with_the_same_bytes(undisturbed, tmp_path):
    second = tmp_path / "labels" / "rows-00000-00001.jsonl"
    processes.Child(SCRIPT, undisturbed / "images", tmp_path / "labels").kill_when(second.exists)
    finished = len(lines_of(tmp_path / "labels"))
    assert 14 <= finished < 29
    rest = label_tiny.run(undisturbed / "images", tmp_path / "labels")
    assert (rest.done, rest.skipped, rest.failed) == (29 - finished, finished, 1)
    for file in sorted((undisturbed / "labels").iterdir()):
        assert (tmp_path / "labels" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.slow
def test_two_processes_write_the_rows_of_one(undisturbed, tmp_path):
    printed = "".join(processes.run_together(SCRIPT, undisturbed / "images", tmp_path / "labels"))
    assert printed.count("'done': 29, 'skipped': 0, 'failed': 1") == 2 and "'processes': 2" in printed
    names = {file.name.rpartition("-")[0] for file in (tmp_path / "labels").glob("rows-*")}
    assert names == {"rows-00000", "rows-00001"}  # both had a part
    assert sorted(lines_of(tmp_path / "labels")) == sorted(lines_of(undisturbed / "labels"))
    for name in ("header.json", "failures.jsonl"):
        assert (tmp_path / "labels" / name).read_bytes() == (undisturbed / "labels" / name).read_bytes()
    assert not list((tmp_path / "labels").glob("failures-*"))


def test_a_block_with_an_image_to_repair_is_labeled_as_if_nothing_had_happened(undisturbed, tmp_path):
    shutil.copytree(undisturbed / "images", tmp_path / "images")
    label_tiny.run(tmp_path / "images", tmp_path / "labels")
    image_folder(tmp_path / "images", 30)
    assert label_tiny.run(tmp_path / "images", tmp_path / "labels").done == 1
    state = json.loads((tmp_path / "labels" / "header.json").read_text())["state"]
    (line,) = [json.loads(line) for line in lines_of(tmp_path / "labels") if b'"013.png"' in line]
    labeler, dataset = label_tiny.tiny_labeler(), load_dataset_rows(tmp_path / "images")
    labeler.restore(state)
    block = labeler([dataset.load_image(k) for k in range(12, 16)])
    assert line["objects"]["segmentation"] == encode_masks(block[1].masks)
    assert line["objects"]["score"] == [round(float(score), 5) for score in block[1].scores]


def test_two_runs_on_one_folder_do_not_mix(tmp_path):
    dataset = image_folder(tmp_path / "images", 2)
    other = dataset.subset([0])

    labeler, seen = foreground(), []
    inner = labeler.begin

    def meddle(images, rows=None):
        with pytest.raises(UserError, match="another run is writing"):
            label_images(other, foreground(), None, tmp_path / "labels", progress=False)
        seen.append(len(images))
        return inner(images, rows)

    labeler.begin = meddle
    label_images(dataset, labeler, None, tmp_path / "labels", progress=False)
    assert seen == [2]
    assert len(read_store(tmp_path / "labels")) == 2
    names = ["complete.json", "features-00000-00000.npy", "features.json", "header.json"]
    names += ["rows-00000-00000.jsonl"]
    assert sorted(path.name for path in (tmp_path / "labels").iterdir()) == names
    label_images(dataset, foreground(), None, tmp_path / "labels", progress=False)  # and may go on afterwards
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    with pytest.raises(StoreError, match="holds no pseudo-label store"):
        label_images(dataset, foreground(), None, tmp_path / "mine", progress=False)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]


def test_too_many_failures_are_an_error_at_the_end(tmp_path):
    dataset = image_folder(tmp_path / "images", 5)
    for k in (0, 2):
        (tmp_path / "images" / f"{k:03d}.png").write_bytes(b"broken")
    with pytest.raises(StoreError, match=r"2 of 5 images failed.*0\.3.*failures\.jsonl"):
        label_images(dataset, foreground(), None, tmp_path / "labels", max_failed=0.3, **QUIET)
    assert len(rows_of(tmp_path / "labels")) == 3
    assert label_images(dataset, foreground(), None, tmp_path / "labels", max_failed=0.4, **QUIET).failed == 2


def test_a_labeler_may_fail_for_one_image(tmp_path):
    dataset = image_folder(tmp_path / "images", 4)

    class Picky(ForegroundLabeler):
        def begin(self, images, rows=None):
            if any(row["image_id"] == "001.png" for row in rows):
                raise DataError("has no features", file="features.npz", row="001")
            return super().begin(images, rows)

    labeler = foreground()
    labeler.__class__ = Picky
    summary = label_images(dataset, labeler, None, tmp_path / "labels", **QUIET)
    assert (summary.done, summary.failed) == (3, 1)
    (failure,) = read_store(tmp_path / "labels").failures
    assert failure["file"] == dataset[1]["image"] and failure["reason"] == "features.npz, 001: has no features"


def test_unnamed_masks_are_dropped_or_kept_as_objects(tmp_path):
    dataset = image_folder(tmp_path / "images", 3)

    class Alternating:
        name, names, settings = "alternating", ["bear"], {}

        def __call__(self, images, proposals):
            return [
                replace(p, labels=np.arange(len(p)) % 2 - 1, confidences=np.full(len(p), 0.5, dtype=np.float32))
                for p in proposals
            ]

    (found,) = foreground()([dataset.load_image(0)])
    masks = {"all": len(found)}
    label_images(dataset, foreground(), Alternating(), tmp_path / "drop", **QUIET)
    label_images(dataset, foreground(), Alternating(), tmp_path / "keep", unnamed="keep", **QUIET)
    drop, keep = rows_of(tmp_path / "drop"), rows_of(tmp_path / "keep")
    assert [category["name"] for category in read_store(tmp_path / "keep").categories] == ["bear", "object"]
    kept = keep["000.png"]["objects"]
    assert kept["score"] == pytest.approx(found.scores * 0.5, abs=1e-4)  # unnamed masks are no surer than named ones
    assert len(kept["score"]) == masks["all"] and kept["category_id"] == [2, 1] * (masks["all"] // 2) + [2] * (
        masks["all"] % 2
    )
    for name in drop:
        named = [k for k, category in enumerate(keep[name]["objects"]["category_id"]) if category == 1]
        for key, values in drop[name]["objects"].items():
            assert values == [keep[name]["objects"][key][k] for k in named]
    with pytest.raises(ConfigError, match="`unnamed` must be one of drop, keep, got `maybe`"):
        label_images(dataset, foreground(), None, tmp_path / "x", unnamed="maybe", **QUIET)


def test_calibration_is_kept_for_the_rest_of_a_run(tmp_path):
    dataset = image_folder(tmp_path / "images", 6)
    clip = tiny_clip()
    options = {"image_size": 48, "window": 32, "stride": 16, "threshold": 0.3}
    label_images(dataset, DenseClipLabeler(clip, ["bear", "deer"], **options), None, tmp_path / "whole", **QUIET)
    label_images(
        dataset.subset(range(2)), DenseClipLabeler(clip, ["bear", "deer"], **options), None, tmp_path / "parts", **QUIET
    )
    state = json.loads((tmp_path / "parts" / "header.json").read_text())["state"]
    assert state["calibration"]["images"] == 2
    label_images(dataset, DenseClipLabeler(clip, ["bear", "deer"], **options), None, tmp_path / "parts", **QUIET)
    assert json.loads((tmp_path / "parts" / "header.json").read_text())["state"] == state
    stored = read_store(tmp_path / "whole")
    assert len(stored) == 6 and [c["name"] for c in stored.categories] == ["bear", "deer"]
    assert any(row["objects"]["score"] for row in stored.rows)


def test_confidence_floor_and_agnostic_namer(tmp_path):
    dataset = image_folder(tmp_path / "images", 4)
    summary = label_images(dataset, foreground(), classifier_namer(), tmp_path / "none", min_confidence=1.01, **QUIET)
    assert (summary.done, summary.instances) == (4, 0)
    clip = tiny_clip()
    labeler = DenseClipLabeler(clip, ["bear", "deer"], image_size=48, window=32, stride=16, threshold=0.3)
    label_images(dataset, labeler, AgnosticNamer(), tmp_path / "agnostic", **QUIET)
    assert [c["name"] for c in read_store(tmp_path / "agnostic").categories] == ["object"]
