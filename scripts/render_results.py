"""Writes the tables of README.md, docs/results.md and docs/labeling.md and the figures from the rows in docs/results.

Commands:

    python scripts/render_results.py             # rewrites the blocks between `<!-- rows: ... -->` and `<!-- end -->`
    python scripts/render_results.py --check     # changes nothing; exits with 1 where a document is not what rows give

A block is one of

    <!-- rows: headline -->                      all sets and segmenters, the arms of the papers' main claims
    <!-- rows: table SET SEGMENTER -->           arms against labels, AP / AP50
    <!-- rows: claims SET -->                    differences of the arms that the papers' claims name, and verdicts
    <!-- rows: ablation SET ARM -->              every arm against ARM, without a human label and fine-tuned
    <!-- rows: longer -->                        docs/results/animals7_500_steps.jsonl, an earlier comparison
    <!-- rows: examples -->                      docs/results/labels_from_examples.jsonl, names from few examples

SET is a file docs/results/SET.jsonl, rows that `uplvp benchmark` wrote.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

from safetensors.torch import load_file

from uplvp_hf.benchmark.ablation import ablation_table
from uplvp_hf.benchmark.claims import claims_table, judge
from uplvp_hf.benchmark.figures import curves_of, draw_activations, draw_bars, mean_text, results_table
from uplvp_hf.benchmark.rows import labels_text, read_rows, row_metric
from uplvp_hf.evaluation.compare_page import figure_bytes, plot_curves

ROOT = Path(__file__).parents[1]
RESULTS = Path("docs/results")
DOCUMENTS = ("README.md", "docs/results.md", "docs/labeling.md")
SETS = ("animals7", "balloon", "scenes", "knet_tuning", "finetuning_scenes", "finetuning_animals7")
SETS += ("kernels_scenes", "kernels_animals7", "pretraining_length", "teacher_scenes", "teacher_animals7")
SETS += ("scenes_icpc",)
IN_HEADLINE = {  # set -> (its name in tables, labels of the headline)
    "animals7": ("seven animals, photographs", 10),
    "balloon": ("balloons, photographs", 15),
    "scenes": ("synthetic scenes", 3),
}
SEGMENTERS = {"mask2former": "Mask2Former", "knet": "K-Net", "queryinst": "QueryInst"}
HEADLINE = {
    "scratch": "no pre-training",
    "scratch total": "no pre-training, as many steps in all",
    "full quarter": "pre-trained, a quarter of the fine-tuning steps",
    "full": "pre-trained",
}
_BLOCK = re.compile(r"(<!-- rows: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def load_rows(root: Path = ROOT) -> dict[str, list[dict]]:
    """The committed rows of every set that has some."""
    files = {name: root / RESULTS / f"{name}.jsonl" for name in SETS}
    return {name: read_rows(file) for name, file in files.items() if file.is_file()}


def places(rows: dict[str, list[dict]]):
    """(set, labels, segmenter, rows of the headline's arms there), in the order of the documents."""
    for name, (_, count) in IN_HEADLINE.items():
        for segmenter in SEGMENTERS:
            own = [row for row in rows.get(name, ()) if row["segmenter"] == segmenter]
            chosen = [row for row in own if row["labels_per_class"] == count and row["arm"] in HEADLINE]
            if chosen:
                yield name, count, segmenter, chosen


def headline_table(rows: dict[str, list[dict]]) -> str:
    """Markdown: mask AP in per cent, mean and deviation over seeds."""
    lines = ["| data, labels | segmenter | " + " | ".join(HEADLINE.values()) + " |", "|---|---" + "|---:" * 4 + "|"]
    for name, count, segmenter, chosen in places(rows):
        cells = [mean_text([row for row in chosen if row["arm"] == arm], "AP") for arm in HEADLINE]
        place = f"{IN_HEADLINE[name][0]}, {labels_text(count)}"
        lines.append(f"| {place} | {SEGMENTERS[segmenter]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_headline(rows: dict[str, list[dict]]):
    """AP against fine-tuning steps, without and with pre-training, a panel for each set and segmenter."""
    from matplotlib.figure import Figure

    panels = list(places(rows))
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(3.3 * columns, 2.9 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, (name, _, segmenter, chosen) in zip(grid, panels, strict=False):
        two = [{**row, "arm": HEADLINE[row["arm"]]} for row in chosen if row["arm"] in ("scratch", "full")]
        plot_curves(axes, curves_of(two))
        axes.set_title(f"{SEGMENTERS[segmenter]}, {IN_HEADLINE[name][0]}", fontsize=8)
        axes.legend(fontsize=7, loc="lower right")
        axes.set_xlabel("fine-tuning steps")
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    return figure


def figures(rows: dict[str, list[dict]]) -> dict[str, bytes]:
    """File in docs/results -> .svg. Its description holds the numbers that it shows."""
    numbers = [
        [name, segmenter, row["arm"], row["seed"], row["curve"]]
        for name, _, segmenter, chosen in places(rows)
        for row in chosen
        if row["arm"] in ("scratch", "full")
    ]
    found = {"headline.svg": figure_bytes(draw_headline(rows), "svg", json.dumps(numbers))}
    for segmenter in ("mask2former", "knet"):
        own = [row for row in rows.get("animals7", ()) if row["segmenter"] == segmenter]
        own = [row for row in own if row["labels_per_class"] in (0, 10) and not row["class_agnostic"]]
        if own:
            numbers = [[row["arm"], row["seed"], row["metrics"]["AP"]] for row in own]
            bars = draw_bars(own, f"{SEGMENTERS[segmenter]}, seven animals, 10 labels a class")
            found[f"arms_{segmenter}.svg"] = figure_bytes(bars, "svg", json.dumps(numbers))
    return found


def longer_table() -> str:
    """Markdown: arms against fine-tuning steps, AP / AP50 in per cent, mean and deviation over seeds."""
    rows = [json.loads(line) for line in (ROOT / RESULTS / "animals7_500_steps.jsonl").read_text().splitlines()]
    steps = ("100", "250", "500")
    lines = [f"| arm | {' | '.join(f'{step} steps' for step in steps)} |", "|---|---:|---:|---:|"]
    for arm in ("scratch", "agnostic", "named"):
        own = [row["evaluations"] for row in rows if row["arm"] == arm]
        cells = []
        for step in steps:
            pair = ([100 * one[step][key] for one in own] for key in ("AP", "AP50"))
            cells.append(
                " / ".join(f"{statistics.mean(values):.1f} ({statistics.stdev(values):.1f})" for values in pair)
            )
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def examples_table() -> str:
    """Markdown: what few examples make of true masks, shares in per cent, mean and deviation over draws."""
    rows = [json.loads(line) for line in (ROOT / RESULTS / "labels_from_examples.jsonl").read_text().splitlines()]
    columns = ("right", "right_by_default", "kept", "right_of_kept", "ground_unnamed", "ground_dropped")
    lines = [
        "| set | examples | named rightly | by default | sure of | right of these | ground unnamed | ground dropped |"
    ]
    lines.append("|---|---:" + "|---:" * len(columns) + "|")
    for row in rows:
        means = [(row[name], row[f"{name}_sd"]) for name in columns]
        cells = ["-" if mean is None else f"{100 * mean:.1f} ({100 * deviation:.1f})" for mean, deviation in means]
        name = row["set"] if not row["split"] else f"{row['set']}, {row['split'].replace(':', ' to ')}"
        lines.append(f"| {name} | {row['examples']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def query_figures(root: Path = ROOT) -> dict[str, bytes]:
    """File in docs/results -> .png: mean masks of the queries after fine-tuning, an arm a line.

    From query_maps.safetensors: (Q, 32, 32) of 0..255, the `query_maps` that runs wrote, by SET/SEGMENTER/ARM.
    """
    file, found = root / RESULTS / "query_maps.safetensors", {}
    for key, maps in (load_file(file) if file.is_file() else {}).items():
        name, segmenter, arm = key.split("/")
        found.setdefault(f"queries_{name}_{segmenter}.png", {})[arm] = maps
    order = ("scratch", "pseudo", "prompts", "full")
    arranged = {name: {arm: arms[arm] for arm in sorted(arms, key=order.index)} for name, arms in sorted(found.items())}
    return {name: figure_bytes(draw_activations(arms), "png", dpi=64) for name, arms in arranged.items()}


def block(words: list[str], rows: dict[str, list[dict]]) -> str:
    """The content of a block; raises ValueError for words that name none."""
    if words == ["headline"]:
        return headline_table(rows)
    if words == ["longer"]:
        return longer_table()
    if words == ["examples"]:
        return examples_table()
    if len(words) == 3 and words[0] == "table" and words[1] in rows:
        return results_table(rows[words[1]], words[2])
    if len(words) == 3 and words[0] == "ablation" and words[1] in rows:
        return ablation_table(rows[words[1]], words[2])
    if len(words) == 2 and words[0] == "claims" and words[1] in rows:
        return claims_table(judge(rows[words[1]]), row_metric(rows[words[1]]))
    raise ValueError(f"no block `{' '.join(words)}`, see the head of {Path(__file__).name}")


def rendered(text: str, rows: dict[str, list[dict]]) -> str:
    """A document with its blocks as the rows give them."""
    return _BLOCK.sub(lambda match: f"{match[1]}\n{block(match[2].split(), rows)}\n\n{match[3]}", text)


def same_figure(ours: bytes, theirs: bytes) -> bool:
    """Whether two figures show the same: to the byte, or of another matplotlib but (.svg) with the same numbers."""
    return ours == theirs or (_described(ours) == _described(theirs) and _version(ours) != _version(theirs))


def _described(figure: bytes) -> bytes:
    found = re.search(rb"<dc:description>(.*?)</dc:description>", figure, re.DOTALL)
    return found[1] if found else b""


def _version(figure: bytes) -> bytes:
    return re.search(rb"Matplotlib v(?:ersion ?)?([\d.]+)", figure)[1]


def stale(root: Path = ROOT) -> list[str]:
    """Documents and figures that are not what the rows give."""
    rows = load_rows(root)
    found = [name for name in DOCUMENTS if rendered((root / name).read_text(), rows) != (root / name).read_text()]
    for name, content in {**figures(rows), **query_figures(root)}.items():
        file = root / RESULTS / name
        if not file.is_file() or not same_figure(content, file.read_bytes()):
            found.append(str(RESULTS / name))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    if parser.parse_args().check:
        old = stale()
        print(*old, f"{len(old)} to be rendered again", sep="\n")
        return int(bool(old))
    rows = load_rows()
    for name in DOCUMENTS:
        (ROOT / name).write_text(rendered((ROOT / name).read_text(), rows))
    for name, content in {**figures(rows), **query_figures()}.items():
        (ROOT / RESULTS / name).write_bytes(content)
    print(f"{', '.join(DOCUMENTS)} and figures rendered from {sum(map(len, rows.values()))} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
