"""What a run leaves behind when it has finished, and that resuming it then is safe."""

import pytest
import torch

from uplvp_hf.training.config import ConfigError

WORDS = ["stage=finetune", "optim.steps=2", "optim.schedule=constant", "checkpoint.every=1", "checkpoint.stay=false"]


def test_a_finished_run_leaves_no_checkpoints_and_is_not_touched_again(run, tmp_path, scenes_dir, caplog):
    words = [*WORDS, f"data.val={scenes_dir}", "evaluation.at=[1]", "checkpoint.best=true"]
    first = run("run", *words)
    files = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "run").iterdir()}
    assert {path.name for path in files} == {
        "config.json", "log.jsonl", "model.safetensors", "preprocessor_config.json", "settings.json",
        "training_summary.json",
    }  # fmt: skip
    with caplog.at_level("INFO"):
        again = run("run", *words, resume=True)
    assert "run has finished: its 2 steps are done, and nothing was changed." in caplog.text
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "run").iterdir()} == files
    assert again.evaluations.keys() == first.evaluations.keys() == {1, 2}
    assert again.model_step == first.model_step and again.evaluations[2]["AP"] == first.evaluations[2]["AP"]
    weights = first.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in again.model.state_dict().items())
    with pytest.raises(ConfigError, match=r"finished its 2 steps and holds no checkpoint .*checkpoint\.stay=true"):
        run("run", *words, "optim.steps=3", resume=True)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "run").iterdir()} == files


def test_checkpoints_stay_where_they_are_asked_for_and_a_run_grows_from_them(run, tmp_path):
    run("run", *WORDS, "checkpoint.stay=true")
    assert (tmp_path / "run" / "checkpoint-1" / "optimizer.safetensors").is_file()
    assert run("run", *WORDS, "checkpoint.stay=true", "optim.steps=3", resume=True).steps == 3
