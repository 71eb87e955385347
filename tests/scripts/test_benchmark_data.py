"""The benchmark runs, and a sample of 200 instances stays far below what dense masks take."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmark_data.py"
linux_only = pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks are read from /proc")


def run(*words):
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@linux_only
def test_200_instances_take_at_most_10_mb():
    result = run("--quick")
    assert result["instances"] == 200 and result["size"] == 1024
    assert 100_000 < result["bytes_per_sample"] <= 10_000_000


@linux_only
@pytest.mark.slow
def test_whole_run():
    """The measurement sees what is there: the dense stack of 40 masks of 512 x 512 pixels is 42 MB."""
    result = run("--size", "512", "--instances", "40", "--rounds", "1", "--radius", "8", "60")
    assert 41_900_000 < result["dense_float_bytes"] < 50_000_000
    assert all(0 < result[f"bytes_per_sample{kind}"] < 10_000_000 for kind in ("", "_rotated", "_pasted"))
    assert 0 < result["held_bytes"] < 1_000_000
