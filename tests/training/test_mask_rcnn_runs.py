"""Training runs of the Mask R-CNN baseline: through the same loop, rows, evaluation and commands."""

import copy
import json

import pytest
import torch
from training_helpers import assert_same_run, stop_at

from uplvp_hf import MaskRcnnForInstanceSegmentation
from uplvp_hf.commands import evaluate, finetune, predict
from uplvp_hf.data import load_dataset_rows
from uplvp_hf.data.synthetic import write_scenes
from uplvp_hf.evaluation import evaluate_model, load_segmenter
from uplvp_hf.training.build import build_model
from uplvp_hf.training.config import ConfigError, load_settings
from uplvp_hf.training.loop import train

SMALL = {
    "model_type": "mask_rcnn", "hidden_size": 16, "intermediate_size": 32, "num_mask_layers": 1,
    "anchor_sizes": [8, 16, 32, 64, 96], "proposals": [100, 50], "sampled_anchors": 64, "sampled_proposals": 32,
}  # fmt: skip


@pytest.fixture
def settings(scenes_dir, tiny_segmenter, tmp_path):
    """settings(name, *words): six updates on six scenes of 64 px, output tmp_path/name."""
    segmenter = {**SMALL, "backbone_config": tiny_segmenter("resnet")["backbone_config"]}

    def make(name, *words, segmenter=segmenter, **sections):
        defaults = {
            "log_every": 1,
            "data": {"train": str(scenes_dir), "size": 64},
            "model": {"segmenter": copy.deepcopy(segmenter)},  # words write into it
            "optim": {"steps": 6, "batch_size": 2, "lr": 1e-3, "warmup": 1},
            "checkpoint": {"every": 2, "keep": 9, "stay": True},
        }
        return load_settings(None, [*words, f"output={tmp_path / name}"], **{**defaults, **sections})

    return make


@pytest.mark.slow
@pytest.mark.parametrize("words", [["optim.ema=0.9"], ["optim.optimizer=sgd", "optim.lr=0.01", "optim.accumulation=2"]])
def test_a_run_stopped_and_resumed_equals_uninterrupted(settings, tmp_path, monkeypatch, words):
    train(settings("whole", *words), progress=False)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train(settings("parts", *words), progress=False)
    train(settings("parts", *words), resume=True, progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    line = json.loads((tmp_path / "whole" / "log.jsonl").read_text().splitlines()[0])
    assert {"objectness", "rpn_box_reg", "classifier", "box_reg", "mask"} <= line.keys()


@pytest.mark.slow
def test_a_frozen_backbone_stays_and_the_best_model_is_kept(settings, scenes_dir, tmp_path):
    first = train(settings("first"), progress=False).model
    words = [
        "model.freeze_backbone=true",
        "checkpoint.best=true",
        "evaluation.every=3",
        f"model.init={tmp_path / 'first'}",
    ]
    result = train(settings("second", *words, f"data.val={scenes_dir}"), progress=False)
    assert set(result.evaluations) == {3, 6} and result.model_step in (3, 6)
    before, after = first.state_dict(), result.model.state_dict()
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"neck", "rpn", "roi_heads"}
    summary = json.loads((tmp_path / "second" / "training_summary.json").read_text())
    assert "remapped by class name" in summary["transfer"] and summary["skipped_steps"] == 0


@pytest.mark.slow
def test_commands_work_on_it(settings, scenes_dir, tmp_path, capsys):
    """Fine-tuned, evaluated and predicted from the command line; the numbers are those of the library call."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(settings("run").to_dict() | {"base": []}))
    words = ["--recipe", str(recipe), "--quiet", "checkpoint.every=0", "model.segmenter.score_threshold=0.0"]
    assert finetune.main(words) == 0
    folder, output = tmp_path / "run", tmp_path / "evaluation"
    assert evaluate.main([str(folder), str(scenes_dir), "--output", str(output), "--quiet", "--device", "cpu"]) == 0
    metrics = json.loads((output / "metrics.json").read_text())
    assert json.loads((output / "results.json").read_text()) and metrics["num_images"] == 6
    model, processor = load_segmenter(str(folder), "cpu")
    assert type(model) is MaskRcnnForInstanceSegmentation and not model.training
    rows = load_dataset_rows(scenes_dir)
    assert model.config.category_ids == rows.category_ids
    for batch_size in (1, 4):
        found = evaluate_model(model, processor, rows, batch_size=batch_size, progress=False)
        assert found["AP"] == pytest.approx(metrics["AP"], abs=1e-6)
    words = [str(folder), str(scenes_dir), "--output", str(tmp_path / "found"), "--threshold", "0", "--device", "cpu"]
    assert predict.main([*words, "--quiet"]) == 0
    assert any((tmp_path / "found").iterdir())


def test_what_needs_queries_is_refused(settings, scenes_dir):
    rows = load_dataset_rows(scenes_dir)
    with pytest.raises(ConfigError, match="`mask_rcnn` has no queries, so it cannot be pre-trained here"):
        build_model(settings("x", "stage=pretrain"), rows)
    with pytest.raises(ConfigError, match=r"leave out `model.num_prompts`, `model.prompt_drop`"):
        build_model(settings("x", "model.prompt_drop=0.1", "model.num_prompts=3"), rows)
    with pytest.raises(ConfigError, match=r"`model.segmenter.hidden_sise`.*Did you mean `model.segmenter.hidden_size`"):
        build_model(settings("x", "model.segmenter.hidden_sise=4"), rows)
    backbone = {"model_type": "resnet", "depth": [1]}
    with pytest.raises(ConfigError, match=r"`model.segmenter.backbone_config.depth`.*Did you mean"):
        build_model(settings("x", segmenter={**SMALL, "backbone_config": backbone}), rows)


def test_a_checkpoint_starts_a_run_with_other_classes(settings, scenes_dir, tmp_path, tiny_segmenter):
    rows = load_dataset_rows(scenes_dir)
    model = build_model(settings("x", "model.class_agnostic=true"), rows)
    assert model.config.id2label == {0: "object"}
    model.save_pretrained(tmp_path / "baseline")
    start = f"model.init={tmp_path / 'baseline'}"
    with pytest.raises(ConfigError, match="has no queries, so it cannot be pre-trained"):
        build_model(settings("x", "stage=pretrain", start), rows)
    with pytest.raises(ConfigError, match=r"model.segmenter.model_type is 'mask2former', there 'mask_rcnn'"):
        build_model(settings("x", start, segmenter=tiny_segmenter("resnet")), rows)
    tuned = build_model(settings("x", start), rows)
    assert tuned.config.id2label == rows.id2label and tuned.transfer_report.new_classes == list(rows.id2label.values())


@pytest.mark.slow
def test_a_few_images_are_learned_by_heart(settings, tmp_path):
    """Three scenes of 96 px; 60 updates reach an AP of 65 %, of which a random start gives 0."""
    scenes = write_scenes(tmp_path / "scenes", count=3, seed=0, size=96)
    larger = {"hidden_size": 32, "intermediate_size": 64, "anchor_sizes": [16, 32, 64, 96, 128]}
    words = [
        *(f"model.segmenter.{name}={value}" for name, value in larger.items()),
        f"data.train={scenes}", f"data.val={scenes}", "data.size=96", "data.scale_range=[1,1]", "data.flip=0",
        "data.color_jitter=0", "optim.steps=60", "optim.batch_size=3", "optim.lr=0.003", "optim.schedule=linear",
        "optim.backbone_multiplier=1", "optim.clip=5", "checkpoint.every=0",
    ]  # fmt: skip
    result = train(settings("run", *words), progress=False)
    assert result.evaluations[60]["AP"] > 0.35 and result.evaluations[60]["AP50"] > 0.7
    assert result.losses[-1] < result.losses[0] / 3
