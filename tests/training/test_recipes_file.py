"""Recipes that build on one another."""

import dataclasses
import re

import pytest
import yaml

from uplvp_hf.commands import finetune, pretrain
from uplvp_hf.training.config import ConfigError, TrainSettings, load_settings
from uplvp_hf.training.recipes_file import merge_settings, read_recipe, shipped_parts, shipped_recipes


def write(path, **content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_own_settings_win_over_later_bases_over_earlier_ones(tmp_path):
    write(tmp_path / "a.yaml", optim={"lr": 1.0, "clip": 1.0, "steps": 1}, seed=1)
    write(tmp_path / "deep" / "b.yaml", base="../a.yaml", optim={"lr": 2.0, "clip": 2.0})
    write(tmp_path / "c.yaml", optim={"clip": 3.0}, data={"flip": 0.25})
    top = write(tmp_path / "top.yaml", base=["deep/b.yaml", "c.yaml"], optim={"steps": 9})
    assert read_recipe(top) == {"optim": {"lr": 2.0, "clip": 3.0, "steps": 9}, "seed": 1, "data": {"flip": 0.25}}
    again = write(tmp_path / "again.yaml", base=["c.yaml", "deep/b.yaml"])
    assert read_recipe(again)["optim"]["clip"] == 2.0
    assert load_settings([top, again], ["seed=5"]).optim.clip == 2.0 and load_settings([top, again]).optim.steps == 1
    assert load_settings([again, top], ["seed=5"]).seed == 5


def test_a_file_may_build_on_a_shipped_recipe(tmp_path):
    own = write(tmp_path / "own.yaml", base="small_finetune", optim={"steps": 7})
    shipped, mine = load_settings("small_finetune"), load_settings(own)
    assert mine.optim.steps == 7 and mine.model == shipped.model and mine.optim.lr == shipped.optim.lr
    assert read_recipe("paper/knet_coco10_finetune")["model"]["segmenter"]["model_type"] == "knet"


def test_dicts_merge_unless_they_describe_different_models():
    below = {"model": {"segmenter": {"model_type": "knet", "num_stages": 3, "backbone_config": {"depths": [3]}}}}
    same = merge_settings(below, {"model": {"segmenter": {"model_type": "knet", "num_queries": 9}}})
    assert same["model"]["segmenter"] == {**below["model"]["segmenter"], "num_queries": 9}
    unnamed = merge_settings(below, {"model": {"segmenter": {"num_stages": 1, "backbone_config": {"a": 1}}}})
    assert unnamed["model"]["segmenter"]["backbone_config"] == {"depths": [3], "a": 1}
    other = merge_settings(below, {"model": {"segmenter": {"model_type": "queryinst"}}})
    assert other["model"]["segmenter"] == {"model_type": "queryinst"}
    assert below["model"]["segmenter"]["num_stages"] == 3 and "num_queries" not in below["model"]["segmenter"]


def test_circles_and_missing_bases_are_explained(tmp_path):
    write(tmp_path / "a.yaml", base="b.yaml")
    write(tmp_path / "b.yaml", base="a.yaml")
    with pytest.raises(ConfigError, match=r"circle: .*a\.yaml -> .*b\.yaml -> .*a\.yaml"):
        read_recipe(str(tmp_path / "a.yaml"))
    own = write(tmp_path / "own.yaml", base="own.yaml")
    with pytest.raises(ConfigError, match="circle"):
        read_recipe(own)
    diamond = write(tmp_path / "d.yaml", base=["e.yaml", "f.yaml"])  # twice the same base is no circle
    write(tmp_path / "e.yaml", base="small_finetune")
    write(tmp_path / "f.yaml", base="small_finetune", seed=3)
    assert read_recipe(diamond)["seed"] == 3
    missing = write(tmp_path / "missing.yaml", base="no/such")
    with pytest.raises(
        ConfigError, match=r"missing\.yaml, `base`: No recipe file .*no/such.*Parts of recipes: .*init_swav"
    ):
        read_recipe(missing)
    with pytest.raises(ConfigError, match="named by a word, got 3"):
        read_recipe(write(tmp_path / "number.yaml", base=[3]))
    with pytest.raises(ConfigError, match=r"`base` is the name of a recipe, or a list of them, got \{'a': 1\}"):
        read_recipe(write(tmp_path / "dict.yaml", base={"a": 1}))


def test_recipes_and_parts_are_told_apart():
    recipes, parts = shipped_recipes(), shipped_parts()
    assert not set(recipes) & set(parts)
    assert {"small_pretrain", "paper/knet_pretrain", "one_gpu_finetune"} <= set(recipes)
    assert {"paper/init_mocov2", "parts/knet_r50"} <= set(parts)
    assert all(name.startswith(("parts/", "paper/init_")) for name in parts)


def test_the_help_of_the_commands_says_what_every_setting_does(capsys):
    with pytest.raises(SystemExit):
        finetune.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    sections = [item for item in dataclasses.fields(TrainSettings) if dataclasses.is_dataclass(item.default_factory)]
    assert len(sections) == 7
    for section in sections:
        for item in dataclasses.fields(section.default_factory):
            assert item.metadata["meaning"], item.name
            shown = text.split(f" {section.name}.{item.name} ", 1)[1]
            assert item.metadata["meaning"] in shown[:600], item.name


def test_the_help_of_the_commands_names_recipes_that_can_be_combined(capsys):
    with pytest.raises(SystemExit):
        pretrain.main(["--help"])
    told = capsys.readouterr().out
    assert "`base: NAME`" in told and "several times" in told
    lines = [re.findall(r"--recipe (\S+)", line) for line in told.splitlines() if line.strip().startswith("--recipe ")]
    examples = [names for names in lines if len(names) == 2]
    assert len(examples) == 2
    for names in examples:
        assert load_settings(names).stage == names[0].rsplit("_", 1)[1]
