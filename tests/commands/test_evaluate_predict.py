"""`uplvp evaluate` and `uplvp predict` from the command line's side."""

import argparse
import csv
import json
import shutil
from collections import Counter

import processes
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from uplvp_hf.commands import evaluate, predict
from uplvp_hf.data import DataWarning, load_dataset_rows
from uplvp_hf.evaluation import BACKENDS, METRICS, backends, load_segmenter, make_evaluator, predict_dataset
from uplvp_hf.files import only_run
from uplvp_hf.hub.card import build_card
from uplvp_hf.inference import Predictor
from uplvp_hf.models.pipeline_uplvp import UplvpInstanceSegmentationPipeline


def test_evaluate_writes_metrics_and_results(tiny_model_dir, scenes_dir, tmp_path, capsys):
    output = tmp_path / "evaluation"
    arguments = [str(tiny_model_dir), str(scenes_dir), "--output", str(output), "--quiet", "--device", "cpu"]
    assert evaluate.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "AP50" in printed and "6 images" in printed
    metrics = json.loads((output / "metrics.json").read_text())
    assert 0 <= metrics["AP"] <= 1 and metrics["num_images"] == 6
    assert metrics["command"].startswith("uplvp evaluate ") and metrics["data"] == str(scenes_dir)
    assert metrics["findings"]["at"][0]["threshold"] == 0.5 and "objects an image" in printed
    page = (output / "report.html").read_text()
    assert "<h2>Neighbors</h2>" in page and "<td>2 or more</td>" in page
    dataset = load_dataset_rows(scenes_dir)
    results = json.loads((output / "results.json").read_text())
    assert results and {entry["category_id"] for entry in results} <= set(dataset.category_ids)
    assert {entry["image_id"] for entry in results} <= {row["image_id"] for row in dataset.rows}
    assert sorted(file.name for file in output.iterdir()) == [
        "metrics.json", "per_class.csv", "report.html", "results.json",
    ]  # fmt: skip


def test_a_stored_threshold_is_what_everything_starts_from(tiny_model_dir, scenes_dir, tmp_path, capsys):
    model_dir, images = tmp_path / "model", str(scenes_dir / "images")
    shutil.copytree(tiny_model_dir, model_dir)
    given = argparse.Namespace(model=str(model_dir), duplicates=0.6)
    assert "No threshold is stored" in evaluate._store(given, {"best_threshold": 0.03, "annotations": 19})
    assert load_segmenter(str(model_dir))[0].config.default_threshold is None
    assert "from a score of 0.03 on" in evaluate._store(given, {"best_threshold": 0.03, "annotations": 20})
    model, processor = load_segmenter(str(model_dir), "cpu")
    assert (model.config.default_threshold, model.config.duplicate_iou) == (0.03, 0.6)
    found = {}
    for name, words in (("stored", []), ("given", ["--threshold", "0.03"]), ("usual", ["--threshold", "0.5"])):
        options = ["--output", str(tmp_path / name), "--quiet", "--device", "cpu", "--no-overlays"]
        assert predict.main([str(model_dir), images, *options, *words]) == 0
        found[name] = json.loads((tmp_path / name / "predictions.json").read_text())["annotations"]
    assert found["stored"] == found["given"] and len(found["stored"]) > len(found["usual"])
    image = Image.open(sorted((scenes_dir / "images").iterdir())[0])
    predictor = Predictor(model, processor)
    scores = predictor.predict(image).scores.tolist()
    assert scores == predictor.predict(image, threshold=0.03).scores.tolist() and min(scores) >= 0.03
    segmenter = UplvpInstanceSegmentationPipeline(model=model, image_processor=processor)
    assert [entry["score"] for entry in segmenter(image)] == pytest.approx(scores, abs=1e-5)
    assert "threshold=0.03" in str(build_card(model_dir, "someone/model"))


def test_crowds_can_be_evaluated_as_objects(tiny_model_dir, scenes_dir, tmp_path, capsys):
    """Where every object is a crowd, there is nothing to compare with, and the message names the way on."""
    annotations = json.loads((scenes_dir / "annotations" / "instances.json").read_text())
    options = ["--quiet", "--device", "cpu", "--images", str(scenes_dir / "images")]
    found = []
    for name, crowd in (("plain", 0), ("crowds", 1)):
        for entry in annotations["annotations"]:
            entry["iscrowd"] = crowd
        (tmp_path / f"{name}.json").write_text(json.dumps(annotations))
        output = ["--output", str(tmp_path / name)] + ["--crowds-as-objects"] * crowd
        assert evaluate.main([str(tiny_model_dir), str(tmp_path / f"{name}.json"), *options, *output]) == 0
        found.append(json.loads((tmp_path / name / "metrics.json").read_text()))
    assert all(found[0][name] == found[1][name] for name in METRICS)
    assert "--crowds-as-objects" in found[1]["command"] and found[1]["crowds_as_objects"]
    capsys.readouterr()
    assert evaluate.main([str(tiny_model_dir), str(tmp_path / "crowds.json"), *options]) == 2
    refused = capsys.readouterr().err
    assert "crowds" in refused and "--crowds-as-objects" in refused and len(refused.strip().splitlines()) == 1


def test_a_second_evaluation_into_one_output_is_refused(tiny_model_dir, scenes_dir, tmp_path, capsys):
    options = ["--output", str(tmp_path / "out"), "--quiet", "--device", "cpu"]
    with only_run(tmp_path / "out"):
        assert evaluate.main([str(tiny_model_dir), str(scenes_dir), *options]) == 2
        assert "another run is writing" in capsys.readouterr().err
        assert [file.name for file in (tmp_path / "out").iterdir()] == [".lock"]


@pytest.mark.parametrize("backend", ["streaming", "pycocotools"])
def test_results_give_pycocotools_the_numbers_of_the_metrics(backend, tiny_model_dir, scenes_dir, tmp_path, capsys):
    options = ["--backend", backend, "--no-report", "--output", str(tmp_path), "--quiet", "--device", "cpu"]
    assert evaluate.main([str(tiny_model_dir), str(scenes_dir), *options]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["backend"] == backend and not (tmp_path / "report.html").exists()
    truth = COCO(str(scenes_dir / "annotations" / "instances.json"))
    evaluator = COCOeval(truth, truth.loadRes(str(tmp_path / "results.json")), "segm")
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    found = [metrics[name] for name in METRICS]
    assert [-1 if value is None else value for value in found] == evaluator.stats.tolist()
    with open(tmp_path / "per_class.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["name"]: float(row["AP"]) if row["AP"] else None for row in rows} == metrics["per_class"]
    assert sum(int(row["annotations"]) for row in rows) == len(truth.anns) == metrics["num_instances"]
    assert sum(int(row["detections"]) for row in rows) == len(json.loads((tmp_path / "results.json").read_text()))


def test_results_are_bounded_and_the_bounds_are_told(tiny_model_dir, scenes_dir, tmp_path, capsys):
    words = [str(tiny_model_dir), str(scenes_dir), "--no-report", "--quiet", "--device", "cpu"]

    def results(name, *bounds):
        assert evaluate.main([*words, "--output", str(tmp_path / name), *bounds]) == 0
        return json.loads((tmp_path / name / "results.json").read_text())

    four = results("four", "--max-detections", "4")
    assert max(Counter(entry["image_id"] for entry in four).values()) == 4
    floor = sorted(entry["score"] for entry in four)[len(four) // 2]
    capsys.readouterr()
    kept = results("floor", "--max-detections", "4", "--min-score", str(floor))
    assert kept == [entry for entry in four if entry["score"] >= floor] and len(kept) < len(four)
    assert f"at most 4 detections an image, of scores from {floor:g} on" in capsys.readouterr().out
    assert json.loads((tmp_path / "floor" / "metrics.json").read_text())["min_score"] == floor
    assert evaluate.main([*words, "--max-detections", "0"]) == 2


@pytest.mark.filterwarnings("ignore:No row has a `void`")
def test_evaluate_cityscapes_metric(tiny_model_dir, scenes_dir, tmp_path, capsys):
    words = [str(tiny_model_dir), str(scenes_dir), "--quiet", "--device", "cpu", "--metric", "cityscapes"]
    assert evaluate.main([*words, "--output", str(tmp_path)]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert 0 <= metrics["AP"] <= metrics["AP50"] <= 1 and "AP_S" not in metrics
    assert "Cityscapes benchmark" in (tmp_path / "report.html").read_text()
    assert "--metric cityscapes" in metrics["command"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--report"], "--report needs --output"),
        (["--threshold", "1.5"], "--threshold must be from 0 to 1"),
        (["--store-threshold"], "--store-threshold writes into the folder of a model"),
        (["--mask-threshold", "-1"], "--mask-threshold must be from 0 to 1"),
        (
            ["--metric", "cityscapes", "--backend", "pycocotools"],
            "'pycocotools' has no Cityscapes AP; leave it at streaming",
        ),
    ],
)
def test_evaluate_refuses_settings_before_anything_is_loaded(options, message, capsys):
    assert evaluate.main(["no model", "no data", *options]) == 2
    assert message in capsys.readouterr().err


def test_missing_backend_is_one_sentence(monkeypatch, capsys):
    found = backends.importlib.util.find_spec
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None if name == "hotcoco" else found(name))
    assert evaluate.main(["no model", "no data", "--backend", "hotcoco"]) == 2
    assert capsys.readouterr().err.count("pip install uplvp_hf[fast_eval]") == 1


def test_choices_are_those_of_the_library():
    assert (*BACKENDS, "fastest") == evaluate.BACKENDS
    for metric in evaluate.METRICS:
        make_evaluator(metric=metric)


@pytest.mark.slow
def test_evaluate_in_two_processes_writes_the_same_files(tiny_model_dir, scenes_dir, tmp_path):
    words = ["evaluate", tiny_model_dir, scenes_dir, "--quiet", "--device", "cpu", "--batch-size", "1"]
    words = [str(word) for word in words]
    assert evaluate.main([*words[1:], "--output", str(tmp_path / "one")]) == 0
    processes.run_together(processes.COMMAND, *words, "--output", tmp_path / "two")
    for name in ("results.json", "per_class.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert one.pop("seconds") and two.pop("seconds") and one == two
    pages = [(tmp_path / name / "report.html").read_text() for name in ("one", "two")]
    assert pages[0] == pages[1]


def test_evaluate_names_both_class_lists(tiny_model_dir, scenes_dir, tmp_path, capsys):
    content = json.loads((scenes_dir / "annotations" / "instances.json").read_text())
    for number, category in enumerate(content["categories"]):
        category["name"] = f"thing {number}"
    file = tmp_path / "renamed.json"
    file.write_text(json.dumps(content))
    arguments = [str(tiny_model_dir), str(file), "--images", str(scenes_dir / "images"), "--quiet"]
    assert evaluate.main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]  # after transformers' loading bar
    assert error.startswith("uplvp evaluate: ") and "thing 0" in error
    assert load_dataset_rows(scenes_dir).id2label[0] in error
    assert evaluate.main([*arguments, "--class-agnostic"]) == 0


@pytest.mark.slow
def test_predict_writes_json_overlays_and_failures(tiny_model_dir, scenes_dir, tmp_path, capsys):
    images = tmp_path / "images"
    shutil.copytree(scenes_dir / "images", images / "deeper")
    victim = sorted((images / "deeper").iterdir())[1]
    victim.write_bytes(victim.read_bytes()[:600])
    (images / "text.jpg").write_text("not an image")
    single = tmp_path / "single.png"
    Image.new("RGB", (80, 50), (200, 30, 30)).save(single)
    output = tmp_path / "out"
    arguments = [str(tiny_model_dir), str(images), str(single), "--output", str(output), "--threshold", "0.02"]
    assert predict.main([*arguments, "--quiet", "--device", "cpu", "--batch-size", "4"]) == 0
    assert "2 images could not be read" in capsys.readouterr().out
    content = json.loads((output / "predictions.json").read_text())
    assert len(content["images"]) == 6 and len(list((output / "overlays").glob("*.png"))) == 6
    assert all(annotation["score"] >= 0.02 for annotation in content["annotations"])
    ids = {category["id"] for category in content["categories"]}
    assert {annotation["category_id"] for annotation in content["annotations"]} <= ids and min(ids) == 10
    failures = [json.loads(line) for line in (output / "failures.jsonl").read_text().splitlines()]
    assert sorted(failure["file"].rsplit("/", 1)[-1] for failure in failures) == sorted([victim.name, "text.jpg"])
    # what was predicted reads back as labels
    shutil.copy(single, images / "deeper")
    with pytest.warns(DataWarning, match=r"found by the end of the name \('single.png' is 'deeper.single.png'"):
        labels = load_dataset_rows(output / "predictions.json", images=images)
    assert sum(len(row["objects"]["score"]) for row in labels.rows) == len(content["annotations"]) > 0


@pytest.mark.parametrize("kind", ["missing", "empty", "broken"])
def test_predict_without_images_fails_in_one_line(kind, tiny_model_dir, tmp_path, capsys):
    folder = tmp_path / "folder"
    if kind != "missing":
        folder.mkdir()
    if kind == "broken":
        (folder / "a.png").write_text("no")
    assert predict.main([str(tiny_model_dir), str(folder), "--output", str(tmp_path / "out"), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("uplvp predict: ") and error.count("\n") == 1 and str(folder) in error


def test_missing_model_fails_in_one_line(scenes_dir, tmp_path, capsys):
    images = str(scenes_dir / "images")
    assert predict.main([str(tmp_path / "none"), images, "--output", str(tmp_path / "out")]) == 2
    assert evaluate.main([str(tmp_path), str(scenes_dir)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "no such folder" in lines[0] and "no config.json" in lines[1]


def test_a_prediction_does_not_depend_on_its_batch_mates(tiny_model_dir, scenes_dir, tmp_path):
    dataset = load_dataset_rows(scenes_dir)
    for index, size in enumerate([(96, 60), (50, 96), (96, 96), (70, 30)]):
        dataset.load_image(index).resize(size).save(tmp_path / f"{index}.png")
    images = load_dataset_rows(tmp_path)
    model, processor = load_segmenter(str(tiny_model_dir), "cpu")
    alone = list(predict_dataset(model, processor, images, batch_size=1, progress=False))
    together = list(predict_dataset(model, processor, images, batch_size=4, progress=False))
    for (row, one), (_, other) in zip(alone, together):
        assert one["scores"].shape == other["scores"].shape, row["file_name"]
        torch.testing.assert_close(one["scores"], other["scores"], atol=1e-4, rtol=1e-3)


def test_flags_of_semantic_segmenters_are_refused(tiny_model_dir, scenes_dir, tmp_path, capsys):
    assert evaluate.main([str(tiny_model_dir), str(scenes_dir), "--window", "64", "--flip"]) == 2
    assert "and --window, --flip are only for semantic segmenters" in capsys.readouterr().err
    words = [str(tiny_model_dir), str(scenes_dir / "images"), "--output", str(tmp_path / "p"), "--scales", "1,2"]
    assert predict.main(words) == 2 and not (tmp_path / "p").exists()
    assert "--scales is only for semantic segmenters" in capsys.readouterr().err
