"""TensorBoard through Accelerate: its files, read back, hold the log; a resumed run continues the curves."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_helpers import log_of, stop_at

from uplvp_hf.training import launch
from uplvp_hf.training.config import ConfigError


def curves(folder) -> dict[str, dict[int, list[float]]]:
    """{name: {step: values}} of what TensorBoard shows."""
    events = EventAccumulator(str(folder / "uplvp_hf"))
    events.Reload()
    found = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            found.setdefault(name, {}).setdefault(event.step, []).append(event.value)
    return found


@pytest.mark.slow
def test_a_resumed_run_continues_its_curves(run, tmp_path, scenes_dir, monkeypatch):
    words = ["tracker=tensorboard", "log_every=1", f"data.val={scenes_dir}", "evaluation.every=3"]
    stop_at(monkeypatch, 5)  # after the fifth step, which is logged; the checkpoint is of the fourth
    with pytest.raises(KeyboardInterrupt):
        run("run", *words)
    assert set(curves(tmp_path / "run")["loss"]) == {1, 2, 3, 4, 5}
    run("run", *words, resume=True)
    found, log = curves(tmp_path / "run"), log_of(tmp_path / "run")
    assert sorted(found["loss"]) == [1, 2, 3, 4, 5, 6] and sorted(found["val_AP"]) == [3, 6]
    for line in log:
        step = line.pop("step")
        for name, value in line.items():
            assert found[name][step] == pytest.approx([value], rel=1e-6), (name, step)  # once, and the same number


def test_a_tracker_that_is_not_there_is_refused(run, monkeypatch, tmp_path):
    """Accelerate only warns of one that is not installed, and the run would not be tracked."""
    monkeypatch.setattr(launch, "get_available_trackers", lambda: ["tensorboard"])
    for name in ("nothing", "wandb"):
        with pytest.raises(ConfigError, match=f"`tracker` must be one of tensorboard, got `{name}`"):
            run("run", f"tracker={name}")
    assert not (tmp_path / "run").exists()
