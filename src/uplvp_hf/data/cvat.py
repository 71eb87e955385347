"""CVAT for images 1.1 (https://docs.cvat.ai/docs/manual/advanced/xml_format/): one annotations.xml for all images.

Polygons, ellipses and masks are objects; shapes of one label with one `group_id` are parts of one object. Boxes have no
masks. Points, lines and skeletons outline nothing and are listed in `failures`.
"""

from __future__ import annotations

import os
from typing import Any
from xml.etree import ElementTree

import numpy as np

from .coco import read_content
from .coco_files import find_images
from .dataset import InstanceDataset
from .errors import DataError
from .fields import read_xml
from .shapes import Shapes, ellipse, placed

_FILE = "annotations.xml"
_LINES = ("polyline", "points", "cuboid", "skeleton")


def _file(path: str) -> str:
    return os.path.join(path, _FILE) if os.path.isdir(path) else path


def is_cvat(path: str) -> bool:
    """Whether a path is CVAT's XML, or a folder with annotations.xml."""
    file = _file(path)
    if not (file.lower().endswith(".xml") and os.path.isfile(file)):
        return False
    with open(file, "rb") as stream:
        return b"<annotations" in stream.read(512).replace(b"\0", b"")  # of UTF-16


def read_cvat(path: str | os.PathLike[str], split: str | None = None, unlabeled: bool = False) -> InstanceDataset:
    """Rows of a CVAT file; images lie in images/ beside it or beside the file itself.

    split: a subset that the images name (`subset="train"`). Classes are the labels of the head of the file in its
    order, then further ones of the shapes, with ids from 1. Raises DataError for a file of CVAT for video, a split that
    is not there, and as `read_coco` does.
    """
    path = _file(os.path.abspath(os.fspath(path)))
    root = read_xml(path)
    if root.find("track") is not None:
        remedy = "Export it as CVAT for images 1.1 or as COCO 1.0."
        raise DataError("is CVAT for video, whose tracks are not read", file=path, remedy=remedy)
    images = root.findall("image")
    subsets = sorted({image.get("subset", "") for image in images})
    if split is not None:
        if split not in subsets:
            raise DataError(f"has no subset {split!r}, only {subsets}", file=path)
        images = [image for image in images if image.get("subset") == split]
    labels = (label.findtext("name") for label in root.findall("meta//labels/label"))
    shapes, failures = Shapes(label for label in labels if label), []
    for number, image in enumerate(images):
        where = f"image[{number}] ({image.get('name')})"
        try:
            image_id, width, height = (int(image.attrib[key]) for key in ("id", "width", "height"))
        except (KeyError, ValueError) as error:
            raise DataError(f"has no number {error}", file=path, row=where) from error
        shapes.add_image(image_id, image.get("name", ""), width, height)
        for index, shape in enumerate(image):
            failures += _add(shapes, image_id, shape, (width, height), path, f"{where}, {shape.tag}[{index}]")
    names = [image.get("name", "") for image in images[:20]]
    dataset = read_content(shapes.content(), path, find_images(path, names), unlabeled)
    dataset.failures += failures
    return dataset


def _add(
    shapes: Shapes, image_id: int, shape: ElementTree.Element, size: tuple[int, int], path: str, where: str
) -> list[dict[str, Any]]:
    """Adds a shape. Returns it as a failure where it outlines nothing."""
    box, outline = None, None
    try:
        if shape.tag == "polygon":
            outline = [float(side) for point in shape.attrib["points"].split(";") for side in point.split(",")]
        elif shape.tag == "ellipse":
            outline = ellipse(*(float(shape.attrib[key]) for key in ("cx", "cy", "rx", "ry")))
        elif shape.tag == "mask":
            outline = _mask(shape, *size)
        elif shape.tag == "box":
            left, top, right, bottom = (float(shape.attrib[key]) for key in ("xtl", "ytl", "xbr", "ybr"))
            box = [left, top, right - left, bottom - top]
        else:
            reason = f"a {shape.tag} outlines no object"
            return [{"file": path, "row": where, "reason": reason}] if shape.tag in _LINES else []
    except (KeyError, ValueError) as error:
        raise DataError(f"the {shape.tag} cannot be read ({error})", file=path, row=where) from error
    shapes.add(image_id, shape.get("label", ""), where, outline, box, shape.get("group_id"))
    return []


def _mask(shape: ElementTree.Element, width: int, height: int) -> dict[str, Any]:
    """Runs of 0 and 1 in turn along the rows of the mask's box."""
    runs = [int(run) for run in shape.attrib["rle"].split(",")]
    left, top, w, h = (int(float(shape.attrib[key])) for key in ("left", "top", "width", "height"))
    inner = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(h, w)
    return placed(inner, left, top, width, height)
