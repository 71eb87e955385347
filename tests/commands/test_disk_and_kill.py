"""Full disks, kills and files that cannot be written: what was done stays, and one line says so."""

import shutil

import processes
import pytest

from uplvp_hf.cli import main
from uplvp_hf.data import load_dataset_rows, read_store
from uplvp_hf.files import write_text
from uplvp_hf.training import loop


@pytest.mark.slow
def test_label_refuses_other_settings(fails, label, scenes_dir, tmp_path):
    labels = tmp_path / "labels"
    assert main(label(scenes_dir / "images", labels)) == 0
    before = {path.name: path.read_bytes() for path in labels.iterdir()}
    fails(label(scenes_dir / "images", labels, "labeler.threshold=0.3"), labels, "settings.threshold", "0.3 now")
    fails(label(scenes_dir / "images", labels, vocabulary="orange disc"), labels, "vocabulary", "another output")
    fails(label(scenes_dir / "images", labels, "run.resume=false"), labels, "already holds")
    assert {path.name: path.read_bytes() for path in labels.iterdir()} == before


def test_going_on_with_few_calibration_images_is_said(label, scenes_dir, tmp_path, capsys):
    assert main(label(scenes_dir / "images", tmp_path / "labels", "--limit", "2")) == 0
    assert capsys.readouterr().err == ""
    assert main(label(scenes_dir / "images", tmp_path / "labels")) == 0
    assert "was calibrated on 2 images, a new store would be on 6" in capsys.readouterr().err


def test_full_disk_while_labeling(fails, label, scenes_dir, tmp_path, full_disk):
    images, labels, whole = scenes_dir / "images", tmp_path / "labels", tmp_path / "whole"
    more = ["run.batch_size=3", "labeler.calibration=none"]
    assert main(label(images, whole, *more)) == 0
    assert main(label(images, labels, *more, "--limit", "3")) == 0
    first = (labels / "rows-00000-00000.jsonl").read_bytes()
    with full_disk(500):
        # `--limit` is no setting of the labels, so this is the same store. The features of a shard come before it.
        line = fails(label(images, labels, *more), labels / "features-00000-00001.npy", "make room")
    assert "run the same command again" in line
    names = ["features-00000-00000.npy", "features.json", "header.json", "rows-00000-00000.jsonl"]
    assert sorted(path.name for path in labels.iterdir()) == names
    assert (labels / "rows-00000-00000.jsonl").read_bytes() == first and len(read_store(labels)) == 3
    assert main(label(images, labels, *more)) == 0
    assert read_store(labels).rows == read_store(whole).rows
    with full_disk(100):
        fails(label(images, tmp_path / "new"), tmp_path / "new" / "header.json", "make room")
    assert main(label(images, tmp_path / "new")) == 0


def test_full_disk_at_a_checkpoint(fails, recipe, scenes_dir, tmp_path, full_disk, monkeypatch):
    save = loop.save_checkpoint

    def second_fails(folder, step, *rest):
        if step != 4:
            return save(folder, step, *rest)
        with full_disk(200_000):
            return save(folder, step, *rest)

    words = ["finetune", "--recipe", recipe, f"data.train={scenes_dir}", "optim.steps=6", "--quiet", "--output"]
    assert main([*map(str, words), str(tmp_path / "whole")]) == 0
    run = tmp_path / "run"
    monkeypatch.setattr(loop, "save_checkpoint", second_fails)
    fails([*words, run], run / "checkpoint-4", "make room", "--resume")
    assert [path.name for path in run.glob("*checkpoint*")] == ["checkpoint-2"]
    monkeypatch.setattr(loop, "save_checkpoint", save)
    assert main([*map(str, words), str(run), "--resume"]) == 0
    for name in ("model.safetensors", "log.jsonl"):
        assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_full_disk_at_the_results(fails, tiny_model_dir, scenes_dir, tmp_path, full_disk):
    with full_disk(2000):
        words = ["evaluate", tiny_model_dir, scenes_dir, "--output", tmp_path / "evaluation", "--quiet"]
        fails(words, tmp_path / "evaluation" / "results.json", "make room")
        out = ["--output", tmp_path / "out", "--quiet"]
        fails(["predict", tiny_model_dir, scenes_dir / "images", "--threshold", "0", *out], tmp_path / "out")
    assert list((tmp_path / "evaluation").iterdir()) == []


@pytest.mark.slow
def test_killed_while_labeling(label, scenes_dir, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(150):
        source = scenes_dir / "images" / f"{number % 6 + 1:06d}.png"
        shutil.copy(source, images / f"{number:03d}.png")
    words = label(images, tmp_path / "labels")
    processes.Child(processes.COMMAND, *words).kill_when((tmp_path / "labels" / "rows-00000-00000.jsonl").exists)
    done = len(read_store(tmp_path / "labels"))
    assert 50 <= done < 150
    assert main(words) == 0
    assert main(label(images, tmp_path / "whole")) == 0
    resumed, whole = (load_dataset_rows(tmp_path / name).rows for name in ("labels", "whole"))
    assert sorted(resumed, key=lambda row: row["image_id"]) == list(whole)


def test_a_file_that_cannot_be_opened_for_writing_is_named():
    with pytest.raises(OSError, match=r"'/proc/page\.html'"):
        write_text("/proc/page.html", "text")
