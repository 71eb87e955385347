"""Benchmarks: real tiny runs, resumed, shared among processes, with a job that fails."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
import yaml

from uplvp_hf.benchmark import run
from uplvp_hf.benchmark.plan import Sources, make_plan
from uplvp_hf.benchmark.recipe import load_benchmark
from uplvp_hf.benchmark.rows import read_rows
from uplvp_hf.benchmark.run import DONE, label_words, run_benchmark
from uplvp_hf.benchmark.sources import prepare_sources
from uplvp_hf.commands.benchmark import main
from uplvp_hf.data import load_dataset_rows
from uplvp_hf.data.synthetic import write_scenes
from uplvp_hf.training.config import ConfigError

SOURCES = Sources({"train": "data"}, {"val": "data"}, {"path": "images"})
STEPS = {"optim.steps": 2, "optim.warmup": 0, "optim.batch_size": 2, "data.size": 64}


def recipe_file(tmp_path: Path, **changes) -> str:
    content = {
        "name": "tiny",
        "data": {"scenes": {"unlabeled": 4, "train": 8, "val": 3}},
        "labels": {"truth": {"truth": True}},
        "segmenters": {"mask2former": {"pretrain": "scenes_pretrain", "finetune": "scenes_finetune"}},
        "settings": STEPS,
        "arms": {
            "scratch": {},
            "full": {"labels": "truth", "pretrain": {"model.class_agnostic": True}},
            "no human label": {"labels": "truth", "pretrain": {"model.class_agnostic": True}, "steps": 0},
        },
        "labels_per_class": [1],
        "seeds": [0],
        "curve": [0.5],
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**content, **changes}, sort_keys=False))
    return str(path)


@pytest.mark.slow
def test_runs_once_with_several_processes_and_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run.multiprocessing, "get_context", lambda kind: processes.CONTEXT)
    recipe, output = recipe_file(tmp_path), tmp_path / "out"
    assert main(["--recipe", recipe, "--output", str(output), "--workers", "2", "--quiet"]) == 0
    rows = read_rows(output / "rows.jsonl")
    assert [(row["arm"], row["labels_per_class"]) for row in rows] == [
        ("scratch", 1),
        ("full", 1),
        ("no human label", 0),
    ]
    full, unlabeled = rows[1], rows[2]
    # The rows say what the runs recorded.
    summary = json.loads((output / "runs/mask2former/full/1_labels_seed0/training_summary.json").read_text())
    assert full["metrics"]["AR100"] == pytest.approx(summary["metrics"]["AR100"], abs=1e-5)
    assert full["curve"].keys() == {"1", "2"} and full["pretrain"]["steps"] == full["finetune"]["steps"] == 2
    assert full["finetune"]["settings"]["data.size"] == 64 and "data.train" not in full["finetune"]["settings"]
    assert unlabeled["class_agnostic"] and unlabeled["finetune"] is None
    # One pre-training for both arms, and nothing is done twice.
    assert len(list(output.glob("pretrain/*/training_summary.json"))) == 1
    before = {file: file.stat().st_mtime_ns for file in output.rglob("training_summary.json")}
    assert main(["--recipe", recipe, "--output", str(output), "--quiet"]) == 0
    assert {file: file.stat().st_mtime_ns for file in output.rglob("training_summary.json")} == before
    assert "| scratch |" in capsys.readouterr().out
    assert {"results.md", "curves_mask2former_1.svg", "queries_mask2former.png"} <= {f.name for f in output.iterdir()}
    # A finished run is not taken for one of other settings.
    assert main(["--recipe", recipe, "--output", str(output), "--quiet", "finetune.optim.lr=0.5"]) == 2
    assert "made with other settings" in capsys.readouterr().err
    # Rows alone give the same tables.
    assert main(["--rows", str(output / "rows.jsonl"), "--output", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "results.md").read_text() == (output / "results.md").read_text()


@pytest.mark.slow
def test_a_job_that_fails_leaves_the_others_alone(tmp_path):
    labels = {"truth": {"truth": True}, "gone": {"store": str(tmp_path / "nothing")}}
    arms = {"broken": {"labels": "gone"}, "scratch": {}}
    benchmark = load_benchmark(recipe_file(tmp_path, labels=labels, arms=arms))
    output = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"1 of 3 jobs failed: pretrain/mask2former_gone_\w+_seed0"):
        run_benchmark(benchmark, str(output), progress=False)
    jobs = {
        job.row.get("arm", job.kind): job for job in make_plan(benchmark, output, prepare_sources(benchmark, output))
    }
    assert (output / jobs["scratch"].folder / DONE["finetune"]).is_file()
    assert "no such file or folder" in (output / jobs["pretrain"].folder / "error.txt").read_text()
    assert not (output / jobs["broken"].folder).exists()


@pytest.mark.slow
def test_every_training_in_two_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    benchmark = load_benchmark(recipe_file(tmp_path, arms={"scratch": {}}, processes=2))
    run_benchmark(benchmark, str(tmp_path / "out"), progress=False)
    row = read_rows(tmp_path / "out" / "rows.jsonl")[0]
    assert row["hardware"].startswith("2 x CPU") and row["curve"].keys() == {"1", "2"}


def test_workers_take_the_gpus_in_turn(tmp_path, monkeypatch):
    """GPUs that this process may use, not those that the machine has; none for trainings that use several."""
    taken = []

    class Process:
        def __init__(self, target, args):
            taken.append(args[-1])

        start = join = is_alive = lambda self: None

    monkeypatch.setattr(run.multiprocessing, "get_context", lambda kind: SimpleNamespace(Process=Process))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    for count in (1, 8):
        benchmark = load_benchmark(recipe_file(tmp_path, processes=count))
        run._work_together(benchmark, tmp_path / "out", [], workers=3, look=lambda: None)
    assert taken == ["2", "5", "2", None, None, None]


def test_validation_part_stays_out_of_everything(tmp_path):
    data = str(write_scenes(tmp_path / "scenes", 12, seed=0))
    path = recipe_file(tmp_path, data={"train": data, "val": "untouched"}, validation=0.25)
    sources = prepare_sources(load_benchmark(path), tmp_path / "out")
    train = load_dataset_rows(sources.train["train"], split="train")
    val = load_dataset_rows(sources.val["val"], split=sources.val["val_split"])
    names = [{row["file_name"] for row in rows.rows} for rows in (train, val)]
    assert [len(one) for one in names] == [9, 3] and not names[0] & names[1]
    unlabeled = load_dataset_rows(**sources.unlabeled)
    assert {row["file_name"] for row in unlabeled.rows} == names[0]
    assert train.load_image(0).size == (train[0]["width"], train[0]["height"])
    again = prepare_sources(load_benchmark(path), tmp_path / "out")
    assert again == sources


def test_validation_part_is_not_among_the_unlabeled(tmp_path):
    """Also where the unlabeled images are given as the folder of the training images."""
    data = write_scenes(tmp_path / "scenes", 8, seed=0)
    for unlabeled in (data, data / "images"):
        given = {"train": str(data), "val": "untouched", "unlabeled": str(unlabeled)}
        sources = prepare_sources(load_benchmark(recipe_file(tmp_path, data=given, validation=0.25)), tmp_path / "out")
        assert sources.unlabeled == {"path": sources.train["train"], "split": "train"}


def test_a_label_set_of_other_settings_is_refused(tmp_path):
    """Where its files lie does not matter."""
    label = {"labeler": "foreground", "backbone": "timm:mobilenetv2_100", "backbone_weights": "here/w.safetensors"}
    recipe = {"labels": {"x": {"label": label}}, "arms": {"full": {"labels": "x"}}}
    job = next(job for job in make_plan(load_benchmark(recipe_file(tmp_path, **recipe)), tmp_path, SOURCES))
    words = ["uplvp", "label", "images", *label_words(load_benchmark(recipe_file(tmp_path, **recipe)).labels["x"])]
    (tmp_path / job.folder).mkdir(parents=True)
    (tmp_path / job.folder / DONE["label"]).write_text(json.dumps({"command": words, "seconds": 1}))
    for change, refused in ((("backbone_weights", "there/w.safetensors"), False), (("labeler", "saliency"), True)):
        label[change[0]] = change[1]
        benchmark = load_benchmark(recipe_file(tmp_path, **recipe))
        with pytest.raises(ConfigError, match="made with other settings") if refused else nullcontext():
            run._check_unchanged(benchmark, tmp_path, job)


def test_processes_that_end_early_are_noticed(tmp_path, monkeypatch):
    benchmark = load_benchmark(recipe_file(tmp_path))
    monkeypatch.setattr(run, "_work_together", lambda *arguments: None)  # all killed at once
    with pytest.raises(ConfigError, match="4 of 4 jobs are not finished"):
        run_benchmark(benchmark, str(tmp_path / "out"), workers=2, progress=False)


def test_scenes_that_broke_off_are_made_again(tmp_path):
    path = recipe_file(tmp_path)
    (tmp_path / "out/data/train/images").mkdir(parents=True)
    (tmp_path / "out/data/train/annotations").mkdir()
    (tmp_path / "out/data/train/images/000001.png").touch()
    sources = prepare_sources(load_benchmark(path), tmp_path / "out")
    assert len(load_dataset_rows(sources.train["train"])) == 8


def test_folders_of_others_are_left_alone(tmp_path):
    benchmark = load_benchmark(recipe_file(tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="not a benchmark's"):
        run_benchmark(benchmark, str(tmp_path / "mine"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "benchmark.json").write_text('{"name": "other"}')
    with pytest.raises(ConfigError, match="holds another benchmark"):
        run_benchmark(benchmark, str(tmp_path / "other"))


def test_a_recipe_is_asked_for(tmp_path, capsys):
    assert main(["--output", str(tmp_path / "out")]) == 2
    assert "--data for the recipe photos_cpu" in capsys.readouterr().err
    assert main(["--data", "missing", "--output", str(tmp_path / "out"), "--plan"]) == 0  # the default recipe
    assert "runs/mask2former/teacher/20_labels_seed2" in capsys.readouterr().out


def test_wrong_words(tmp_path, capsys):
    recipe = recipe_file(tmp_path)
    for words, message in (
        (["--workers", "0"], "--workers must be at least 1"),
        (["--var", "weights"], "not of the form NAME=VALUE"),
        (["--arms", "ful"], "has no arms"),
        (["seds=[1]"], "Did you mean `seeds`"),
    ):
        assert main(["--recipe", recipe, "--output", str(tmp_path / "out"), *words]) == 2
        assert message in capsys.readouterr().err
