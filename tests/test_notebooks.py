"""The notebooks run, and what is committed shows what a run gives."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs" / "notebooks").glob("*.ipynb"))
MOST_BYTES = 400_000
# Folders of a machine, as they begin a path; not the parts of an address, of a share such as 3/4, or of a media type.
MACHINE = re.compile(r"(?<![\w.:/])(/(home|root|tmp|usr|var|opt|work|mnt|Users|private)/|[A-Za-z]:\\)")


def text_of(output):
    """What an output of a cell says, without its pictures."""
    data = {kind: value for kind, value in output.get("data", {}).items() if not kind.startswith("image/")}
    return json.dumps([output.get("text"), data])


def test_there_are_notebooks():
    assert len(NOTEBOOKS) == 3


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_committed_outputs(file):
    """Every cell was executed, in order; one shows a picture, none an error or a folder of somebody's machine."""
    cells = [cell for cell in json.loads(file.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert any(kind.startswith("image/") for output in outputs for kind in output.get("data", ()))
    assert not [text for text in map(text_of, outputs) if MACHINE.search(text)]
    assert file.stat().st_size < MOST_BYTES


def test_a_path_of_a_machine_is_seen():
    assert MACHINE.search('["saved in /tmp/abc/model"]') and MACHINE.search('["/home/me/runs"]')
    assert not MACHINE.search('["runs/tmp/model, https://example.org/home/page, image/jpeg"]')


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
# jupyter_client warns of its own defaults: channels without encryption on loopback, folders of settings.
@pytest.mark.filterwarnings("default")
def test_notebook_runs(file, tmp_path, load_script):
    notebook = load_script("run_notebooks").executed(file, tmp_path)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
