"""When a run is evaluated, on which weights, and what follows: the best model, an early end."""

import json

import pytest
import torch
from safetensors.torch import load_file
from training_helpers import log_of, stop_at

from uplvp_hf.evaluation.compare import compare_runs
from uplvp_hf.evaluation.predictor import evaluate_model
from uplvp_hf.models.modeling_uplvp import UplvpForInstanceSegmentation
from uplvp_hf.training import task
from uplvp_hf.training.config import ConfigError, load_settings
from uplvp_hf.training.validation import best_step, evaluation_steps, shown


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        ([], {20}),
        (["evaluation.at=[3, 20, 99]"], {3, 20}),
        (["evaluation.every=8"], {8, 16, 20}),
        (["evaluation.every_epochs=1"], {5, 10, 15, 20}),  # 20 images, 4 a step
        (["evaluation.every_epochs=1.5", "evaluation.at=[1]"], {1, 8, 15, 20}),
        (["evaluation.every_epochs=0.01"], set(range(1, 21))),
    ],
)
def test_steps_to_evaluate_at(words, steps):
    settings = load_settings(None, ["optim.steps=20", "optim.batch_size=2", *words])
    assert evaluation_steps(settings, images=20, processes=2) == steps


def test_best_is_the_first_of_equals():
    assert best_step({2: {"AP": 0.1}, 4: {"AP": 0.3}, 6: {"AP": None}, 8: {"AP": 0.3}}) == 4
    assert best_step({2: {"AP": None}}) == 2


@pytest.fixture
def scored(monkeypatch):
    """scored([AP, ...]): evaluations find these, and a best F1 at such a score. Returns, filled by the run, a weight of
    every model evaluated."""

    def go(scores):
        seen = []

        def evaluate(model, *arguments, **options):
            metrics = evaluate_model(model, *arguments, **options)
            seen.append(next(model.parameters()).detach().clone())
            score = scores[len(seen) - 1]
            findings = {**metrics["findings"], "best_threshold": score, "annotations": 20}
            return {**metrics, "AP": score, "findings": findings}

        monkeypatch.setattr(task, "evaluate_model", evaluate)
        return seen

    return go


@pytest.mark.slow
def test_the_best_model_is_the_one_that_stays(run, scored, scenes_dir, tmp_path):
    seen = scored([0.1, 0.4, 0.2])
    words = [f"data.val={scenes_dir}", "evaluation.every=2", "stage=finetune", "checkpoint.best=true", "optim.ema=0.5"]
    result = run("run", *words)
    assert result.model_step == 4 and result.steps == 6
    assert torch.equal(next(result.model.parameters()), seen[1]) and not torch.equal(seen[1], seen[2])
    saved = UplvpForInstanceSegmentation.from_pretrained(tmp_path / "run")
    assert torch.equal(next(saved.parameters()), seen[1]) and saved.config.default_threshold == 0.4
    summary = json.loads((tmp_path / "run" / "training_summary.json").read_text())
    assert summary["model_step"] == 4 and summary["metrics"]["AP"] == 0.4 and summary["steps"] == 6
    assert len(list((tmp_path / "run").glob("best-4/*.json"))) >= 3  # a model folder of its own
    seen = scored([0.1, 0.4, 0.2])
    last = run("last", *words[:-2])
    assert last.model_step == 6 and torch.equal(next(last.model.parameters()), seen[2])
    assert last.model.config.default_threshold == 0.2
    # A run that measures none does not keep the one of the model that it starts from.
    after = run("after", f"model.init={tmp_path / 'run'}", "stage=finetune", "optim.steps=1", "data.extra=null")
    assert after.model.config.default_threshold is None


def test_a_surpassed_model_stays_as_long_as_a_checkpoint_goes_back_to_it(run, scored, scenes_dir, tmp_path):
    scored([0.1, 0.2, 0.3, 0.1, 0.0, 0.0])
    words = [f"data.val={scenes_dir}", "evaluation.every=1", "checkpoint.best=true", "checkpoint.every=2"]
    run("run", *words, "checkpoint.keep=2")
    assert sorted(path.name for path in (tmp_path / "run").glob("best-*")) == ["best-2", "best-3"]


def test_without_checkpoints_only_the_best_model_stays(run, scored, scenes_dir, tmp_path):
    scored([0.1, 0.2, 0.1, 0.3, 0.0, 0.1])
    words = [f"data.val={scenes_dir}", "evaluation.every=1", "checkpoint.best=true", "checkpoint.every=0"]
    assert run("run", *words).model_step == 4
    assert [path.name for path in (tmp_path / "run").glob("best-*")] == ["best-4"]


def test_evaluations_know_how_long_the_training_took(run, scenes_dir, tmp_path):
    result = run("run", f"data.val={scenes_dir}", "evaluation.every=2", "log_every=1")
    seconds = [metrics["training_seconds"] for metrics in result.evaluations.values()]
    assert 0 < seconds[0] < seconds[1] < seconds[2] == pytest.approx(result.seconds, abs=0.001)
    logged = [line["val_training_seconds"] for line in log_of(tmp_path / "run") if "val_AP" in line]
    assert logged == seconds
    points = compare_runs([tmp_path / "run"], axis="seconds").arms[0].points
    assert [point.x for point in points] == seconds
    (tmp_path / "run" / "training_summary.json").unlink()  # as if it were still running
    points = compare_runs([tmp_path / "run"], axis="seconds").arms[0].points
    assert [point.x for point in points] == seconds


def test_settings_without_images_to_evaluate_on_are_reported(run, caplog):
    assert not run("run", "evaluation.every=2", "optim.steps=1").evaluations
    assert [r.message for r in caplog.records if "`data.val` is not set: nothing is evaluated" in r.message]
    caplog.clear()
    run("other", "optim.steps=1")
    run("batch", "evaluation.every=2", "optim.steps=1", "overfit_one_batch=true")
    assert "data.val" not in caplog.text


def test_nothing_to_find_is_a_dash():
    assert shown({"AP": None, "AP50": 0.1234}) == "AP -  AP50 12.3"


def test_a_resumed_run_knows_its_best_model(run, scored, scenes_dir, tmp_path, monkeypatch):
    words = [f"data.val={scenes_dir}", "evaluation.every=1", "checkpoint.best=true"]
    seen = scored([0.1, 0.5, 0.9, 0.3, 0.2, 0.2, 0.1])
    stop_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        run("run", *words)
    assert (tmp_path / "run" / "best-3").is_dir()
    result = run("run", *words, resume=True)  # from step 2; the third step is now worth less
    assert result.model_step == 2 and not (tmp_path / "run" / "best-3").exists()
    assert torch.equal(next(result.model.parameters()), seen[1])


def test_a_run_that_gets_no_better_ends_early(run, scored, scenes_dir, tmp_path):
    scored([0.1, 0.3, 0.3, 0.2, 0.5, 0.5])
    words = [f"data.val={scenes_dir}", "evaluation.every=1", "evaluation.patience=2", "log_every=3"]
    result = run("run", *words)
    assert result.steps == 4 and list(result.evaluations) == [1, 2, 3, 4]
    assert [line["step"] for line in log_of(tmp_path / "run") if "loss" in line] == [3, 4]
    summary = json.loads((tmp_path / "run" / "training_summary.json").read_text())
    assert summary["steps"] == 4 and summary["settings"]["optim"]["steps"] == 6
    scored([0.3, 0.2, 0.5, 0.4])  # resumed with more patience, from step 2
    assert run("run", *words, "evaluation.patience=3", resume=True).steps == 6


def test_the_average_is_what_is_evaluated(run, scored, scenes_dir, tmp_path):
    seen = scored([0.1, 0.1, 0.1])
    run("run", f"data.val={scenes_dir}", "evaluation.every=2", "optim.ema=0.9")
    for index, step in enumerate((2, 4)):
        tensors = load_file(tmp_path / "run" / f"checkpoint-{step}" / "average.safetensors")
        name = next(name for name in tensors if tensors[name].shape == seen[index].shape)
        assert torch.equal(tensors[name], seen[index])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["checkpoint.best=true"], "`checkpoint.best` needs"),
        (["evaluation.patience=2", "evaluation.every=3"], "`evaluation.patience` needs"),
        (["evaluation.patience=2", "data.val=x"], "`evaluation.patience` needs"),
        (["evaluation.every_epochs=0"], "above 0"),
        (["evaluation.at=[5, 0]"], "`evaluation.at` must be at least 1, got 0"),
        (["evaluation.backend=fast"], "`evaluation.backend` must be one of"),
        (["optim.ema=1"], "`optim.ema` must be at least 0 and below 1, got 1.0"),
        (["optim.epochs=0"], "`optim.epochs` must be above 0, got 0.0"),
        (["optim.warmup_factor=2"], "`optim.warmup_factor` must be from 0 to 1, got 2.0"),
        (["optim.milestones=[0, 1]"], "`optim.milestones` must be above 0, got 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        load_settings(None, words)
