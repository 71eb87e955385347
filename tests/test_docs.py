"""Numbers in the documents are those of the committed rows."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def compare():
    spec = importlib.util.spec_from_file_location("compare_pretraining", ROOT / "scripts" / "compare_pretraining.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("document", "cell"),
    [("docs/results.md", "{AP} / {AP50}"), ("README.md", "{AP}")],
)
def test_animals7_table_is_that_of_the_rows(compare, document, cell):
    rows = [json.loads(line) for line in (ROOT / "docs/results/animals7.jsonl").read_text().splitlines()]
    text = (ROOT / document).read_text().replace("**", "")
    for arm in compare.ARMS:
        runs = [row["evaluations"] for row in rows if row["arm"] == arm]
        assert len(runs) == 3
        cells = [
            cell.format(**{key: compare._mean(runs, step, key) for key in ("AP", "AP50")}) for step in (100, 250, 500)
        ]
        assert f"| {' | '.join(cells)} |" in text, (arm, cells)
