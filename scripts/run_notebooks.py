"""Executes the notebooks of docs/notebooks and writes their outputs into them.

Commands:

    python scripts/run_notebooks.py                        # all of them
    python scripts/run_notebooks.py label_and_look         # one

Each runs in an empty temporary folder, so that its paths are relative and nothing of the machine is in its outputs.
What libraries write to the standard error is left out: it names their files.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
SECONDS = 3600  # most for a start or a cell, where other work takes the cores


def executed(file: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a run in `folder`. Raises CellExecutionError when a cell raises."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # of the kernel: the notebooks need no network
    notebook = nbformat.read(file, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    patience = {"timeout": SECONDS, "startup_timeout": SECONDS}
    NotebookClient(notebook, kernel_name="python3", resources=resources, record_timing=False, **patience).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    return notebook


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="notebooks, without .ipynb (default: all)")
    names = parser.parse_args(argv).names or sorted(file.stem for file in FOLDER.glob("*.ipynb"))
    for name in names:
        file, began = FOLDER / f"{name}.ipynb", time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            notebook = executed(file, Path(folder))
        nbformat.write(notebook, file)
        print(f"{name}: {file.stat().st_size:,} bytes, {time.perf_counter() - began:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
