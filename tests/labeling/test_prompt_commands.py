"""`uplvp label` with examples, words and boxes."""

import json
import shutil

import processes
import prompt_models
import pytest

from uplvp_hf.commands.label import main
from uplvp_hf.data import load_dataset_rows
from uplvp_hf.data.synthetic import write_scenes
from uplvp_hf.demo.pipeline import synthetic_clip_path
from uplvp_hf.labeling import proposal_quality
from uplvp_hf.labeling.encoders.weights import weights_license


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Scenes to label, some of them as examples, and tiny models."""
    folder = tmp_path_factory.mktemp("prompts")
    write_scenes(folder / "few", 8, seed=0)
    write_scenes(folder / "scenes", 6, seed=1)
    shutil.copytree(folder / "scenes" / "images", folder / "images")
    for kind in ("sam", "sam3", "owl", "grounding_dino"):
        getattr(prompt_models, kind)(folder / kind)
    return folder


def call(folder, output, *more):
    return [str(folder / "images"), "--output", str(output), "--device", "cpu", *map(str, more)]


def rows(output):
    return [json.loads(line) for file in sorted(output.glob("rows-*.jsonl")) for line in file.read_text().splitlines()]


def header(output):
    return json.loads((output / "header.json").read_text())


def with_examples(folder):
    return ["--examples", folder / "few", "--clip", synthetic_clip_path()]


def test_example_images_are_the_only_input(folder, tmp_path, capsys):
    out = tmp_path / "labels"
    options = ["labeler.points=4", "labeler.min_iou=-100", "labeler.min_stability=0", "labeler.max_area=1"]
    assert main(call(folder, out, *with_examples(folder), "--model", folder / "sam", *options, "--report")) == 0
    printed = capsys.readouterr().out
    assert "Examples a class: " in printed and f"License of the weights of {folder / 'sam'}: apache-2.0" in printed
    settings = header(out)["settings"]
    assert header(out)["labeler"] == "sam" and settings["namer"]["name"] == "examples"
    license = weights_license(synthetic_clip_path())
    networks = {str(folder / "sam"): "apache-2.0"} | ({} if license is None else {str(synthetic_clip_path()): license})
    joined = ", ".join(f"{text} ({name})" for name, text in networks.items())
    assert header(out)["license"] == ("apache-2.0" if license is None else joined)
    assert set(header(out)["vocabulary"]) <= {c["name"] for c in load_dataset_rows(folder / "few").categories}
    assert len(rows(out)) == 6 and (out / "report.html").is_file()


def test_examples_alone_tell_a_clip_what_to_find(folder, tmp_path):
    out = tmp_path / "labels"
    assert main(call(folder, out, *with_examples(folder), "--quiet")) == 0
    head = header(out)
    assert head["labeler"] == "clip" and head["settings"]["namer"]["name"] == "examples"
    assert head["settings"]["examples"] == head["settings"]["namer"]["examples"]
    quality = proposal_quality(load_dataset_rows(out), load_dataset_rows(folder / "scenes"))
    assert quality["recall_named"] >= 0.5 and quality["class_accuracy"] >= 0.9
    assert main(call(folder, tmp_path / "own", *with_examples(folder), "--namer", "map", "--quiet")) == 0
    assert header(tmp_path / "own")["vocabulary"] == head["vocabulary"]


def test_words_and_examples_together(folder, tmp_path):
    words = ["--vocabulary", "heart,star", *with_examples(folder), "--limit", "1", "--quiet"]
    assert main(call(folder, tmp_path / "labels", *words)) == 0
    settings = header(tmp_path / "labels")["settings"]
    assert settings["entries"] == ["heart", "star"] and "examples" not in settings
    assert settings["namer"]["name"] == "examples"


def test_examples_name_true_masks_and_drop_what_is_unsure(folder, tmp_path):
    masks = ["--labeler", "file", "--masks", folder / "scenes"]
    assert main(call(folder, tmp_path / "all", *with_examples(folder), *masks, "--quiet")) == 0
    assert (
        main(call(folder, tmp_path / "sure", *with_examples(folder), *masks, "--min-confidence", 0.9, "--quiet")) == 0
    )
    confidences = [value for row in rows(tmp_path / "sure") for value in row["objects"]["confidence"]]
    assert confidences and min(confidences) >= 0.9
    truth = {row["file_name"]: row for row in load_dataset_rows(folder / "scenes").rows}
    names = {c["id"]: c["name"] for c in load_dataset_rows(folder / "scenes").categories}
    own = {c["id"]: c["name"] for c in header(tmp_path / "all")["categories"]}
    right = [
        own[label] in {names[k] for k in truth[row["file_name"]]["objects"]["category_id"]}
        for row in rows(tmp_path / "all")
        for label in row["objects"]["category_id"]
    ]
    assert len(right) > 10 and sum(right) >= 0.9 * len(right)


def test_examples_that_are_also_to_be_labeled_are_said(folder, tmp_path, capsys):
    words = [str(folder / "few" / "images"), "--output", str(tmp_path / "labels"), "--device", "cpu", "--limit", "1"]
    words += [*map(str, with_examples(folder)), "--labeler", "center_box"]
    assert main(words) == 0
    assert "8 of the images to label are examples too" in capsys.readouterr().out
    assert len(rows(tmp_path / "labels")) == 1


def test_words_for_sam_3(folder, tmp_path):
    words = ["--labeler", "concept", "--model", folder / "sam3", "--vocabulary", "bear,deer", "labeler.threshold=0"]
    assert main(call(folder, tmp_path / "labels", *words, "--quiet")) == 0
    assert header(tmp_path / "labels")["vocabulary"] == ["bear", "deer"]
    assert sum(len(row["objects"]["score"]) for row in rows(tmp_path / "labels")) > 0


def test_words_for_a_detector(folder, tmp_path, capsys):
    words = ["--labeler", "boxes", "--detector", folder / "grounding_dino", "--model", folder / "sam"]
    words += ["--vocabulary", "bear,deer", "labeler.threshold=0", "labeler.mask_nms=1"]
    assert main(call(folder, tmp_path / "labels", *words)) == 0
    assert f"apache-2.0 ({folder / 'grounding_dino'}), apache-2.0 ({folder / 'sam'})" in capsys.readouterr().out
    assert header(tmp_path / "labels")["settings"]["detector"] == str(folder / "grounding_dino")
    assert sum(len(row["objects"]["score"]) for row in rows(tmp_path / "labels")) > 0


def test_example_crops_for_owlv2_keep_its_own_names(folder, tmp_path):
    words = ["--labeler", "boxes", "--detector", folder / "owl", "--model", folder / "sam", "labeler.threshold=0"]
    assert main(call(folder, tmp_path / "labels", *words, "--examples", folder / "few", "--quiet")) == 0
    assert header(tmp_path / "labels")["settings"]["namer"] is None
    assert sum(len(row["objects"]["score"]) for row in rows(tmp_path / "labels")) > 0


def test_boxes_from_a_file_keep_their_names_or_take_those_of_examples(folder, tmp_path):
    boxes = ["--labeler", "boxes", "--masks", folder / "scenes", "--model", folder / "sam", "--quiet"]
    assert main(call(folder, tmp_path / "own", *boxes)) == 0
    assert header(tmp_path / "own")["settings"]["namer"] is None
    assert main(call(folder, tmp_path / "renamed", *boxes, *with_examples(folder))) == 0
    assert header(tmp_path / "renamed")["settings"]["namer"]["name"] == "examples"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--labeler", "boxes", "--model", "sam"], "needs either a detector (--detector) or a file of boxes (--masks)"),
        (["--labeler", "concept", "--model", "sam3"], "needs --vocabulary"),
        (["--labeler", "concept", "--vocabulary", "bear"], "needs --model"),
        (["--labeler", "center_box", "--examples", "few"], "needs --backbone or --clip"),
        (["--labeler", "center_box", "--namer", "examples", "--clip", "sam"], "needs --examples"),
        (["--labeler", "center_box", "--namer", "none", "--examples", "few"], "--examples has no effect"),
        (["--namer", "map", "--vocabulary", "a", "--clip", "sam", "--examples", "few"], "--examples has no effect"),
        (["--namer", "clip", "--clip", "sam", "--examples", "few"], "needs --vocabulary"),
        (["--labeler", "center_box", "--detector", "owl"], "--detector has no effect"),
        (["--labeler", "boxes", "--detector", "sam", "--model", "sam", "--vocabulary", "a"], "no zero-shot detector"),
    ],
)
def test_mistakes_are_one_line(folder, tmp_path, capsys, words, message):
    words = [str(folder / word) if (folder / word).exists() else word for word in words]
    assert main(call(folder, tmp_path / "labels", *words, "--quiet")) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "labels").exists()


@pytest.mark.slow
@pytest.mark.parametrize("labeler", ["file", "concept", "boxes"])
def test_two_processes_write_what_one_writes(folder, tmp_path, labeler):
    truth = next((folder / "scenes" / "annotations").glob("*.json"))
    words = {
        "file": ["--masks", truth, "--namer", "examples", *with_examples(folder)],
        "concept": ["--model", folder / "sam3", "--vocabulary", "orange disc,green cross", "labeler.threshold=0"],
        "boxes": ["--model", folder / "sam", "--masks", truth],
    }[labeler]
    words = [*words, "--labeler", labeler, "--quiet", "run.batch_size=2", "run.workers=1"]
    assert main(call(folder, tmp_path / "one", *words)) == 0
    processes.run_together(processes.COMMAND, "label", *call(folder, tmp_path / "two", *words))
    by_id = [{row["image_id"]: row for row in rows(tmp_path / name)} for name in ("one", "two")]
    assert by_id[0] == by_id[1] and len(by_id[0]) == 6
    assert any(row["objects"]["segmentation"] for row in by_id[0].values())
