"""The benchmark runs, both models give the same loss on the same points, and its last line can be read."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmark_train_step.py"


@pytest.mark.slow
def test_small_run(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import benchmark_train_step

    monkeypatch.setattr(benchmark_train_step, "subprocess", SimpleNamespace(run=processes.instead_of_subprocess))
    small = ["--size", "64", "--points", "64", "--rounds", "1", "--queries", "6", "--objects", "9"]
    assert benchmark_train_step.main(small) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert {"time_ratio_9", "memory_ratio_9", "peak_mib_9"} <= set(result)
    assert {f"{name}seconds_9" for name in ("", "knet_", "queryinst_")} <= set(result)
    differences = [float(line.split("loss difference ")[1].split()[0]) for line in lines if "loss difference" in line]
    assert len(differences) == 1 and differences[0] < 1e-5


@pytest.mark.slow
def test_steps_with_a_teacher(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import benchmark_train_step

    small = ["--teacher", "--no-memory", "--size", "64", "--points", "64", "--rounds", "1", "--queries", "6"]
    assert benchmark_train_step.main([*small, "--batch", "1"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result.keys() == {"teacher_ratio", "teacher_processor_ratio", "supervised_seconds"}
    assert result["teacher_processor_ratio"] > 1


@pytest.mark.slow
def test_losses_that_differ_are_refused(monkeypatch):
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import benchmark_train_step as benchmark
    finally:
        sys.path.pop(0)
    inner = benchmark.build

    def skewed(name, arguments):
        model = inner(name, arguments)
        if name == "theirs":
            model.weight_dict["loss_mask"] *= 1.001
        return model

    monkeypatch.setattr(benchmark, "build", skewed)
    with pytest.raises(SystemExit, match="losses at 2 objects differ"):
        benchmark.main(["--size", "64", "--points", "64", "--queries", "6", "--objects", "2", "--no-memory"])
