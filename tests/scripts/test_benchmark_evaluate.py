"""The benchmark of evaluation runs on small images, and its last line can be read."""

import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmark_evaluate.py"


@pytest.fixture
def benchmark(load_script, monkeypatch):
    module = load_script("benchmark_evaluate")
    for name, value in (("WIDTH", 96), ("HEIGHT", 64), ("OBJECTS", 3)):
        monkeypatch.setattr(module, name, value)
    return module


@pytest.mark.slow
def test_small_run(benchmark, capsys):
    assert benchmark.main(["--inferred", "2", "--images", "4", "--rounds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert result["detections"] == 100
    assert result["inference_ms"] == pytest.approx(result["forward_ms"] + result["postprocess_ms"], abs=1e-3)
    dearer = max(result["evaluation_streaming_own_ms"], result["evaluation_streaming_made_ms"])
    assert result["evaluation_over_inference_streaming"] == pytest.approx(dearer / result["inference_ms"], abs=1e-4)
    assert result["evaluation_over_inference"] > 0
    assert sum(line.startswith("AP ") for line in lines) == 2


def test_made_detections_are_mostly_right(benchmark):
    generator = benchmark.np.random.default_rng(0)
    rows = [benchmark.make_row(generator, number) for number in range(3)]
    detections = [benchmark.made_detections(generator, row) for row in rows]
    numbers = benchmark.evaluate_once("streaming", rows, detections, 5)
    assert 0.2 < numbers["AP"] < 1
