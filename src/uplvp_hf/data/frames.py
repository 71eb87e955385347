"""Which frame the annotations of an image mean: the image as it is stored, or turned upright by its EXIF rotation.

Some exporters write the width and height of one frame and outlines of the other. Where the outlines do not fit the size
in the file but fit it turned by 90 degrees, and the image has a frame of that size, the outlines decide.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..models.images import image_size
from .dataset import Row
from .errors import ImageError

_ROUNDING = 1  # px that an outline may reach out of its image


def fits(segmentation: Any, width: int, height: int) -> bool:
    """Whether an object lies in a frame of this size; one that cannot be read at all fits."""
    try:
        if isinstance(segmentation, dict):
            return list(segmentation["size"]) == [height, width]
        for part in segmentation:
            if min(part) < -_ROUNDING or max(part[0::2]) > width + _ROUNDING or max(part[1::2]) > height + _ROUNDING:
                return False
    except (KeyError, TypeError, ValueError):
        return True
    return True


def turned_images(
    rows: Mapping[int | str, Row], content: dict[str, Any], misfits: Iterable[int | str]
) -> set[int | str]:
    """The ids of images whose width and height have to be exchanged.

    Args:
        rows: by image id, as the file says. content: of the COCO file. misfits: images with objects that do not fit.

    Where one image proves that a file mixes the frames, its other turned images are exchanged too, unless an object of
    theirs fits only as the file says. The heads of files are read only then.
    """
    outlines: dict[int | str, list[Any]] = {image_id: [] for image_id in rows}
    for entry in content["annotations"]:
        if isinstance(entry, dict) and isinstance(entry.get("image_id"), (int, float, str)):
            outlines.get(entry["image_id"], []).append(entry.get("segmentation"))

    def turns(image_id: int | str) -> bool:
        row = rows[image_id]
        width, height = row["height"], row["width"]
        return (
            width != height
            and all(fits(segmentation, width, height) for segmentation in outlines[image_id])
            and (width, height) in _frames(row["image"])
        )

    proven = {image_id for image_id in misfits if turns(image_id)}
    return proven | {image_id for image_id in rows if outlines[image_id] and turns(image_id)} if proven else set()


def _frames(image: Any) -> set[tuple[int, int]]:
    """The sizes of an image file as it is stored and upright; none where it cannot be read."""
    try:
        return {image_size(image), image_size(image, exif=False)} if isinstance(image, str) else set()
    except ImageError:
        return set()
