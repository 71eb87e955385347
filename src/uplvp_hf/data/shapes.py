"""COCO content out of the shapes of another annotation format, which `coco.read_content` then reads."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from ..models.masks import encode_mask
from .coco import PLACE


def ellipse(x: float, y: float, radius_x: float, radius_y: float, corners: int = 64) -> list[float]:
    """The outline of an ellipse around (x, y) as a polygon."""
    angles = (2 * math.pi * k / corners for k in range(corners))
    return [side for angle in angles for side in (x + radius_x * math.cos(angle), y + radius_y * math.sin(angle))]


def placed(inner: np.ndarray, left: int, top: int, width: int, height: int) -> dict[str, Any]:
    """The RLE of a (h, w) bool mask with its corner at (left, top) of an image of width x height pixels."""
    mask = np.zeros((height, width), dtype=bool)
    window = mask[top : top + inner.shape[0], left : left + inner.shape[1]]
    window[:] = inner[: window.shape[0], : window.shape[1]]
    return encode_mask(mask)


class Shapes:
    """Collects images and shapes. Category ids are 1, 2, ... in the order of `names`, and of new names after them."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.ids = {name: number for number, name in enumerate(dict.fromkeys(names), start=1)}
        self._groups: dict[Any, dict[str, Any]] = {}

    def add_image(
        self, image_id: int | str, file_name: str, width: int | None = None, height: int | None = None
    ) -> None:
        """An image; without a size it is read from the file."""
        size = {"width": width, "height": height} if width and height else {}
        self.images.append({"id": image_id, "file_name": file_name, **size})

    def add(self, image_id: int | str, name: str, place: str, outline: Any, box: Any = None, group: Any = None) -> None:
        """An object of the class `name`, or a further part of one.

        outline: a polygon, or an RLE; None where there is only a `box` (x, y, width, height). Shapes of one `group` and
        class in an image are parts of one object. `place` says where the shape stands in the file.
        """
        category_id = self.ids.setdefault(name, len(self.ids) + 1)
        key = (image_id, category_id, group)
        if group not in (None, 0, "", "0") and outline is not None and key in self._groups:
            self._groups[key]["segmentation"].append(outline)
            return
        entry: dict[str, Any] = {"image_id": image_id, "category_id": category_id, PLACE: place}
        entry |= {"bbox": box} if outline is None else {"segmentation": [outline]}
        self.annotations.append(entry)
        if outline is not None:
            self._groups[key] = entry

    def content(self) -> dict[str, Any]:
        """As a COCO file."""
        for entry in self.annotations:
            parts = entry.get("segmentation", ())
            if len(parts) == 1 and isinstance(parts[0], dict):
                entry["segmentation"] = parts[0]
        categories = [{"id": number, "name": name} for name, number in self.ids.items()]
        return {"images": self.images, "annotations": self.annotations, "categories": categories}
