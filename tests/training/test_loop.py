"""The loop: stopped and resumed, accumulated and distributed runs end where the plain run ends; failures are met."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from training_helpers import assert_same_run, log_of, stop_at

from uplvp_hf.data import load_dataset_rows
from uplvp_hf.models import matching
from uplvp_hf.models.modeling_uplvp import UplvpForInstanceSegmentation, UplvpForPreTraining
from uplvp_hf.training import loop
from uplvp_hf.training.backbone_weights import load_backbone_weights
from uplvp_hf.training.build import build_model
from uplvp_hf.training.checkpoint import list_checkpoints
from uplvp_hf.training.config import ConfigError, TrainingAborted, load_settings
from uplvp_hf.training.freezing import freeze_unused


@pytest.mark.slow
def test_stopped_and_resumed_equals_uninterrupted(run, tmp_path, monkeypatch, scenes_dir):
    val = [f"data.val={scenes_dir}", "evaluation.at=[2]"]
    whole = run("whole", *val)
    stop_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        run("parts", *val)
    assert [path.name for path in list_checkpoints(tmp_path / "parts")] == ["checkpoint-2"]
    with open(tmp_path / "parts" / "log.jsonl", "a") as log:
        log.write('{"step": 3, "loss": 1.0}\n{"step": 3, "lo')  # logged after the checkpoint, the last line torn
    parts = run("parts", *val, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    moments = load_file(tmp_path / "parts" / "checkpoint-4" / "optimizer.safetensors")
    assert len(moments) > 300 and all(v == 4 for name, v in moments.items() if name.endswith("|step"))
    assert list(parts.evaluations) == [2, 6]
    for step, metrics in whole.evaluations.items():
        same = {key for key, value in metrics.items() if parts.evaluations[step][key] == value}
        assert same >= {"AP", "AP50", "AR100", "per_class", "num_images"}
    assert [line["step"] for line in log_of(tmp_path / "parts")] == [2, 4, 6, 6]
    summary = json.loads((tmp_path / "parts" / "training_summary.json").read_text())
    assert summary["stage"] == "pretrain" and summary["images"] == 6 and summary["skipped_steps"] == 0


@pytest.mark.slow
def test_stopped_before_the_first_checkpoint(run, tmp_path, monkeypatch):
    run("whole", "log_every=1")
    stop_at(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        run("parts", "log_every=1")
    run("parts", "log_every=1", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    final = (tmp_path / "parts" / "model.safetensors").read_bytes()
    run("parts", "log_every=1", resume=True)  # of a finished run: the end is done again
    assert (tmp_path / "parts" / "model.safetensors").read_bytes() == final
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_evaluation_leaves_the_training_alone(run, tmp_path, scenes_dir):
    run("without")
    run("with", f"data.val={scenes_dir}", "evaluation.at=[1, 3]")
    assert (tmp_path / "with" / "model.safetensors").read_bytes() == (
        tmp_path / "without" / "model.safetensors"
    ).read_bytes()


def test_only_the_newest_checkpoints_are_kept(run, tmp_path):
    run("run", "checkpoint.every=1", "checkpoint.keep=2")
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-4", "checkpoint-5"]
    assert isinstance(UplvpForPreTraining.from_pretrained(tmp_path / "run" / "checkpoint-5"), UplvpForPreTraining)


def test_an_output_folder_belongs_to_one_run(run, monkeypatch):
    stop_at(monkeypatch, 0)
    with pytest.raises(KeyboardInterrupt):
        run()
    with pytest.raises(ConfigError, match="already holds a run"):
        run()
    with pytest.raises(ConfigError, match=r"other settings: .*optim.lr was 0.001, now 0.002"):
        run("run", "optim.lr=2e-3", resume=True)


def poison(monkeypatch, steps, what):
    """At these updates, images or gradients are not a number. Returns the weights before and after every update."""
    update, history = loop._Run._update, []

    def poisoned(self, step, batches):
        before = {name: value.clone() for name, value in self.plain.state_dict().items()}
        hook = None
        if step in steps and what == "images":
            batches[0]["pixel_values"][0, 0, 0, 0] = float("nan")
        elif step in steps:
            hook = self.plain.segmenter.class_predictor.weight.register_hook(lambda gradient: gradient * float("nan"))
        losses = update(self, step, batches)
        if hook is not None:
            hook.remove()
        history.append((step, before, {name: value.clone() for name, value in self.plain.state_dict().items()}, losses))
        return losses

    monkeypatch.setattr(loop._Run, "_update", poisoned)
    return history


@pytest.mark.parametrize("what", ["images", "gradients"])
@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.filterwarnings("ignore:Non-finite matching costs")
def test_steps_that_are_not_finite_are_skipped(run, recipe, tiny_segmenter, monkeypatch, tmp_path, what, clip):
    settings = yaml.safe_load(recipe.read_text())
    settings["model"]["segmenter"] = tiny_segmenter("resnet")  # its batch norms would remember such an image
    recipe.write_text(yaml.safe_dump(settings))
    history = poison(monkeypatch, {1, 2, 3}, what)
    result = run("run", f"optim.clip={clip}", "log_every=2", "checkpoint.every=0")
    assert result.skipped == 3 and any("running_mean" in name for name in history[0][1])
    for step, before, after, losses in history:
        same = all(torch.equal(before[name], after[name]) for name in before)  # statistics of batch norms, too
        assert same is (step in {1, 2, 3}) and bool(losses) is not same
    assert all(torch.isfinite(value).all() for value in result.model.state_dict().values())
    log = log_of(tmp_path / "run")
    assert log[0]["loss"] == pytest.approx(sum(v.item() for v in history[0][3].values()), rel=1e-5)
    assert "loss" not in log[1] and log[2]["loss"] > 0  # all of steps 3 and 4 skipped
    summary = json.loads((tmp_path / "run" / "training_summary.json").read_text())
    assert summary["skipped_steps"] == 3


@pytest.mark.filterwarnings("ignore:Non-finite matching costs")
def test_too_many_skipped_steps_end_the_run(run, monkeypatch):
    history = poison(monkeypatch, {1, 3}, "images")
    with pytest.raises(TrainingAborted, match=r"2 steps had a non-finite loss, cost or gradient.* images \["):
        run("run", "optim.max_skipped=2")
    assert [step for step, *_ in history] == [0, 1, 2]


@pytest.mark.filterwarnings("ignore:Non-finite matching costs")
@pytest.mark.parametrize("kind", ["mask2former", "knet", "queryinst"])
def test_costs_that_are_not_finite_skip_the_step(run, recipe, segmenters, monkeypatch, caplog, kind):
    """A single cost, of a pair that is not matched, so that the loss itself stays finite. Reported once."""
    settings = yaml.safe_load(recipe.read_text())
    settings["model"]["segmenter"] = segmenters[kind]
    recipe.write_text(yaml.safe_dump(settings))
    places = [sys.modules[f"uplvp_hf.models.losses{suffix}"] for suffix in ("_mask2former", "_knet", "_queryinst")]
    inner, history = matching.hungarian, poison(monkeypatch, set(), "images")

    def spoilt(costs):
        if len(history) in (2, 4):  # updates 3 and 5
            pairs = inner(costs)
            queries = costs[0].shape[1]
            free = sorted(set(range(queries)) - set(pairs[0][0][0].tolist()))
            costs = [cost.clone() for cost in costs]
            costs[0][0, free[0], 0] = float("nan")
        return inner(costs)

    for place in places:
        monkeypatch.setattr(place, "hungarian", spoilt)
    result = run("run", "log_every=1")
    assert result.skipped == 2
    assert [bool(losses) for *_, losses in history] == [True, True, False, True, False, True]
    assert [record.levelname for record in caplog.records if "skipped" in record.message] == ["WARNING"]
    assert "Step 3 skipped: its loss, a matching cost or its gradient is not finite. Images: [" in caplog.text


def test_a_precision_does_not_stick_to_the_process(run):
    assert run("half", "mixed_precision=bf16", "optim.steps=1").skipped == 0
    assert run("full", "optim.steps=1").skipped == 0


def test_unreadable_images_are_listed(run, scenes_dir, tmp_path):
    shutil.copytree(scenes_dir, tmp_path / "data")
    bad = sorted((tmp_path / "data" / "images").iterdir())[2]
    bad.write_bytes(bad.read_bytes()[:200])
    run("run", f"data.train={tmp_path / 'data'}")
    failures = [json.loads(line) for line in (tmp_path / "run" / "failures.jsonl").read_text().splitlines()]
    assert [Path(failure["file"]).name for failure in failures] == [bad.name]
    assert "row 2" in failures[0]["row"] and failures[0]["reason"]


def test_data_without_classes_and_models_without_source_are_refused(run, scenes_dir, tmp_path):
    with pytest.raises(ConfigError, match="without classes"):
        run("a", f"data.train={scenes_dir / 'images'}")
    with pytest.raises(ConfigError, match=r"`data\.train` is not set"):
        run("b", "data.train=")
    with pytest.raises(ConfigError, match=r"`model\.init`"):
        run("c", "model.segmenter=")
    with pytest.raises(ConfigError, match=r"`model\.backbone_weights`: no file"):
        run("d", "model.backbone_weights=nowhere.safetensors")
    with pytest.raises(ValueError, match="prompt_matching` must be one of"):
        run("e", "model.prompt_matching=best")
    annotations = json.loads((scenes_dir / "annotations" / "instances.json").read_text())
    annotations["annotations"][0]["category_id"] = 77
    (tmp_path / "wrong.json").write_text(json.dumps(annotations))
    with pytest.raises(ValueError, match="77"):
        run("f", f"data.train={tmp_path / 'wrong.json'}")


@pytest.mark.slow
def test_from_pretraining_to_finetuning(run, scenes_dir, tmp_path):
    data = load_dataset_rows(scenes_dir)
    first = run("pretrain", "model.prompt_matching=cosine").model
    assert isinstance(first, UplvpForPreTraining)
    assert first.config.id2label == data.id2label and first.config.category_ids == list(data.category_ids)
    words = ["stage=finetune", "model.segmenter=", f"model.init={tmp_path / 'pretrain'}", "optim.lr=0"]
    second = run("finetune", *words).model
    assert isinstance(second, UplvpForInstanceSegmentation)
    weights = first.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in second.state_dict().items())
    summary = json.loads((tmp_path / "finetune" / "training_summary.json").read_text())
    assert "prompt_projection" in summary["transfer"] and "remapped" in summary["transfer"]
    fresh = run("fresh", *words, "model.class_head=new").model
    assert not torch.equal(fresh.segmenter.class_predictor.weight, first.segmenter.class_predictor.weight)
    agnostic = run("agnostic", "model.class_agnostic=true", "optim.steps=2").model
    assert agnostic.config.id2label == {0: "object"} and agnostic.config.class_agnostic


def test_frozen_backbones_do_not_move(run, recipe, tiny_segmenter, tmp_path):
    from safetensors.torch import save_file

    settings = yaml.safe_load(recipe.read_text())
    settings["model"]["segmenter"] = tiny_segmenter("resnet")
    recipe.write_text(yaml.safe_dump(settings))
    loaded = load_settings(str(recipe))
    loop.set_seed(0)
    model = build_model(loaded, load_dataset_rows(loaded.data.train))
    start = model.state_dict()
    weights = tmp_path / "backbone.safetensors"
    save_file(model.segmenter.backbone.state_dict(), weights)
    words = ("model.freeze_backbone=true", f"model.backbone_weights={weights}", "optim.steps=2")
    state = run("run", *words).model.state_dict()
    moved = {name for name in start if not torch.equal(start[name], state[name])}
    assert moved and not any("pixel_level_module.encoder." in name for name in moved)


@pytest.mark.parametrize("backbone", ["resnet", "swin"])
def test_what_no_map_needs_is_frozen(run, recipe, tiny_segmenter, backbone):
    settings = yaml.safe_load(recipe.read_text())
    settings["model"]["segmenter"] = tiny_segmenter(backbone)
    recipe.write_text(yaml.safe_dump(settings))
    loaded = load_settings(str(recipe))
    model = build_model(loaded, load_dataset_rows(loaded.data.train))
    frozen = [name for name, p in model.segmenter.backbone.named_parameters() if not p.requires_grad]
    assert frozen == (["swin.layernorm.weight", "swin.layernorm.bias"] if backbone == "swin" else [])
    assert freeze_unused(model.segmenter.backbone, 64) == [] and model.training is True


def test_backbone_weights_from_a_file(recipe, tmp_path):
    from safetensors.torch import save_file

    loaded = load_settings(str(recipe))
    rows = load_dataset_rows(loaded.data.train)
    source, target = (build_model(loaded, rows).segmenter.backbone for _ in range(2))
    state = {f"backbone.{name}": value for name, value in source.state_dict().items()}
    save_file({**state, "head.weight": torch.zeros(1)}, tmp_path / "weights.safetensors")
    assert load_backbone_weights(target, str(tmp_path / "weights.safetensors")) == ["head.weight"]
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in target.state_dict().items())
    save_file(dict(list(state.items())[:-1]), tmp_path / "short.safetensors")
    with pytest.raises(ValueError, match="lacks 1 tensors of the backbone"):
        load_backbone_weights(target, str(tmp_path / "short.safetensors"))


def test_result_is_a_model_that_predicts(run, tmp_path):
    """What a run writes is enough for `from_pretrained` and the image processor."""
    from uplvp_hf.models.image_processing_uplvp import UplvpImageProcessor

    run("run", "optim.steps=1", "stage=finetune")
    processor = UplvpImageProcessor.from_pretrained(tmp_path / "run")
    model = UplvpForInstanceSegmentation.from_pretrained(tmp_path / "run").eval()
    inputs = processor(Image.new("RGB", (90, 40)), return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 64, 64)  # the canvas of the training
    with torch.no_grad():
        assert model(**inputs).masks_queries_logits.shape[-2:] == (16, 16)
