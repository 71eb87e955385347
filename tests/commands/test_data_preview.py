"""`uplvp data preview` and `--preview`: a sheet of augmented samples, and no training."""

import numpy as np
import pytest
import torch
from PIL import Image

from uplvp_hf.cli import main
from uplvp_hf.commands._data_preview import _image, preview_sheet
from uplvp_hf.commands.data import parse
from uplvp_hf.data import load_dataset_rows
from uplvp_hf.training.build import build_samples, with_image_settings
from uplvp_hf.training.config import load_settings


def samples_of(scenes_dir, **data):
    settings = load_settings(None, [], data={"train": str(scenes_dir), "size": 96, **data})
    return build_samples(with_image_settings(settings), load_dataset_rows(scenes_dir))


def test_data_preview(scenes_dir, tmp_path, capsys):
    words = ["data", "preview", str(scenes_dir), "data.size=96", "data.rotate=9", "--count", "5"]
    assert main([*words, "--output", str(tmp_path / "new" / "sheet.png")]) == 0
    assert "5 augmented samples of 6 images" in capsys.readouterr().out
    sheet = Image.open(tmp_path / "new" / "sheet.png")
    assert sheet.format == "PNG" and sheet.width > 2 * 320 and sheet.height > 3 * 320


def test_settings_stand_anywhere(scenes_dir, tmp_path):
    words = [str(scenes_dir), "--output", "x.png", "data.size=96", "--count", "2", "data.rotate=-9"]
    assert parse(["preview", *words]).settings == ["data.size=96", "data.rotate=-9"]
    assert parse(["preview", str(scenes_dir), "data.flip=0", *words[1:]]).settings[0] == "data.flip=0"


@pytest.mark.parametrize("words", [["preview", "x", "--output", "x.png", "word"], ["check", "x", "--nothing", "a=b"]])
def test_other_words_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        parse(words)
    assert (
        f"unrecognized arguments: {' '.join(words[-1:] if 'word' in words else words[-2:])}" in capsys.readouterr().err
    )


@pytest.mark.parametrize("verb", ["pretrain", "finetune"])
def test_preview_of_training_writes_nothing_else(verb, scenes_dir, recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([verb, "--recipe", recipe, f"data.train={scenes_dir}", "--preview", "sheet.jpg"]) == 0
    assert Image.open("sheet.jpg").format == "JPEG" and not (tmp_path / "runs").exists()
    assert "sheet.jpg: 16 augmented samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "sheet.pdf"], "sheet.pdf: the name of a preview ends in .png, .jpg"),
        (["--output", "sheet.png", "--count", "0"], "--count must be at least 1"),
        (["--output", "sheet.png", "--config", "full"], "--config full: training reads no configurations"),
        (["data.rotat=3", "--output", "sheet.png"], "Did you mean `data.rotate`?"),
    ],
)
def test_wrong_words_are_one_line(words, message, scenes_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "preview", str(scenes_dir), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_pixels_are_those_before_normalization(scenes_dir):
    samples = samples_of(scenes_dir, scale_range=[1, 1], flip=0, color_jitter=0)
    image = _image(samples[2]["pixel_values"], samples)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(samples.dataset.load_image(2)))


def test_small_sets_are_shown_over_several_epochs_and_large_ones_at_even_distances(scenes_dir, monkeypatch):
    samples, asked = samples_of(scenes_dir), []
    make = samples.sample
    monkeypatch.setattr(samples, "sample", lambda index, epoch: asked.append((epoch, index)) or make(index, epoch))
    preview_sheet(samples, samples.dataset.id2label, 8)
    assert asked == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (1, 0), (1, 1)]
    asked.clear()
    state = torch.get_rng_state()
    preview_sheet(samples, samples.dataset.id2label, 3)
    assert asked == [(0, 0), (0, 2), (0, 4)] and torch.equal(state, torch.get_rng_state())
