"""Teacher-student runs: what a step sees, that the student learns what the teacher finds, resuming, bad input."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from training_helpers import (
    DESCENT,
    DETERMINISTIC,
    PROCESS,
    TRAIN,
    assert_same_run,
    largest_difference,
    log_of,
    on_two_processes,
    state_of,
    stop_at,
)

from uplvp_hf.data import load_dataset_rows
from uplvp_hf.data.errors import DataError
from uplvp_hf.data.synthetic import write_scenes
from uplvp_hf.models.masks import decode_segmentation
from uplvp_hf.training.config import ConfigError, load_settings
from uplvp_hf.training.optim import with_steps
from uplvp_hf.training.pseudo_labels import ClassThresholds, find_pseudo_instances
from uplvp_hf.training.stream import UnlabeledKeys
from uplvp_hf.training.teacher_settings import TeacherSettings
from uplvp_hf.training.unlabeled import load_unlabeled, same_images

# A random network is sure of nothing: everything counts as found.
FINDS_ALL = ["teacher.class_threshold=0", "teacher.mask_threshold=0", "teacher.burn_in=2", "teacher.ramp=2"]


@pytest.fixture(scope="module")
def unlabeled(tmp_path_factory):
    """Five other scenes."""
    return write_scenes(tmp_path_factory.mktemp("unlabeled") / "scenes", 5, seed=9, size=96)


@pytest.fixture
def words(unlabeled):
    return ["stage=finetune", f"data.unlabeled={unlabeled}", "log_every=1", *FINDS_ALL]


def outputs(scores, masks, classes=3):
    """Of a model of sigmoids: scores (query, class) -> probability, one mask of logits a query."""
    probabilities = torch.full((1, len(masks), classes), 0.01)
    for (query, label), value in scores.items():
        probabilities[0, query, label] = value
    return SimpleNamespace(class_scores=probabilities, masks_queries_logits=torch.stack(masks)[None])


def rectangle(top, left, bottom, right, inside=5.0):
    logits = torch.full((16, 16), -5.0)
    logits[top:bottom, left:right] = inside
    return logits


def test_class_and_mask_have_thresholds_of_their_own():
    """Six queries: sure, a duplicate of it, a poor mask, half believed, nothing, another sure one."""
    masks = [rectangle(0, 0, 8, 8), rectangle(0, 0, 8, 7), rectangle(10, 0, 14, 6, inside=0.2)]
    masks += [rectangle(10, 10, 14, 14), rectangle(0, 10, 4, 14), rectangle(9, 2, 15, 9)]
    scores = {(0, 1): 0.9, (1, 1): 0.8, (2, 0): 0.9, (3, 2): 0.4, (4, 0): 0.1, (5, 0): 0.75}
    settings = TeacherSettings(class_threshold=0.7, mask_threshold=0.8, unsure_threshold=0.3)
    found = find_pseudo_instances(outputs(scores, masks), 0, (62, 64), torch.full((3,), 0.7), settings)
    assert found.labels.tolist() == [1, 0] and found.scores.tolist() == pytest.approx([0.9, 0.75])
    assert found.qualities.tolist() == pytest.approx([0.99331] * 2, abs=1e-4)
    mask = decode_segmentation(found.rles[0], 62, 64)
    assert mask[:30, :30].all() and not mask[34:].any() and not mask[:, 34:].any()
    assert len(found.unsure) == 2  # the poor mask and the half believed one, not the duplicate
    assert decode_segmentation(found.unsure[0], 62, 64)[42:54, 2:22].all()
    strict = find_pseudo_instances(outputs(scores, masks), 0, (62, 64), torch.tensor([0.7, 0.95, 0.7]), settings)
    assert strict.labels.tolist() == [0] and len(strict.unsure) == 3


def test_softmax_models_leave_no_object_out():
    logits = torch.tensor([[[0.0, 3.0, 0.0, 0.0], [0.0, 0.0, 1.0, 5.0]]])
    given = SimpleNamespace(
        class_scores=None, class_queries_logits=logits,
        masks_queries_logits=torch.stack([rectangle(0, 0, 8, 8), rectangle(9, 9, 15, 15)])[None],
    )  # fmt: skip
    found = find_pseudo_instances(given, 0, (64, 64), torch.full((3,), 0.5), TeacherSettings())
    assert found.labels.tolist() == [1]
    assert torch.allclose(found.probabilities[0], logits[0, 0].softmax(-1)[:3])


def test_thresholds_fall_for_classes_that_are_seldom_found():
    even = ClassThresholds(TeacherSettings(class_threshold=0.8), 3)
    even.update(torch.tensor([9, 1, 0]))
    assert even.values().tolist() == pytest.approx([0.8] * 3)
    own = ClassThresholds(TeacherSettings(class_threshold=0.8, adaptive=0.5), 3)
    own.update(torch.tensor([9, 3, 0]))
    third = (1 / 3) / (2 - 1 / 3)
    assert own.values().tolist() == pytest.approx([0.8, 0.8 * (1 - 0.5 * (1 - third)), 0.4])


def test_every_unlabeled_image_is_seen_once_an_epoch_whatever_the_processes():
    settings = load_settings(None, ["optim.steps=12", "teacher.batch_size=2", "teacher.burn_in=2"])
    keys = list(UnlabeledKeys(8, settings, 2, 2))
    flat = [key for batch in keys for key in batch]
    for epoch in range(2):
        assert sorted(index for number, index in flat if number == epoch) == list(range(8))
    assert list(UnlabeledKeys(8, settings, 7, 2)) == keys[5:]
    halved = load_settings(None, ["optim.steps=12", "teacher.batch_size=1", "teacher.burn_in=2"])
    ranks = [list(UnlabeledKeys(8, halved, 2, 2, rank, 2)) for rank in range(2)]
    assert [key for pair in zip(*ranks, strict=True) for batch in pair for key in batch] == flat


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mask2former", "knet", "queryinst"])
def test_every_segmenter_learns_from_unlabeled_images(run, segmenters, words, tmp_path, kind):
    # At this rate the masks stay as random as they are, and so are not empty.
    run("run", *words, f"model.segmenter={json.dumps(segmenters[kind])}", "teacher.measure=true", "optim.lr=1e-5")
    lines = log_of(tmp_path / "run")
    assert not any(key.startswith(("unsup", "pseudo")) for line in lines[:2] for key in line)  # burn-in
    for line in lines[2:]:
        assert {"unsup_class", "unsup_mask", "pseudo_instances", "pseudo_quality", "pseudo_precision"} <= line.keys()
        terms = [value for key, value in line.items() if key[-1].isdigit() or key in ("semantic",) or "unsup" in key]
        terms += [line[key] for key in ("initial_mask", "initial_dice") if key in line]
        assert line["loss"] == pytest.approx(sum(terms), rel=1e-5) and line["pseudo_instances"] > 0
    assert lines[2]["unsup_class"] > 0


@pytest.mark.slow
def test_a_stopped_run_resumes_to_the_same_bytes(run, words, unlabeled, tmp_path, monkeypatch):
    more = ["teacher.adaptive=0.5", "teacher.measure=true", "optim.accumulation=2", "optim.batch_size=1"]
    more += ["log_every=3", "data.workers=1"]
    run("whole", *words, *more)
    stop_at(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        run("stopped", *words, *more)
    run("stopped", *words, *more, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    with pytest.raises(ConfigError, match=r"data\.unlabeled"):
        run("stopped", *words[:1], "log_every=3", resume=True)


@pytest.mark.slow
def test_a_teacher_that_finds_nothing_says_so_once(run, words, caplog):
    run("run", *words, "teacher.class_threshold=1", "teacher.patience=2")
    said = [record.getMessage() for record in caplog.records if "no pseudo instance" in record.getMessage()]
    assert len(said) == 1 and "in 2 steps (up to step 4)" in said[0] and "teacher.class_threshold (now 1)" in said[0]


@pytest.mark.slow
def test_two_processes_equal_one_with_the_doubled_batch(run, recipe, words, deterministic, tmp_path):
    """Weights, divisors, and how often the classes were found. A parameter without a gradient would end the second
    update of DistributedDataParallel."""
    more = [*words, *DESCENT, "optim.ema=0.9", "teacher.adaptive=0.5", "teacher.burn_in=1", "teacher.ramp=0"]
    more += ["checkpoint.every=2", "teacher.measure=true"]
    run("one", *more, "optim.batch_size=4")
    script = tmp_path / "distributed.py"
    script.write_text(PROCESS + DETERMINISTIC + TRAIN)
    on_two_processes(script, recipe, tmp_path / "two", *more, "optim.batch_size=2")
    assert largest_difference(tmp_path / "one", tmp_path / "two") < 1e-5
    one, two = (state_of(tmp_path / name / "checkpoint-2")["teacher"] for name in ("one", "two"))
    assert one["counts"] == two["counts"] and sum(one["counts"]) > 0
    for line, other in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        # Shares of the gradient are those of one micro-batch.
        line, other = ({k: v for k, v in one.items() if not k.startswith("gradient_")} for one in (line, other))
        assert line == pytest.approx(other, rel=1e-4)


def test_validation_images_are_refused_by_path_and_by_content(unlabeled, tmp_path, caplog):
    train = load_dataset_rows(unlabeled)
    settings = load_settings(None, [f"data.unlabeled={unlabeled}/images"]).data
    with pytest.raises(DataError, match=r"2 of its 5 images are validation images, for example"):
        load_unlabeled(settings, train, train.subset([1, 3]))
    copied = tmp_path / "copied"
    copied.mkdir()
    for number, row in enumerate(train.rows[:3]):
        shutil.copy(row["image"], copied / f"renamed{number}.png")
    settings = load_settings(None, [f"data.unlabeled={copied}"]).data
    with pytest.raises(DataError, match=r"1 of its 3 images are validation images, for example renamed1\.png"):
        load_unlabeled(settings, train, train.subset([1]))
    caplog.set_level("INFO", logger="uplvp_hf")
    assert len(load_unlabeled(settings, train.subset([0, 2]), train.subset([4]))) == 3
    assert "2 of the 3 unlabeled images are labeled ones, too." in caplog.text
    assert list(same_images(load_dataset_rows(copied), train)) == [(0, 0), (1, 1), (2, 2)]


def test_unlabeled_images_that_cannot_be_used_are_refused(unlabeled, tmp_path):
    train = load_dataset_rows(unlabeled)
    broken = tmp_path / "broken"
    shutil.copytree(unlabeled, broken)
    for file in (broken / "images").iterdir():
        file.write_bytes(b"no image")
    settings = load_settings(None, [f"data.unlabeled={broken}"]).data
    with pytest.raises(DataError, match="none of the first 5 of its 5 images can be opened"):
        load_unlabeled(settings, train, None)


def test_a_model_without_queries_is_refused(run, words, unlabeled):
    backbone = {"model_type": "resnet", "layer_type": "basic", "embedding_size": 8, "hidden_sizes": [8, 16, 24, 40]}
    backbone |= {"depths": [1, 1, 1, 1], "out_features": ["stage1", "stage2", "stage3", "stage4"]}
    segmenter = {"model_type": "mask_rcnn", "backbone_config": backbone, "hidden_size": 32}
    with pytest.raises(ConfigError, match="has no queries"):
        run("run", *words, f"model.segmenter={json.dumps(segmenter)}")


def test_classes_without_labels_are_named(unlabeled, scenes_dir, caplog):
    train = load_dataset_rows(scenes_dir)
    train.categories = [*train.categories, {"id": 99, "name": "otter"}]
    load_unlabeled(load_settings(None, [f"data.unlabeled={unlabeled}"]).data, train, None)
    assert "'otter'" in caplog.text and "the teacher cannot learn these classes" in caplog.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stage=pretrain"], r"`data\.unlabeled` is for fine-tuning"),
        (["teacher.burn_in=500"], r"`teacher\.burn_in` of 500 steps leaves none of the 500"),
        (["teacher.cutout_area=0.3,0.1"], r"`teacher\.cutout_area` must be two numbers"),
        (["teacher.ignore=some"], r"teacher\.ignore"),
    ],
)
def test_settings_that_do_not_fit(words, message):
    with pytest.raises(ConfigError, match=message):
        load_settings(None, ["data.unlabeled=somewhere", *words])


def test_a_burn_in_beyond_the_epochs_is_refused():
    """The number of steps is known with the images: 4 epochs of 10 images, 8 a step, are 5 steps."""
    words = ["data.unlabeled=x", "optim.epochs=4", "optim.batch_size=8"]
    with pytest.raises(ConfigError, match="burn_in` of 5 steps leaves none of the 5 for"):
        with_steps(load_settings(None, [*words, "teacher.burn_in=5"]), 10, 1)
    assert with_steps(load_settings(None, [*words, "teacher.burn_in=4"]), 10, 1).optim.steps == 5
