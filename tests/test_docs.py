"""Numbers in the documents are those of the committed rows."""

import json
import statistics
from pathlib import Path

ROOT = Path(__file__).parents[1]


# docs/labeling.md: rows that scripts/benchmark_label_quality.py wrote.
SEEDS = (0, 1, 2)
SCENES = "synthetic scenes"
KEYS = ("mean_best_iou", "recall", "precision", "ap50", "class_accuracy", "ap50_named")
IMAGE_KEYS = ("mean_best_iou", "recall", "precision", "ap50", "proposals_per_image")


def read_rows():
    """{(set, seed, source): row}"""
    lines = (ROOT / "docs/results/labels.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    keyed = {(row["set"], row["seed"], row["source"]): row for row in rows}
    assert len(keyed) == len(rows)
    return keyed


def share(value):
    """.759, 1.000, -"""
    return "-" if value is None else f"{value:.3f}".removeprefix("0")


def plain(source):
    return source.removesuffix(", calibrated")


def table_lines(rows):
    """Every line of the tables that holds numbers."""
    scenes = {(seed, source): row for (name, seed, source), row in rows.items() if name == SCENES}
    sources = list(dict.fromkeys(source for _, source in scenes))
    repeated = [source for source in sources if all((seed, source) in scenes for seed in SEEDS)]
    lines = []
    for source in sources:  # recipes, with both kinds of evidence
        if source.endswith(", calibrated"):
            pair = [scenes[0, source], scenes[0, source.replace("calibrated", "background")]]
            shown = ("mean_best_iou", "recall", "precision", "class_accuracy")
            cells = [" / ".join(share(row[key]) for key in shown) for row in pair]
            lines.append(f"| {plain(source)} | {' | '.join(cells)} |")
    for source in repeated:  # three sets of scenes
        if not source.endswith(", background"):
            values = {key: [scenes[seed, source][key] for seed in SEEDS] for key in KEYS}
            cells = [f"{share(statistics.mean(some))} ({share(statistics.stdev(some))})" for some in values.values()]
            lines.append(f"| {plain(source)} | {' | '.join(cells)} |")
    for source in sources:  # options that were tried on one set
        if source not in repeated and not source.endswith((", calibrated", ", background")):
            lines.append(f"| {source} | {' | '.join(share(scenes[0, source][key]) for key in KEYS)} |")
    for (name, _, source), row in rows.items():  # images
        if name == "animals7":
            pair = [row, rows["balloon", 0, source]]
            cells = [" / ".join(share(one[key]) for key in IMAGE_KEYS[:-1]) for one in pair]
            masks = " / ".join(f"{one['proposals_per_image']:.1f}" for one in pair)
            lines.append(f"| {source} | {' | '.join(cells)} | {masks} |")
    return lines


def test_tables_are_those_of_the_rows():
    text = (ROOT / "docs/labeling.md").read_text().split("\n## Measured\n")[1].replace("**", "").replace("*", "")
    shown = [line for line in text.splitlines() if line.startswith("| ") and "." in line.split("|")[2]]
    assert shown == table_lines(read_rows()) and len(shown) > 40


def test_rows_are_of_the_sources_that_the_script_has(load_script):
    quality = load_script("benchmark_label_quality")
    rows = read_rows()
    found = {(name, source) for name, _, source in rows}
    recipes = [recipe for recipe in quality.RECIPES if recipe != "proxy"]  # which needs a second backbone
    assert {(SCENES, f"{recipe}, {kind}") for recipe in recipes for kind in ("calibrated", "background")} <= found
    assert {(SCENES, f"naclip, {option}") for option in quality.CUTTING} <= found
    assert {(name, source) for name in ("animals7", "balloon") for source in quality.image_sources(None)} <= found
    keys = {"set", "split", "images", "backbone", "seed", "source", *quality.KEYS, *quality.NAMED_KEYS}
    assert all(set(row) <= keys and row["images"] in (61, 100) for row in rows.values())


# docs/results.md: the log of the pilot run of a teacher.


def test_the_table_of_the_pilot_is_that_of_its_log():
    lines = [json.loads(line) for line in (ROOT / "docs/results/teacher_pilot.jsonl").read_text().splitlines()]
    logged = {line["step"]: line for line in lines if "pseudo_instances" in line}
    text = (ROOT / "docs/results.md").read_text()
    rows = {"pseudo instances an image": ("instances", 2), "their precision, hidden labels": ("precision", 2)}
    rows |= {"their recall": ("recall", 2), "half believed, an image": ("unsure", 1)}
    for name, (key, digits) in rows.items():
        cells = [f"{logged[step][f'pseudo_{key}']:.{digits}f}" for step in (140, 200, 260, 320, 380)]
        assert f"| {name} | {' | '.join(cells)} |" in text
    scores = [f"{100 * line['val_AP']:.1f} after {line['step']}" for line in lines if "val_AP" in line]
    assert f"The AP was {scores[0]} steps, {', '.join(scores[1:])}." in text
