"""`uplvp auto` on tiny generated scenes: from a few labels to a model that predicts, stopped and gone on with."""

import json
from importlib import resources

import pytest
import yaml
from transformers import ResNetBackbone, ResNetConfig

from uplvp_hf.auto import run as auto_run
from uplvp_hf.benchmark import run as benchmark_run
from uplvp_hf.cli import main
from uplvp_hf.data import load_dataset_rows
from uplvp_hf.data.synthetic import CLASSES, write_scenes
from uplvp_hf.models.modeling_uplvp import UplvpForInstanceSegmentation

CLIP = resources.files("uplvp_hf") / "assets" / "synthetic_clip"


@pytest.fixture(scope="module")
def given(tmp_path_factory, tiny_segmenter):
    """Words of the command: scenes, eight of which are labeled, a backbone and recipes of a few steps."""
    base = tmp_path_factory.mktemp("auto")
    scenes = write_scenes(base / "scenes", count=12, seed=3, size=80)
    content = json.loads((scenes / "annotations" / "instances.json").read_text())
    content["images"] = content["images"][:8]
    labeled = [image["id"] for image in content["images"]]
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in labeled]
    content["annotations"].append({**content["annotations"][0], "id": 999, "category_id": 77})  # a broken one
    (base / "few.json").write_text(json.dumps(content))
    backbone = {key: value for key, value in tiny_segmenter()["backbone_config"].items() if key != "model_type"}
    ResNetBackbone(ResNetConfig(**backbone)).save_pretrained(base / "backbone")
    recipe = {
        "data": {"size": 64},
        "model": {"segmenter": tiny_segmenter()},
        "optim": {"steps": 4, "batch_size": 2, "lr": 5e-3, "warmup": 1},
    }
    (base / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    words = ["auto", str(scenes / "images"), "--labels", str(base / "few.json"), "--backbone", str(base / "backbone")]
    words += ["--clip", str(CLIP), "--vocabulary", ",".join(CLASSES), "--recipes", *[str(base / "recipe.yaml")] * 2]
    return [*words, "--sources", "saliency", "clip", "--device", "cpu", "--quiet"]


def interrupted(*_args, **_options):
    raise KeyboardInterrupt


@pytest.mark.slow
def test_from_a_few_labels_to_a_model_stopped_between_all_stages(given, tmp_path, monkeypatch, capsys):
    """Every call stops at the next stage; none does again what an earlier one has finished."""
    output = tmp_path / "auto"
    words = [*given, "--output", str(output), "finetune.optim.steps=6"]

    def stop(place, name):
        with monkeypatch.context() as patch:
            (patch.setitem if isinstance(place, dict) else patch.setattr)(place, name, interrupted)
            assert main(words) == 130
        return {path: path.stat().st_mtime_ns for path in finished(output)}

    def finished(folder):
        names = ("data.json", "trial.json", "estimate.json", "finished.json", "training_summary.json", "row.json")
        return [path for name in names for path in folder.rglob(name)]

    seen = [stop(auto_run, "make_estimate"), stop(benchmark_run._WORK, "pretrain")]
    seen += [stop(benchmark_run._WORK, "finetune"), stop(auto_run, "train")]
    said = capsys.readouterr().err
    assert "1 broken" in said and "category" in said  # the data check
    assert "Masks come from clip" in said and "GB of memory from here on" in said and "run the same command" in said
    assert main(words) == 0
    assert f"Model: {output}/model" in capsys.readouterr().out
    for earlier in seen:
        assert earlier and all(path.stat().st_mtime_ns == time for path, time in earlier.items())

    data, choice = (json.loads((output / name).read_text()) for name in ("data/data.json", "choice.json"))
    assert (data["labeled"], data["images"]) == (8, 12 - data["val"]) and data["val"] == 2 and data["held_out"]
    assert set(choice["results"]) == {"no pre-training", "pre-trained", "half the labels"}
    assert {one["what"] for one in choice["advice"]} == {"labels", "time", "images"}
    held = {row["file_name"] for row in load_dataset_rows(output / "data" / "labeled", split="val").rows}
    labels = load_dataset_rows(output / "runs" / "labels" / "chosen")
    assert len(labels) == 10 and not held & {row["file_name"].rpartition("/")[2] for row in labels.rows}
    model = UplvpForInstanceSegmentation.from_pretrained(output / "model")
    assert list(model.config.id2label.values()) == list(CLASSES)
    assert json.loads((output / "model" / "training_summary.json").read_text())["images"] == 8  # all labels
    assert not list(output.rglob("checkpoint-*"))
    page = (output / "report.html").read_text()
    for text in ("Where masks come from", "<b>clip</b> is taken", "What would help most next", "data:image/jpeg"):
        assert text in page

    again = {path: path.stat().st_mtime_ns for path in finished(output)}
    assert main(words) == 0 and again == {path: path.stat().st_mtime_ns for path in finished(output)}
    assert main([*words, "--seed", "1"]) == 2 and "was begun with other arguments (seed: 0, now 1)" in (
        capsys.readouterr().err
    )
