"""`uplvp label`: from arguments to a store, and one clear line for what is wrong."""

import json
import subprocess
import sys

import pytest
import timm
import torch
from labeling_helpers import picture_folder, tiny_clip
from safetensors.torch import save_file

from uplvp_hf.commands.label import main
from uplvp_hf.data import read_store


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    picture_folder(folder / "pictures", 3)
    torch.manual_seed(0)
    save_file(timm.create_model("mobilenetv2_035").state_dict(), folder / "weights.safetensors")
    clip = tiny_clip()
    clip.model.save_pretrained(folder / "clip")
    clip.tokenizer.save_pretrained(folder / "clip")
    (folder / "map.yaml").write_text("bear: 0-2\ndeer: [7]\n")
    return folder


def arguments(folder, *more):
    return [str(folder / "pictures"), "--quiet", "--device", "cpu", *map(str, more)]


def backbone(folder):
    return ["--backbone", "timm:mobilenetv2_035", "--backbone-weights", folder / "weights.safetensors"]


@pytest.mark.parametrize(
    "labeler, namer, names",
    [
        ("foreground", "none", ["object"]),
        ("foreground", "classifier", ["bear", "deer"]),
        ("saliency", "clip", ["bear", "deer"]),
        ("clip", "map", ["bear", "deer"]),
        ("clip", None, ["bear", "deer"]),
    ],
)
def test_every_labeler_writes_a_store(folder, tmp_path, capsys, labeler, namer, names):
    call = arguments(folder, "--output", tmp_path / "labels", "--labeler", labeler)
    if labeler != "clip" or namer == "classifier":
        call += map(str, backbone(folder))
    if "clip" in (labeler, namer):
        call += ["--clip", str(folder / "clip"), "--vocabulary", "bear,deer"]
    if labeler == "clip":
        call += ["--image-size", "48", "--template", "a photo of a {}"]
    if namer is not None:
        call += ["--namer", namer]
    if namer == "classifier":
        call += ["--class-map", str(folder / "map.yaml")]
    assert main(call) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["done"], summary["failed"]) == (3, 0)
    stored = read_store(tmp_path / "labels")
    if labeler == "clip":
        settings = json.loads((tmp_path / "labels" / "header.json").read_text())["settings"]
        assert settings["templates"] == ["a photo of a {}"]
    assert [category["name"] for category in stored.categories] == names and len(stored) == 3
    assert main(call) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["skipped"] == 3


@pytest.mark.parametrize(
    "more, message",
    [
        (["--labeler", "foreground"], "needs --backbone"),
        (["--labeler", "foreground", "--backbone", "timm:mobilenetv2_035"], "no trained weights"),
        (["--labeler", "clip"], "needs --clip"),
        (["--labeler", "clip", "--clip", "CLIP", "--vocabulary", ""], "names no class"),
        (["--labeler", "foreground", "--attention", "naclip"], "--attention has no effect"),
        (["--labeler", "saliency", "--sigma", "2"], "--sigma has no effect with --labeler saliency"),
        (
            ["--clip", "CLIP", "--vocabulary", "bear", "--attention", "identity", "--scale", "2"],
            "--scale has no effect with --attention identity",
        ),
        (["--clip", "CLIP", "--vocabulary", "bear", "--sigma", "0"], "sigma 0.0 is no width of a gaussian"),
        (["--labeler", "foreground", "--template", "a {}"], "--template has no effect"),
        (["--labeler", "clip", "--clip", "CLIP", "--vocabulary", "bear", "--namer", "classifier"], "needs --backbone"),
        (["--labeler", "saliency", "--namer", "map", "--backbone", "x"], "no classes of its own"),
        (["--labeler", "clip", "--clip", "/nowhere/clip", "--vocabulary", "bear"], "/nowhere/clip"),
    ],
)
def test_mistakes_are_one_line(folder, tmp_path, capsys, more, message):
    more = [str(folder / "clip") if word == "CLIP" else word for word in more]
    assert main(arguments(folder, "--output", tmp_path / "labels", *more)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("uplvp label: error: ") and message in error


@pytest.mark.parametrize(
    "more, want",
    [
        ([], ("naclip", 5.0, 1.0)),
        (["--attention", "naclip", "--sigma", "1.5", "--scale", "5"], ("naclip", 1.5, 5.0)),
        (["--scale", "2"], ("naclip", 5.0, 2.0)),
    ],
)
def test_gaussian_of_the_attention(folder, tmp_path, more, want):
    call = arguments(folder, "--output", tmp_path / "labels", "--clip", folder / "clip", "--vocabulary", "bear,deer")
    assert main([*call, "--image-size", "48", "--limit", "1", *more]) == 0
    settings = json.loads((tmp_path / "labels" / "header.json").read_text())["settings"]
    assert (settings["attention"], settings["sigma"], settings["scale"]) == want


def test_empty_and_missing_folders(folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for pictures, message in [("empty", "holds no pictures"), ("missing", "no such file or folder")]:
        more = ["--output", tmp_path / "labels", "--labeler", "foreground", *backbone(folder)]
        assert main([str(tmp_path / pictures), *map(str, more)]) == 2
        assert message in capsys.readouterr().err


def test_help_does_not_import_torch():
    code = (
        "import sys; from uplvp_hf.commands.label import build_parser; build_parser(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
