"""Bad input through the command line: exit code 2 and one line that names file and row, or skipped and listed."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from uplvp_hf.cli import main
from uplvp_hf.data import read_store
from uplvp_hf.data.synthetic import CLASSES
from uplvp_hf.training import loop


@pytest.fixture
def annotations(scenes_dir, tmp_path):
    """annotations(change): a copy of the scenes' COCO file with `change(content)` applied, images beside it."""

    def write(change):
        content = json.loads((scenes_dir / "annotations" / "instances.json").read_text())
        change(content)
        shutil.copytree(scenes_dir / "images", tmp_path / "images", dirs_exist_ok=True)
        file = tmp_path / "changed.json"
        file.write_text(json.dumps(content))
        return file

    return write


def failures_in(folder):
    return [json.loads(line) for line in (folder / "failures.jsonl").read_text().splitlines()]


@pytest.fixture
def odd_images(tmp_path):
    """Six images of every kind that can be read, and three that cannot. Sizes are 96 x 64 as they should be seen."""
    folder, noise = tmp_path / "odd", np.random.default_rng(0)
    folder.mkdir()
    color = Image.fromarray(noise.integers(0, 255, (64, 96, 3)).astype(np.uint8))
    color.save(folder / "plain.png")
    color.convert("CMYK").save(folder / "cmyk.jpg")
    color.convert("P").save(folder / "palette.png")
    color.convert("LA").save(folder / "gray-alpha.png")
    Image.fromarray(noise.integers(0, 65535, (64, 96)).astype(np.uint16)).save(folder / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    color.transpose(Image.Transpose.ROTATE_90).save(folder / "rotated.jpg", exif=exif)
    color.resize((400, 300)).save(folder / "truncated.jpg")
    content = (folder / "truncated.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(content[: len(content) // 2])
    (folder / "empty.jpg").touch()
    (folder / "text.png").write_text("not an image")
    return folder


UNREADABLE = ["empty.jpg", "text.png", "truncated.jpg"]


def test_odd_images_are_read_and_unreadable_ones_listed(odd_images, label, recipe, tiny_model_dir, tmp_path, capsys):
    def listed(folder):
        return sorted(failure["file"].rsplit("/", 1)[-1] for failure in failures_in(folder))

    labels, run, out = tmp_path / "labels", tmp_path / "run", tmp_path / "out"
    assert main(label(odd_images, labels)) == 0
    output = capsys.readouterr()
    summary = json.loads(output.out)
    assert (summary["done"], summary["failed"]) == (6, 3) and listed(labels) == UNREADABLE
    assert f"3 images could not be labeled: {labels}" in output.err and output.err.count("\n") == 1
    assert {(row["width"], row["height"]) for row in read_store(labels).rows} == {(96, 64)}

    assert main(["predict", str(tiny_model_dir), str(odd_images), "--output", str(out), "--quiet"]) == 0
    assert listed(out) == UNREADABLE and len(list((out / "overlays").iterdir())) == 6
    sizes = {(row["width"], row["height"]) for row in json.loads((out / "predictions.json").read_text())["images"]}
    assert sizes == {(96, 64)}

    (odd_images / "plain.png").write_bytes(b"gone bad since")
    assert main(["pretrain", "--recipe", recipe, f"data.train={labels}", "--output", str(run), "--quiet"]) == 0
    assert listed(run) == sorted([*UNREADABLE, "plain.png"])
    assert "4 images or objects could not be used" in capsys.readouterr().err


def test_missing_and_empty_folders(fails, label, recipe, tiny_model_dir, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder, reason in [(tmp_path / "missing", "no such file or folder"), (empty, "holds no images")]:
        run = tmp_path / "run"
        fails(label(folder, tmp_path / "labels"), folder, reason)
        fails(["finetune", "--recipe", recipe, f"data.train={folder}", "--output", run], folder, reason)
        fails(["evaluate", tiny_model_dir, folder], folder, reason)
        fails(["predict", tiny_model_dir, folder, "--output", run], folder)
        assert not run.exists() and not (tmp_path / "labels").exists()  # a corrected command can use the names


def lacks_name(content):
    del content["images"][2]["file_name"]


def lacks_categories(content):
    del content["categories"]


def unknown_category(content):
    content["annotations"][1]["category_id"] = 77


def unknown_image(content):
    content["annotations"][1]["image_id"] = 12345


@pytest.mark.parametrize(
    "change, parts",
    [
        (lacks_name, ["images[2]", "'file_name'"]),
        (lacks_categories, ["'categories'"]),
        (unknown_category, ["annotations[1] (id 2)", "category id 77 is not in 'categories'"]),
        (unknown_image, ["annotations[1] (id 2)", "image id 12345 is not in 'images'"]),
    ],
)
def test_faulty_annotations(change, parts, annotations, fails, recipe, tiny_model_dir, tmp_path):
    file = annotations(change)
    fails(["finetune", "--recipe", recipe, f"data.train={file}", "--output", tmp_path / "run"], file, *parts)
    fails(["evaluate", tiny_model_dir, file], file, *parts)


def test_cut_off_json(fails, recipe, annotations, tmp_path):
    file = annotations(lambda content: None)
    file.write_text(file.read_text()[:500])
    fails(["finetune", "--recipe", recipe, f"data.train={file}", "--output", tmp_path / "run"], file, "not valid JSON")


def test_polygons_outside_of_the_image_are_listed(annotations, label, recipe, tiny_model_dir, tmp_path, capsys):
    def outside(content):
        content["annotations"][0]["segmentation"] = [[200, 200, 300, 200, 300, 300]]
        content["annotations"][1]["segmentation"] = [[-20, -20, 30, -20, 30, 30, -20, 30]]  # clipped, so kept

    file, run, out = annotations(outside), tmp_path / "run", tmp_path / "out"
    count = len(json.loads(file.read_text())["annotations"])
    assert main(["finetune", "--recipe", recipe, f"data.train={file}", "--output", str(run), "--quiet"]) == 0
    error = capsys.readouterr().err
    assert f"uplvp finetune: warning: {file}: 1 of {count} annotations" in error and "site-packages" not in error
    (failure,) = failures_in(run)
    assert failure["file"] == str(file) and failure["row"] == "annotations[0] (id 1)" and "inside" in failure["reason"]
    assert main(["evaluate", str(tiny_model_dir), str(file), "--output", str(out), "--quiet"]) == 0
    assert f"{count - 1} instances" in capsys.readouterr().out and failures_in(out) == [failure]
    assert main(label(file, tmp_path / "labels")) == 0  # labeling does not look at objects
    assert json.loads(capsys.readouterr().out)["failed"] == 0


def test_empty_class_lists(fails, label, scenes_dir, recipe, tiny_model_dir, tmp_path):
    (tmp_path / "none.txt").write_text("# nothing yet\n\n")
    for vocabulary in ("", tmp_path / "none.txt"):
        words = label(scenes_dir / "images", tmp_path / "labels", vocabulary=vocabulary)
        fails(words, "names no class", "one class a line")
    images = scenes_dir / "images"  # without classes
    fails(["finetune", "--recipe", recipe, f"data.train={images}", "--output", tmp_path / "run"], "without classes")
    fails(["evaluate", tiny_model_dir, images], images, "none of the 6 images is annotated")


def test_a_vocabulary_file_names_the_classes(label, scenes_dir, tmp_path, capsys):
    (tmp_path / "names.txt").write_text("orange disc, orange ball\n# a comment\nblue heart\n")
    words = label(scenes_dir / "images", tmp_path / "labels", vocabulary=tmp_path / "names.txt")
    assert main(words) == 0
    assert list(read_store(tmp_path / "labels").id2label.values()) == ["orange disc", "blue heart"]


def test_classes_that_disagree_with_the_data(fails, annotations, tiny_model_dir, recipe, scenes_dir, tmp_path):
    def fewer(content):
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] < 8]
        content["categories"] = [c for c in content["categories"] if c["id"] < 8]

    file, run = annotations(fewer), tmp_path / "run"
    fails(["evaluate", tiny_model_dir, file], "8 classes", CLASSES[7], "the dataset 7")
    # Known before the first step, and nothing is left in the way of the corrected command.
    words = ["finetune", "--recipe", recipe, f"data.train={scenes_dir}", f"data.val={file}", "--output", run]
    fails(words, "8 classes", "the dataset 7", "class-agnostic")
    assert not run.exists()
    assert main([str(word) for word in [*words, "evaluation.class_agnostic=true", "--quiet"]]) == 0


def test_folders_that_are_no_model(fails, tiny_model_dir, scenes_dir, recipe, tmp_path):
    images, out = scenes_dir / "images", tmp_path / "out"
    predict = ["--output", out, "--quiet"]
    fails(["predict", scenes_dir, images, *predict], scenes_dir, "no config.json")
    fails(["predict", tmp_path / "none", images, *predict], tmp_path / "none", "no such folder")
    fails(["push", scenes_dir, "--repo-id", "me/it", "--dry-run", "--output", out], scenes_dir, "no config.json")
    clip = sys.modules["uplvp_hf"].__path__[0] + "/assets/synthetic_clip"
    fails(["predict", clip, images, *predict], clip, "`clip` model")
    train = ["finetune", "--recipe", recipe, f"data.train={scenes_dir}", "--output", out]
    fails([*train, "model.segmenter=", f"model.init={clip}"], clip, "`clip` model")
    fails([*train, "model.init=runs/none"], "`model.init`: runs/none")

    broken = tmp_path / "broken"
    shutil.copytree(tiny_model_dir, broken)
    tensors = load_file(broken / "model.safetensors")
    save_file(dict(list(tensors.items())[:-3]), broken / "model.safetensors", {"format": "pt"})
    fails(["predict", broken, images, *predict], broken, "3 tensors are missing")
    config = json.loads((tiny_model_dir / "config.json").read_text())
    config["id2label"] = config["segmenter_config"]["id2label"] = {"0": "one"}
    config["category_ids"] = [1]
    (broken / "config.json").write_text(json.dumps(config))
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    fails(["predict", broken, images, *predict], broken, "class_predictor", "number of classes")
    (broken / "model.safetensors").write_bytes(b"torn")
    fails(["predict", broken, images, *predict])
    assert not out.exists()


def test_training_without_data_or_with_another_run_in_the_way(fails, recipe, scenes_dir, tiny_model_dir, tmp_path):
    run = tmp_path / "run"
    words = ["finetune", "--recipe", recipe, "--output", run, "--quiet"]
    fails(words, "`data.train` is not set")
    fails([*words, "data.trian=x"], "`data.trian`", "Did you mean `data.train`?")
    words.append(f"data.train={scenes_dir}")
    fails([*words, "model.segmenter.num_queries=many"], "num_queries", "many")
    assert main([*map(str, words)]) == 0  # the failed attempts did not take the folder
    before = (run / "model.safetensors").read_bytes()
    fails(words, run, "already holds a run", "--resume")
    fails([*words, "--resume", "optim.lr=0.5"], "optim.lr was 0.001, now 0.5")
    fails([*words, "--output", tiny_model_dir], tiny_model_dir, "holds a model")
    assert (run / "model.safetensors").read_bytes() == before


def test_resume_without_a_run_starts_and_says_so(recipe, scenes_dir, tmp_path, capsys):
    words = ["finetune", "--recipe", recipe, "--output", tmp_path / "run", "--quiet", f"data.train={scenes_dir}"]
    assert main([*map(str, words), "--resume"]) == 0
    assert f"Nothing to resume in {tmp_path / 'run'}" in capsys.readouterr().err


def test_training_that_diverges_is_stopped_in_one_line(recipe, scenes_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loop._Run, "_clip", lambda self: torch.tensor(float("nan")))
    words = ["finetune", "--recipe", recipe, "--output", tmp_path / "run", "--quiet", f"data.train={scenes_dir}"]
    assert main([*map(str, words), "optim.max_skipped=2"]) == 2
    used, skipped, error = capsys.readouterr().err.splitlines()
    assert (
        used.startswith("Training uses 6 images")
        and skipped.startswith("Step 1 skipped")
        and error.startswith("uplvp finetune: error: 2 steps had a non-finite")
    )


def test_ctrl_c_says_how_to_go_on(recipe, scenes_dir, tmp_path, capsys, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop._Run, "_update", interrupt)
    words = ["finetune", "--recipe", recipe, "--output", tmp_path / "run", "--quiet", f"data.train={scenes_dir}"]
    assert main([*map(str, words)]) == 130
    message = "uplvp finetune: interrupted; run the same command again with --resume to go on\n"
    used, _, said = capsys.readouterr().err.partition("\n")
    assert used.startswith("Training uses 6 images") and said == message


@pytest.mark.parametrize("device", ["floppy", "cuda:99"])
def test_devices_that_are_not_there(device, fails, label, scenes_dir, tiny_model_dir, tmp_path):
    fails(["predict", tiny_model_dir, scenes_dir, "--output", tmp_path / "out", "--device", device], device)
    fails(["evaluate", tiny_model_dir, scenes_dir, "--device", device], device)
    fails([*label(scenes_dir / "images", tmp_path / "labels"), "--device", device], device)


@pytest.mark.parametrize(
    "words, message",
    [
        (["predict", "model", "data", "--processes", "2"], "predict runs in one process"),
        (["label", "images", "--processes", "many"], "--processes needs a number"),
        (["lable"], "Did you mean `label`?"),
    ],
)
def test_the_front_door(words, message, capsys):
    assert main(words) == 2
    assert message in capsys.readouterr().err.splitlines()[0]


def test_outputs_that_cannot_be_written_are_found_first(fails, scenes_dir, tiny_model_dir, tmp_path):
    (tmp_path / "file").touch()
    line = fails(["evaluate", tiny_model_dir, scenes_dir, "--output", tmp_path / "file"], tmp_path / "file")
    assert "exists" in line
    fails(["predict", tiny_model_dir, scenes_dir, "--output", tmp_path / "file"], tmp_path / "file")


@pytest.mark.slow
def test_worker_processes_report_in_one_line(fails, recipe, scenes_dir, tmp_path):
    shutil.copytree(scenes_dir, tmp_path / "scenes")
    for image in (tmp_path / "scenes" / "images").iterdir():
        image.write_bytes(b"broken")
    words = ["finetune", "--recipe", recipe, f"data.train={tmp_path / 'scenes'}", "data.workers=1", "--quiet"]
    line = fails([*words, "--output", tmp_path / "run"], "can be opened", "Check the image folder")
    assert "Traceback" not in line
