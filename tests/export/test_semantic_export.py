"""Exported semantic segmenters, opened anew, against the model."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import uplvp_hf
from uplvp_hf import IcpcForSemanticSegmentation, IcpcImageProcessor
from uplvp_hf.commands import evaluate, export, predict
from uplvp_hf.data.synthetic import CLASSES, write_scenes


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    from pathlib import Path

    clip, names = Path(uplvp_hf.__file__).parent / "assets" / "synthetic_clip", ("background", *CLASSES)
    torch.manual_seed(0)
    model = IcpcForSemanticSegmentation.from_clip(
        clip, dict(enumerate(names)), fpn_channels=16, head_channels=16, dense_block="naclip"
    )
    model.head.classifier.weight.data.normal_()  # logits that differ
    folder = tmp_path_factory.mktemp("icpc")
    model.save_pretrained(folder)
    IcpcImageProcessor(size={"shortest_edge": 64, "longest_edge": 256}).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_onnx_is_the_model(model_dir, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    out = tmp_path / "onnx"
    assert export.main([str(model_dir), "--output", str(out), "--check"]) == 0
    assert "any number of images on 64 x 64" in capsys.readouterr().out
    described = json.loads((out / "export.json").read_text())
    assert described["inputs"] == {"pixel_values": [None, 3, 64, 64]}
    assert described["largest_difference"]["logits"] < 1e-4
    # The verbs give the same maps with it as with the model in windows of its size.
    scenes = write_scenes(tmp_path / "scenes", 3, seed=1, size=96)
    images, words = str(scenes / "images"), ["--quiet", "--no-overlays"]
    assert predict.main([str(out), images, "--output", str(tmp_path / "a"), *words]) == 0
    assert predict.main([str(model_dir), images, "--output", str(tmp_path / "b"), "--window", "64", *words]) == 0
    for one in sorted((tmp_path / "a" / "maps").iterdir()):
        ours, theirs = (np.asarray(Image.open(tmp_path / name / "maps" / one.name)) for name in "ab")
        assert (ours == theirs).mean() > 0.999 and len(np.unique(ours)) > 1
    capsys.readouterr()
    assert evaluate.main([str(out), str(scenes), "--quiet", "--window", "96"]) == 2
    assert "was exported with windows of 64 pixels" in capsys.readouterr().err


def test_forms_that_do_not_fit(model_dir, tmp_path, capsys):
    assert export.main([str(model_dir), "--output", str(tmp_path / "x"), "--format", "mask2former"]) == 2
    assert "gives classes of pixels, and transformers has no class of its own" in capsys.readouterr().err
    assert export.main([str(model_dir), "--output", str(tmp_path / "x"), "--size", "50"]) == 2
    assert "a multiple of 32 pixels, not 50" in capsys.readouterr().err and not (tmp_path / "x").exists()
