"""Tables and figures of README.md and docs/results.md are what the committed rows give."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from uplvp_hf.evaluation.predictor import METRICS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def render(load_script):
    return load_script("render_results")


@pytest.fixture
def copy(tmp_path):
    """A copy of what is rendered, to change."""
    for name in ("README.md", "docs/results.md", "docs/labeling.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "docs/results", tmp_path / "docs/results")
    return tmp_path


@pytest.mark.slow
def test_documents_and_figures_are_those_of_the_rows(render, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["render_results.py", "--check"])
    assert render.main() == 0, capsys.readouterr().out
    assert capsys.readouterr().out == "0 to be rendered again\n"


@pytest.mark.slow
def test_another_number_is_seen(render, copy):
    """One AP of one row that the headline shows: both documents and the figures are stale then."""
    file = copy / "docs/results/animals7.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    row = next(row for row in rows if row["arm"] == "full" and row["labels_per_class"] == 10)
    row["metrics"]["AP"] += 0.05
    last = max(row["curve"], key=int)
    row["curve"][last] += 0.05
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert {"README.md", "docs/results.md", "docs/results/headline.svg"} <= set(render.stale(copy))


def test_a_figure_of_another_matplotlib_is_compared_by_its_numbers(render, copy):
    file = copy / "docs/results/headline.svg"
    content = file.read_bytes()
    assert render.same_figure(
        content, re.sub(rb"Matplotlib v[\w.]+", b"Matplotlib v0.1", content).replace(b"M 0", b"M 1")
    )
    assert not render.same_figure(content, content.replace(b"M 0", b"M 1"))


def test_headline_by_hand(render):
    """The mean of one cell, without our tables."""
    rows = [json.loads(line) for line in (ROOT / "docs/results/animals7.jsonl").read_text().splitlines()]
    found = [
        row["metrics"]["AP"]
        for row in rows
        if (row["segmenter"], row["arm"], row["labels_per_class"]) == ("mask2former", "full", 10)
    ]
    assert len(found) >= 3 and len({row["seed"] for row in rows}) >= 3
    line = next(
        line for line in (ROOT / "README.md").read_text().splitlines() if "10 labels a class | Mask2Former" in line
    )
    assert line.split("|")[-2].strip().startswith(f"{100 * sum(found) / len(found):.1f} (")


def test_rows_say_how_to_repeat_them(render):
    """Settings, revision, seconds, all COCO numbers and a curve in every row; no path of a machine."""
    for name, rows in render.load_rows().items():
        assert rows
        for row in rows:
            assert set(row["metrics"]) == set(METRICS)
            assert row["revision"] and row["curve"] and isinstance(row["seed"], int)
            assert row["labels_per_class"] == 0 or "seconds" in row["finetune"]  # 0: evaluated as it was pre-trained
        assert not re.search(r'"(/|~|[A-Za-z]:\\\\)', json.dumps(rows)), name  # no value is an absolute path
