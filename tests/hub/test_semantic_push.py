"""What is pushed of a semantic segmenter."""

import json
from pathlib import Path

from transformers import AutoModelForSemanticSegmentation

import uplvp_hf
from uplvp_hf import IcpcForSemanticSegmentation, IcpcImageProcessor
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
    assert (folder / "modeling_icpc.py").is_file() and not (folder / "handler.py").exists()
    assert type(AutoModelForSemanticSegmentation.from_pretrained(folder)) is IcpcForSemanticSegmentation
