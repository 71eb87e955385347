"""The score threshold at which trained models find instances best: F1 by threshold, over several models.

Commands:

    python scripts/measure_threshold.py runs/finetune runs/scratch --data photos/val.json
    python scripts/measure_threshold.py runs/benchmark/runs/*/*/*

Every model is run on --data (anything that training reads), or where that is not given on the validation images of
its own training. Detections are matched with annotations of their class at an IoU of .5, best score first. At a
threshold t, F1 is 2 x matches / (detections that score at least t + annotations).

Columns: the best threshold of a model and its F1 there, then its F1 at fixed thresholds. The last line has the
threshold of the largest mean F1 over all models, which `models/thresholds.py` holds, and how much F1 the models lose to
their own best ones there.
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
    arguments = parser.parse_args(argv)
    rows = []
    for folder in arguments.models:
        rows.append(("/".join(Path(folder).parts[-2:]), measure(Path(folder), arguments.data)))
        print(f"{folder}: {rows[-1][1]}", file=sys.stderr, flush=True)
    print(table(rows))
    return 0


def measure(folder: Path, data: str | None) -> list[float]:
    """F1 at every threshold of `GRID`."""
    from uplvp_hf.data import load_dataset_rows
    from uplvp_hf.evaluation import load_segmenter

    if data is not None:
        dataset = load_dataset_rows(data)
    else:
        settings = json.loads((folder / "training_summary.json").read_text(encoding="utf-8"))["settings"]["data"]
        names = {"images": "val_images", "split": "val_split", "format": "val_format"}
        dataset = load_dataset_rows(settings["val"], **{key: settings.get(name) for key, name in names.items()})
    return f1_by_threshold(*load_segmenter(str(folder)), dataset)


def f1_by_threshold(model: Any, processor: Any, dataset: Any) -> list[float]:
    import numpy as np

    from uplvp_hf.evaluation import as_prediction, as_reference, match_category_ids, predict_dataset
    from uplvp_hf.evaluation.coco_map import compare

    ids = match_category_ids(model.config, dataset)
    scores, hits, annotations = [], [], 0
    for row, result in predict_dataset(model, processor, dataset, progress=False):
        image = compare(as_prediction(row, result, ids), as_reference(row))
        ious = np.where(image.labels[:, None] == image.gt_labels, image.ious, 0.0)[:, ~image.gt_crowd]
        annotations += ious.shape[1]
        for detection in np.argsort(-image.scores, kind="stable"):
            best = int(ious[detection].argmax()) if ious.shape[1] else -1
            hit = best >= 0 and ious[detection, best] >= 0.5
            if hit:
                ious[:, best] = 0.0  # an annotation is found once
            scores.append(image.scores[detection])
            hits.append(hit)
    kept = np.asarray(scores)[None] >= np.asarray(GRID)[:, None]  # (thresholds, detections)
    return (2 * (kept & np.asarray(hits)).sum(1) / (kept.sum(1) + annotations)).round(4).tolist()


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
