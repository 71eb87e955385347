"""How well examples name true masks: many draws of few examples, from features that are computed once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .examples import Described
from .prototypes import Calibration, Prototypes


def draw_examples(labels: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Indices of `count` examples of each class of (N,) labels, or of all of a class that has fewer."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in range(int(labels.max()) + 1):
        members = (labels == label).nonzero()[:, 0]
        chosen.append(members[torch.randperm(len(members), generator=generator)[:count]])
    return torch.cat(chosen)


def naming_quality(
    pool: Described, test: Described, count: int, seed: int, confidence: float = 0.5
) -> dict[str, float]:
    """What `count` examples a class, drawn from `pool`, make of the masks of `test`; classes are matched by name.

    Returns shares of the test's true masks: `right` with every mask named, `right_by_default` where masks that are like
    no example stay unnamed and count as wrong, `kept` with at least `confidence`, and of these `right_of_kept`; and
    `ground_dropped`, the share of places without an object that are unnamed or below `confidence`.
    """
    chosen = draw_examples(pool.labels, count, seed)
    around = torch.isin(pool.ground_groups, pool.groups[chosen])  # the ground of the drawn images alone
    prototypes = Prototypes(
        pool.vectors[chosen],
        pool.labels[chosen],
        pool.groups[chosen],
        pool.ground[around],
        pool.ground_groups[around],
    )
    calibration = prototypes.calibrate()
    truth = torch.tensor([pool.names.index(test.names[label]) for label in test.labels.tolist()])
    every = Calibration(calibration.temperature, calibration.bias, floor=-1.0)
    right = prototypes.name(test.vectors, every)[0] == truth
    labels, confidences = prototypes.name(test.vectors, calibration)
    kept = (labels >= 0) & (confidences >= confidence)
    ground_labels, ground_confidences = prototypes.name(test.ground, calibration)
    dropped = (ground_labels < 0) | (ground_confidences < confidence)
    return {
        "right": _share(right),
        "right_by_default": _share(labels == truth),
        "kept": _share(kept),
        "right_of_kept": _share((labels == truth)[kept]),
        "ground_dropped": _share(dropped),
    }


def mean_and_deviation(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of several draws: {name: mean, name_sd: standard deviation}."""
    result = {}
    for name in rows[0]:
        values = torch.tensor([row[name] for row in rows], dtype=torch.float64)
        result[name] = round(float(values.nanmean()), 4)
        result[f"{name}_sd"] = round(float(values[~values.isnan()].std()), 4)
    return result


def _share(values: torch.Tensor) -> float:
    return float(values.float().mean()) if len(values) else float("nan")
