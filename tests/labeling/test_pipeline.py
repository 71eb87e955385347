"""The store and the pipeline: resuming, failures, refusals, names."""

import json
import os

import numpy as np
import pytest
from labeling_helpers import picture_folder, tiny_clip, tiny_encoder

from uplvp_hf.data import decode_segmentation, read_store
from uplvp_hf.labeling import store as store_module
from uplvp_hf.labeling.foreground import ForegroundLabeler
from uplvp_hf.labeling.language_vision import DenseClipLabeler
from uplvp_hf.labeling.namers import AgnosticNamer, ClassifierNamer
from uplvp_hf.labeling.pipeline import label_images
from uplvp_hf.labeling.store import StoreError

QUIET = {"progress": False, "shard_size": 3, "batch_size": 2}


def foreground(**options):
    return ForegroundLabeler(tiny_encoder(), (64,), (64,), grid=48, min_area=0.001, **options)


def classifier_namer(mode="picture"):
    return ClassifierNamer(tiny_encoder(), {"bear": [0, 3], "deer": [1], "otter": [5]}, mode, image_size=64)


def rows_of(folder):
    return {row["image_id"]: row for row in read_store(folder).rows}


class Killed(BaseException):
    pass


def test_a_killed_run_resumes_to_the_same_rows(tmp_path, monkeypatch):
    dataset = picture_folder(tmp_path / "pictures", 11)
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
    assert len(rows_of(tmp_path / "killed")) == 6  # two finished shards, all readable
    (tmp_path / "killed" / ".rows-00000-00002.jsonl.1.tmp").write_text('{"half a row')

    rest = label_images(dataset, foreground(), classifier_namer(), tmp_path / "killed", **QUIET)
    assert (rest.done, rest.skipped) == (5, 6)
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")
    again = label_images(dataset, foreground(), classifier_namer(), tmp_path / "killed", **QUIET)
    assert (again.done, again.skipped) == (0, 11)


def test_a_full_disk_keeps_what_was_written(tmp_path, monkeypatch):
    dataset = picture_folder(tmp_path / "pictures", 8)
    writes = []
    real = os.fsync

    def full(descriptor):
        writes.append(descriptor)
        if len(writes) > 3:  # header, two shards
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(store_module.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        label_images(dataset, foreground(), None, tmp_path / "labels", **QUIET)
    monkeypatch.undo()
    assert len(rows_of(tmp_path / "labels")) == 6
    assert not [name for name in os.listdir(tmp_path / "labels") if name.endswith(".tmp")]
    assert label_images(dataset, foreground(), None, tmp_path / "labels", **QUIET).done == 2


def test_an_interrupt_keeps_the_rows_in_hand(tmp_path):
    dataset = picture_folder(tmp_path / "pictures", 4)
    labeler = foreground()
    calls = []

    class Interrupted(ForegroundLabeler):
        def __call__(self, images, rows=None):
            calls.append(len(images))
            if len(calls) == 2:
                raise KeyboardInterrupt
            return super().__call__(images, rows)

    labeler.__class__ = Interrupted
    with pytest.raises(KeyboardInterrupt):
        label_images(dataset, labeler, None, tmp_path / "labels", **QUIET)
    assert len(rows_of(tmp_path / "labels")) == 2


def test_truncated_pictures_are_listed_and_tried_again(tmp_path):
    dataset = picture_folder(tmp_path / "pictures", 5)
    broken = tmp_path / "pictures" / "002.png"
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
    dataset = picture_folder(tmp_path / "pictures", 2)
    label_images(dataset, foreground(), None, tmp_path / "labels", **QUIET)
    with pytest.raises(StoreError, match=r"settings.strength: 3.0 in the store, 0.5 now"):
        label_images(dataset, foreground(strength=0.5), None, tmp_path / "labels", **QUIET)
    with pytest.raises(StoreError, match=r"settings.namer.name: None in the store, 'classifier' now"):
        label_images(dataset, foreground(), classifier_namer(), tmp_path / "labels", **QUIET)
    with pytest.raises(StoreError, match="already holds"):
        label_images(dataset, foreground(), None, tmp_path / "labels", resume=False, **QUIET)
    with pytest.raises(StoreError, match="is not empty"):
        label_images(dataset, foreground(), None, tmp_path / "pictures", **QUIET)


def test_rows_are_complete_and_processes_share_the_work(tmp_path):
    dataset = picture_folder(tmp_path / "pictures", 5)
    for rank in (0, 1):
        label_images(
            dataset, foreground(), None, tmp_path / "labels", image_root=tmp_path, rank=rank, world_size=2, **QUIET
        )
    names = sorted(os.listdir(tmp_path / "labels"))
    assert "rows-00000-00000.jsonl" in names and "rows-00001-00000.jsonl" in names
    line = json.loads((tmp_path / "labels" / "rows-00001-00000.jsonl").read_text().splitlines()[0])
    assert line["image"] == "pictures/001.png"
    stored = read_store(tmp_path / "labels")
    assert len(stored) == 5 and [category["name"] for category in stored.categories] == ["object"]
    for index, row in enumerate(stored.rows):
        assert (row["width"], row["height"]) == stored.load_image(index).size == (96, 64)
        for k in range(len(row["objects"]["score"])):
            mask = decode_segmentation(row["objects"]["segmentation"][k], 64, 96)
            y, x = np.nonzero(mask)
            box = [x.min(), y.min(), x.max() + 1 - x.min(), y.max() + 1 - y.min()]
            assert row["objects"]["bbox"][k] == box and row["objects"]["area"][k] == mask.sum()


def test_calibration_is_kept_for_the_rest_of_a_run(tmp_path):
    dataset = picture_folder(tmp_path / "pictures", 6)
    clip = tiny_clip()
    options = {"image_size": 48, "window": 32, "stride": 16, "threshold": 0.3}
    label_images(dataset, DenseClipLabeler(clip, ["bear", "deer"], **options), None, tmp_path / "whole", **QUIET)
    label_images(
        dataset.subset(range(2)), DenseClipLabeler(clip, ["bear", "deer"], **options), None, tmp_path / "parts", **QUIET
    )
    state = json.loads((tmp_path / "parts" / "header.json").read_text())["state"]
    assert state["calibration"]["pictures"] == 2
    label_images(dataset, DenseClipLabeler(clip, ["bear", "deer"], **options), None, tmp_path / "parts", **QUIET)
    assert json.loads((tmp_path / "parts" / "header.json").read_text())["state"] == state
    stored = read_store(tmp_path / "whole")
    assert len(stored) == 6 and [c["name"] for c in stored.categories] == ["bear", "deer"]
    assert any(row["objects"]["score"] for row in stored.rows)


def test_confidence_floor_and_agnostic_namer(tmp_path):
    dataset = picture_folder(tmp_path / "pictures", 4)
    summary = label_images(dataset, foreground(), classifier_namer(), tmp_path / "none", min_confidence=1.01, **QUIET)
    assert (summary.done, summary.instances) == (4, 0)
    clip = tiny_clip()
    labeler = DenseClipLabeler(clip, ["bear", "deer"], image_size=48, window=32, stride=16, threshold=0.3)
    label_images(dataset, labeler, AgnosticNamer(), tmp_path / "agnostic", **QUIET)
    assert [c["name"] for c in read_store(tmp_path / "agnostic").categories] == ["object"]
