"""The benchmark runs, both sides find the same instances, and its last line can be read."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
from pycocotools import mask as coco_mask

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmark_postprocess.py"
SMALL = {"queries": 12, "objects": 4, "seed": 0, "longest_edge": 512}


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import benchmark_postprocess

    return benchmark_postprocess


@pytest.mark.slow
def test_small_run(benchmark, monkeypatch, capsys):
    small = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert benchmark.main(["--rounds", "1", "--no-memory", *small]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name in ("480_t50", "480_t00", "1080_t50", "1080_t00"):
        assert result[f"speedup_{name}"] == min(result[f"speedup_{way}_{name}"] for way in ("flat", "instances"))
    # Every measurement of memory is a process of its own, so one size and threshold have to do.
    monkeypatch.setattr(benchmark, "SIZES", {480: (480, 640)})
    monkeypatch.setattr(benchmark, "THRESHOLDS", {50: 0.5})
    monkeypatch.setattr(benchmark, "subprocess", SimpleNamespace(run=processes.instead_of_subprocess))
    assert benchmark.compare_memory(argparse.Namespace(**SMALL))["memory_ratio"] < 5


def test_all_ways_see_the_same_instances(benchmark):
    arguments = argparse.Namespace(**SMALL)
    outputs = benchmark.model_outputs(arguments, (120, 160))
    results = {way: benchmark.call(way, arguments, outputs, (120, 160), 0.5)() for way in benchmark.WAYS}
    count, overlap = benchmark.agreement(results["ours"], results["instances"], 0.5)
    assert count == len(results["flat"]["segments_info"]) == arguments.objects and overlap > 0.9
    areas = coco_mask.area(results["ours"]["rle"])
    assert (areas > 0).all() and len(set(areas.tolist())) > 1


def test_instances_that_differ_are_refused(benchmark):
    arguments = argparse.Namespace(**SMALL)
    outputs = benchmark.model_outputs(arguments, (120, 160))
    ours = benchmark.call("ours", arguments, outputs, (120, 160), 0.5)()
    theirs = benchmark.call("instances", arguments, outputs, (120, 160), 0.5)()
    shifted = {**ours, "rle": ours["rle"][1:]}
    with pytest.raises(SystemExit, match="We find 3 instances, transformers 4"):
        benchmark.agreement(shifted, theirs, 0.5)
    for rle in theirs["rle"]:
        mask = coco_mask.decode(rle)
        rle["counts"] = coco_mask.encode((1 - mask).copy(order="F"))["counts"]
    with pytest.raises(SystemExit, match="overlap by"):
        benchmark.agreement(ours, theirs, 0.5)
