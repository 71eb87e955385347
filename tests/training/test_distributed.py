"""Two processes (gloo, on the CPU) end where one process with the doubled batch ends, with whole or spread weights."""

import json
import re

import pytest
import torch
import yaml
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from training_helpers import (
    DESCENT,
    DETERMINISTIC,
    PROCESS,
    TRAIN,
    largest_difference,
    log_of,
    on_two_processes,
    state_of,
    stop_at,
)

from uplvp_hf.data import load_dataset_rows
from uplvp_hf.training import launch
from uplvp_hf.training.build import build_model
from uplvp_hf.training.config import ConfigError, load_settings


@pytest.mark.slow
def test_two_processes_equal_one_with_the_doubled_batch(run, recipe, deterministic, tmp_path, scenes_dir):
    """With whole and with spread weights. DistributedDataParallel raises at the second update if a parameter got no
    gradient."""
    words = [*DESCENT, "optim.ema=0.9", "optim.clip=2", f"data.val={scenes_dir}", "evaluation.every=2"]
    words += ["checkpoint.every=2"]
    run("one", *words, "optim.batch_size=6")
    script = tmp_path / "distributed.py"
    script.write_text(PROCESS + DETERMINISTIC + BOTH)
    told = on_two_processes(
        script, recipe, tmp_path, *words, "optim.batch_size=1", "optim.accumulation=3", "log_every=2"
    )
    assert "FutureWarning" not in told
    for two in (tmp_path / "ddp", tmp_path / "fsdp"):
        check_equal_to_one(tmp_path / "one", two)


BOTH = """
for name in ("ddp", "fsdp"):
    loop.train(load_settings(recipe, [*words, f"fsdp={name == 'fsdp'}", f"output={output}/{name}"]), progress=False)
"""


def check_equal_to_one(one_folder, two_folder):
    summary = json.loads((two_folder / "training_summary.json").read_text())
    assert summary["hardware"].startswith("2 x CPU") and list(summary["evaluations"]) == ["2", "3"]
    assert largest_difference(one_folder, two_folder) < 1e-5
    for file in ("model", "average"):
        one, two = (load_file(folder / "checkpoint-2" / f"{file}.safetensors") for folder in (one_folder, two_folder))
        assert one.keys() == two.keys()
        assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)
    states = load_file(two_folder / "checkpoint-2" / "random_state.safetensors")
    assert {name.split(".")[0] for name in states} == {"0", "1"}
    one, two = ([x for x in log_of(folder) if "loss" in x] for folder in (one_folder, two_folder))
    assert two[0]["loss"] == pytest.approx((one[0]["loss"] + one[1]["loss"]) / 2, rel=1e-4)
    assert two[1]["loss"] == pytest.approx(one[2]["loss"], rel=1e-4)


@pytest.mark.slow
def test_spread_runs_resume_to_the_same_bytes(recipe, segmenters, tmp_path):
    """With frozen stages, accumulation and an average. The first files are those of a run without spreading, too."""
    for kind, segmenter in segmenters.items():
        settings = yaml.safe_load(recipe.read_text())
        settings["model"] |= {"segmenter": segmenter}
        settings["optim"] |= {"accumulation": 2, "batch_size": 1, "ema": 0.9}
        settings |= {"fsdp": True, "log_every": 1}
        (tmp_path / kind).mkdir()
        own = tmp_path / kind / "recipe.yaml"
        own.write_text(yaml.safe_dump(settings))
        built = build_model(load_settings(str(own)), load_dataset_rows(settings["data"]["train"]))
        weights = tmp_path / kind / "backbone.safetensors"
        save_file(built.segmenter.backbone.state_dict(), weights)
        settings["model"] |= {"backbone_weights": str(weights), "freeze_stages": 1}
        own.write_text(yaml.safe_dump(settings))
    script = tmp_path / "spread.py"
    script.write_text(PROCESS + SPREAD)
    for kind in segmenters:  # processes of their own: a run that was interrupted leaves its group's state behind
        on_two_processes(script, recipe, tmp_path, kind)
        check_resumed(tmp_path / kind)


def check_resumed(tmp_path):
    for file in ("model", "checkpoint-4/model", "checkpoint-4/optimizer", "checkpoint-4/average"):
        one, other = (tmp_path / name / f"{file}.safetensors" for name in ("whole", "parts"))
        assert one.read_bytes() == other.read_bytes(), file
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")
    assert state_of(tmp_path / "whole" / "checkpoint-4") == state_of(tmp_path / "parts" / "checkpoint-4")
    one, other = (load_file(tmp_path / name / "checkpoint-2" / "model.safetensors") for name in ("whole", "plain"))
    assert one.keys() == other.keys() and all(torch.allclose(one[name], other[name], atol=1e-3) for name in one)
    config = json.loads((tmp_path / "parts" / "config.json").read_text())
    assert config["architectures"] == ["UplvpForPreTraining"]


SPREAD = """
def go(name, *more, resume=False):
    settings = load_settings(f"{output}/{kind}/recipe.yaml", [*more, f"output={output}/{kind}/{name}"])
    loop.train(settings, resume=resume, progress=False)
update = loop._Run._update
def stop(self, step, batches):
    if step == 3:
        raise KeyboardInterrupt
    return update(self, step, batches)
for kind in words:
    go("whole")
    loop._Run._update = stop
    try:
        go("parts")
    except KeyboardInterrupt:
        loop._Run._update = update
    go("parts", resume=True)
    go("plain", "fsdp=false", "optim.steps=3")
"""


@pytest.mark.slow
def test_images_of_all_processes_are_named(recipe, tmp_path):
    """The second process meets an image that is not a number: both leave the step out, the first one reports."""
    script = tmp_path / "poisoned.py"
    script.write_text(PROCESS + POISONED + TRAIN)
    told = on_two_processes(script, recipe, tmp_path / "run", "optim.steps=2", "log_every=1")
    lines = [line for line in told.splitlines() if "Step 2 skipped" in line]
    assert len(lines) == 1 and len(re.search(r"Images: \[([\d, ]+)\]", lines[0])[1].split(", ")) == 4
    summary = json.loads((tmp_path / "run" / "training_summary.json").read_text())
    assert summary["skipped_steps"] == 1
    assert all(torch.isfinite(v).all() for v in load_file(tmp_path / "run" / "model.safetensors").values())


POISONED = """
update = loop._Run._update
def poisoned(self, step, batches):
    if step == 1 and self.accelerator.process_index == 1:
        batches[0]["pixel_values"][0] = float("nan")
    return update(self, step, batches)
loop._Run._update = poisoned
"""


@pytest.mark.slow
def test_one_process_goes_on_with_a_checkpoint_of_two(run, recipe, tmp_path, monkeypatch, caplog):
    """The other process' random state is not asked for; the images of a step have to be as many."""
    stop_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        run("parts", "fsdp=true")  # one process spreads nothing
    state = tmp_path / "parts" / "checkpoint-2" / "state.json"
    content = json.loads(state.read_text())
    state.write_text(json.dumps({**content, "processes": 2}))
    assert run("parts", resume=True).steps == 6
    assert "is of 2 processes" in caplog.text


def test_other_ways_of_spreading_are_refused(monkeypatch):
    monkeypatch.setattr(launch.Accelerator, "distributed_type", property(lambda self: DistributedType.FSDP))
    with pytest.raises(ConfigError, match=r"set up for FSDP: .*fsdp=true"):
        launch.make_accelerator(load_settings())


def test_spread_weights_in_float16_are_refused():
    with pytest.raises(ConfigError, match="fsdp"):
        load_settings(None, ["fsdp=true", "mixed_precision=fp16"])
