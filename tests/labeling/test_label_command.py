"""`uplvp label`: from arguments to a store, and one clear line for what is wrong."""

import json
import subprocess
import sys
from dataclasses import fields

import pytest
import timm
import torch
from labeling_helpers import image_folder, tiny_clip
from safetensors.torch import save_file

from uplvp_hf.commands.label import main
from uplvp_hf.data import read_store
from uplvp_hf.labeling.catalog import LABELERS, NAMERS, label_settings
from uplvp_hf.settings import describe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    image_folder(folder / "images", 3)
    torch.manual_seed(0)
    save_file(timm.create_model("mobilenetv2_035").state_dict(), folder / "weights.safetensors")
    clip = tiny_clip()
    clip.model.save_pretrained(folder / "clip")
    clip.tokenizer.save_pretrained(folder / "clip")
    (folder / "map.yaml").write_text("bear: 0-2\ndeer: [7]\n")
    return folder


def arguments(folder, *more):
    return [str(folder / "images"), "--quiet", "--device", "cpu", *map(str, more)]


def backbone(folder):
    return ["--backbone", "timm:mobilenetv2_035", "--backbone-weights", folder / "weights.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "labeler, namer, names",
    [
        ("foreground", "none", ["object"]),
        ("foreground", "classifier", ["bear", "deer"]),
        ("saliency", "clip", ["bear", "deer"]),
        ("ncut", "none", ["object"]),
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
        call += [f"namer.class_map={folder / 'map.yaml'}"]
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
        (["--labeler", "foreground", "labeler.attention=naclip"], "Unknown setting `labeler.attention`"),
        (["--labeler", "saliency", "--window", "2"], "--window has no effect with --labeler saliency"),
        (
            ["--clip", "CLIP", "--vocabulary", "bear", "labeler.attention=identity", "labeler.scale=2"],
            "`labeler.scale` has no effect with `labeler.attention=identity`",
        ),
        (["--clip", "CLIP", "--vocabulary", "bear", "labeler.sigma=0"], "`labeler.sigma` must be above 0, got 0.0"),
        (["--labeler", "foreground", "--template", "a {}"], "--template has no effect"),
        (["--labeler", "clip", "--clip", "CLIP", "--vocabulary", "bear", "--namer", "classifier"], "needs --backbone"),
        (["--labeler", "saliency", "--namer", "map", "--backbone", "x"], "no classes of its own"),
        (["--labeler", "clip", "--clip", "/nowhere/clip", "--vocabulary", "bear"], "/nowhere/clip"),
        (["--labeler", "clops"], "--labeler clops is unknown. Did you mean clip? Use clip, saliency"),
        (["--labeler", "file"], "needs --masks"),
        (["--labeler", "sam"], "needs --model"),
        (["--labeler", "file", "--masks", "/nowhere.json"], "/nowhere.json: no such file"),
        (["--labeler", "file", "--masks", "x", "--model", "y"], "--model has no effect"),
        (["--labeler", "segmenter", "--model", "/nowhere/model"], "/nowhere/model"),
        (["--labeler", "no_such_module_here:make"], "no module no_such_module_here"),
        (["--labeler", "saliency", "labeler.treshold=0.3"], "Did you mean `labeler.threshold`?"),
        (["--labeler", "saliency", "labeler.threshold=high"], "`labeler.threshold` must be a number, got 'high'"),
        (["--labeler", "saliency", "labeler.image_size=9", "--image-size", "9"], "labeler.image_size say the same"),
        (["--labeler", "saliency", "--namer", "clip", "namer.kontext=1"], "Did you mean `namer.context`?"),
        (["--labeler", "saliency", "--namer", "classifier", "x.image_size=64"], "Unknown setting `x`"),
        (["--clip", "CLIP", "--vocabulary", "bear", "labeler.gem_depth=3"], "`labeler.gem_depth` has no effect with"),
        (["--clip", "CLIP", "--vocabulary", "bear", "labeler.attention=proxy"], "needs networks.guide"),
        (["--clip", "CLIP", "--vocabulary", "bear", "networks.features=f"], "needs networks.text_embeddings"),
        (
            ["--labeler", "saliency", "networks.features=f", "networks.text_embeddings=t", "--backbone", "x"],
            "networks.features has no effect",
        ),
        (["--labeler", "file", "--masks", "x", "networks.dtype=bf16"], "networks.dtype has no effect"),
        (["--labeler", "saliency", "namer.mode=crop", "--backbone", "x"], "Unknown setting `namer.mode`"),
        (["output.truth=t.json"], "output.truth is for the report"),
        (["output.truth=/nowhere.json", "--report"], "output.truth=/nowhere.json: no such file"),
        (["run.workers=0"], "`run.workers` must be at least 1, got 0"),
        (["run.calibration_images=0"], "`run.calibration_images` must be at least 1"),
        (["--min-confidence", "nan"], "--min-confidence must be from 0 to 1, got nan"),
        (["--min-confidence", "50"], "--min-confidence must be from 0 to 1, got 50"),
        (
            ["--clip", "CLIP", "--vocabulary", "bear", "labeler.threshold=nan"],
            "`labeler.threshold` must be a number or none",
        ),
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
        (["labeler.attention=naclip", "labeler.sigma=1.5", "labeler.scale=5"], ("naclip", 1.5, 5.0)),
        (["labeler.scale=2"], ("naclip", 5.0, 2.0)),
    ],
)
def test_gaussian_of_the_attention(folder, tmp_path, more, want):
    call = arguments(folder, "--output", tmp_path / "labels", "--clip", folder / "clip", "--vocabulary", "bear,deer")
    assert main([*call, "--image-size", "48", "--limit", "1", *more]) == 0
    settings = json.loads((tmp_path / "labels" / "header.json").read_text())["settings"]
    assert (settings["attention"], settings["sigma"], settings["scale"]) == want


def test_empty_and_missing_folders(folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for images, message in [("empty", "holds no images"), ("missing", "no such file or folder")]:
        more = ["--output", tmp_path / "labels", "--labeler", "foreground", *backbone(folder)]
        assert main([str(tmp_path / images), *map(str, more)]) == 2
        assert message in capsys.readouterr().err


def test_help_does_not_import_torch():
    code = (
        "import sys; from uplvp_hf.commands.label import build_parser; build_parser(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_settings_reach_labeler_and_namer(folder, tmp_path, capsys):
    call = arguments(folder, "--output", tmp_path / "labels", "--clip", folder / "clip", "--vocabulary", "bear,deer")
    call += ["--image-size", "48", "labeler.peak=1.5", "labeler.side=longer", "labeler.nms_kind=matrix"]
    call += ["labeler.top=3", "namer.context=0.3", "namer.surroundings=mean", "labeler.max_border=0.5"]
    call += ["run.unnamed=keep", "--min-confidence", "0.99", "run.workers=1", "run.calibration_images=2"]
    assert main(call) == 0
    header = json.loads((tmp_path / "labels" / "header.json").read_text())
    settings = header["settings"]
    want = {"peak": 1.5, "side": "longer", "nms_kind": "matrix", "top": 3, "max_border": 0.5, "image_size": 48}
    assert {name: settings[name] for name in want} == want
    assert (settings["namer"]["context"], settings["namer"]["surroundings"]) == (0.3, "mean")
    assert [category["name"] for category in header["categories"]] == ["bear", "deer", "object"]
    stored = read_store(tmp_path / "labels")
    unsure = [k for row in stored.rows for k in row["objects"]["category_id"]]
    assert unsure and stored.id2label[stored.category_ids.index(unsure[0])] == "object"


@pytest.mark.parametrize(
    "words, lines",
    [
        (["--labeler", "clip"], ["labeler.attention", "labeler.peak", "namer.surroundings", "labeler.logit_scale"]),
        (["--labeler", "saliency", "--namer", "classifier"], ["labeler.threshold", "namer.others", "run.batch_size"]),
        (["--labeler", "segmenter"], ["labeler.min_score", "labeler.min_area", "networks.dtype", "output.coco"]),
        (["--labeler", "uplvp_hf.labeling.labelers.baselines:CenterBoxLabeler"], ["labeler.side"]),
    ],
)
def test_help_lists_the_settings_of_labeler_and_namer(capsys, words, lines):
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--help"])
    assert stopped.value.code == 0
    output = capsys.readouterr().out
    assert all(f"\n  {line}\n      " in output for line in lines)


def test_help_says_what_a_setting_means(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    output = capsys.readouterr().out
    assert "  labeler.top\n      a whole number, at least 1; default 20. most instances of an image" in output
    assert "--min-confidence" in output and "settings of labeler clip and namer clip" in output


@pytest.mark.parametrize("labeler", LABELERS)
def test_every_setting_has_a_meaning(labeler):
    for namer in NAMERS:
        for section in fields(label_settings(labeler, namer)):
            assert all(item.metadata["meaning"] for item in fields(section.default_factory)), (labeler, namer)
    assert "labeler." in describe(label_settings(labeler, "none"))


def test_words_and_flags_come_in_any_order(folder, tmp_path, capsys):
    more = ["--labeler", "center_box", "--quiet", "run.batch_size=2", "--output", str(tmp_path / "labels")]
    assert main(["labeler.side=0.5", *more, str(folder / "images"), "--limit", "1"]) == 0
    assert json.loads((tmp_path / "labels" / "header.json").read_text())["settings"]["side"] == 0.5
    assert main([str(folder / "images"), "other/", *more]) == 2
    assert "`other/` is not of the form section.name=value" in capsys.readouterr().err


def test_self_training_and_files_in_turn(tiny_model_dir, scenes_dir, tmp_path, capsys):
    base = [str(scenes_dir / "images"), "--quiet", "--device", "cpu", "run.batch_size=4"]
    one, two, three = (str(tmp_path / name) for name in ("one", "two", "three"))
    call = ["--labeler", "segmenter", "--model", str(tiny_model_dir), "labeler.min_score=0.05"]
    assert main([*base, "--output", one, *call, f"output.coco={tmp_path / 'one.json'}"]) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert first["instances"] > 0 and first["export_coco"] == str(tmp_path / "one.json")
    assert main([*base, "--output", two, "--labeler", "file", "--masks", str(tmp_path / "one.json")]) == 0
    parquet = str(tmp_path / "one.parquet")
    assert main([one, f"output.parquet={parquet}"]) == 0
    assert main([*base, "--output", three, "--labeler", "file", "--masks", parquet]) == 0
    stores = [read_store(folder) for folder in (one, two, three)]
    assert list(stores[0].rows) == list(stores[1].rows) == list(stores[2].rows)
    assert [store.id2label for store in stores[1:]] == [stores[0].id2label] * 2


def test_a_source_of_ones_own(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "own_masks.py").write_text(
        "import numpy as np\n\n\n"
        "def bright(level: int = 200, **rest):\n"
        "    def source(images, rows):\n"
        "        return [{'masks': [np.asarray(i.convert('L')) > level]} for i in images]\n\n"
        "    return source\n"
    )
    monkeypatch.chdir(tmp_path)
    call = arguments(folder, "--output", tmp_path / "labels", "--labeler", "own_masks:bright")
    assert main([*call, "labeler.level=120", "labeler.other=x"]) == 0
    stored = read_store(tmp_path / "labels")
    assert [category["name"] for category in stored.categories] == ["object"]
    assert [len(row["objects"]["score"]) for row in stored.rows] == [1, 1, 1]
    assert json.loads((tmp_path / "labels" / "header.json").read_text())["settings"]["options"]["level"] == 120
    assert main([*call, "labeler.level=dark"]) == 2
    assert "`labeler.level` must be a whole number, got 'dark'" in capsys.readouterr().err


def test_classes_by_name_and_half_precision(folder, tmp_path, capsys):
    from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

    labels = dict(enumerate(["brown bear, bruin", "red deer", "tench"]))
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", id2label=labels)
    ResNetForImageClassification(config).save_pretrained(tmp_path / "classifier")
    ViTImageProcessor().save_pretrained(tmp_path / "classifier")
    (tmp_path / "map.yaml").write_text("bear: Bruin\ndeer: red deer\n")
    call = arguments(folder, "--output", tmp_path / "labels", "--labeler", "foreground", *backbone(folder))
    call += ["--namer", "classifier", f"namer.class_map={tmp_path / 'map.yaml'}", "networks.dtype=bf16"]
    call += [f"networks.classifier={tmp_path / 'classifier'}", "namer.mode=crop", "namer.others=count"]
    assert main(call) == 0
    settings = json.loads((tmp_path / "labels" / "header.json").read_text())["settings"]["namer"]
    assert settings["class_map"] == {"bear": [0], "deer": [1]} and settings["mode"] == "crop"
    (tmp_path / "map.yaml").write_text("bear: Bruin\ndeer: roe deer\n")
    assert main(call) == 2
    assert "'deer': " in capsys.readouterr().err.splitlines()[-1]


def test_precomputed_features_and_text(folder, tmp_path, capsys):
    from uplvp_hf.labeling.encoders.text import TextEmbeddings, save_text_embeddings

    torch.manual_seed(0)
    (tmp_path / "features").mkdir()
    for k in range(3):
        save_file({"map": torch.randn(12, 5, 7)}, tmp_path / "features" / f"{k:03d}.safetensors")
    names = ("deer", "bear", "sky", "grass")
    save_text_embeddings(tmp_path / "text.safetensors", TextEmbeddings(torch.randn(4, 12), torch.arange(4), 4, names))
    call = arguments(folder, "--vocabulary", "bear,deer", f"networks.features={tmp_path / 'features'}")
    call += [f"networks.text_embeddings={tmp_path / 'text.safetensors'}", "labeler.logit_scale=5"]
    assert (
        main([*call, "--output", str(tmp_path / "one"), "labeler.calibration=none", "--background", "sky,grass"]) == 0
    )
    header = json.loads((tmp_path / "one" / "header.json").read_text())
    assert header["settings"]["background"] == ["sky", "grass"] and header["settings"]["namer"] is None
    assert header["settings"]["features"] == "features" and header["settings"]["logit_scale"] == 5.0
    assert [category["name"] for category in read_store(tmp_path / "one").categories] == ["bear", "deer"]
    assert main([*call, "--output", str(tmp_path / "two"), "networks.features_layout=hwd"]) == 2
    assert "channels" in capsys.readouterr().err
    assert main([*call, "--output", str(tmp_path / "two"), "--clip", str(folder / "clip")]) == 2
    assert "12 numbers" in capsys.readouterr().err  # the namer's CLIP has another text space


def test_proxy_attention_with_a_guide(folder, tmp_path):
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32)
    config.patch_size = 8
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "guide")
    ViTImageProcessor().save_pretrained(tmp_path / "guide")
    call = arguments(folder, "--output", tmp_path / "labels", "--clip", folder / "clip", "--vocabulary", "bear,deer")
    call += ["labeler.attention=proxy", f"networks.guide={tmp_path / 'guide'}", "labeler.gamma=2", "--image-size", "48"]
    assert main([*call, "--limit", "1"]) == 0
    settings = json.loads((tmp_path / "labels" / "header.json").read_text())["settings"]
    assert settings["guide"] == str(tmp_path / "guide") and (settings["attention"], settings["gamma"]) == ("proxy", 2.0)
