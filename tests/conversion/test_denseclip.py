"""`uplvp convert` on DenseCLIP's recorded checkpoints."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from uplvp_hf.commands.convert import main
from uplvp_hf.conversion import detect_format
from uplvp_hf.conversion.checkpoint_file import CheckpointError
from uplvp_hf.conversion.convert import convert_checkpoint

pytestmark = pytest.mark.golden
CLASSES = ["sky", "tree", "road", "car", "person"]
HEADS = {"num_attention_heads": 4}


@pytest.fixture(params=["denseclip_resnet", "denseclip_vit"])
def checkpoint(request, golden, tmp_path):
    tensors, _ = golden(request.param)
    state = {name.removeprefix("state."): value for name, value in tensors.items() if name.startswith("state.")}
    save_file(state, tmp_path / "denseclip.safetensors")
    end = len(state["text_encoder.token_embedding.weight"]) - 1
    ids = [row[1 : row.index(end)] for row in tensors["input.texts"].tolist()]
    settings = {"class_token_ids": ids, "text_config": HEADS}
    if request.param == "denseclip_vit":
        settings["vision_config"] = HEADS
    return tmp_path / "denseclip.safetensors", settings, tensors


def test_a_converted_folder_predicts_as_the_original(checkpoint, tmp_path, assert_close):
    path, settings, tensors = checkpoint
    report = convert_checkpoint(path, tmp_path / "out", classes=CLASSES, settings=settings)
    assert not report.untrained
    model = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "out").eval()
    assert model.config.id2label == dict(enumerate(CLASSES)) and model.config.prompt == "post"
    with torch.no_grad():
        assert_close(model(tensors["input.img"]).logits, tensors["test.seg_logits"], 1e-5)
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").size["shortest_edge"] in (512, 640)


def test_the_command(checkpoint, tmp_path, capsys):
    path, settings, _ = checkpoint
    words = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    sets = [part for word in words for part in ("--set", word)]
    assert main([str(path), str(tmp_path / "out"), "--classes", ",".join(CLASSES), *sets]) == 0
    assert json.loads((tmp_path / "out" / "conversion_report.json").read_text())["format"] == "denseclip"
    assert main([str(path), str(tmp_path / "more"), *sets]) == 2
    assert "5 classes, whose names it does not hold" in capsys.readouterr().err


def test_what_it_is_not(checkpoint, tmp_path):
    _, settings, tensors = checkpoint
    state = {name.removeprefix("state."): value for name, value in tensors.items() if name.startswith("state.")}
    assert detect_format(state) == "denseclip"
    save_file({**state, "auxiliary.weight": torch.zeros(2)}, tmp_path / "more.safetensors")
    with pytest.raises(CheckpointError, match=r"auxiliary\.weight"):
        convert_checkpoint(tmp_path / "more.safetensors", tmp_path / "out", classes=CLASSES, settings=settings)
