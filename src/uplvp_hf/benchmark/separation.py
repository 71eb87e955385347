"""Whether arms tell neighbors apart: F1, and recall on images with one and with several objects, from rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .rows import labels_text, percent_text

HEAD = (
    "arm", "labels", "steps", "AP", "AP50", "F1 at .5", "best F1", "its score", "one object: found",
    "several: found at .5", "several: found", "several: merged", "runs",
)  # fmt: skip


def separation_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line for every segmenter, arm and number of labels; per cent, mean and deviation (n - 1) over seeds.

    Where no score is named, it is the one of the run's best F1. Empty without rows that have findings
    (`evaluation/findings.py`).
    """
    groups: dict[tuple[str, str, Any], list[dict[str, Any]]] = {}
    for row in rows:
        if row.get("findings"):
            groups.setdefault((row["segmenter"], row["arm"], row["labels_per_class"]), []).append(row)
    lines = ["| " + " | ".join(HEAD) + " |", "|---|---" + "|---:" * (len(HEAD) - 2) + "|"] if groups else []
    for (segmenter, arm, labels), own in groups.items():
        steps = sorted({row["finetune"]["steps"] if row["finetune"] else 0 for row in own})
        cells = [
            _mean(own, lambda row: row["metrics"]["AP"]),
            _mean(own, lambda row: row["metrics"]["AP50"]),
            _mean(own, lambda row: row["findings"]["at"][0]["f1"]),
            _mean(own, lambda row: row["findings"]["at"][-1]["f1"]),
            _mean(own, lambda row: row["findings"]["best_threshold"]),
            _mean(own, lambda row: _share(row, "1", "found")),
            _mean(own, lambda row: _share(row, "2 or more", "found", 0)),
            _mean(own, lambda row: _share(row, "2 or more", "found")),
            _mean(own, lambda row: _share(row, "2 or more", "merged")),
        ]
        name = f"{segmenter}: {arm}"
        lines.append(
            "| " + " | ".join([name, labels_text(labels), ", ".join(map(str, steps)), *cells, str(len(own))]) + " |"
        )
    return "\n".join(lines)


def _share(row: dict[str, Any], objects: str, name: str, place: int = -1) -> float | None:
    for group in row["findings"]["at"][place]["by_objects"]:
        if group["objects"] == objects:
            return group[name]
    return None


def _mean(rows: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float | None]) -> str:
    return percent_text([value(row) for row in rows])
