"""Fine-tuning with the recipes as they are does not lose what pre-training taught, on generated scenes."""

import json
from pathlib import Path
from statistics import mean

import pytest
import yaml

from uplvp_hf.benchmark.recipe import load_benchmark
from uplvp_hf.benchmark.rows import read_rows
from uplvp_hf.benchmark.run import run_benchmark

RESULTS = Path(__file__).parents[2] / "docs" / "results"
NOISE = 0.03  # AP by which two runs of one arm differed at most by chance (docs/results.md), and half as much again


@pytest.mark.slow
def test_fine_tuning_does_not_end_below_its_pretraining(tmp_path):
    """The scenes of the demo on a smaller scale, pre-trained on true masks, then fine-tuned on one scene a class."""
    recipe = {
        "name": "keeping",
        "data": {"scenes": {"unlabeled": 150, "train": 40, "val": 60}},
        "labels": {"truth": {"truth": True}},
        "segmenters": {"mask2former": {"pretrain": "scenes_pretrain", "finetune": "scenes_finetune"}},
        "settings": {"data.size": 96, "checkpoint.every": 0},
        "pretrain": {"optim.steps": 250},
        "finetune": {"optim.steps": 60},
        "curve": [],
        "arms": {"no human label": {"labels": "truth", "steps": 0}, "pre-trained": {"labels": "truth"}},
        "labels_per_class": [1],
        "seeds": [0],
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    run_benchmark(load_benchmark(str(path)), str(tmp_path / "out"), progress=False)
    before, after = (row["metrics"]["AP"] for row in read_rows(tmp_path / "out" / "rows.jsonl"))
    assert before > 0.08, "nothing was learned that could be lost"
    assert after > before - NOISE
    log = next((tmp_path / "out").glob("runs/*/pre-trained/*/log.jsonl")).read_text().splitlines()
    assert "gradient_share_mask" in json.loads(log[-1]) or "gradient_share_mask" in json.loads(log[-2])


@pytest.mark.parametrize("name", ["finetuning_scenes", "finetuning_animals7"])
def test_the_default_lost_nothing_in_the_published_rows(name):
    """On validation images of both sets, whose pseudo labels are good and rough, the default ended no further below the
    pre-trained model than chance moves an arm, and above what either constant share makes of the other set."""
    found: dict[str, dict[int, float]] = {}
    for row in read_rows(RESULTS / f"{name}.jsonl"):
        found.setdefault(row["arm"], {})[row["seed"]] = row["metrics"]["AP"]
    chance = max(abs(found["mixed noise"][seed] - found["mixed"][seed]) for seed in found["mixed"])
    default = mean(found["mixed measured"].values())
    assert len(found["mixed measured"]) >= 3
    assert default > mean(found["no human label"].values()) - chance
    assert default > min(mean(found[arm].values()) for arm in ("plain", "mixed"))
