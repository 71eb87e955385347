"""A comparison of runs for people: learning curves, tables in Markdown, CSV and JSON, one self-contained page."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import replacing, write_json, write_text
from .compare import Comparison, Point, short
from .measures import spelled
from .runs import X_AXES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colors, which people with any color vision can tell apart; markers differ too.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#F0E442")
_MARKERS = "os^Dv<>P"
MOST_COLUMNS = 6  # evaluations in the table of the page; the CSV has all


def write_comparison(comparison: Comparison, output: str | os.PathLike[str]) -> list[Path]:
    """Writes compare.html, curves.png, curves.svg, table.md, table.csv and compare.json; returns their paths."""
    output = Path(output)
    figure = draw_curves(comparison)
    drawn = {suffix: figure_bytes(figure, suffix) for suffix in ("png", "svg")}
    for suffix, content in drawn.items():
        with replacing(output / f"curves.{suffix}", "wb") as stream:
            stream.write(content)
    write_text(output / "table.md", markdown_table(comparison))
    write_text(output / "table.csv", csv_table(comparison))
    write_json(output / "compare.json", as_dict(comparison))
    write_text(output / "compare.html", _page(comparison, drawn["svg"].decode()))
    names = ("compare.html", "curves.png", "curves.svg", "table.md", "table.csv", "compare.json")
    return [output / name for name in names]


def draw_curves(comparison: Comparison) -> Figure:
    """The metric in per cent against the axis: the mean of each arm, and a band of one deviation over its runs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    plot_curves(figure.subplots(), comparison)
    return figure


def plot_curves(axes: Axes, comparison: Comparison) -> None:
    """`draw_curves` into axes that exist."""
    for index, arm in enumerate(comparison.arms):
        style = {"color": _COLORS[index % len(_COLORS)], "linestyle": "-" if index < len(_COLORS) else "--"}
        xs, means = [point.x for point in arm.points], [100 * point.mean for point in arm.points]
        marker = _MARKERS[index % len(_MARKERS)] if len(xs) <= 25 else None
        label = f"{arm.name} ({len(arm.runs)} run{'s' if len(arm.runs) > 1 else ''})"
        axes.plot(xs, means, marker=marker, markersize=4, linewidth=1.6, label=label, **style)
        if len(arm.runs) > 1:
            spread = [100 * point.deviation for point in arm.points]
            low, high = zip(*((mean - one, mean + one) for mean, one in zip(means, spread)), strict=True)
            axes.fill_between(xs, low, high, color=style["color"], alpha=0.18, linewidth=0)
    axes.set_xlabel(X_AXES[comparison.axis])
    axes.set_ylabel(f"{spelled(comparison.metric)} (%)")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="best")


def figure_bytes(figure: Figure, suffix: str, description: str | None = None, dpi: int = 150) -> bytes:
    """The figure as bytes, the same for the same runs: without the date that matplotlib would put in.

    description: kept in an .svg, as its dc:description.
    """
    import matplotlib

    buffer = io.BytesIO()
    metadata = {"Date": None, **({"Description": description} if description else {})} if suffix == "svg" else None
    with matplotlib.rc_context({"svg.hashsalt": "uplvp", "svg.fonttype": "path"}):
        figure.savefig(buffer, format=suffix, dpi=dpi, metadata=metadata)
    return buffer.getvalue()


def figure_svg(figure: Figure) -> str:
    """The figure as an element of a page."""
    text = figure_bytes(figure, "svg").decode()
    return text[text.index("<svg") :]


def table_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Head and body of the table: an arm a row; the end, the number of runs, and evaluations that all share."""
    shown = _spread_out(comparison.common(), MOST_COLUMNS)
    head = ["arm", f"{comparison.metric} at the end", "runs"]
    head += [f"{comparison.metric} at {row[0].x:.4g} {comparison.axis}" for row in shown]
    head += [f"{comparison.axis} to the first arm's end"]
    body = []
    for index, arm in enumerate(comparison.arms):
        reached = comparison.reached(arm)
        cells = [arm.name, percent(arm.end), str(len(arm.runs)), *(percent(row[index]) for row in shown)]
        body.append([*cells, "-" if reached is None else f"{reached:.4g}"])
    return head, body


def settings_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Head and body of a second table: a setting a row, of those that the arms differ in; no row where they do not."""
    names = [arm.name for arm in comparison.arms]
    keys = list(comparison.arms[0].differences)
    return ["setting", *names], [[key, *(short(arm.differences[key]) for arm in comparison.arms)] for key in keys]


def percent(point: Point | None) -> str:
    """`23.5 (0.4)`: mean and, of several runs, deviation, in per cent; a dash where there is none."""
    if point is None:
        return "-"
    spread = "" if point.deviation is None else f" ({100 * point.deviation:.1f})"
    return f"{100 * point.mean:.1f}{spread}"


def markdown_table(comparison: Comparison) -> str:
    lines = [*_markdown_lines(*table_rows(comparison)), "", *caption(comparison)]
    head, body = settings_rows(comparison)
    lines += ["", "What the arms differ in:", "", *_markdown_lines(head, body)] if body else []
    return "\n".join(lines) + "\n"


def _markdown_lines(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    return [_markdown_line(head), _markdown_line(["---"] * len(head)), *map(_markdown_line, body)]


def _markdown_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def caption(comparison: Comparison) -> list[str]:
    """What the table shows, and the notes, a sentence each."""
    common = comparison.common()
    lines = [
        f"{spelled(comparison.metric, True)} in per cent: mean over the runs of an arm (standard deviation, n - 1). "
        "The end is that of the models that the runs left."
    ]
    if len(common) > MOST_COLUMNS:
        lines.append(f"{MOST_COLUMNS} of {len(common)} evaluations that all arms share; table.csv has all.")
    return lines + comparison.notes


def csv_table(comparison: Comparison) -> str:
    """A line an arm and evaluation, and one for its end: numbers from 0 to 1, values of the single runs by `;`."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["arm", "evaluation", "step", comparison.axis, "metric", "runs", "mean", "deviation", "values"])
    for arm in comparison.arms:
        points = [("step", point) for point in arm.points] + ([("end", arm.end)] if arm.end else [])
        for kind, point in points:
            values = ";".join(f"{value:.6f}" for value in point.values)
            spread = "" if point.deviation is None else f"{point.deviation:.6f}"
            numbers = [point.step, f"{point.x:.6g}", comparison.metric, len(point.values), f"{point.mean:.6f}", spread]
            writer.writerow([arm.name, kind, *numbers, values])
    return stream.getvalue()


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """Everything, for programs; numbers from 0 to 1."""
    return {
        "metric": comparison.metric,
        "axis": comparison.axis,
        "notes": comparison.notes,
        "arms": [
            {
                "name": arm.name,
                "differences": arm.differences,
                "runs": [{"folder": str(run.folder), "seed": run.seed} for run in arm.runs],
                "points": [_point(point) for point in arm.points],
                "end": arm.end and _point(arm.end),
                "reaches_first_end_at": comparison.reached(arm),
            }
            for arm in comparison.arms
        ],
    }


def _point(point: Point) -> dict[str, Any]:
    return {**vars(point), "mean": point.mean, "deviation": point.deviation}


def _spread_out(rows: Sequence[Any], most: int) -> list[Any]:
    """At most so many, evenly spread, first and last among them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(index * (len(rows) - 1) / (most - 1))] for index in range(most)]


def _page(comparison: Comparison, svg: str) -> str:
    from .pages import render

    head, body = table_rows(comparison)
    return render(
        "evaluation",
        "compare",
        metric=spelled(comparison.metric, True),
        head=head,
        body=body,
        caption=caption(comparison),
        settings=settings_rows(comparison),
        arms=comparison.arms,
        svg=svg[svg.index("<svg") :],
    )
