"""How good proposals are, against true instances: the numbers that tell mask sources apart before any training."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from ..data.dataset import InstanceDataset, Row
from ..data.errors import DataError
from ..models.masks import mask_iou, segmentation_to_rle


def row_keys(predicted: InstanceDataset, true: InstanceDataset) -> tuple[list, list]:
    """What both sides call their images: the image ids, or the file names where no id is shared."""
    ids = [row["image_id"] for row in predicted.rows], [row["image_id"] for row in true.rows]
    if set(ids[0]) & set(ids[1]):
        return ids
    return tuple([os.path.basename(row["file_name"]) for row in dataset.rows] for dataset in (predicted, true))


def _instances(row: Row, names: dict[int, str], crowd: bool) -> tuple[list[dict], list[str]]:
    objects = row["objects"]
    kept = [k for k in range(len(objects["segmentation"])) if crowd or not objects["iscrowd"][k]]
    rles = [segmentation_to_rle(objects["segmentation"][k], row["height"], row["width"]) for k in kept]
    return rles, [names[objects["category_id"][k]] for k in kept]


def proposal_quality(
    predicted: InstanceDataset, true: InstanceDataset, threshold: float = 0.5, average_precision: bool = False
) -> dict[str, float]:
    """Quality of pseudo masks over the images that both sets hold.

    Returns, class-agnostic and (keys ending in `_named`) counting only pairs of equal class name:
    `mean_best_iou` over the true instances, `mean_best_iou_of_proposals` over the proposals, `recall` = share of true
    instances, `precision` = share of proposals, whose
    best IoU reaches `threshold` (several proposals may share an instance); `class_accuracy` = among the proposals that
    reach it, the share that is named like the instance they cover best; also `images`, `instances`, `proposals`,
    `proposals_per_image`. With `average_precision` also `ap` and `ap50`, COCO's mask AP in 0 to 1 with the proposals'
    scores (`_named`: the mean over the classes of `true`); crowd regions are ignored there as COCO does.

    Crowd regions of `true` are left out of everything else. What has nothing to be a share of is NaN: recall, IoU and
    AP without true instances, precision without proposals, accuracy without covered instances. Raises DataError when
    the sets share no image.
    """
    pairs, names = _shared_rows(predicted, true), [_names(dataset) for dataset in (predicted, true)]
    best: dict[str, list[np.ndarray]] = {key: [] for key in ("true", "proposal", "true_named", "proposal_named")}
    right: list[np.ndarray] = []
    for ours, theirs in pairs:
        overlap, same = _overlap(ours, theirs, *names)
        for suffix, matrix in (("", overlap), ("_named", overlap * same)):
            best["true" + suffix].append(matrix.max(axis=0, initial=0.0))
            best["proposal" + suffix].append(matrix.max(axis=1, initial=0.0))
        if overlap.size:
            covers = overlap.max(axis=1) >= threshold
            right.append(same[np.arange(len(overlap)), overlap.argmax(axis=1)][covers])
    values = {key: np.concatenate(parts) for key, parts in best.items()}
    result: dict[str, float] = {
        "images": len(pairs),
        "instances": len(values["true"]),
        "proposals": len(values["proposal"]),
    }
    result["proposals_per_image"] = result["proposals"] / len(pairs)
    for suffix in ("", "_named"):
        result["mean_best_iou" + suffix] = _mean(values["true" + suffix])
        result["mean_best_iou_of_proposals" + suffix] = _mean(values["proposal" + suffix])
        result["recall" + suffix] = _mean(values["true" + suffix] >= threshold)
        result["precision" + suffix] = _mean(values["proposal" + suffix] >= threshold)
    result["class_accuracy"] = _mean(np.concatenate(right)) if right else float("nan")
    return result | (_average_precision(pairs, *names) if average_precision else {})


def precision_by_score(
    predicted: InstanceDataset, true: InstanceDataset, groups: int = 4, threshold: float = 0.5
) -> list[dict[str, float]]:
    """Whether the scores of pseudo masks tell good ones from bad ones: groups of equal size from the lowest scores to
    the highest, each with its `least` and `most` score, `proposals`, and `precision`, `precision_named` as
    `proposal_quality` counts them, over the images that both sets hold. [] where there are no scores, or one alone.
    """
    names = [_names(dataset) for dataset in (predicted, true)]
    found: list[tuple[float, bool, bool]] = []
    for ours, theirs in _shared_rows(predicted, true):
        overlap, same = _overlap(ours, theirs, *names)
        scores = ours["objects"].get("score") or []
        for score, row, named in zip(scores, overlap, overlap * same, strict=False):
            found.append((score, row.max(initial=0.0) >= threshold, named.max(initial=0.0) >= threshold))
    found.sort(key=lambda one: one[0])
    if len(found) < groups or found[0][0] == found[-1][0]:
        return []
    return [
        {
            "least": found[part[0]][0],
            "most": found[part[-1]][0],
            "proposals": len(part),
            "precision": _mean(np.array([found[k][1] for k in part])),
            "precision_named": _mean(np.array([found[k][2] for k in part])),
        }
        for part in np.array_split(np.arange(len(found)), groups)
    ]


def _shared_rows(predicted: InstanceDataset, true: InstanceDataset) -> list[tuple[Row, Row]]:
    """Predicted and true row of every image that both sets hold. Raises DataError for none."""
    predicted_keys, true_keys = row_keys(predicted, true)
    by_key = dict(zip(predicted_keys, predicted.rows))
    pairs = [(by_key[key], row) for key, row in zip(true_keys, true.rows) if key in by_key]
    if not pairs:
        raise DataError("the two sets share neither image ids nor file names", file=predicted.name)
    return pairs


def _names(dataset: InstanceDataset) -> dict[int, str]:
    return {category["id"]: category["name"] for category in dataset.categories}


def _overlap(
    ours: Row, theirs: Row, names: dict[int, str], true_names: dict[int, str]
) -> tuple[np.ndarray, np.ndarray]:
    """(proposals, true instances): IoU, and whether the names are equal."""
    rles, labels = _instances(ours, names, crowd=True)
    true_rles, true_labels = _instances(theirs, true_names, crowd=False)
    overlap = np.asarray(mask_iou(rles, true_rles)).reshape(len(rles), len(true_rles))
    same = np.array([[a == b for b in true_labels] for a in labels], dtype=bool).reshape(overlap.shape)
    return overlap, same


def _average_precision(
    pairs: Sequence[tuple[Row, Row]], names: dict[int, str], true_names: dict[int, str]
) -> dict[str, float]:
    """COCO's mask AP, class-agnostic and by class name."""
    from ..evaluation import CocoMaskMap  # labeling needs it for this report alone

    ids = {name: k for k, name in enumerate(sorted({*names.values(), *true_names.values()}))}
    result = {}
    for suffix, agnostic in (("", True), ("_named", False)):
        metric = CocoMaskMap()
        for number, (ours, theirs) in enumerate(pairs):
            found, truth = ours["objects"], theirs["objects"]
            rles, labels = _instances(ours, names, crowd=True)
            true_rles, true_labels = _instances(theirs, true_names, crowd=True)
            prediction = {"image_id": number, "rle": rles, "labels": [ids[name] for name in labels]}
            prediction["scores"] = found.get("score") or [1.0] * len(rles)
            reference = {"image_id": number, "segmentation": true_rles, "iscrowd": truth["iscrowd"]}
            reference["category_id"] = [ids[name] for name in true_labels]
            metric.add(prediction=prediction, reference=reference)
        values = metric.compute(class_agnostic=agnostic)
        for key in ("AP", "AP50"):
            result[key.lower() + suffix] = float("nan") if values[key] is None else float(values[key])
    return result


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")
