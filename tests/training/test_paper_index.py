"""docs/paper_index.md: commands that the library accepts, published numbers that agree with the papers' own sums."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from uplvp_hf.data.coco_classes import COCO_CLASSES
from uplvp_hf.training.config import load_settings
from uplvp_hf.training.recipes_file import read_recipe, shipped_recipes

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "paper_index.md").read_text()
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", TEXT, re.S))
COMMANDS = [line.split("  #")[0].strip() for line in BLOCKS.splitlines() if line and not line.startswith("#")]
COMMANDS += re.findall(r"`(uplvp [a-z]+ [^`]+)`", TEXT)
RECIPES = shipped_recipes()
TRAINING = [command for command in COMMANDS if command.split()[1] in ("pretrain", "finetune")]


def options(words):
    """{option: values}, and the section.key=value words, of a training command."""
    found, settings, rest = {}, [], list(words)
    while rest:
        word = rest.pop(0)
        if word.startswith("--"):
            found.setdefault(word, []).append(rest.pop(0))
        else:
            settings.append(word)
    return found, settings


@pytest.mark.parametrize("command", TRAINING)
def test_training_commands_are_valid(command):
    _, verb, *words = shlex.split(command)
    found, settings = options(words)
    assert set(found) <= {"--recipe", "--output"} and found["--recipe"][0] in RECIPES
    assert read_recipe(found["--recipe"])["stage"] == verb  # the verb would silently win
    loaded = load_settings(found["--recipe"], settings)
    assert loaded.stage == verb
    for word in settings:
        key, _, value = word.partition("=")
        section, name, *inner = key.split(".")
        found_value = getattr(getattr(loaded, section), name)
        for one in inner:
            found_value = found_value[one]
        assert str(found_value).lower() in (value, f"{value}.0")


@pytest.mark.parametrize("command", [one for one in COMMANDS if one not in TRAINING])
def test_other_commands_are_accepted_by_their_parsers(command):
    program, *words = shlex.split(command.split(" > ")[0])
    if program == "uplvp":
        module = importlib.import_module(f"uplvp_hf.commands.{words[0]}")
        make_parser = getattr(module, "build_parser", None) or module.make_parser
        parse = getattr(module, "parse", None) or make_parser().parse_args
        parse(words[1:])
    elif words[0] == "-c":
        assert words[1].startswith("from uplvp_hf.data.coco_classes import COCO_CLASSES") and len(COCO_CLASSES) == 80
    else:
        assert (ROOT / words[0]).is_file()


def test_every_paper_recipe_has_a_command():
    used = {options(shlex.split(command)[2:])[0]["--recipe"][0] for command in TRAINING}
    assert used == {name for name in RECIPES if name.startswith("paper/")}


def test_starts_and_figures_use_outputs_that_commands_write():
    written = {"runs/ablation/pseudo"}
    for command in TRAINING:
        found, settings = options(shlex.split(command)[2:])
        written.add(found.get("--output", [load_settings(found["--recipe"], settings).output])[0])
    for command in TRAINING:
        found, settings = options(shlex.split(command)[2:])
        init = load_settings(found["--recipe"], settings).model.init
        assert init is None or init in written
    arms = re.findall(r"--arm '[^=]+=([^'*]+)\*'", BLOCKS)
    assert arms and set(arms) <= written
    names = [found for command in TRAINING if (found := options(shlex.split(command)[2:])[0].get("--output"))]
    assert len({name[0] for name in names}) == len(set(map(tuple, names)))


def cells():
    """Rows of the tables with a command: list of cells, the command last."""
    rows = [line.strip("|").split("|") for line in TEXT.splitlines() if line.startswith("|") and "`uplvp" in line]
    return [[cell.strip() for cell in row] for row in rows]


def test_published_numbers_agree_with_the_differences_that_the_papers_state():
    """SP's text: +5.1 and +4.4 AP over supervised, +2.9 and +2.8 over MoCo-v2 (K-Net), +14.1 and +10.9 on CTW1500,
    +2.7 and +3.7 on Cityscapes."""
    first = {(row[0], row[1]): [float(v) for v in row[2:8]] for row in cells() if row[0] in ("5 %", "10 %")}
    assert len(first) == 10
    for images, over_supervised, over_moco in (("5 %", 5.1, 2.9), ("10 %", 4.4, 2.8)):
        best = first[images, "SP"][0]
        assert best - first[images, "Img. Sup."][0] == pytest.approx(over_supervised)
        assert best - first[images, "MoCo-v2"][0] == pytest.approx(over_moco)
    assert first["5 %", "SP"][5] - first["5 %", "Img. Sup."][5] == pytest.approx(8.2)
    others = [row for row in cells() if row[0] in ("Mask2Former", "QueryInst")]
    curved = {(row[0], row[1]): row for row in others if "ctw1500" in row[-1]}
    street = {(row[0], row[1]): row for row in others if "cityscapes" in row[-1]}
    assert len(curved) == len(street) == 10
    for segmenter, on_text, on_streets in (("Mask2Former", 14.1, 2.7), ("QueryInst", 10.9, 3.7)):
        gain = float(curved[segmenter, "SP"][3]) - float(curved[segmenter, "Img. Sup."][3])
        assert gain == pytest.approx(on_text)
        gain = float(street[segmenter, "SP"][2]) - float(street[segmenter, "Img. Sup."][2])
        assert gain == pytest.approx(on_streets)


def test_rows_and_recipes_name_the_same_numbers():
    """The AP in a recipe's first lines, and the epochs of a row, are those of the table."""
    for row in cells():
        found, _ = options(shlex.split(row[-1].strip("`"))[2:])
        if len(found["--recipe"]) > 1:
            initialization = {"DenseCL": "densecl", "SwAV": "swav", "MoCo-v2": "mocov2"}[row[1]]
            assert found["--recipe"][1] == f"paper/init_{initialization}"
            continue
        recipe = found["--recipe"][0]
        if "icpc" in recipe:
            continue  # its numbers are of models that its authors did not release, and are mIoU
        text = (ROOT / "src/uplvp_hf/training/recipes" / f"{recipe}.yaml").read_text()
        comment = " ".join(line[1:].strip() for line in text.splitlines() if line.startswith("#"))
        column = {"paper/knet_coco_full_finetune": 1}.get(recipe, 3 if "ctw1500" in recipe else 2)
        assert f"AP {float(row[column]):.1f})" in comment
        if "ctw1500" in recipe:
            assert load_settings(recipe).optim.epochs == float(row[2])


def test_the_page_says_that_nothing_was_run():
    assert "**published**" in TEXT and "**None has been run here at that scale.**" in " ".join(TEXT.split())
    assert "no number of UPLVP stands here" in " ".join(TEXT.split())
