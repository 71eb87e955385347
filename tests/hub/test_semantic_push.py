"""What is pushed of a semantic segmenter."""

import base64
import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoModelForSemanticSegmentation

import uplvp_hf
from uplvp_hf import IcpcForSemanticSegmentation, IcpcImageProcessor
from uplvp_hf.data.synthetic import make_scene
from uplvp_hf.hub.push import prepare_folder

CLIP = Path(uplvp_hf.__file__).parent / "assets" / "synthetic_clip"


def test_the_folder_of_a_semantic_model(tmp_path):
    names = {0: "background", 1: "blue heart"}
    model = IcpcForSemanticSegmentation.from_clip(CLIP, names, fpn_channels=16, head_channels=16)
    model.save_pretrained(tmp_path / "model")
    IcpcImageProcessor(size={"shortest_edge": 64, "longest_edge": 256}).save_pretrained(tmp_path / "model")
    metrics = {"mIoU": 0.5, "mAcc": 0.625, "aAcc": 0.75, "per_class": {"background": 0.8, "blue heart": 0.2}}
    summary = {"stage": "finetune", "settings": {"data": {"val": "scenes"}}, "metrics": {**metrics, "num_images": 7}}
    (tmp_path / "model" / "training_summary.json").write_text(json.dumps(summary))
    folder = prepare_folder(tmp_path / "model", tmp_path / "push", "user/icpc")
    card = (folder / "README.md").read_text()
    assert "A semantic segmenter (icpc) on 2 classes" in card and "semantic-segmentation" in card
    assert "| 50.0 | 62.5 | 75.0 |" in card and "| blue heart | 20.0 |" in card and "mask AP" not in card
    assert (folder / "modeling_icpc.py").is_file()
    assert type(AutoModelForSemanticSegmentation.from_pretrained(folder)) is IcpcForSemanticSegmentation
    assert 'client.image_segmentation("image.jpg")' in card
    check_endpoint(folder)


def check_endpoint(folder):
    """The handler of the folder answers with every class that is there: masks that share the image's pixels."""
    spec = importlib.util.spec_from_file_location("semantic_handler", folder / "handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    handler = module.EndpointHandler(str(folder))
    image = make_scene(0)["image"].crop((0, 0, 120, 100))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    answer = json.loads(json.dumps(handler({"inputs": base64.b64encode(stream.getvalue()).decode()})))
    assert {item["label"] for item in answer} <= {"background", "blue heart"} and answer[0]["score"] is None
    masks = [np.asarray(Image.open(io.BytesIO(base64.b64decode(item["mask"])))) for item in answer]
    assert all(mask.shape == (100, 120) and set(np.unique(mask)) <= {0, 255} for mask in masks)
    assert (sum(mask.astype(int) for mask in masks) == 255).all()
    with pytest.raises(ValueError, match="Unknown parameters \\['threshold'\\]; there are \\['subtask'\\]"):
        handler({"inputs": image, "parameters": {"threshold": 0.5}})
    with pytest.raises(ValueError, match="subtask 'instance' is not what this model does"):
        handler({"inputs": image, "parameters": {"subtask": "instance"}})
