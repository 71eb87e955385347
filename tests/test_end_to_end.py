"""Images and class names in, a model in a fresh process out: the real command line on eight tiny scenes."""

import ast
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
import torch
import yaml
from PIL import Image

from uplvp_hf.benchmark.rows import read_rows
from uplvp_hf.cli import main
from uplvp_hf.data import load_dataset_rows
from uplvp_hf.data.synthetic import CLASSES, write_scenes
from uplvp_hf.models.modeling_uplvp import UplvpForInstanceSegmentation, UplvpForPreTraining

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
CLIP = resources.files("uplvp_hf") / "assets" / "synthetic_clip"
LABELED = [*CLASSES[:3], "gray cube"]  # three classes that the pre-training knows, and one that it does not


def call(*words) -> str:
    """Runs a verb; returns what it printed to stdout."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main([str(word) for word in words]) == 0
    return printed.getvalue()


def keep_three_classes(scenes: Path) -> Path:
    """A second annotation file beside the first, of `LABELED` with sparse ids."""
    content = json.loads((scenes / "annotations" / "instances.json").read_text())
    content["annotations"] = [entry for entry in content["annotations"] if entry["category_id"] <= 3]
    for entry in content["annotations"]:
        entry["category_id"] *= 10
    content["categories"] = [{"id": 10 * number, "name": name} for number, name in enumerate(LABELED, start=1)]
    file = scenes / "annotations" / "few.json"
    file.write_text(json.dumps(content))
    return file


@pytest.fixture(scope="module")
def path(tmp_path_factory, tiny_segmenter):
    """The whole path once: label, pretrain, finetune, evaluate, predict, push. Folders and what was printed."""
    base = tmp_path_factory.mktemp("path")
    scenes = write_scenes(base / "scenes", count=8, seed=3, size=80)
    few, recipe = keep_three_classes(scenes), base / "recipe.yaml"
    content = {
        "data": {"size": 64},
        "model": {"segmenter": tiny_segmenter("resnet")},
        "optim": {"steps": 3, "batch_size": 2, "lr": 5e-3, "warmup": 1},
    }
    recipe.write_text(yaml.safe_dump(content))
    printed = {}
    clip = ["--clip", CLIP, "--vocabulary", ",".join(CLASSES), "--template", "a photo of a {}"]
    sizes = ["--image-size", "64", "--window", "64", "--stride", "32", "run.batch_size=4", "--quiet"]
    printed["label"] = call("label", scenes / "images", "--output", base / "labels", *clip, *sizes)
    words = ["--recipe", recipe, "--quiet"]
    method = ["--recipe", "parts/method_of_papers"]
    printed["pretrain"] = call(
        "pretrain", *words, *method, f"data.train={base / 'labels'}", "--output", base / "pretrain"
    )
    # The first masks that reach one half come after about thirty steps.
    data = [f"data.train={few}", f"data.val={few}", f"model.init={base / 'pretrain'}", "optim.steps=50"]
    printed["finetune"] = call("finetune", *words, *data, "--output", base / "model")
    evaluation = ["--split", "few", "--output", base / "evaluation", "--quiet"]
    printed["evaluate"] = call("evaluate", base / "model", scenes, *evaluation)
    prediction = ["--output", base / "predictions", "--threshold", "0", "--quiet"]
    printed["predict"] = call("predict", base / "model", scenes / "images", *prediction)
    push = ["--repo-id", "me/model", "--dry-run", "--output", base / "repository"]
    metrics = ["--metrics", base / "evaluation" / "metrics.json", "--example", scenes / "images" / "000001.png"]
    printed["push"] = call("push", base / "model", *push, *metrics)
    return SimpleNamespace(base=base, scenes=scenes, few=few, recipe=recipe, printed=printed)


@pytest.mark.slow
def test_labels_are_a_training_set(path):
    labels = load_dataset_rows(path.base / "labels")
    assert list(labels.id2label.values()) == list(CLASSES) and len(labels) == 8
    count = sum(len(row["objects"]["score"]) for row in labels.rows)
    assert json.loads(path.printed["label"].splitlines()[-1])["instances"] == count > 0


@pytest.mark.slow
def test_pretraining_transfers_to_other_classes(path):
    summary = json.loads((path.base / "model" / "training_summary.json").read_text())
    assert "ignored: prompt_projection.weight" in summary["transfer"]
    for name in LABELED[:3]:
        assert name in summary["transfer"]
    start = {"id2label": dict(enumerate(LABELED)), "category_ids": [10, 20, 30, 40]}
    model = UplvpForInstanceSegmentation.from_pretraining(path.base / "pretrain", **start)
    source = UplvpForPreTraining.from_pretrained(path.base / "pretrain")
    assert model.config.num_labels == 4 and source.config.num_labels == 8
    head, before = model.segmenter.class_predictor, source.segmenter.class_predictor
    assert head.weight.shape[0] == 5 and torch.equal(head.weight[:3], before.weight[:3])
    assert torch.equal(head.weight[4], before.weight[8])  # "no object"
    report = str(model.transfer_report)
    assert report.startswith("kept ") and "remapped" in report and "ignored: prompt_projection" in report
    fresh = UplvpForInstanceSegmentation.from_pretraining(path.base / "pretrain", **start, class_head="new")
    assert "re-initialized: segmenter.class_predictor.weight" in str(fresh.transfer_report)


@pytest.mark.slow
def test_evaluation_gives_ap(path):
    metrics = json.loads((path.base / "evaluation" / "metrics.json").read_text())
    assert 0 <= metrics["AP"] <= metrics["AP50"] <= 1 and list(metrics["per_class"]) == LABELED
    results = json.loads((path.base / "evaluation" / "results.json").read_text())
    assert results and {entry["category_id"] for entry in results} <= {10, 20, 30, 40}
    assert "AP50" in path.printed["evaluate"] and "step 50: AP" in path.printed["finetune"]


@pytest.mark.slow
def test_predictions_are_coco_and_overlays(path):
    content = json.loads((path.base / "predictions" / "predictions.json").read_text())
    assert len(content["images"]) == 8 and content["annotations"]
    assert [category["name"] for category in content["categories"]] == LABELED
    overlays = sorted((path.base / "predictions" / "overlays").iterdir())
    assert len(overlays) == 8 and all(Image.open(file).mode == "RGB" for file in overlays)
    assert (path.base / "predictions" / "failures.jsonl").read_text() == ""


@pytest.mark.slow
def test_repository_holds_what_is_needed_and_nothing_of_the_run(path):
    folder = path.base / "repository"
    names = {file.name for file in folder.iterdir()}
    assert names >= {"README.md", "config.json", "preprocessor_config.json", "model.safetensors", "modeling_uplvp.py"}
    assert not {"log.jsonl", "settings.json", "training_summary.json"} & names
    assert not any("checkpoint" in name for name in names)
    texts = [file.read_text() for file in folder.iterdir() if file.suffix in (".json", ".md")]
    assert not any(str(path.base) in text for text in texts)  # no path of this machine
    assert "Nothing was pushed" in path.printed["push"]
    assert all(name in (folder / "README.md").read_text() for name in LABELED)


@pytest.mark.slow
def test_model_loads_in_a_fresh_process(path):
    code = """
import json, sys
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForInstanceSegmentation, pipeline
from uplvp_hf import UplvpForInstanceSegmentation
model, image = sys.argv[1:]
own = UplvpForInstanceSegmentation.from_pretrained(model)
auto = AutoModelForInstanceSegmentation.from_pretrained(model)
image = Image.open(image)
processor = AutoImageProcessor.from_pretrained(model)
inputs = processor(image, return_tensors="pt")
result = processor.post_process_instance_segmentation(auto(**inputs), threshold=0, target_sizes=[image.size[::-1]])[0]
found = pipeline("image-segmentation", model=model)(image, threshold=0.0, overlap_mask_area_threshold=0.0)
same = all((a == b).all() for a, b in zip(own.state_dict().values(), auto.state_dict().values()))
print(json.dumps({"same": bool(same), "type": type(auto).__name__, "masks": list(result["masks"].shape),
                  "pipeline": sorted({entry["label"] for entry in found}), "sizes": [e["mask"].size for e in found]}))
"""
    image = path.scenes / "images" / "000001.png"
    done = processes.run(code, path.base / "model", image, cwd="/")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["same"] and found["type"] == "UplvpForInstanceSegmentation" and found["masks"][1:] == [80, 80]
    assert set(found["pipeline"]) <= set(LABELED) and all(size == [80, 80] for size in found["sizes"])
    assert found["masks"][0] > 0 and "not supported" not in done.stderr


@pytest.mark.slow
def test_commands_are_quiet_and_verbose_on_request(path, capfd):
    words = ["predict", str(path.base / "model"), str(path.scenes / "images"), "--no-overlays", "--quiet"]
    assert main([*words, "--output", str(path.base / "quiet")]) == 0
    output = capfd.readouterr()
    assert output.err == "" and output.out.count("\n") == 1
    assert main([*words, "--output", str(path.base / "loud"), "--verbose"]) == 0
    assert "Loading weights" in capfd.readouterr().err  # and the first command did not switch it off for good


def commands_of(script: Path) -> list[str]:
    """The command lines in a script's docstring, continuation lines joined, comments left out."""
    text = ast.get_docstring(ast.parse(script.read_text()), clean=False)
    assert re.search(r"^Commands\b.*:$", text, re.MULTILINE), f"{script.name} has no `Commands:`"
    joined = re.sub(r"\\\n\s*", "", text)
    return [line.partition("  #")[0] for line in joined.splitlines() if f"scripts/{script.name}" in line]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_scripts_have_help_and_commands_that_exist(script, tmp_path):
    done = processes.run(script, "--help", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr
    commands = commands_of(script)
    known = set(re.findall(r"--[a-z][a-z-]*", done.stdout))
    assert commands and all(re.match(r"    (python|accelerate launch|\w+=\d+ python) ", line) for line in commands)
    for command in commands:
        words = command.partition(f"scripts/{script.name}")[2]
        used = set(re.findall(r"--[a-z][a-z-]*", words))
        if not used <= known:  # of a verb
            verb = processes.run(script, words.split()[0], "--help", cwd=tmp_path)
            known |= set(re.findall(r"--[a-z][a-z-]*", verb.stdout))
        assert used <= known, f"{command}: no option {sorted(used - known)}"
        for recipe in re.findall(r"--recipe ([\w/]+)(?:\s|$)", command):
            rooms = [resources.files("uplvp_hf") / room / "recipes" for room in ("training", "benchmark")]
            assert any((room / f"{recipe}.yaml").is_file() for room in rooms)


def clean_environment() -> dict:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
def test_labeling_is_shared_among_processes(path, tmp_path):
    clip = ["--clip", CLIP, "--vocabulary", ",".join(CLASSES), "--template", "a photo of a {}", "--processes", "2"]
    sizes = ["--image-size", "64", "--window", "64", "--stride", "32", "run.batch_size=4", "--quiet"]
    words = ["label", path.scenes / "images", "--output", "labels", *clip, *sizes, "--device", "cpu"]
    command = [sys.executable, "-m", "uplvp_hf.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=clean_environment())
    assert done.returncode == 0, done.stderr
    shards = sorted(file.name for file in (tmp_path / "labels").glob("rows-*"))
    assert shards == ["rows-00000-00000.jsonl", "rows-00001-00000.jsonl"]
    shared, alone = (load_dataset_rows(folder).rows for folder in (tmp_path / "labels", path.base / "labels"))
    assert sorted(shared, key=lambda row: row["image_id"]) == list(alone)


@pytest.mark.slow
def test_accelerate_launch_from_another_folder(path, tmp_path):
    shutil.copy(path.recipe, tmp_path / "mine.yaml")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    words = ["--recipe", "mine.yaml", f"data.train={path.few}", "--output", "here", "--quiet"]
    done = subprocess.run(
        [*launch, ROOT / "scripts" / "finetune.py", *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=clean_environment(),
    )
    assert done.returncode == 0, done.stderr
    assert "3 steps in" in done.stdout and "Model: here" in done.stdout
    model = UplvpForInstanceSegmentation.from_pretrained(tmp_path / "here")
    assert list(model.config.id2label.values()) == LABELED


@pytest.mark.slow
def test_pretraining_without_arguments_runs_the_embedded_default(tmp_path, monkeypatch, capsys):
    from uplvp_hf.benchmark import run as benchmark_run
    from uplvp_hf.commands import pretrain
    from uplvp_hf.demo import pipeline

    def label(command, **unused):  # in one process; `test_demo` has the two that the recipe asks for
        words = command[command.index("label") :]
        place = words.index("--processes")
        return processes.run(processes.COMMAND, *words[:place], *words[place + 2 :])

    monkeypatch.setattr(benchmark_run, "subprocess", SimpleNamespace(run=label))
    monkeypatch.setattr(pipeline, "_quiet", lambda: None)  # it sets up a process of its own
    real = pipeline.pretrain_default
    monkeypatch.setattr(pipeline, "pretrain_default", lambda: real(str(tmp_path / "default"), scale=0.005))
    monkeypatch.setattr(sys, "argv", ["scripts/pretrain.py"])
    assert pretrain.main() == 0
    printed = capsys.readouterr().out
    assert "No settings given: running the embedded default" in printed and "4 steps in" in printed
    model = UplvpForPreTraining.from_pretrained(tmp_path / "default" / "model")
    assert list(model.config.id2label.values()) == list(CLASSES)


@pytest.mark.slow
def test_demo(tmp_path):
    words = ["demo", "--scale", "0.02", "--output", tmp_path / "demo"]
    done = processes.run(processes.FORKING_COMMAND, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Backbone" not in done.stderr and "Loading weights" not in done.stderr
    rows = read_rows(tmp_path / "demo" / "rows.jsonl")
    assert [row["arm"] for row in rows] == ["scratch", "scratch total", "no human label", "pre-trained"]
    assert all(0 <= row["metrics"][name] <= 1 for row in rows for name in ("AP", "AP50"))
    best = max(100 * row["metrics"]["AP"] for row in rows)
    assert re.search(rf" {best:.1f} .* \*$", done.stdout, re.MULTILINE)
    report = (tmp_path / "demo" / "report.html").read_text()
    targets = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'>\s]*)|url\(["']?([^"')]*)""", report)
    assert targets and all("".join(pair).startswith(("data:", "#")) for pair in targets)  # nothing outside of the page
    assert report.count("data:image/") >= 8 and "<svg" in report
    UplvpForInstanceSegmentation.from_pretrained(tmp_path / "demo" / "model")
    refused = processes.run(processes.COMMAND, "demo", "--output", tmp_path)
    assert refused.returncode == 2 and refused.stderr.startswith("uplvp demo: error: ") and "--output" in refused.stderr
