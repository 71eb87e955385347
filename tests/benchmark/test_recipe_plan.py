"""Benchmarks: recipes, and the jobs that they become."""

import json
from importlib import resources
from pathlib import Path

import pytest
import yaml

from uplvp_hf.benchmark.plan import Sources, make_plan
from uplvp_hf.benchmark.recipe import load_benchmark
from uplvp_hf.benchmark.run import label_words
from uplvp_hf.training.config import ConfigError

SHIPPED = sorted(file.stem for file in Path(str(resources.files("uplvp_hf.benchmark") / "recipes")).glob("*.yaml"))
SOURCES = Sources({"train": "data", "train_split": "train"}, {"val": "data", "val_split": "val"}, {"path": "images"})
RECIPE = {
    "name": "test",
    "variables": {"weights": None},
    "data": {"train": "data", "val": "data"},
    "labels": {
        "named": {
            "label": {"labeler": "foreground", "settings": {"labeler.grid": 160}, "backbone_weights": "${weights}"}
        }
    },
    "segmenters": {"small": {"pretrain": "scenes_pretrain", "finetune": "scenes_finetune"}},
    "pretrain": {"optim.steps": 40},
    "finetune": {"optim.steps": 20},
    "curve": [0.25, 0.5],
    "arms": {
        "scratch": {},
        "scratch total": {"equal_total": True},
        "full": {"labels": "named"},
        "quarter": {"labels": "named", "steps": 0.25},
        "pseudo": {"labels": "named", "pretrain": {"model.prompt_matching": "none"}, "labels_per_class": [5]},
        "no label": {"labels": "named", "steps": 0},
    },
    "labels_per_class": [5, 10],
    "seeds": [3, 4],
}


def load(tmp_path: Path, words=(), variables=None, **changes):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, **changes}, sort_keys=False))
    return load_benchmark(str(path), words, {"weights": "w.safetensors"} if variables is None else variables)


def test_plan_shares_labeling_and_pretraining(tmp_path):
    jobs = make_plan(load(tmp_path), tmp_path, SOURCES)
    by_kind = {
        kind: [job for job in jobs if job.kind == kind] for kind in ("label", "pretrain", "finetune", "evaluate")
    }
    assert len(by_kind["label"]) == 1
    assert len(by_kind["pretrain"]) == 2 * 2  # (full, quarter and "no label" together; pseudo) x seeds
    assert len(by_kind["finetune"]) == 2 * (4 * 2 + 1) and len(by_kind["evaluate"]) == 2
    places = {job.folder: index for index, job in enumerate(jobs)}
    assert len(places) == len(jobs)
    assert all(places[need] < places[job.folder] for job in jobs for need in job.needs)
    assert {job.row["seed"] for job in jobs[: len(jobs) // 2] if job.row} == {3}  # seed by seed


def test_steps_and_evaluations(tmp_path):
    jobs = {job.folder: job for job in make_plan(load(tmp_path), tmp_path, SOURCES)}
    steps = {
        name: jobs[f"runs/small/{name}/5_labels_seed3"].settings for name in ("scratch", "scratch_total", "quarter")
    }
    assert {name: settings.optim.steps for name, settings in steps.items()} == {
        "scratch": 20,
        "scratch_total": 60,
        "quarter": 5,
    }
    assert steps["scratch"].evaluation.at == [5, 10] and steps["scratch_total"].evaluation.at == [15, 30]
    settings = jobs["runs/small/full/10_labels_seed4"].settings
    assert (settings.data.labels_per_class, settings.data.split_seed, settings.seed) == (10, 4, 4)
    assert settings.model.init == str(tmp_path / jobs["runs/small/full/10_labels_seed4"].needs[0])
    assert jobs["runs/small/scratch/5_labels_seed3"].settings.model.init is None
    pretrain = jobs[jobs["runs/small/full/10_labels_seed4"].needs[0]]
    assert pretrain.settings.stage == "pretrain" and pretrain.settings.seed == 4
    assert pretrain.settings.data.train == str(tmp_path / "labels" / "named")


def test_one_pretraining_for_all_seeds(tmp_path):
    jobs = make_plan(load(tmp_path, shared_pretraining=True), tmp_path, SOURCES)
    assert {job.settings.seed for job in jobs if job.kind == "pretrain"} == {3}
    assert len([job for job in jobs if job.kind == "pretrain"]) == 2
    assert len([job for job in jobs if job.kind == "evaluate"]) == 1


def test_label_words(tmp_path):
    words = label_words(load(tmp_path).labels["named"])
    flags = [word for word in words if not word.startswith("labeler.")]
    pairs = {tuple(flags[place : place + 2]) for place in range(0, len(flags), 2)}
    assert pairs == {("--labeler", "foreground"), ("--backbone-weights", "w.safetensors")}
    assert [word for word in words if word not in flags] == ["labeler.grid=160"]


def test_words_and_choice(tmp_path):
    benchmark = load(tmp_path, ["seeds=[7]", "pretrain={optim.steps: 8}"])
    assert benchmark.seeds == [7] and benchmark.pretrain == {"optim.steps": 8}
    path = tmp_path / "recipe.yaml"
    chosen = load_benchmark(str(path), (), {"weights": "w"}, arms=["scratch", "full"])
    assert list(chosen.arms) == ["scratch", "full"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"arms": {"full": {"labels": "nmed"}}}, "no label set `nmed`"),
        (
            {"arms": {"full": {"lables": "named"}}},
            r"`arms.full.lables`. Did you mean `arms.full.labels`",
        ),
        ({"arms": {"a/b": {}}}, "`a/b`: names are made of"),
        ({"arms": {"x": {"steps": 0}}}, "needs `labels`"),
        ({"arms": {"x": {"pretrain": {"optim.steps": 3}}}}, "no effect without `labels`"),
        ({"labels": {"named": {"truth": True, "store": "x"}}}, "needs one of"),
        ({"arms": {}}, "needs `arms`"),
        ({"data": {"train": "x"}}, "needs `train` and `val`"),
        ({"curve": [0.5, 1.0]}, "`curve` must be above 0 and below 1, got 1.0"),
        ({"labels_per_class": [0]}, "`labels_per_class` must be at least 1, got 0"),
        ({"labels_per_class": ["1@"]}, "1@"),
        ({"processes": 0}, "`processes` must be at least 1"),
        ({"validation": 1.0}, "`validation` must be at least 0 and below 1"),
        ({"segmenters": {"x": 3}}, "`segmenters.x` is a section"),
    ],
)
def test_wrong_recipes(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, **changes)


def test_variables_have_to_be_given_and_to_exist(tmp_path):
    with pytest.raises(ConfigError, match=r"needs the variable `weights`: give --var weights=VALUE"):
        load(tmp_path, variables={})
    with pytest.raises(ConfigError, match="no variable `wieghts`"):
        load(tmp_path, variables={"wieghts": "x", "weights": "y"})
    with pytest.raises(ConfigError, match="No benchmark recipe `nothing`"):
        load_benchmark("nothing")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SHIPPED if not name.startswith("fewshot")])
def test_shipped_recipes_make_plans(name, tmp_path):
    known = yaml.safe_load((resources.files("uplvp_hf.benchmark") / "recipes" / f"{name}.yaml").read_text())
    variables = {key: f"{key}.given" for key, value in (known.get("variables") or {}).items() if value is None}
    jobs = make_plan(load_benchmark(name, (), variables), tmp_path, SOURCES)
    wanted = {"evaluate" if arm.get("steps") == 0 else "finetune" for arm in known["arms"].values()}
    wanted |= {"pretrain" for arm in known["arms"].values() if arm.get("labels")}
    assert {job.kind for job in jobs} >= wanted
    assert all(json.dumps(job.row) for job in jobs)


def test_splits_and_epochs(tmp_path):
    """Labels may be a named split; recipes that count epochs are scaled in epochs."""
    finetune = {"optim.epochs": 8, "optim.steps": 20}
    changes = {"labels_per_class": ["1@10"], "finetune": finetune, "arms": {"full": {"labels": "named"}}}
    jobs = {job.folder: job for job in make_plan(load(tmp_path, **changes), tmp_path, SOURCES)}
    settings = jobs["runs/small/full/1@10_labels_seed3"].settings
    assert (settings.data.subset, settings.data.labels_per_class) == ("1@10", None)
    assert (settings.optim.epochs, settings.evaluation.every_epochs) == (8, 2)
    changes["arms"] = {"quarter": {"labels": "named", "steps": 0.25}}
    jobs = {job.folder: job for job in make_plan(load(tmp_path, **changes), tmp_path, SOURCES)}
    assert jobs["runs/small/quarter/1@10_labels_seed3"].settings.optim.epochs == 2
    changes["arms"] = {"total": {"equal_total": True}}
    with pytest.raises(ConfigError, match="`equal_total` counts steps"):
        make_plan(load(tmp_path, **changes), tmp_path, SOURCES)


def test_words_for_settings_of_training(tmp_path):
    words = ["finetune.optim.steps=7", "settings.data.size=96", "pretrain.model.class_head=off"]
    benchmark = load(tmp_path, words, settings={"data.size": 64, "optim.lr": 0.1})
    assert benchmark.finetune == {"optim.steps": 7} and benchmark.settings == {"data.size": 96, "optim.lr": 0.1}
    assert benchmark.pretrain["optim.steps"] == 40
    with pytest.raises(ConfigError, match=r"`arms.x.segmenters`: .* has no segmenters \['large'\]"):
        load(tmp_path, arms={"x": {"segmenters": ["large"]}})
    with pytest.raises(ConfigError, match="differ in spaces and _ alone"):
        load(tmp_path, arms={"a b": {}, "a_b": {}})


def test_what_a_result_depends_on(tmp_path):
    """Places do not count, settings do; a pre-trained backbone is not overwritten from its file."""
    weights = {"model.backbone_weights": "${weights}"}
    here = make_plan(load(tmp_path, settings=weights), tmp_path / "here", SOURCES)
    elsewhere = Sources({**SOURCES.train, "train": "moved"}, SOURCES.val, {"path": "other"})
    there = make_plan(load(tmp_path, (), {"weights": "a/w.safetensors"}, settings=weights), tmp_path / "b", elsewhere)
    assert [(job.folder, job.fingerprint) for job in here] == [(job.folder, job.fingerprint) for job in there]
    other = make_plan(load(tmp_path, ["finetune.optim.lr=0.5"], settings=weights), tmp_path / "here", SOURCES)
    changed = {job.kind for job, before in zip(other, here, strict=True) if job.fingerprint != before.fingerprint}
    assert "finetune" in changed and "pretrain" not in changed
    for job in here:
        if job.kind == "finetune":
            assert (job.settings.model.backbone_weights is None) == bool(job.needs)
