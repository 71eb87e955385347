"""What the commands share: writing results in one step, and one line for what the user can put right."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """All of the file or nothing: written under a temporary name, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.tmp")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    write_text(path, json.dumps(content, indent=indent, allow_nan=False) + "\n")


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def fail(command: str, error: Exception) -> int:
    """Prints the error in one line and returns the exit code for wrong input."""
    print(f"uplvp {command}: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
