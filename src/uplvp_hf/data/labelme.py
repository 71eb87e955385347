"""labelme (https://github.com/wkentaro/labelme): one JSON file an image, beside it.

Polygons, circles and masks are objects; shapes of one class with one `group_id` are parts of one object. Rectangles are
boxes without masks. Points and lines outline nothing and are listed in `failures`.
"""

from __future__ import annotations

import base64
import io
import math
import os
from typing import Any

import numpy as np
from PIL import Image

from ..models.images import image_size
from .coco import read_content
from .coco_files import ImageFinder, walk_files
from .dataset import InstanceDataset
from .errors import DataError
from .fields import read_json, require, require_list
from .shapes import Shapes, ellipse, placed

_IGNORED = "__ignore__"


def _is_file(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
            file.seek(max(0, os.path.getsize(path) - 4096))
            found = (head + file.read()).replace(b"\0", b"")  # of UTF-16; imageData, which may be long, stands between
    except OSError:
        return False
    return b'"shapes"' in found and (b'"imagePath"' in found or b'"shape_type"' in found)


def is_labelme(path: str) -> bool:
    """Whether a file, or the first JSON file of a folder, is labelme's."""
    if os.path.isfile(path):
        return path.lower().endswith(".json") and _is_file(path)
    names = sorted(name for name in os.listdir(path) if name.lower().endswith(".json") and not name.startswith("."))
    return bool(names) and _is_file(os.path.join(path, names[0]))


def read_labelme(path: str | os.PathLike[str], split: str | None = None, unlabeled: bool = False) -> InstanceDataset:
    """Rows of a labelme file, or of all below a folder. There are no splits.

    Classes are the labels in the order of the alphabet, with ids from 1. Raises DataError for a split, a file that is
    not labelme's, and as `read_coco` does.
    """
    path = os.path.abspath(os.fspath(path))
    if split is not None:
        raise DataError(f"labelme has no splits, {split!r} was asked for", file=path, remedy="Give the folder of one.")
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    files = sorted(file for file in walk_files(path) if file.lower().endswith(".json")) if folder == path else [path]
    contents = {file: read_json(file) for file in files}
    labels = set()
    for file, content in contents.items():
        for shape in require_list(content, "shapes", file):
            require(shape, ("label", "points"), file, None)
            labels.add(str(shape["label"]))
    shapes, lines = Shapes(sorted(labels - {_IGNORED})), []
    for file, content in contents.items():
        lines += _add(shapes, content, file, folder)
    dataset = read_content(shapes.content(), path, folder, unlabeled)
    dataset.failures += lines
    return dataset


def _add(shapes: Shapes, content: dict[str, Any], file: str, folder: str) -> list[dict[str, Any]]:
    """Adds an image with its shapes. Returns those that outline nothing."""
    name = str(content.get("imagePath") or os.path.splitext(os.path.basename(file))[0]).replace("\\", "/")
    place = os.path.relpath(os.path.dirname(file), folder)
    relative = os.path.normpath(os.path.join(place, name)).replace(os.sep, "/")
    image_id = os.path.splitext(os.path.relpath(file, folder).replace(os.sep, "/"))[0]
    size = content.get("imageWidth"), content.get("imageHeight")
    if not all(size):
        found = ImageFinder(folder).find(relative)
        size = image_size(os.path.join(folder, found)) if found is not None else (None, None)
    shapes.add_image(image_id, relative, *size)
    failures = []
    for index, shape in enumerate(content["shapes"]):
        where = f"{os.path.basename(file)}, shapes[{index}]"
        kind, points = shape.get("shape_type") or "polygon", shape["points"]
        if str(shape["label"]) == _IGNORED:
            continue
        box = None
        try:
            if kind == "polygon":
                outline: Any = [float(side) for point in points for side in point]
            elif kind == "circle":
                (x, y), edge = points[0], points[1]
                radius = math.dist((x, y), edge)
                outline = ellipse(x, y, radius, radius)
            elif kind == "mask":
                outline = _mask(shape, *size)
            elif kind == "rectangle":
                (x0, y0), (x1, y1) = points[0], points[-1]
                outline, box = None, [min(x0, x1), min(y0, y1), abs(x1 - x0), abs(y1 - y0)]
            else:
                failures.append({"file": file, "row": where, "reason": f"a {kind} outlines no object"})
                continue
        except (IndexError, KeyError, OSError, TypeError, ValueError) as error:
            raise DataError(f"the {kind} cannot be read ({error})", file=file, row=f"shapes[{index}]") from error
        shapes.add(image_id, str(shape["label"]), where, outline, box, shape.get("group_id"))
    return failures


def _mask(shape: dict[str, Any], width: int, height: int) -> dict[str, Any]:
    """A mask of the AI tools: a PNG of the box between the two points."""
    with Image.open(io.BytesIO(base64.b64decode(shape["mask"]))) as image:
        inner = np.asarray(image) > 0
    left, top = (round(side) for side in shape["points"][0])
    return placed(inner, left, top, width, height)
