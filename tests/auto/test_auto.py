"""`uplvp auto` on tiny generated scenes: from a few labels to a model that predicts, stopped and gone on with."""

import json
from importlib import resources

import pytest
import yaml
from transformers import ResNetBackbone, ResNetConfig

from uplvp_hf.cli import main
from uplvp_hf.data.synthetic import CLASSES, write_scenes

CLIP = resources.files("uplvp_hf") / "assets" / "synthetic_clip"


@pytest.fixture(scope="module")
def given(tmp_path_factory, tiny_segmenter):
    """Words of the command: scenes, eight of which are labeled, a backbone and recipes of a few steps."""
    base = tmp_path_factory.mktemp("auto")
    scenes = write_scenes(base / "scenes", count=12, seed=3, size=80)
    content = json.loads((scenes / "annotations" / "instances.json").read_text())
    labeled = [image["id"] for image in content["images"][:8]]
    content["images"] = content["images"][:8]
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in labeled]
    (base / "few.json").write_text(json.dumps(content))
    backbone = tiny_segmenter()["backbone_config"]
    ResNetBackbone(ResNetConfig(**{k: v for k, v in backbone.items() if k != "model_type"})).save_pretrained(
        base / "backbone"
    )
    recipe = {
        "data": {"size": 64},
        "model": {"segmenter": tiny_segmenter()},
        "optim": {"steps": 4, "batch_size": 2, "lr": 5e-3, "warmup": 1},
    }
    (base / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    words = ["auto", str(scenes / "images"), "--labels", str(base / "few.json"), "--backbone", str(base / "backbone")]
    words += ["--clip", str(CLIP), "--vocabulary", ",".join(CLASSES), "--recipes", *[str(base / "recipe.yaml")] * 2]
    return [*words, "--device", "cpu", "--quiet"]


@pytest.mark.slow
def test_from_labels_to_a_model(given, tmp_path, capsys):
    output = tmp_path / "auto"
    assert main([*given, "--output", str(output)]) == 0
    print(capsys.readouterr().err)
    assert (output / "model" / "model.safetensors").is_file()
