"""Half precision: autocast, weights in bfloat16, and the scaler of float16 (its logic, with the one of the CPU)."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from training_helpers import log_of, stop_at

from uplvp_hf.training import loop
from uplvp_hf.training.config import ConfigError, TrainingAborted


@pytest.fixture(params=["mask2former", "knet", "queryinst"])
def kind(request, recipe, segmenters):
    settings = yaml.safe_load(recipe.read_text())
    settings["model"]["segmenter"] = segmenters[request.param]
    recipe.write_text(yaml.safe_dump(settings))
    return request.param


def test_autocast_trains_float32_weights(run, kind, tmp_path):
    run("full", "log_every=1", "optim.steps=3")
    result = run("half", "log_every=1", "optim.steps=3", "mixed_precision=bf16", "optim.ema=0.9")
    assert result.skipped == 0 and all(p.dtype == torch.float32 for p in result.model.parameters())
    full, half = log_of(tmp_path / "full"), log_of(tmp_path / "half")
    assert half[0]["loss"] != full[0]["loss"]  # it was on
    assert half[0]["loss"] == pytest.approx(full[0]["loss"], rel=0.1)


def test_weights_in_bfloat16_train(run, kind, tmp_path):
    first = run("first", "optim.steps=1").model
    first.to(torch.bfloat16).save_pretrained(tmp_path / "first")
    words = ["model.segmenter=", f"model.init={tmp_path / 'first'}", "optim.lr=1e-2", "optim.ema=0.9", "log_every=1"]
    result = run("second", *words)
    start, end = first.state_dict(), result.model.state_dict()
    assert result.skipped == 0 and all(p.dtype == torch.bfloat16 for p in result.model.parameters())
    moved = {name for name, value in end.items() if not torch.equal(value, start[name])}
    assert len(moved) > 100 and all(torch.isfinite(value).all() for value in end.values())
    average = load_file(tmp_path / "second" / "checkpoint-4" / "average.safetensors")
    assert all(value.dtype == torch.float32 for value in average.values())
    assert any(not torch.equal(value, value.bfloat16().float()) for value in average.values())


@pytest.fixture
def scaled(monkeypatch):
    """scaled(scale): runs get a scaler that starts there, as they do on CUDA with mixed_precision=fp16.

    half: and compute in float16, which CPUs can (slowly), though Accelerate does not let them.
    """

    def go(scale, half=False):
        inner = loop.make_accelerator

        def make(settings):
            accelerator = inner(settings)
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
            if half:
                accelerator.autocast = lambda: torch.autocast("cpu", dtype=torch.float16)
            return accelerator

        monkeypatch.setattr(loop, "make_accelerator", make)

    return go


@pytest.mark.slow
def test_float16_trains(run, kind, recipe, scaled, tmp_path):
    if kind == "queryinst":  # the gradients of a narrow dynamic convolution come near the largest number of float16
        settings = yaml.safe_load(recipe.read_text())
        settings["model"]["segmenter"]["dynamic_channels"] = 64
        recipe.write_text(yaml.safe_dump(settings))
    run("full", "log_every=1")
    scaled(8.0, half=True)
    result = run("half", "log_every=1")
    assert result.skipped == 0 and result.overflows < 4  # of 6, while the scale is found
    full, half = log_of(tmp_path / "full"), log_of(tmp_path / "half")
    assert half[0]["loss"] != full[0]["loss"]
    assert half[0]["loss"] == pytest.approx(full[0]["loss"], rel=0.1)
    assert all(torch.isfinite(value).all() for value in result.model.state_dict().values())


def test_a_scale_without_overflow_changes_nothing(run, scaled, tmp_path):
    one = run("plain").model.state_dict()
    scaled(8.0)
    result = run("scaled")
    assert (result.skipped, result.overflows) == (0, 0)
    for name, value in result.model.state_dict().items():  # a power of two: no rounding
        torch.testing.assert_close(value, one[name], rtol=0, atol=1e-7)


def test_overflows_are_no_failures(run, scaled, tmp_path):
    """The scaler halves its scale until the gradients fit; meanwhile weights and average stay as they are."""
    scaled(2.0**127)
    result = run("run", "optim.steps=16", "log_every=1", "optim.max_skipped=1", "optim.ema=0.9", "checkpoint.every=5")
    count = result.overflows
    assert 2 < count < 14 and result.skipped == 0
    folder = tmp_path / "run" / "checkpoint-15"
    steps = {value.item() for name, value in load_file(folder / "optimizer.safetensors").items() if "|step" in name}
    assert steps == {15 - count}
    assert json.loads((folder / "state.json").read_text())["average_updates"] == 15 - count
    assert all("loss" in line for line in log_of(tmp_path / "run"))


@pytest.mark.slow
def test_a_scaled_run_resumes_to_the_same_bytes(run, scaled, tmp_path, monkeypatch):
    scaled(2.0**100)
    words = ["checkpoint.every=3", "optim.steps=9"]
    whole = run("whole", *words)
    stop_at(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        run("parts", *words)
    parts = run("parts", *words, resume=True)
    one, other = (tmp_path / name / "model.safetensors" for name in ("whole", "parts"))
    assert one.read_bytes() == other.read_bytes() and parts.overflows == whole.overflows


def test_gradients_that_overflow_at_any_scale_end_the_run(run, scaled, monkeypatch):
    """They are not finite by themselves: below a scale of 1 every such step counts."""
    scaled(4.0)
    unscale = torch.amp.GradScaler.unscale_

    def poisoned(self, optimizer):
        optimizer.param_groups[0]["params"][0].grad.fill_(float("nan"))
        unscale(self, optimizer)

    monkeypatch.setattr(torch.amp.GradScaler, "unscale_", poisoned)
    with pytest.raises(TrainingAborted, match="2 steps had a non-finite loss, cost or gradient"):
        run("run", "optim.steps=30", "optim.max_skipped=2")


def test_float16_needs_a_gpu(run):
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        run("run", "mixed_precision=fp16")
