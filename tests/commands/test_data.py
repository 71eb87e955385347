"""`uplvp data` as it is typed: exit codes, what is printed and what is written."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO

from uplvp_hf.cli import main
from uplvp_hf.data import load_dataset_rows
from uplvp_hf.data.manifest import read_manifest
from uplvp_hf.data.synthetic import write_scenes


@pytest.fixture
def scenes(tmp_path):
    write_scenes(tmp_path / "scenes", count=12, seed=0, size=64)
    return tmp_path / "scenes"


def annotations(scenes):
    (file,) = (scenes / "annotations").glob("*.json")
    return file


def test_check(scenes, tmp_path, capsys):
    assert main(["data", "check", str(scenes), "--images-too", "--json", str(tmp_path / "report.json"), "--quiet"]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["images"] == 12 and "12 images" in printed and "0 broken" in printed
    for entry in report["classes"]:
        assert entry["name"] in printed
    content = json.loads(annotations(scenes).read_text())
    content["annotations"][3]["category_id"] = 999
    annotations(scenes).write_text(json.dumps(content))
    next((scenes / "images").iterdir()).write_bytes(b"")
    capsys.readouterr()
    assert main(["data", "check", str(scenes), "--images-too", "--quiet"]) == 1
    printed = capsys.readouterr().out
    assert "annotations[3]" in printed and "category id 999" in printed and "2 broken" in printed
    assert "is not an image" in printed


def test_convert(scenes, tmp_path, capsys):
    output = tmp_path / "out" / "all.json"
    assert main(["data", "convert", str(scenes), "--output", str(output), "--quiet"]) == 0
    root = capsys.readouterr().out.split("relative to ")[1].split(":")[0]
    before, after = load_dataset_rows(scenes), load_dataset_rows(output, images=root)
    assert after.categories == before.categories and len(after) == 12
    reference = COCO(str(output))
    for index, row in enumerate(before.rows):
        entries = reference.imgToAnns[row["image_id"]]
        assert len(entries) == len(row["objects"]["area"])
        for k, entry in enumerate(entries):
            np.testing.assert_array_equal(after.mask(index, k), before.mask(index, k))
            np.testing.assert_array_equal(reference.annToMask(entry).astype(bool), before.mask(index, k))
    assert main(["data", "convert", str(scenes), "--output", str(output), "--unlabeled", "--quiet"]) == 0
    assert COCO(str(output)).anns == {} and len(load_dataset_rows(output, images=root)) == 12


def test_split_convert_and_train_on_it(scenes, tmp_path, capsys):
    from uplvp_hf.training.build import build_data
    from uplvp_hf.training.config import ConfigError, load_settings

    manifest = tmp_path / "few.json"
    assert main(["data", "split", str(scenes), "--name", "1@25", "--output", str(manifest), "--quiet"]) == 0
    printed = capsys.readouterr().out
    found = read_manifest(manifest)
    assert "3 of 12 images" in printed and found["hash"] in printed and len(found["image_ids"]) == 3
    output = tmp_path / "few_coco.json"
    words = ["data", "convert", str(scenes), "--subset", str(manifest), "--output", str(output), "--quiet"]
    assert main(words) == 0
    assert sorted(COCO(str(output)).imgs) == sorted(found["image_ids"])
    for subset in (manifest, "1@25"):
        train, _ = build_data(load_settings(None, [f"data.train={scenes}", f"data.subset={subset}"]))
        assert [row["image_id"] for row in train.rows] == found["image_ids"] and train.manifest == found
    train, _ = build_data(load_settings(None, [f"data.train={scenes}", "data.labels_per_class=1"]))
    assert train.manifest["name"] == "0@1images" and len(train) == train.manifest["counts"]["images"]
    words = [f"data.train={scenes}", "data.train_format=images"]
    with pytest.raises(ConfigError, match="without classes"):
        build_data(load_settings(None, words))
    with pytest.raises(ConfigError, match=r"`data\.subset` or `data\.labels_per_class`, not both"):
        load_settings(None, ["data.subset=1@10", "data.labels_per_class=1"])


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (["--percent", "25", "--seed", "3"], "3@25"),
        (["--percent", "25", "--stratified"], "0@25strat"),
        (["--images-per-class", "1"], "0@1images"),
        (["--instances", "2", "--allow-fewer"], "0@2instances"),
        (["--shot", "1"], "0@1shot"),
        (["--name", "2shot", "--seed", "4", "--allow-fewer"], "4@2shot"),
    ],
)
def test_rules_of_split(scenes, tmp_path, rule, name):
    assert main(["data", "split", str(scenes), *rule, "--output", str(tmp_path / "m.json"), "--quiet"]) == 0
    assert read_manifest(tmp_path / "m.json")["name"] == name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["check", "none"], "no such file or folder"),
        (["check", "scenes", "--format", "vok"], "no format 'vok'"),
        (["split", "scenes", "--name", "ten", "--output", "m.json"], "'ten' is no name of a split"),
        (["split", "scenes", "--shot", "5000", "--output", "m.json"], "5000 were asked for"),
        (["split", "scenes", "--shot", "1", "--output", "m.txt"], "ends in .json"),
        (["convert", "scenes", "--subset", "1@10", "--unlabeled", "--output", "x.json"], "--unlabeled"),
        (["convert", "scenes", "--output", "scenes"], "scenes"),
    ],
)
def test_wrong_input_is_one_line(scenes, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["data", *words, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith(f"uplvp data {words[0]}: error: ")
    assert sorted(tmp_path.rglob("*")) == before, "nothing is left behind"


@pytest.mark.slow
def test_a_run_records_its_split_and_refuses_another(scenes, recipe, tmp_path, capsys):
    run = tmp_path / "run"
    words = [
        "finetune",
        "--recipe",
        recipe,
        f"data.train={scenes}",
        "data.subset=1@50",
        "--output",
        str(run),
        "--quiet",
    ]
    assert main([*words, "optim.steps=2"]) == 0
    recorded = read_manifest(run / "split.json")
    assert recorded["name"] == "1@50" and recorded["counts"]["images"] == 6
    assert json.loads((run / "training_summary.json").read_text())["images"] == 6
    content = json.loads(annotations(scenes).read_text())
    content["annotations"].pop()
    annotations(scenes).write_text(json.dumps(content))
    capsys.readouterr()
    assert main([*words, "optim.steps=2", "--resume"]) == 2
    assert "split.json: this run was started on another split" in capsys.readouterr().err
    again = [*words[:-3], f"data.subset={run / 'split.json'}", "--output", str(tmp_path / "other"), "--quiet"]
    assert main(again) == 2
    assert "not those that the split was drawn from" in capsys.readouterr().err


def test_the_guide_shows_commands_and_counts_that_exist():
    from uplvp_hf.commands.data import make_parser
    from uplvp_hf.data.layouts import OFFICIAL_COUNTS

    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    commands = [line.split()[2:] for line in text.splitlines() if line.startswith("    uplvp data ")]
    assert {make_parser().parse_args(words).task for words in commands} == {"check", "convert", "split"}
    rows = re.findall(r"^\| (Cityscapes|CTW1500|VOC \d+|COCO) ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE)
    assert len(rows) == 5
    for name, splits, counts in rows:
        for split, count in zip(splits.split(" / "), counts.split(" / "), strict=True):
            assert OFFICIAL_COUNTS[f"{name.replace(' ', '').lower()} {split}"] == int(count)
