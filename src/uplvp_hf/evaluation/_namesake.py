"""Imports the `evaluate` library where a script of the same name would hide it.

Python puts the folder of a started script first on its path, and `scripts/` (like many users' folders) holds a file
called `evaluate.py`.
"""

import importlib
import sys
from pathlib import Path


def import_evaluate_library() -> None:
    """Afterwards `import evaluate` gives the library, whatever lies beside the script that was started."""
    if "evaluate" in sys.modules:
        return
    path = list(sys.path)
    sys.path[:] = [entry for entry in path if not (Path(entry or ".") / "evaluate.py").is_file()]
    try:
        importlib.import_module("evaluate")
    finally:
        sys.path[:] = path


import_evaluate_library()
