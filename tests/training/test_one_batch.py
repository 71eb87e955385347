"""--overfit-one-batch: every step sees the same images, and the loss of every segmenter falls on them."""

import re

import pytest
import torch
import yaml
from training_helpers import log_of

from uplvp_hf.commands.finetune import main
from uplvp_hf.training import loop
from uplvp_hf.training.config import load_settings
from uplvp_hf.training.one_batch import on_one_batch, report_one_batch

WORDS = ["overfit_one_batch=true", "stage=finetune", "optim.backbone_multiplier=1", "optim.lr=5e-3", "optim.warmup=3"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mask2former", "knet", "queryinst"])
def test_the_loss_falls(run, recipe, segmenters, tmp_path, kind, caplog):
    settings = yaml.safe_load(recipe.read_text())
    settings["model"]["segmenter"] = segmenters[kind]
    recipe.write_text(yaml.safe_dump(settings))
    caplog.set_level("INFO", logger="uplvp_hf")
    result = run("run", *WORDS, "optim.steps=80", "log_every=1")
    losses = [line["loss"] for line in log_of(tmp_path / "run")]
    assert result.losses == [losses[0], losses[-1]]
    assert losses[-1] < 0.2 * losses[0]
    assert re.search(r"same 2 images \(\d+, \d+\), without augmentation.*more than 80 %", caplog.text)
    assert f"The loss went from {losses[0]:.2f} to {losses[-1]:.2f} (-" in caplog.text


@pytest.mark.slow
def test_every_step_has_the_same_images_as_they_are(run, scenes_dir, tmp_path, monkeypatch):
    seen, update = [], loop._Run._update

    def record(self, step, batches):
        seen.append(batches)
        return update(self, step, batches)

    monkeypatch.setattr(loop._Run, "_update", record)
    more = ["optim.accumulation=2", "data.workers=1", f"data.val={scenes_dir}", "checkpoint.best=true"]
    result = run("run", *WORDS, "optim.steps=3", *more)
    assert not result.evaluations and not list((tmp_path / "run").glob("checkpoint-*"))
    ids = [[batch["image_ids"] for batch in batches] for batches in seen]
    assert len({i for batch in ids[0] for i in batch}) == 4 and ids[0] == ids[1] == ids[2]
    assert all(torch.equal(seen[0][k]["pixel_values"], seen[2][k]["pixel_values"]) for k in range(2))
    seed = run("other", *WORDS, "optim.steps=1", "seed=5", "optim.accumulation=3")  # other images, none augmented
    assert seed.steps == 1
    pixels = {i: p for b in (*seen[0], *seen[3]) for i, p in zip(b["image_ids"], b["pixel_values"], strict=True)}
    shared = [(i, p) for i, p in zip(seen[0][0]["image_ids"], seen[0][0]["pixel_values"], strict=True)]
    assert len(pixels) == 6 and all(torch.equal(pixels[i], p) for i, p in shared)


def test_multi_scale_resizing_takes_the_last_edge():
    words = ["data.short_edges=[64, 96]", "data.longest_edge=128", "data.rotate=9", "data.copy_paste=0.5"]
    data = on_one_batch(load_settings(None, words)).data
    assert data.short_edges == [96] and data.rotate == data.copy_paste == data.flip == data.color_jitter == 0


def test_a_loss_that_stays_is_a_warning(caplog):
    report_one_batch(10.0, 1.0)
    assert not caplog.records
    report_one_batch(10.0, 9.0)
    assert "from 10.00 to 9.00 (-10 %)" in caplog.text


def test_the_command_leaves_the_folder_of_the_real_run_free(recipe, tmp_path, capsys):
    words = ["--recipe", str(recipe), f"output={tmp_path / 'run'}", "optim.steps=2", "--quiet"]
    assert main([*words, "--overfit-one-batch"]) == 0
    assert capsys.readouterr().out.strip().endswith(f"Model: {tmp_path / 'run'}-one-batch")
    assert main(words) == 0 and (tmp_path / "run" / "model.safetensors").is_file()
