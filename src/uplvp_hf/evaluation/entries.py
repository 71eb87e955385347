"""Results and annotations of one image as evaluators and COCO's files take them."""

from __future__ import annotations

from typing import Any

from ..data import Row, segmentation_to_rle


def as_prediction(row: Row, result: dict[str, Any], category_ids: list[int]) -> dict[str, Any]:
    """One image's result as evaluators take it, with the category id of every class index as label."""
    return {
        "image_id": row["image_id"],
        "scores": result["scores"].tolist(),
        "labels": [category_ids[label] for label in result["labels"].tolist()],
        "rle": result["rle"],
    }


def as_reference(row: Row) -> dict[str, Any]:
    """The annotations of one image as evaluators take them. Raises DataError for a malformed segmentation."""
    objects, size = row["objects"], (row["height"], row["width"])
    return {
        "image_id": row["image_id"],
        "category_id": objects["category_id"],
        "segmentation": [segmentation_to_rle(segmentation, *size) for segmentation in objects["segmentation"]],
        "iscrowd": objects["iscrowd"],
        "area": objects["area"],
        "void": [segmentation_to_rle(segmentation, *size) for segmentation in row.get("void", [])],
    }


def to_coco_results(row: Row, result: dict[str, Any], category_ids: list[int]) -> list[dict[str, Any]]:
    """One image's result as entries of a COCO results file, best first.

    Args:
        row: the image.
        result: as `predict_dataset` yields it.
        category_ids: original category id of every class index.
    """
    boxes = result["boxes"].tolist()
    return [
        {
            "image_id": row["image_id"],
            "category_id": int(category_ids[label]),
            "segmentation": rle,
            "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
            "score": score,
        }
        for score, label, box, rle in zip(result["scores"].tolist(), result["labels"].tolist(), boxes, result["rle"])
    ]
