"""The thresholds of whatever shows instances: pipeline, endpoint, page, `uplvp predict`, reports and cards."""

from typing import Any

# Least score where a model's configuration has none (`default_threshold`), measured by scripts/measure_threshold.py:
# the table and the reason are in docs/inference.md.
SCORE_THRESHOLD = 0.5
# Least probability of a mask's pixels.
MASK_THRESHOLD = 0.5


def score_threshold(config: Any) -> float:
    """The least score at which instances of a model are shown: what was measured for it, else `SCORE_THRESHOLD`."""
    measured = getattr(config, "default_threshold", None)
    return SCORE_THRESHOLD if measured is None else float(measured)


def duplicate_iou(config: Any) -> float | None:
    """The IoU above which a worse instance of a class is left out, or None where all are kept."""
    return getattr(config, "duplicate_iou", None)
