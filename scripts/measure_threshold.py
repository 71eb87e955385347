"""The score threshold at which trained models find instances best: F1 by threshold, over several models; and whether
leaving out duplicates helps.

Commands:

    python scripts/measure_threshold.py runs/finetune runs/scratch --data photos/val.json
    python scripts/measure_threshold.py runs/benchmark/runs/*/*/*
    python scripts/measure_threshold.py runs/*/ --data photos/val.json --duplicates 0.5 0.7 0.9

Every model is run on --data (anything that training reads), or where that is not given on the validation images of
its own training. Detections are matched with annotations of their class at an IoU of .5, best score first. At a
threshold t, F1 is 2 x matches / (detections that score at least t + annotations).

Columns: the best threshold of a model and its F1 there, then its F1 at fixed thresholds. The last line has the
threshold of the largest mean F1 over all models, which `models/thresholds.py` holds, and how much F1 the models lose to
their own best ones there. With --duplicates a second table has AP, AP50 and best F1 without and with the worse one of
two instances of a class left out whose masks have a larger IoU (`duplicate_iou` of a model's configuration).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

GRID = [round(0.05 * step, 2) for step in range(1, 20)]
SHOWN = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.9)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL_DIR", help="folder of a trained model")
    parser.add_argument("--data", help="labeled images (default: `data.val` of each training)")
    parser.add_argument("--duplicates", type=float, nargs="+", default=[], metavar="IOU", help="to compare with all")
    arguments = parser.parse_args(argv)
    rows, kept = [], []
    for folder in arguments.models:
        name = "/".join(Path(folder).parts[-2:])
        every = measure(Path(folder), arguments.data, [1.0, *arguments.duplicates])
        rows.append((name, [every[0]["findings"]["curve"]["f1"][round(100 * threshold)] for threshold in GRID]))
        kept.append((name, every))
        print(f"{folder}: {rows[-1][1]}", file=sys.stderr, flush=True)
    print(table(rows))
    if arguments.duplicates:
        print("\n" + duplicates_table(kept, ["all", *(f"IoU {iou:g}" for iou in arguments.duplicates)]))
    return 0


def measure(folder: Path, data: str | None, duplicates: Sequence[float]) -> list[dict[str, Any]]:
    """The metrics of a model with duplicates above each of these IoUs left out; predicted once."""
    from uplvp_hf.data import load_dataset_rows
    from uplvp_hf.evaluation import evaluate_model, load_segmenter, predict_dataset

    if data is not None:
        dataset = load_dataset_rows(data)
    else:
        settings = json.loads((folder / "training_summary.json").read_text(encoding="utf-8"))["settings"]["data"]
        names = {"images": "val_images", "split": "val_split", "format": "val_format"}
        dataset = load_dataset_rows(settings["val"], **{key: settings.get(name) for key, name in names.items()})
    model, processor = load_segmenter(str(folder))
    agnostic = list(model.config.id2label.values()) == ["object"]
    pairs = list(predict_dataset(model, processor, dataset, progress=False, duplicates=1.0))
    return [
        evaluate_model(
            model, processor, dataset, class_agnostic=agnostic, pairs=[(row, without(one, iou)) for row, one in pairs]
        )
        for iou in duplicates
    ]


def without(result: dict[str, Any], most: float) -> dict[str, Any]:
    """A result without instances whose mask has an IoU above `most` with a better one of their class."""
    import torch

    from uplvp_hf.models.masks import mask_iou
    from uplvp_hf.models.postprocessing_uplvp import first_of_duplicates

    if most >= 1:
        return result
    kept = []
    for label in result["labels"].unique():
        own = torch.nonzero(result["labels"] == label).flatten().tolist()
        masks = [result["rle"][place] for place in own]
        kept += [own[place] for place in first_of_duplicates(mask_iou(masks, masks), most)]
    kept.sort()
    chosen = {name: result[name][kept] for name in ("scores", "labels", "boxes")}
    return {**chosen, "rle": [result["rle"][place] for place in kept]}


def duplicates_table(models: Sequence[tuple[str, list[dict[str, Any]]]], names: Sequence[str]) -> str:
    """Markdown: AP / AP50 / best F1 in per cent by model and by what is left out, and their means."""
    lines = ["| model | " + " | ".join(names) + " |", "|---" + "|---:" * len(names) + "|"]

    def numbers(metrics: dict[str, Any]) -> tuple[float, float, float]:
        return 100 * (metrics["AP"] or 0), 100 * (metrics["AP50"] or 0), 100 * metrics["findings"]["at"][-1]["f1"]

    found = [(name, [numbers(metrics) for metrics in every]) for name, every in models]
    means = [tuple(sum(own[k][n] for _, own in found) / len(found) for n in range(3)) for k in range(len(names))]
    for name, own in [*found, (f"mean of {len(found)} models", means)]:
        lines.append(f"| {name} | " + " | ".join(" / ".join(f"{value:.1f}" for value in cell) for cell in own) + " |")
    return "\n".join(lines)


def table(rows: Sequence[tuple[str, list[float]]]) -> str:
    """Markdown: F1 in per cent by model and threshold."""
    head = ["model", "best threshold", "F1 there", *(f"at {threshold}" for threshold in SHOWN)]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    mean = [sum(f1[k] for _, f1 in rows) / len(rows) for k in range(len(GRID))]
    for name, f1 in [*rows, (f"mean of {len(rows)} models", mean)]:
        cells = [name, str(GRID[f1.index(max(f1))]), f"{100 * max(f1):.1f}"]
        lines.append("| " + " | ".join([*cells, *(f"{100 * f1[GRID.index(one)]:.1f}" for one in SHOWN)]) + " |")
    best = mean.index(max(mean))
    lost = [max(f1) - f1[best] for _, f1 in rows]
    said = f"At {GRID[best]} a model loses {100 * sum(lost) / len(lost):.1f} points of F1 to its own best threshold on "
    return "\n".join([*lines, "", f"{said}average, {100 * max(lost):.1f} at most."])


if __name__ == "__main__":
    sys.exit(main())
