"""The cards of the intended models: rendered from their sources, honest, and with snippets that run."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from uplvp_hf.commands import label
from uplvp_hf.training.config import load_settings

ROOT = Path(__file__).parents[2]
CARDS = sorted((ROOT / "model_cards").glob("*.md"))
NAMES = [f"{kind}-coco{end}" for kind in ("knet", "mask2former", "queryinst") for end in ("", "-pretrained")]


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("render_model_cards")


def test_files_are_what_their_sources_give(script, monkeypatch, capsys):
    cards = script.render()
    assert sorted(cards) == sorted(NAMES) == sorted(file.stem for file in CARDS)
    for file in CARDS:
        assert file.read_text(encoding="utf-8") == cards[file.stem], "run scripts/render_model_cards.py"
    monkeypatch.setattr("sys.argv", ["render_model_cards.py", "--check"])
    assert script.main() == 0
    monkeypatch.setattr(script, "render", lambda: {NAMES[0]: "other"})
    assert script.main() == 1 and f"Differing: {NAMES[0]}.md" in capsys.readouterr().out


@pytest.mark.parametrize("file", CARDS, ids=lambda file: file.stem)
def test_metadata_and_honesty(file):
    card = ModelCard.load(file)
    data = card.data.to_dict()
    kind = file.stem.split("-")[0]
    assert data["pipeline_tag"] == "image-segmentation" and data["library_name"] == "transformers"
    assert data["license"] == "apache-2.0" and {"instance-segmentation", "uplvp", kind} <= set(data["tags"])
    assert not {"model-index", "base_model", "widget"} & set(data)  # nothing of these exists
    assert "No weights are published yet" in card.text.split("##")[0] and f"uplvp/{file.stem}" in card.text
    sections = re.findall(r"^## (.+)$", card.text, re.MULTILINE)
    assert sections == ["Use", "Our results", "Published figures (not ours)", "Limits", "Citation"]
    parts = dict(zip(sections, re.split(r"^## .+$", card.text, flags=re.MULTILINE)[1:], strict=True))
    assert not re.search(r"\d", parts["Our results"])  # no figure of ours
    titles = [line for line in parts["Published figures (not ours)"].splitlines() if line.endswith(":")]
    assert titles and all("(published" in title for title in titles)
    assert "2405.13388" in parts["Citation"] and "2302.01171" in parts["Citation"]


@pytest.mark.parametrize("file", CARDS, ids=lambda file: file.stem)
def test_snippets_name_what_exists(file):
    text = file.read_text(encoding="utf-8")
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        tree = ast.parse(code)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), code
    for line in re.findall(r"^uplvp label (.+)$", text, re.MULTILINE):
        assert label.build_parser().parse_args(shlex.split(line)).output
    words = re.findall(r"--recipe (\S+)", text)
    assert words
    for recipe, stage in zip(words, ["pretrain", "finetune"], strict=False):
        settings = load_settings(recipe, [])
        assert settings.stage == stage and recipe.split("/")[1].startswith(file.stem.split("-")[0])
        if stage == "pretrain":
            assert f"--output {settings.data.train}" in text
        else:
            assert settings.model.init == load_settings(words[0], []).output


def test_figures_have_the_margins_that_were_noted_apart():
    """Differences in AP between SP and two initializations, written down apart from the tables."""
    published = yaml.safe_load((ROOT / "model_cards" / "published.yaml").read_text())

    def margin(model, table, other, **where):
        content = published[model]["tables"][table]

        rows = [dict(zip(content["columns"], row, strict=True)) for row in content["rows"]]
        rows = [row for row in rows if all(row[key] == value for key, value in where.items())]
        values = {row["pre-training"]: row["AP"] for row in rows}
        assert len(values) == 5
        return round(values["SP"] - values[other], 1)

    assert [margin("knet", 0, "ImageNet", labels=share) for share in ("5 %", "10 %")] == [5.1, 4.4]
    assert [margin("knet", 0, "MoCo-v2", labels=share) for share in ("5 %", "10 %")] == [2.9, 2.8]
    assert [margin(model, 0, "ImageNet") for model in ("mask2former", "queryinst")] == [2.7, 3.7]
    assert [margin(model, 0, "MoCo-v2") for model in ("mask2former", "queryinst")] == [1.1, 1.4]
    assert [margin(model, 1, "ImageNet") for model in ("mask2former", "queryinst")] == [14.1, 10.9]
    assert [margin(model, 1, "MoCo-v2") for model in ("mask2former", "queryinst")] == [9.6, 7.6]


def test_citations_are_those_of_the_citation_file():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    works = [citation["preferred-citation"], *citation["references"]]
    templates = [ROOT / "model_cards" / "template.md.j2", ROOT / "src/uplvp_hf/hub/templates/model_card.md.j2"]
    entries = [re.search(r"```bibtex.*?```", file.read_text(), re.DOTALL)[0] for file in templates]
    assert entries[0] == entries[1]
    for work in works:
        authors = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in work["authors"])
        assert all(part in entries[0] for part in (work["title"], authors, work["url"].split("/")[-1]))
