"""`uplvp evaluate` and `uplvp predict` from the command line's side."""

import json
import shutil

import pytest
import torch
from PIL import Image

from uplvp_hf.commands import evaluate, predict
from uplvp_hf.data import load_dataset_rows
from uplvp_hf.evaluation import load_segmenter, predict_dataset


def test_evaluate_writes_metrics_and_results(tiny_model_dir, scenes_dir, tmp_path, capsys):
    output = tmp_path / "evaluation"
    arguments = [str(tiny_model_dir), str(scenes_dir), "--output", str(output), "--quiet", "--device", "cpu"]
    assert evaluate.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "AP50" in printed and "6 pictures" in printed
    metrics = json.loads((output / "metrics.json").read_text())
    assert 0 <= metrics["AP"] <= 1 and metrics["num_images"] == 6
    assert metrics["command"].startswith("uplvp evaluate ") and metrics["data"] == str(scenes_dir)
    dataset = load_dataset_rows(scenes_dir)
    results = json.loads((output / "results.json").read_text())
    assert results and {entry["category_id"] for entry in results} <= set(dataset.category_ids)
    assert {entry["image_id"] for entry in results} <= {row["image_id"] for row in dataset.rows}
    assert sorted(file.name for file in output.iterdir()) == ["metrics.json", "results.json"]


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


def test_predict_writes_json_overlays_and_failures(tiny_model_dir, scenes_dir, tmp_path, capsys):
    pictures = tmp_path / "pictures"
    shutil.copytree(scenes_dir / "images", pictures / "deeper")
    victim = sorted((pictures / "deeper").iterdir())[1]
    victim.write_bytes(victim.read_bytes()[:600])
    (pictures / "text.jpg").write_text("not a picture")
    single = tmp_path / "single.png"
    Image.new("RGB", (80, 50), (200, 30, 30)).save(single)
    output = tmp_path / "out"
    arguments = [str(tiny_model_dir), str(pictures), str(single), "--output", str(output), "--threshold", "0.02"]
    assert predict.main([*arguments, "--quiet", "--device", "cpu", "--batch-size", "4"]) == 0
    assert "2 pictures could not be read" in capsys.readouterr().out
    content = json.loads((output / "predictions.json").read_text())
    assert len(content["images"]) == 6 and len(list((output / "overlays").glob("*.png"))) == 6
    assert all(annotation["score"] >= 0.02 for annotation in content["annotations"])
    ids = {category["id"] for category in content["categories"]}
    assert {annotation["category_id"] for annotation in content["annotations"]} <= ids and min(ids) == 10
    failures = [json.loads(line) for line in (output / "failures.jsonl").read_text().splitlines()]
    assert sorted(failure["file"].rsplit("/", 1)[-1] for failure in failures) == sorted([victim.name, "text.jpg"])
    # what was predicted reads back as labels
    shutil.copy(single, pictures / "deeper")
    labels = load_dataset_rows(output / "predictions.json", images=pictures)
    assert sum(len(row["objects"]["score"]) for row in labels.rows) == len(content["annotations"]) > 0


@pytest.mark.parametrize("kind", ["missing", "empty", "broken"])
def test_predict_without_pictures_fails_in_one_line(kind, tiny_model_dir, tmp_path, capsys):
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
    pictures = load_dataset_rows(tmp_path)
    model, processor = load_segmenter(str(tiny_model_dir), "cpu")
    alone = list(predict_dataset(model, processor, pictures, batch_size=1, progress=False))
    together = list(predict_dataset(model, processor, pictures, batch_size=4, progress=False))
    for (row, one), (_, other) in zip(alone, together):
        assert one["scores"].shape == other["scores"].shape, row["file_name"]
        torch.testing.assert_close(one["scores"], other["scores"], atol=1e-4, rtol=1e-3)
