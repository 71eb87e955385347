"""Tables and figures of the papers from rows: AP with deviation, AP against steps, ablation bars, maps of queries."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.compare import Arm, Comparison, Point
from ..evaluation.compare_page import draw_curves, figure_bytes
from ..evaluation.measures import shown_metrics, spelled
from ..files import replacing, write_text
from ..models.errors import UserError
from .advice import advise
from .claims import claims_table, judge
from .rows import label_counts, labels_text, percent_text, row_metric, row_value
from .semantic import control_columns
from .separation import separation_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Sequence[dict[str, Any]]
_BARS = "#0072B2"


def write_results(rows: Rows, output: Path, maps: dict[str, dict[str, Any]] | None = None) -> str:
    """Writes results.md, and curves_*, ablation_*, of `maps` queries_*, and where the findings of a teacher were
    compared with hidden labels pseudo_*, as .svg and .png; returns the text.

    maps: segmenter -> arm -> mean masks of the queries (Q, h, w). Raises UserError for no rows.
    """
    if not rows:
        raise UserError("no finished run, so there is nothing to show yet")
    names = _in_order(rows, "benchmark")
    if len(names) > 1:
        raise UserError(f"rows of several benchmarks ({', '.join(names)}) are no comparison: draw one at a time")
    figures: dict[str, Figure] = {}
    for segmenter in _in_order(rows, "segmenter"):
        own = [row for row in rows if row["segmenter"] == segmenter]
        for count in label_counts(own):
            chosen = [row for row in own if row["labels_per_class"] == count]
            name = _file_name(f"{segmenter}_{count}")
            curves = curves_of(chosen)
            if any(len(arm.points) > 1 for arm in curves.arms):
                figures[f"curves_{name}"] = draw_curves(curves)
            if len(_in_order(chosen, "arm")) > 2:
                figures[f"ablation_{name}"] = draw_bars(chosen, f"{segmenter}, {labels_text(count)}")
            pseudo = pseudo_curves(chosen)
            if pseudo:
                figures[f"pseudo_{name}"] = draw_pseudo(pseudo, f"{segmenter}, {labels_text(count)}")
    figures |= {f"queries_{_file_name(name)}": draw_activations(own) for name, own in (maps or {}).items()}
    for name, figure in figures.items():
        for suffix in ("svg", "png"):
            with replacing(output / f"{name}.{suffix}", "wb") as stream:
                stream.write(figure_bytes(figure, suffix))
    tables = [*(results_table(rows, one) for one in _in_order(rows, "segmenter")), separation_table(rows)]
    parts = [*tables, claims_table(judge(rows), row_metric(rows)), advise(rows)]
    text = "\n\n".join(filter(None, parts))
    write_text(output / "results.md", text + "\n")
    return text


def results_table(rows: Rows, segmenter: str) -> str:
    """Markdown: an arm a line, AP / AP50 (or mIoU / aAcc) in per cent by labels, mean and deviation over seeds; of
    semantic segmenters also the mIoU of the controls."""
    own = [row for row in rows if row["segmenter"] == segmenter]
    counts = label_counts(own) or [0]
    controls = [(key, f"{title}, {labels_text(count)}", count)
                for key, title in control_columns(own) for count in counts]  # fmt: skip
    head = [f"{segmenter}: arm", *(labels_text(count) for count in counts), *(title for _, title, _ in controls)]
    head += ["fine-tuning steps", "runs"]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for arm in _in_order(own, "arm"):
        chosen = [row for row in own if row["arm"] == arm]
        cells = [_cell([row for row in chosen if row["labels_per_class"] == count]) for count in counts]
        if all(row["labels_per_class"] == 0 for row in chosen):  # no human label: one number for all columns
            cells = [_cell(chosen)] * len(counts)
        for key, _, count in controls:
            parts = [{"metrics": row[key]} for row in chosen if row["labels_per_class"] == count and row.get(key)]
            cells.append(mean_text(parts, "mIoU"))
        steps = sorted({row["finetune"]["steps"] if row["finetune"] else 0 for row in chosen})
        name = arm + (" (class-agnostic AP)" if any(row["class_agnostic"] for row in chosen) else "")
        lines.append("| " + " | ".join([name, *cells, ", ".join(map(str, steps)), str(len(chosen))]) + " |")
    return "\n".join(lines)


def _cell(rows: Rows) -> str:
    return " / ".join(mean_text(rows, name) for name in shown_metrics(rows[0]["metrics"])) if rows else "-"


def mean_text(rows: Rows, metric: str) -> str:
    """`39.9 (1.4)`: mean and standard deviation (n - 1) over rows, in per cent."""
    return percent_text([row["metrics"][metric] for row in rows])


def curves_of(rows: Rows) -> Comparison:
    """The arms of rows of one segmenter and number of labels, for `draw_curves`: AP or mIoU against fine-tuning
    steps."""
    arms = []
    for name in _in_order(rows, "arm"):
        own = [row for row in rows if row["arm"] == name and not row["class_agnostic"]]
        shared = set.intersection(*(set(row["curve"]) for row in own)) if own else set()
        steps = sorted(map(int, shared))
        points = [Point(step, step, [row["curve"][str(step)] for row in own]) for step in steps]
        if points:
            arms.append(Arm(name, own, points, points[-1]))
    return Comparison(arms, row_metric(rows), "steps", [])


def draw_bars(rows: Rows, title: str) -> Figure:
    """Final AP or mIoU of every arm, mean and deviation over seeds, and a dot for each seed."""
    from matplotlib.figure import Figure

    names = _in_order(rows, "arm")
    figure = Figure(figsize=(7.5, 0.7 + 0.32 * len(names)), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(names):
        own = [row_value(row) for row in rows if row["arm"] == name]
        values = [100 * value for value in own if value is not None]
        spread = statistics.stdev(values) if len(values) > 1 else 0
        axes.barh(place, statistics.mean(values), xerr=spread, color=_BARS, alpha=0.55, height=0.7, capsize=2)
        axes.plot(values, [place] * len(values), "o", color="black", markersize=2.5)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"{spelled(row_metric(rows))} (%)")
    axes.set_title(title, fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    return figure


def pseudo_curves(rows: Rows) -> dict[str, dict[str, dict[int, float]]]:
    """arm -> `precision` and `recall` of its teacher's findings -> step -> mean over the runs that have it, 0 to 1."""
    curves: dict[str, dict[str, dict[int, list[float]]]] = {}
    for row in rows:
        for step, values in (row.get("pseudo") or {}).items():
            for name in ("precision", "recall"):
                if name in values:
                    own = curves.setdefault(row["arm"], {"precision": {}, "recall": {}})[name]
                    own.setdefault(int(step), []).append(values[name])
    return {
        arm: {name: {step: statistics.mean(own[step]) for step in sorted(own)} for name, own in found.items()}
        for arm, found in curves.items()
    }


def draw_pseudo(curves: dict[str, dict[str, dict[int, float]]], title: str) -> Figure:
    """`pseudo_curves` against steps: precision and recall at a mask IoU of 0.5, of the right class."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("precision", "recall"), strict=True):
        for arm, own in curves.items():
            axes.plot(list(own[name]), list(own[name].values()), marker="o", markersize=3, label=arm)
        axes.set_xlabel("fine-tuning steps")
        axes.set_ylabel(f"{name} of the pseudo instances")
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    return figure


def draw_activations(maps: dict[str, Any], columns: int = 20) -> Figure:
    """Mean mask of every query, an arm a line. maps: arm -> (Q, h, w); each is drawn from its least to its greatest."""
    from matplotlib.figure import Figure

    columns = min(columns, *(len(one) for one in maps.values()))
    figure = Figure(figsize=(0.55 * columns + 1.2, 0.75 * len(maps)), layout="constrained")
    grid = figure.subplots(len(maps), columns, squeeze=False)
    for line, (name, queries) in zip(grid, maps.items(), strict=True):
        for axes, query in zip(line, queries, strict=False):
            axes.imshow(query, cmap="viridis")
            axes.set_xticks([])
            axes.set_yticks([])
        line[0].set_ylabel(name, fontsize=8, rotation=0, ha="right", va="center")
    return figure


def _in_order(rows: Rows, key: str) -> list[str]:
    """Values of `key`, in the order in which they first occur."""
    return list(dict.fromkeys(row[key] for row in rows))


def _file_name(name: str) -> str:
    return re.sub(r"\W+", "_", name)
