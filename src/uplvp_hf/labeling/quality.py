"""How good proposals are, against true instances: the numbers that tell mask sources apart before any training."""

from __future__ import annotations

import os

import numpy as np

from ..data.dataset import InstanceDataset, Row
from ..data.errors import DataError
from ..data.rle import mask_iou, segmentation_to_rle


def _row_keys(predicted: InstanceDataset, true: InstanceDataset) -> tuple[list, list]:
    """What both sides call their pictures: the image ids, or the file names where no id is shared."""
    ids = [row["image_id"] for row in predicted.rows], [row["image_id"] for row in true.rows]
    if set(ids[0]) & set(ids[1]):
        return ids
    return tuple([os.path.basename(row["file_name"]) for row in dataset.rows] for dataset in (predicted, true))


def _instances(row: Row, names: dict[int, str], crowd: bool) -> tuple[list[dict], list[str]]:
    objects = row["objects"]
    kept = [k for k in range(len(objects["segmentation"])) if crowd or not objects["iscrowd"][k]]
    rles = [segmentation_to_rle(objects["segmentation"][k], row["height"], row["width"]) for k in kept]
    return rles, [names[objects["category_id"][k]] for k in kept]


def proposal_quality(predicted: InstanceDataset, true: InstanceDataset, threshold: float = 0.5) -> dict[str, float]:
    """Quality of pseudo masks over the pictures that both sets hold.

    Returns, class-agnostic and (keys ending in `_named`) counting only pairs of equal class name:
    `mean_best_iou` over the true instances, `recall` = share of true instances, `precision` = share of proposals, whose
    best IoU reaches `threshold` (several proposals may share an instance); also `pictures`, `instances`, `proposals`,
    `proposals_per_picture`. Crowd regions of `true` are left out. No true instance gives recall and IoU NaN, no
    proposal gives precision NaN. Raises DataError when the sets share no picture.
    """
    predicted_keys, true_keys = _row_keys(predicted, true)
    by_key = dict(zip(predicted_keys, predicted.rows))
    names = [{category["id"]: category["name"] for category in dataset.categories} for dataset in (predicted, true)]
    best: dict[str, list[np.ndarray]] = {key: [] for key in ("true", "proposal", "true_named", "proposal_named")}
    pictures = 0
    for key, row in zip(true_keys, true.rows):
        if key not in by_key:
            continue
        pictures += 1
        rles, labels = _instances(by_key[key], names[0], crowd=True)
        true_rles, true_labels = _instances(row, names[1], crowd=False)
        overlap = np.asarray(mask_iou(rles, true_rles)).reshape(len(rles), len(true_rles))
        same = np.array([[a == b for b in true_labels] for a in labels], dtype=bool).reshape(overlap.shape)
        for suffix, matrix in (("", overlap), ("_named", overlap * same)):
            best["true" + suffix].append(matrix.max(axis=0, initial=0.0))
            best["proposal" + suffix].append(matrix.max(axis=1, initial=0.0))
    if not pictures:
        raise DataError("the two sets share neither image ids nor file names", file=predicted.name)
    values = {key: np.concatenate(parts) for key, parts in best.items()}
    result: dict[str, float] = {
        "pictures": pictures,
        "instances": len(values["true"]),
        "proposals": len(values["proposal"]),
    }
    result["proposals_per_picture"] = result["proposals"] / pictures
    for suffix in ("", "_named"):
        result["mean_best_iou" + suffix] = _mean(values["true" + suffix])
        result["recall" + suffix] = _mean(values["true" + suffix] >= threshold)
        result["precision" + suffix] = _mean(values["proposal" + suffix] >= threshold)
    return result


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")
