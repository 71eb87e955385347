"""Semantic segmenters through the one loop and the verbs."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForSemanticSegmentation

from uplvp_hf.cli import main
from uplvp_hf.data.synthetic import write_scenes
from uplvp_hf.training.config import ConfigError, load_settings
from uplvp_hf.training.loop import train

WORDS = [
    "data.size=64", "optim.steps=4", "optim.batch_size=2", "checkpoint.every=2", "model.segmenter.fpn_channels=16",
    "model.segmenter.head_channels=16", "log_every=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes") / "s", 6, seed=3, size=64)


def settings(scenes, output, *words):
    return load_settings("scenes_icpc", [*WORDS, f"data.train={scenes}", f"output={output}", *words])


@pytest.mark.slow
def test_training_resumes_to_the_bit_and_starts_from_itself(scenes, tmp_path):
    whole = train(settings(scenes, tmp_path / "whole", f"data.val={scenes}"), progress=False)
    assert 0 <= whole.evaluations[4]["mIoU"] <= 1 and set(whole.evaluations[4]["per_class"]) >= {"background"}
    text = {name: value for name, value in whole.model.state_dict().items() if name.startswith("text.")}
    two = ["optim.steps=2", "optim.schedule=constant", "checkpoint.stay=true", "checkpoint.every=1"]
    train(settings(scenes, tmp_path / "parts", *two), progress=False)
    half = settings(scenes, tmp_path / "half", "optim.schedule=constant")
    straight = train(half, progress=False)
    resumed = train(settings(scenes, tmp_path / "parts", "optim.schedule=constant"), resume=True, progress=False)
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    # The text tower is what it was.
    clip = load_settings("scenes_icpc", []).model.segmenter["clip"]
    assert clip.startswith("package:") and text
    again = train(
        load_settings([], [*WORDS[:4], f"data.train={scenes}", f"model.init={tmp_path / 'whole'}",
                           f"output={tmp_path / 'again'}", "data.extra=null"]), progress=False,
    )  # fmt: skip
    assert "kept" in str(again.model.transfer_report) and "re-init" not in str(again.model.transfer_report)
    for name, value in again.model.text.state_dict().items():
        assert torch.equal(value, text[f"text.{name}"])
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert {"segmentation", "identity", "contrastive"} <= {key for line in lines for key in line}


@pytest.mark.slow
def test_verbs(scenes, tmp_path, capsys):
    words = [*WORDS, f"data.train={scenes}"]
    model = tmp_path / "model"
    assert main(["finetune", "--recipe", "scenes_icpc", *words, "--output", str(model), "--quiet"]) == 0
    assert type(AutoModelForSemanticSegmentation.from_pretrained(model)).__name__ == "IcpcForSemanticSegmentation"
    assert main(["evaluate", str(model), str(scenes), "--output", str(tmp_path / "e"), "--quiet", "--flip"]) == 0
    metrics = json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert f"mIoU {100 * metrics['mIoU']:.1f}" in capsys.readouterr().out and metrics["num_images"] == 6
    page = (tmp_path / "e" / "report.html").read_text()
    assert page.count("<figure") == 6 and page.count("data:image/jpeg") == 12 and f"{100 * metrics['mIoU']:.1f}" in page
    rows = list(csv.DictReader((tmp_path / "e" / "per_class.csv").open()))
    assert [row["name"] for row in rows][:1] == ["background"] and len(rows) == 9
    assert sum(int(row["labeled"]) for row in rows) == sum(int(row["predicted"]) for row in rows) == 6 * 64 * 64
    assert main(["evaluate", str(model), str(scenes), "--quiet", "--swap-prompts", "--no-report"]) == 0
    capsys.readouterr()
    images = str(scenes / "images")
    assert main(["predict", str(model), images, "--output", str(tmp_path / "p"), "--quiet", "--window", "64"]) == 0
    files = sorted((tmp_path / "p" / "maps").glob("*.png"))
    ids = {int(line.split()[0]) for line in (tmp_path / "p" / "classes.txt").read_text().splitlines()}
    assert len(files) == 6 and set(np.unique(np.asarray(Image.open(files[0])))) <= ids
    again = ["predict", str(model), images, "--output", str(tmp_path / "p"), "--quiet"]
    assert main([*again, "--window", "64"]) == 0
    assert "0 label maps, 6 were there already" in capsys.readouterr().out
    assert main(again) == 2 and "was begun with other settings (window)" in capsys.readouterr().err
    assert main([*again, "--overwrite"]) == 0 and "6 label maps, 0 were there" in capsys.readouterr().out
    assert main(["evaluate", str(model), str(scenes), "--stride", "64"]) == 2
    capsys.readouterr()
    # What only instances have is refused, not ignored.
    assert main(["evaluate", str(model), str(scenes), "--class-agnostic", "--batch-size", "2"]) == 2
    assert "--batch-size, --class-agnostic are only for instance segmenters" in capsys.readouterr().err
    assert main(["predict", str(model), images, "--output", str(tmp_path / "q"), "--tiles", "64"]) == 2
    assert "--tiles is only for instance segmenters" in capsys.readouterr().err and not (tmp_path / "q").exists()
    assert main(["finetune", "--recipe", "scenes_icpc", *words, f"data.val={scenes}", "--output", str(tmp_path / "v"),
                 "--quiet"]) == 0  # fmt: skip
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "v"), "--output", str(tmp_path / "c")]) == 0
    assert "mIoU at the end" in (printed := capsys.readouterr().out) and "mask" not in printed.lower()


@pytest.mark.parametrize("word, message", [
    ("data.rotate=10", r"data\.rotate"), ("stage=pretrain", "use finetune"),
    ("model.segmenter.prommpt=post", "Did you mean `model.segmenter.prompt`"),
    ("model.segmenter.clip=null", r"Set `model\.segmenter\.clip`"),
])  # fmt: skip
def test_settings_without_meaning(scenes, tmp_path, word, message):
    with pytest.raises(ConfigError, match=message):
        train(settings(scenes, tmp_path / "out", word), progress=False)


def test_parts_of_a_batch_count_together(scenes, tmp_path):
    """Divisors are those of the whole step: two micro-batches give the loss of one."""
    from accelerate import Accelerator

    from uplvp_hf.training.task import task_of

    chosen = settings(scenes, tmp_path / "out")
    task = task_of(chosen)
    chosen = task.with_image_settings(chosen)
    rows, _ = task.data(chosen)
    model = task.model(chosen, rows).eval()
    accelerator = Accelerator(cpu=True)
    loader = iter(task.loader(task.samples(chosen, rows, None), chosen, 0, accelerator))
    parts = [next(loader), next(loader)]
    joined = {key: torch.cat([part[key] for part in parts]) for key in ("pixel_values", "labels")}
    divisors = task.normalizers(model, accelerator, parts)
    with torch.no_grad():
        whole = model(**joined).losses
        split = [model(**task.inputs(part, torch.device("cpu"), "finetune"), normalizers=divisors) for part in parts]
    for name in ("segmentation", "identity", "align_16", "align_32"):
        assert torch.allclose(sum(part.losses[name] for part in split), whole[name], rtol=1e-4)
