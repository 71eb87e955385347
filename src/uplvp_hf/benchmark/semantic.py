"""What a benchmark knows of semantic segmenters beside their mIoU: controls of every run, and overlays.

Every image gets another image's prompt: where mIoU does not fall, the prompt made from the image is not used. The score
map alone, without pyramid and head, says how far patches and texts lie in one space: through a map that says nothing no
form of prompt can show itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data import InstanceDataset
from ..data.semantic import label_map, semantic_view
from ..evaluation.semantic import evaluate_semantic, load_semantic, segment_dataset
from ..evaluation.visualize import label_map_uri

METRICS = ("mIoU", "mAcc", "aAcc")
SWAPPED, SCORE_MAP = "another image's prompt", "score map alone"
_CONTROLS = {  # key of a row -> (what tables call it, options of the evaluation)
    "swapped": (SWAPPED, {"swap_prompts": True}),
    "score_map": (SCORE_MAP, {"score_maps": True}),
    "score_map_swapped": (f"{SCORE_MAP}, {SWAPPED}", {"score_maps": True, "swap_prompts": True}),
}
Rows = Sequence[dict[str, Any]]


def control_metrics(folder: Path, val: InstanceDataset) -> dict[str, dict[str, float | None] | None]:
    """The numbers of the controls of a trained model; None where its texts do not depend on the image, or it has
    none."""
    model, processor = load_semantic(str(folder))
    own_texts = model.config.uses_image or model.config.uses_decoder
    found: dict[str, dict[str, float | None] | None] = dict.fromkeys(_CONTROLS)
    for name, (_, options) in _CONTROLS.items():
        if own_texts if "swap_prompts" in options else model.config.uses_text:
            metrics = evaluate_semantic(model, processor, val, progress=False, **options)
            found[name] = {key: None if metrics[key] is None else round(metrics[key], 5) for key in METRICS}
    return found


def with_controls(rows: Rows) -> list[dict[str, Any]]:
    """The rows, and every control of a run as a row of an arm of its own (`static, score map alone`), for claims."""
    found = []
    for row in rows:
        own = {title: row.get(key) for key, (title, _) in _CONTROLS.items()}
        found += [row, *({**row, "arm": f"{row['arm']}, {name}", "metrics": one} for name, one in own.items() if one)]
    return found


def control_columns(rows: Rows) -> list[tuple[str, str]]:
    """(key of a row, what the column is called) of the controls that some of the rows have."""
    return [(key, title) for key, (title, _) in _CONTROLS.items() if any(row.get(key) for row in rows)]


def semantic_pairs(folder: str, val: InstanceDataset, count: int, side: int) -> list[list[str]]:
    """Overlays of a model's classes and of the true ones, side by side, of the first images of `val`."""
    model, processor = load_semantic(folder)
    shown = semantic_view(val.subset(range(min(count, len(val)))))
    pairs = []
    for index, _, found in segment_dataset(model, processor, shown, progress=False):
        true = label_map(shown, index)
        image, count = shown.load_image(index), len(shown.categories)
        pairs.append([label_map_uri(image, one, count, side) for one in (found, true)])
    return pairs


__all__ = ["METRICS", "SCORE_MAP", "SWAPPED", "control_columns", "control_metrics", "semantic_pairs", "with_controls"]
