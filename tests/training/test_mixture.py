"""Pseudo labels mixed into fine-tuning: which images a step sees, whose classes they have, and resuming."""

import json
import shutil

import pytest
from training_helpers import assert_same_run, stop_at

from uplvp_hf.data import load_dataset_rows
from uplvp_hf.data.errors import DataError
from uplvp_hf.data.synthetic import write_scenes
from uplvp_hf.training import share as shares
from uplvp_hf.training.config import ConfigError, load_settings
from uplvp_hf.training.mixture import extra_count, load_extra
from uplvp_hf.training.share import share_of
from uplvp_hf.training.stream import SampleKeys


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    """Other scenes of the same classes, under other category ids and with a class that nobody else has."""
    folder = tmp_path_factory.mktemp("more") / "scenes"
    write_scenes(folder, 5, seed=9, size=96)
    file = folder / "annotations" / "instances.json"
    content = json.loads(file.read_text())
    for category in content["categories"]:
        category["id"] += 100
    for annotation in content["annotations"]:
        annotation["category_id"] += 100
    content["categories"].append({"id": 7, "name": "unheard of"})
    content["annotations"].append({**content["annotations"][0], "id": 10**6, "category_id": 7})
    file.write_text(json.dumps(content))
    return folder


def keys(settings, start=0, rank=0, world=1):
    return list(SampleKeys(4, settings, start, rank, world, extra=6))


def test_every_step_has_its_share_whatever_the_processes():
    optim = {"steps": 12, "batch_size": 4, "accumulation": 2}
    settings = load_settings(None, ["data.extra_share=0.75,0.25"], seed=3, optim=optim)
    counts = [extra_count(step, 12, [0.75, 0.25], 8) for step in range(12)]
    assert counts[0] == 6 and counts[-1] == 2 and sorted(counts, reverse=True) == counts
    batches = keys(settings)
    for step, count in enumerate(counts):
        micro = batches[2 * step : 2 * step + 2]
        assert [sum(index >= 4 for _, index in batch) for batch in micro] == [count // 2, count - count // 2]
    flat = [key for batch in batches for key in batch]
    for low, high in ((0, 4), (4, 10)):  # every image of each source once an epoch
        part = [key for key in flat if low <= key[1] < high]
        epochs = [[index for epoch, index in part if epoch == e] for e in range(len(part) // (high - low))]
        assert all(sorted(epoch) == list(range(low, high)) for epoch in epochs) and len(epochs) > 3
    assert keys(settings, 5) == batches[10:]
    halved = load_settings(None, ["data.extra_share=0.75,0.25", "optim.batch_size=2"], seed=3, optim=optim)
    ranks = [keys(halved, 0, rank, 2) for rank in range(2)]
    assert [key for pair in zip(*ranks, strict=True) for batch in pair for key in batch] == flat


def test_classes_go_by_name_and_validation_images_stay_out(more, scenes_dir, tmp_path):
    train = load_dataset_rows(scenes_dir)
    extra = load_extra(load_settings(None, [f"data.extra={more}"]), train, None)
    names = {c["id"]: c["name"] for c in load_dataset_rows(more).categories}
    for row, before in zip(extra.rows, load_dataset_rows(more).rows, strict=True):
        kept = [names[k] for k in before["objects"]["category_id"] if names[k] != "unheard of"]
        assert [extra.id2label[extra.category_ids.index(k)] for k in row["objects"]["category_id"]] == kept
        assert len(row["objects"]["segmentation"]) == len(kept)
    assert extra.categories == train.categories
    val = load_dataset_rows(more).subset([0, 1])
    without = load_extra(load_settings(None, [f"data.extra={more}"]), train, val)
    assert [row["image_id"] for row in without.rows] == [row["image_id"] for row in extra.rows[2:]]
    assert "2 images are left out" in without.failures[-1]["reason"]
    copied = shutil.copytree(more, tmp_path / "copied")  # the same images under another path
    content = load_extra(load_settings(None, [f"data.extra={more}"]), train, load_dataset_rows(copied).subset([0, 1]))
    assert content.rows == without.rows
    with pytest.raises(DataError, match="validation images and labeled images only"):
        load_extra(load_settings(None, [f"data.extra={more}"]), train, load_dataset_rows(more))
    train.categories = [{"id": 1, "name": "otter"}]
    with pytest.raises(ConfigError, match=r"none of the classes of `data\.train` \(otter\)"):
        load_extra(load_settings(None, [f"data.extra={more}"]), train, None)


@pytest.mark.slow
def test_a_mixed_run_trains_on_both_and_resumes_exactly(run, more, tmp_path, monkeypatch, caplog):
    words = ["stage=finetune", f"data.extra={more}", "data.extra_share=0.5", "optim.steps=6", "log_every=1"]
    caplog.set_level("INFO", logger="uplvp_hf")
    run("whole", *words)
    assert "Mixed in: 5 images" in caplog.text
    assert json.loads((tmp_path / "whole" / "training_summary.json").read_text())["extra_images"] == 5
    run("alone", "stage=finetune", "optim.steps=6", "log_every=1")
    assert (tmp_path / "whole" / "log.jsonl").read_text() != (tmp_path / "alone" / "log.jsonl").read_text()
    stop_at(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        run("stopped", *words)
    run("stopped", *words, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_shares_are_checked():
    with pytest.raises(ConfigError, match=r"data\.extra_share"):
        load_settings(None, ["data.extra_share=1.5"])
    with pytest.raises(ConfigError, match="one or two shares"):
        load_settings(None, ["data.extra_share=0.1,0.2,0.3"])


def pretrained(folder, **data):
    """What a pre-training leaves, as far as `data.extra=pretraining` reads it."""
    folder.mkdir(exist_ok=True)
    words = [f"data.{key}={value}" for key, value in data.items()]
    settings = load_settings(None, words, stage="pretrain").to_dict()
    settings["model"]["class_agnostic"] = data.get("train") is None
    settings["data"]["train"] = data.get("train") or "anywhere"
    (folder / "training_summary.json").write_text(json.dumps({"settings": settings}))
    return folder


def test_the_labels_of_pretraining_are_the_default(more, scenes_dir, tmp_path, caplog):
    caplog.set_level("INFO", logger="uplvp_hf")
    train = load_dataset_rows(scenes_dir)
    init = pretrained(tmp_path / "init", train=str(more))

    def extra(*words, stage="finetune"):
        caplog.clear()
        return load_extra(load_settings(None, [f"model.init={init}", *words], stage=stage), train, None)

    found = extra()
    given = load_extra(load_settings(None, [f"data.extra={more}"]), train, None)
    assert [row["objects"] for row in found.rows] == [row["objects"] for row in given.rows]
    assert str(more) in caplog.text
    assert extra("data.extra=null") is None and extra(stage="pretrain") is None and not caplog.text
    # A teacher labels the images anew; both may teach.
    assert extra("data.unlabeled=images") is None
    assert len(extra("data.unlabeled=images", "teacher.mix_pretraining=true")) == len(found)
    assert load_extra(load_settings(None), train, None) is None
    train.categories.append({"id": 99, "name": "otter"})  # on its images otters would count as background
    assert extra() is None and "has no class otter" in caplog.text
    train.categories.pop()
    pretrained(init, train=str(tmp_path / "moved"))
    assert extra() is None and f"no longer at {tmp_path / 'moved'}" in caplog.text
    pretrained(init)
    assert extra() is None and "without classes" in caplog.text


@pytest.mark.parametrize(("ap50", "share"), [(0.0, 0.0), (0.25, 0.0), (0.4, 0.15), (0.75, 0.5), (1.0, 0.5)])
def test_the_share_follows_what_the_pretrained_model_finds(ap50, share):
    assert share_of(ap50) == pytest.approx(share)


def labeled_scenes(more, folder):
    """Two other scenes of the classes of `more`."""
    labeled = folder / "labeled"
    write_scenes(labeled, 2, seed=10, size=96)
    file = labeled / "annotations" / "instances.json"
    content = json.loads(file.read_text())
    names = json.loads((more / "annotations" / "instances.json").read_text())["categories"]
    content["categories"] = [{"id": category["id"], "name": category["name"]} for category in names]
    for annotation in content["annotations"]:
        annotation["category_id"] += 100
    file.write_text(json.dumps(content))
    return labeled


@pytest.mark.slow
def test_a_run_chooses_its_share_once(run, more, tmp_path, monkeypatch, caplog):
    """A model that finds nothing mixes nothing in, to the bit; another share is the same as one that is given, also
    where the run broke off."""
    caplog.set_level("INFO", logger="uplvp_hf")
    run("before", f"data.train={more}", "optim.steps=2")
    words = ["stage=finetune", f"model.init={tmp_path / 'before'}", "log_every=1", "optim.steps=6"]
    words += [f"data.train={labeled_scenes(more, tmp_path)}"]
    run("chosen", *words)
    assert json.loads((tmp_path / "chosen" / "extra_share.json").read_text()) == {
        "share": 0.0,
        "ap50": 0.0,
        "images": 2,
    }
    assert "so 0 % of the images of a step" in caplog.text
    run("none", *words, "data.extra_share=0")
    assert_same_run(tmp_path / "chosen", tmp_path / "none")
    monkeypatch.setattr(shares, "NOTHING_BELOW", -0.5)  # now the same model would keep half of them
    run("half", *words)
    run("given", *words, "data.extra_share=0.5")
    assert_same_run(tmp_path / "half", tmp_path / "given")
    with monkeypatch.context() as patched:
        stop_at(patched, 4)
        with pytest.raises(KeyboardInterrupt):
            run("stopped", *words)
    monkeypatch.setattr(shares, "NOTHING_BELOW", 0.25)
    run("stopped", *words, resume=True)  # with the share that it began with
    assert_same_run(tmp_path / "half", tmp_path / "stopped")


def test_labeled_images_are_not_mixed_in_again(more):
    labeled = load_dataset_rows(more).subset([1, 3])
    extra = load_extra(load_settings(None, [f"data.extra={more}"]), labeled, None)
    assert [row["image_id"] for row in extra.rows] == [load_dataset_rows(more)[k]["image_id"] for k in (0, 2, 4)]
    assert not extra.failures
