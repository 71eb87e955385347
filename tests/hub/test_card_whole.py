"""The whole card of a real tiny run (labels, pre-training, fine-tuning, evaluation), line by line."""

import json
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from uplvp_hf.commands import evaluate
from uplvp_hf.hub import build_card

PATTERN = Path(__file__).with_name("card_pattern.md")
FIELDS = {
    "percent": r"(?:\d+\.\d|-)",
    "whole": r"[\d,]+",
    "hash": r"[0-9a-f]{64}",
    "cpu": r"CPU \(\w+, \d+ threads\)",
    "settings": r"(?:\w+:.*\n(?:[ -].*\n)*)+",  # top-level keys of YAML, each with what belongs to it
    "metric lines": r"(?:    - type: mask_\w+\n      value: [01]\.\d+\n      name: mask \w+\n)+",
}


@pytest.fixture(scope="module")
def run_dir(scenes_dir, tiny_segmenter, tmp_path_factory):
    """Folder of a model: six scenes labeled by the tiny CLIP, two steps on the labels, two on the annotations."""
    from uplvp_hf.data import load_dataset_rows
    from uplvp_hf.data.synthetic import BACKGROUND, CLASSES
    from uplvp_hf.demo.pipeline import synthetic_clip_path
    from uplvp_hf.labeling import ClipZeroShotNamer, DenseClipLabeler, label_images, load_clip
    from uplvp_hf.training.config import load_settings
    from uplvp_hf.training.loop import train

    folder = tmp_path_factory.mktemp("runs")
    clip = load_clip(synthetic_clip_path())
    labeler, namer = DenseClipLabeler(clip, CLASSES), ClipZeroShotNamer(clip, CLASSES, background=[BACKGROUND])
    label_images(load_dataset_rows(scenes_dir).unlabeled(), labeler, namer, folder / "labels", min_confidence=0.7)
    recipe = folder / "recipe.yaml"
    segmenter = {"segmenter": tiny_segmenter(), "prompt_matching": "cosine"}
    base = {"data": {"size": 64}, "model": segmenter, "optim": {"steps": 2, "batch_size": 2, "warmup": 0}, "seed": 3}
    recipe.write_text(json.dumps({"stage": "pretrain", **base}))
    words = [f"data.train={folder / 'labels'}", f"output={folder / 'pretrain'}"]
    train(load_settings(str(recipe), words), progress=False)
    recipe.write_text(json.dumps({"stage": "finetune", **base, "model": {"init": str(folder / "pretrain")}}))
    words = [f"data.train={scenes_dir}", f"data.val={scenes_dir}", "data.subset=1@50", f"output={folder / 'model'}"]
    train(load_settings(str(recipe), words), progress=False)
    return folder / "model"


def expression(pattern: str) -> str:
    """The pattern's text as a regular expression, in which <field> stands for what FIELDS says."""
    parts = re.split(r"(<(?:" + "|".join(FIELDS) + ")>)", pattern)
    return "".join(FIELDS[part[1:-1]] if part[1:-1] in FIELDS and part[0] == "<" else re.escape(part) for part in parts)


def first_difference(text: str, pattern: str) -> str:
    """The last line of the pattern up to which the text agrees with it, and what follows in the text."""
    lines = pattern.splitlines(keepends=True)
    for count in range(len(lines), 0, -1):
        if found := re.match(expression("".join(lines[:count])), text):
            return f"as the pattern up to its line {count}; then {text[found.end() : found.end() + 200]!r}"
    return f"different from the start: {text[:200]!r}"


@pytest.mark.slow
def test_whole_card(run_dir, scenes_dir, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(run_dir, folder)
    assert evaluate.main([str(folder), str(scenes_dir), "--output", str(tmp_path / "evaluation"), "--quiet"]) == 0
    split = json.loads((folder / "split.json").read_text())
    card = build_card(folder, "uplvp/tiny", metrics_file=tmp_path / "evaluation" / "metrics.json")
    text, pattern = str(card), PATTERN.read_text(encoding="utf-8")
    assert re.fullmatch(expression(pattern), text), first_difference(text, pattern)
    assert split["hash"] in text and f"; {split['counts']['instances']} instances; " in text
    assert str(tmp_path) not in text and str(run_dir.parent) not in text
    assert ModelCard(text).data.to_dict()["model-index"][0]["name"] == "tiny"
    changed = text.replace("| Seed | 3 |", "| Seed | 4 |", 1)
    assert not re.fullmatch(expression(pattern), changed)  # the pattern is no wildcard


@pytest.mark.slow
def test_weights_of_a_run_have_the_rights_of_its_other_files(run_dir):
    assert (run_dir / "model.safetensors").stat().st_mode == (run_dir / "config.json").stat().st_mode
