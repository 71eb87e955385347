"""Teacher-student runs: what a step sees, that the student learns what the teacher finds, resuming, bad input."""

import json
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import processes
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
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
)

from uplvp_hf.data import load_dataset_rows
from uplvp_hf.data.errors import DataError
from uplvp_hf.data.synthetic import write_scenes
from uplvp_hf.data.window import Window
from uplvp_hf.models.configuration_uplvp import UplvpConfig
from uplvp_hf.models.masks import decode_segmentation, encode_masks
from uplvp_hf.models.modeling_uplvp import UplvpForInstanceSegmentation, UplvpForPreTraining
from uplvp_hf.models.pseudo_targets import PseudoTargets
from uplvp_hf.training.checkpoint import list_checkpoints
from uplvp_hf.training.config import ConfigError, load_settings
from uplvp_hf.training.optim import with_steps
from uplvp_hf.training.pseudo_labels import ClassThresholds, PseudoInstances, find_pseudo_instances
from uplvp_hf.training.stream import UnlabeledKeys
from uplvp_hf.training.student_batch import lessons_of
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


def found(labels, candidates=()):
    """Pseudo instances of these classes without masks, and candidates of [class, score]."""
    one = torch.ones(len(labels))
    return PseudoInstances(
        [], torch.tensor(labels, dtype=torch.int64), one, one, one, [], torch.tensor(candidates).view(-1, 2)
    )


def test_thresholds_fall_for_classes_that_are_seldom_found():
    settings = {"class_threshold": 0.8, "label_share": 0.0}
    pseudo = found([0] * 9 + [1] * 3)
    even = ClassThresholds(TeacherSettings(**settings), torch.ones(3))
    even.update(even.seen([pseudo]), 1)
    assert even.values().tolist() == pytest.approx([0.8] * 3)
    own = ClassThresholds(TeacherSettings(**settings, adaptive=0.5, class_floor=0.0), torch.ones(3))
    own.update(own.seen([pseudo]), 1)
    third = (1 / 3) / (2 - 1 / 3)
    assert own.values().tolist() == pytest.approx([0.8, 0.8 * (1 - 0.5 * (1 - third)), 0.4])


def test_thresholds_follow_the_numbers_of_the_labels():
    """Labels have 2, 1, 0 and 4 objects an image. In 2 images the teacher has 5 candidates of class 0, one of class 1,
    none of the others: class 0 falls to what its two best reach, class 1 to its only one, class 3 to the floor."""
    settings = TeacherSettings(class_threshold=0.8, class_floor=0.3, label_share=0.5)
    thresholds = ClassThresholds(settings, torch.tensor([2.0, 1.0, 0.0, 4.0]))
    assert thresholds.values().tolist() == pytest.approx([0.8] * 4)
    halves = found([], [[0, 0.75], [0, 0.35], [0, 0.551]]), found([], [[0, 0.41], [0, 0.1], [1, 0.62]])
    thresholds.update(thresholds.seen(halves), 2)
    assert thresholds.values().tolist() == pytest.approx([0.54, 0.62, 0.8, 0.3])
    again = ClassThresholds(settings, thresholds.labeled)
    again.load(json.loads(json.dumps(thresholds.state())))
    assert again.values().tolist() == thresholds.values().tolist()
    thresholds.update(thresholds.seen([found([], [[0, 0.99]] * 4)]), 1)  # more than the share: the usual threshold
    assert thresholds.values()[0].item() == pytest.approx(0.8)


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


# Kills itself in update 1 and, resumed, in update 5: in the burn-in, and between a checkpoint and the end.
KILLED = """
def run(step):
    child = os.fork()
    if child == 0:
        update = loop._Run._update
        def dying(self, current, batches):
            if current == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return update(self, current, batches)
        loop._Run._update = dying
        settings = load_settings(recipe, [*words, f"output={output}"])
        loop.train(settings, resume=os.path.isdir(output), progress=False)
        os._exit(0)
    return os.waitpid(child, 0)[1]

print(run(1), run(5))
"""
# Everything that a run with a teacher can have: pseudo labels of another source, prompts, pasted instances, a worker.
# At this rate the masks stay as random as they are, and so are not empty.
ALL = ["teacher.prompts=true", "teacher.copy_paste=0.5", "teacher.measure=true", "optim.lr=1e-5"]
ALL += ["log_every=3", "data.workers=1", "optim.accumulation=2", "model.prompt_drop=0.3"]


@pytest.mark.slow
def test_a_run_that_is_killed_resumes_to_the_same_bytes(run, recipe, words, tmp_path):
    extra = write_scenes(tmp_path / "extra", 3, seed=11, size=96)
    val = write_scenes(tmp_path / "val", 2, seed=12, size=96)
    more = [*words, *ALL, f"data.extra={extra}", f"data.val={val}", "evaluation.at=4", "checkpoint.best=true"]
    whole = run("whole", *more)
    script = tmp_path / "killed.py"
    script.write_text(PROCESS + KILLED)
    done = processes.run(script, recipe, tmp_path / "killed", *more, environment={"CUDA_VISIBLE_DEVICES": ""})
    assert done.stdout.splitlines()[-1].split() == [str(int(signal.SIGKILL))] * 2, done.stderr[-2000:]
    assert [path.name for path in list_checkpoints(tmp_path / "killed")] == ["checkpoint-2", "checkpoint-4"]
    run("killed", *more, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    # Kernel supervision is of the unlabeled part alone, and nothing of the prompts is in the model that is left.
    for line in log_of(tmp_path / "whole"):
        assert "kernel" not in line and ("val_AP" in line or line["unsup_kernel"] > 0)
    assert type(whole.model) is UplvpForInstanceSegmentation
    assert all(name.startswith("segmenter.") for name in load_file(tmp_path / "whole" / "model.safetensors"))
    with pytest.raises(ConfigError, match=r"data\.unlabeled"):
        run("killed", *words[:1], "log_every=3", resume=True)


def test_labels_of_people_are_learned_without_prompts(tiny_segmenter):
    """As by the plain segmenter, and what is for prompts has a gradient, which is zero: no other process waits."""
    torch.manual_seed(0)
    model = UplvpForPreTraining(UplvpConfig(segmenter_config=tiny_segmenter("resnet"), id2label={0: "a", 1: "b"}))
    masks = torch.zeros(1, 64, 64, dtype=torch.bool)
    masks[0, 8:40, 8:40] = True
    batch = {"pixel_values": torch.randn(1, 3, 64, 64), "mask_labels": [masks], "class_labels": [torch.tensor([1])]}

    def loss(one, **more):
        torch.manual_seed(1)
        return one.train()(**batch, **more)

    assert "kernel" in loss(model).losses
    model.prompts_pseudo_alone = True
    own, plain = loss(model), loss(model.plain())
    assert own.loss.item() == plain.loss.item() and own.losses.keys() == plain.losses.keys()
    own.loss.backward()
    assert not model.prompt_projection.weight.grad.any()
    pseudo = loss(model, pseudo=PseudoTargets(background=False))
    assert "kernel" in pseudo.losses and pseudo.losses["class_0"] < own.losses["class_0"]


def test_instances_are_pasted_with_their_pixels():
    """Every image gets some of its partner: their masks lie where the pixels are the partner's, and the step alone says
    which. What was unsure and is covered now is not unsure any more."""
    settings = load_settings(None, ["teacher.copy_paste=1", "data.unlabeled=x"])
    boxes = np.zeros((2, 4, 32, 32), dtype=bool)
    boxes[:, 0, 2:8, 2:8], boxes[:, 1, 20:30, 4:9], boxes[:, 2, 12:16, 12:30] = True, True, True
    boxes[:, 3, :2] = True
    whole = Window(32, 32, 0, 0, 32, 32, False)
    ones = torch.ones(3)
    teacher = [
        PseudoInstances(
            encode_masks(one[:3]), torch.tensor([0, 1, 2]), ones * 0.9, ones, torch.eye(3), encode_masks(one[3:]), ones
        )
        for one in boxes
    ]
    pixels = torch.stack([torch.full((3, 32, 32), value) for value in (1.0, 2.0)])
    views = {"strong": {"pixel_values": pixels, "pixel_mask": torch.ones(2, 32, 32)}, "windows": [(whole, whole)] * 2}
    draws = [lessons_of(views, teacher, settings, step, 0) for step in (0, 1, 2, 0)]
    assert [len(one.masks) for one in draws[0]] == [len(one.masks) for one in draws[3]]
    assert any((one.pixels[0] != number + 1).any() for lessons in draws for number, one in enumerate(lessons))
    for lessons in draws:
        for number, one in enumerate(lessons):
            foreign = (one.pixels[0] != number + 1).numpy()
            pasted = [mask for mask in one.masks.dense().numpy() if foreign[mask].all()]
            assert (foreign == (np.any(pasted, axis=0) if pasted else False)).all()
            assert one.labels.tolist() == one.probabilities.argmax(1).tolist() and not (one.unsure & foreign).any()
    plain = lessons_of(views, teacher, load_settings(None, ["data.unlabeled=x"]), 0, 0)
    assert [len(one.masks) for one in plain] == [3, 3] and plain[0].unsure[:2].all() and not plain[0].unsure[2:].any()


@pytest.mark.slow
def test_drawing_shows_the_steps_and_changes_nothing(run, words, tmp_path):
    run("plain", *words)
    run("drawn", *words, "teacher.draw_every=3")
    plain, drawn = (tmp_path / name for name in ("plain", "drawn"))
    assert (plain / "model.safetensors").read_bytes() == (drawn / "model.safetensors").read_bytes()
    page = (drawn / "teacher.html").read_text()
    assert not (plain / "teacher.html").exists()
    files = sorted((drawn / "teacher").iterdir())
    assert [file.stem for file in files] == ["step-0000003", "step-0000006"]
    assert all(f'src="teacher/{file.name}"' in page for file in files)
    with Image.open(files[0]) as sheet:  # two images, three columns, of which the first has the weak view
        assert sheet.width > 1.2 * sheet.height  # with titles
        colors = np.asarray(sheet.convert("HSV"))[..., 1]
    assert (np.array_split(colors, 3, axis=1)[0] > 150).mean() > 0.02


@pytest.mark.slow
def test_a_teacher_that_finds_nothing_says_so_once(run, words, caplog):
    run("run", *words, "teacher.class_threshold=1", "teacher.patience=2")
    said = [record.getMessage() for record in caplog.records if "no pseudo instance" in record.getMessage()]
    assert len(said) == 1 and "in 2 steps (up to step 4)" in said[0] and "teacher.class_threshold (now 1)" in said[0]


@pytest.mark.slow
def test_two_processes_equal_one_with_the_doubled_batch(run, recipe, words, deterministic, tmp_path):
    """Weights, divisors, and how often the classes were found. A parameter without a gradient would end the second
    update of DistributedDataParallel."""
    more = [
        *words,
        *DESCENT,
        "optim.ema=0.9",
        "teacher.adaptive=0.5",
        "teacher.label_share=0",
        "teacher.burn_in=1",
        "teacher.ramp=0",
    ]
    more += ["checkpoint.every=2", "teacher.measure=true", "teacher.prompts=true"]
    run("one", *more, "optim.batch_size=4")
    script = tmp_path / "distributed.py"
    script.write_text(PROCESS + DETERMINISTIC + TRAIN)
    on_two_processes(script, recipe, tmp_path / "two", *more, "optim.batch_size=2")
    assert largest_difference(tmp_path / "one", tmp_path / "two") < 1e-5
    one, two = (state_of(tmp_path / name / "checkpoint-2")["teacher"]["thresholds"] for name in ("one", "two"))
    assert one == two and sum(one["counts"]) > 0
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
        (["stage=fewshot"], r"`data\.unlabeled` is for fine-tuning"),
        (["teacher.burn_in=500"], r"`teacher\.burn_in` of 500 steps leaves none of the 500"),
        (["teacher.cutout_area=0.3,0.1"], r"`teacher\.cutout_area` must be two numbers"),
        (["teacher.ignore=some"], r"teacher\.ignore"),
        (["teacher.adaptive=0.5"], r"`teacher\.label_share=0` for `teacher\.adaptive`"),
        (["teacher.copy_paste=0.5", "teacher.batch_size=1"], r"`teacher\.batch_size` must be at least 2"),
        (["teacher.prompts=true", "model.kernel_target=labeler"], r"`model\.kernel_target=prompt`"),
        (["data.unlabeled=null", "teacher.prompts=true"], r"`teacher\.prompts` needs `data\.unlabeled`"),
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


def test_thresholds_are_measured_on_labeled_images(load_script, tiny_model_dir, scenes_dir, capsys):
    """Higher thresholds find no more, and what has the right class has a right mask."""
    given = ["--model", str(tiny_model_dir), "--data", str(scenes_dir), "--images", "2"]
    assert load_script("measure_pseudo_labels").main([*given, "--classes", "0", "0.2", "--masks", "0", "0.6"]) == 0
    printed = capsys.readouterr().out.splitlines()
    lines = json.loads(printed[-1])
    assert len(printed) == 3 + len(lines) == 7 and lines[0]["instances"] > 0
    counts = [line["instances"] for line in lines]  # by class threshold, then by mask threshold
    assert counts[0] >= max(counts[1:3]) and min(counts[1:3]) >= counts[3]
    for line in lines:
        assert line["precision"] is None or line["precision"] <= line["mask_precision"]
