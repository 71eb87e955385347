"""docs/labeling.md: its commands have options and settings that exist, its Python runs."""

import dataclasses
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml
from labeling_helpers import image_folder

from uplvp_hf.cli import VERBS
from uplvp_hf.commands.label import build_parser, parse, read_settings
from uplvp_hf.labeling.catalog import LABELERS, NAMERS, label_settings, labeler_entry
from uplvp_hf.labeling.naming.class_map import read_class_map

GUIDE = Path(__file__).parents[2] / "docs" / "labeling.md"
TEXT = GUIDE.read_text().split("\n## Measured\n")[0]  # after that come tables and other commands


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


COMMANDS = [
    shlex.split(line, comments=True)
    for block in blocks("bash")
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("uplvp")
]


def test_there_are_commands():
    assert len(COMMANDS) > 10 and {command[1] for command in COMMANDS} <= set(VERBS)


@pytest.mark.parametrize("words", [c[2:] for c in COMMANDS if c[1] == "label"], ids=lambda words: " ".join(words)[:60])
def test_options_and_settings_exist(words, tmp_path, monkeypatch):
    (tmp_path / "my_masks.py").write_text(next(block for block in blocks("python") if "my_masks.py" in block))
    monkeypatch.chdir(tmp_path)
    if "--help" in words:
        with pytest.raises(SystemExit) as stopped:
            parse(words)
        assert stopped.value.code == 0
        return
    args = parse(words)
    if args.merge is not None:
        assert len(args.merge) > 1 and args.output and {word.partition(".")[0] for word in args.settings} <= {"run"}
        return
    if args.output is None:
        assert (
            args.report is not None
            or args.features is not None
            or any(word.startswith("output.") for word in args.settings)
        )
        return
    args.labeler = args.labeler or "clip"
    args.namer = args.namer or labeler_entry(args.labeler).namer
    settings = read_settings(args)
    for word in args.settings:
        section, name = word.partition("=")[0].split(".")
        assert name in getattr(settings, section).given


def test_settings_in_the_text_exist():
    known = {"section.name", "labeler.level"}
    for labeler in LABELERS:
        for namer in NAMERS:
            for section in dataclasses.fields(label_settings(labeler, namer)):
                known |= {f"{section.name}.{item.name}" for item in dataclasses.fields(section.default_factory)}
    sections = "labeler|namer|run|networks|images|output"
    named = re.findall(rf"(?<![\w./-])((?:{sections})\.[a-z_]+)\b(?!\.)", TEXT)
    assert len(named) > 30 and set(named) <= known, set(named) - known
    options = {word for action in build_parser()._actions for word in action.option_strings} | {"--processes"}
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXT)) - {"--num_processes", "--num"}
    assert used <= options, used - options


def test_python_and_class_map(tmp_path, monkeypatch):
    from uplvp_hf.labeling.labelers.plugin import load_plugin

    (tmp_path / "my_masks.py").write_text(next(block for block in blocks("python") if "my_masks.py" in block))
    monkeypatch.chdir(tmp_path)
    images = image_folder(tmp_path / "images", 1)
    image = images.load_image(0)
    (found,) = load_plugin("my_masks:bright_regions", {"level": 100})([image], images.rows)
    assert (found.masks[0] == (np.asarray(image.convert("L")) > 100)).all()
    (tmp_path / "classes.yaml").write_text(blocks("yaml")[0])
    assert read_class_map(tmp_path / "classes.yaml")["bear"] == [294, 295, 296, 297]
    assert yaml.safe_load(blocks("yaml")[0]).keys() == {"bear", "deer", "otter"}
    for block in blocks("python"):
        compile(block, "guide", "exec")
