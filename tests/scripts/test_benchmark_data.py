"""The benchmark runs, and a sample of 200 instances stays far below what dense masks take."""

import json
import os
import subprocess
from types import SimpleNamespace

import processes
import pytest

linux_only = pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks are read from /proc")


@pytest.fixture
def run(load_script, monkeypatch, capsys):
    """run(*words): the last line. What does not depend on how an interpreter was started is in forked processes."""
    script = load_script("benchmark_data")

    def start(command, **options):
        return (subprocess.run if command[2] == "memory" else processes.instead_of_subprocess)(command, **options)

    monkeypatch.setattr(script, "subprocess", SimpleNamespace(run=start, PIPE=subprocess.PIPE))

    def measure(*words):
        assert script.main(words) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return measure


@pytest.mark.slow
@linux_only
def test_200_instances_take_at_most_10_mb(run):
    result = run("--quick")
    assert result["instances"] == 200 and result["size"] == 1024
    assert 100_000 < result["bytes_per_sample"] <= 10_000_000


@linux_only
@pytest.mark.slow
def test_whole_run(run):
    """The measurement sees what is there: the dense stack of 40 masks of 512 x 512 pixels is 42 MB."""
    result = run("--size", "512", "--instances", "40", "--rounds", "1", "--radius", "8", "60")
    assert 41_900_000 < result["dense_float_bytes"] < 50_000_000
    assert all(0 < result[f"bytes_per_sample{kind}"] < 10_000_000 for kind in ("", "_rotated", "_pasted"))
    assert 0 < result["held_bytes"] < 1_000_000
