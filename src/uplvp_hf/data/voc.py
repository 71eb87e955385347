"""Pascal VOC 2007 and 2012 (http://host.robots.ox.ac.uk/pascal/VOC/): the instance masks of the segmentation sets.

ImageSets/Segmentation/<split>.txt     one image name a line
JPEGImages/<name>.jpg
SegmentationObject/<name>.png          palette index = number of the object, 0 background, 255 contour
SegmentationClass/<name>.png           palette index = class 1 to 20, 0 background, 255 contour
Annotations/<name>.xml                 boxes with `difficult` flags; optional
"""

from __future__ import annotations

import os
import re
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from ..models.masks import encode_id_map, rle_boxes
from .dataset import InstanceDataset
from .errors import DataError
from .fields import inside, read_lines, read_xml
from .layouts import (
    Labels,
    Pair,
    PairReader,
    choose_split,
    image_files,
    lazy_dataset,
    missing,
    objects_of,
    present_ids,
    read_id_map,
    stems,
)

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
_CONTOUR = 255
_LISTS = os.path.join("ImageSets", "Segmentation")
_YEAR = re.compile(r"VOC(20\d\d)")
_SAME_OBJECT = 0.5  # overlap (IoU) of a mask's box with a box of the XML, as VOC's own criterion of detection


def voc_root(folder: str) -> str | None:
    """The folder with the trees of VOC: `folder`, or the only VOC20xx in it or in VOCdevkit/ below it; None where there
    is none or several could be meant."""
    below = [folder]
    for parent in (folder, os.path.join(folder, "VOCdevkit")):
        if os.path.isdir(parent):
            below += [os.path.join(parent, name) for name in sorted(os.listdir(parent)) if _YEAR.fullmatch(name)]
    trees = (_LISTS, "JPEGImages", "SegmentationObject")
    found = [place for place in below if all(os.path.isdir(os.path.join(place, tree)) for tree in trees)]
    return found[0] if len(found) == 1 else None


def read_voc(folder: str | os.PathLike[str], split: str | None = None, unlabeled: bool = False) -> InstanceDataset:
    """Rows of a split of VOC's segmentation sets; no image or mask is opened before its row is asked for.

    Args:
        folder: VOC2012 or VOC2007, or VOCdevkit with one of them.
        split: a file of ImageSets/Segmentation without .txt; None: the only one there is.
        unlabeled: the images alone; so is `test` where none of its images has masks (those of 2012 are withheld).

    Masks are those of SegmentationObject; the contour (255) belongs to no instance. The class of an object is that of
    most of its pixels in SegmentationClass. An object that the XML calls difficult (same class, boxes that overlap by
    at least half) becomes a crowd: neither trained on nor counted in evaluation, as in VOC's own evaluation of
    detection. Names without an image or masks are left out and listed in `failures`.
    Raises DataError for a missing split, names that lead out of the folder, and when a row is asked for whose masks are
    broken.
    """
    given = os.path.abspath(os.fspath(folder))
    folder = voc_root(given)
    if folder is None:
        raise DataError(
            "is not one folder of Pascal VOC",
            file=given,
            remedy=f"Give VOC2012 or VOC2007, with JPEGImages/, SegmentationObject/ and {_LISTS}/.",
        )
    lists = stems(os.path.join(folder, _LISTS), [".txt"])
    split = choose_split(list(lists), split, folder)
    year = _YEAR.search(os.path.basename(folder))
    pairs, failures = _pairs(folder, lists[split], unlabeled)
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES, start=1)]
    return lazy_dataset(
        PairReader(pairs, _labels), categories, folder, failures, f"voc{year[1] if year else ''} {split}"
    )


def _pairs(folder: str, listing: str, unlabeled: bool) -> tuple[list[Pair], list[dict[str, Any]]]:
    names = read_lines(listing)
    images, boxes = (
        image_files(os.path.join(folder, "JPEGImages")),
        stems(os.path.join(folder, "Annotations"), [".xml"]),
    )
    masks = {tree: stems(os.path.join(folder, tree), [".png"]) for tree in ("SegmentationObject", "SegmentationClass")}
    if os.path.basename(listing) == "test.txt" and not masks["SegmentationObject"].keys() & {name for _, name in names}:
        unlabeled = True
    pairs, failures, seen = [], [], set()
    for where, name in names:
        inside(folder, name, listing, where)
        if name in seen:
            raise DataError(f"the name {name!r} occurs twice", file=listing, row=where)
        seen.add(name)
        lacking = [tree for tree in masks if name not in masks[tree]] if not unlabeled else []
        if name not in images or lacking:
            trees = " and ".join(lacking if name in images else ["JPEGImages", *lacking])
            failures.append({**missing(listing, f"{name!r} has no file in {trees}"), "row": where})
            continue
        annotations = () if unlabeled else (*(masks[tree][name] for tree in masks), *filter(None, [boxes.get(name)]))
        file_name = os.path.relpath(images[name], folder).replace(os.sep, "/")
        pairs.append(Pair(name, file_name, images[name], annotations))
    return pairs, failures


def _labels(pair: Pair) -> Labels:
    path, class_path = pair.annotations[:2]
    numbers, classes = read_id_map(path), read_id_map(class_path)
    if numbers.shape != classes.shape:
        raise DataError(
            f"is {numbers.shape[1]}x{numbers.shape[0]}, {class_path} is {classes.shape[1]}x{classes.shape[0]}",
            file=path,
        )
    wanted = [number for number in present_ids(numbers) if number not in (0, _CONTOUR)]
    category_ids = [_class(classes[numbers == number], number, path, class_path) for number in wanted]
    rles = encode_id_map(numbers, wanted)
    crowds = [False] * len(rles)
    if len(pair.annotations) > 2:
        crowds = _difficult(rle_boxes(rles).tolist(), category_ids, pair.annotations[2])
    return Labels(numbers.shape[1], numbers.shape[0], objects_of(rles, category_ids, crowds))


def _class(pixels: np.ndarray, number: int, path: str, class_path: str) -> int:
    counts = np.bincount(pixels.ravel(), minlength=_CONTOUR + 1)[1 : len(CLASSES) + 1]
    if not counts.any():
        raise DataError(f"object {number} has no class in {class_path}", file=path, row=f"object {number}")
    return int(counts.argmax()) + 1


def _xml_objects(path: str) -> list[tuple[str, list[float], bool]]:
    """(class, box, difficult) of each object of the XML; boxes x, y, width, height in pixels from 0."""
    found = []
    for index, entry in enumerate(read_xml(path).iter("object")):
        try:
            sides = [float(entry.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")]
            name = entry.findtext("name").strip()
        except (AttributeError, TypeError, ValueError) as error:
            where = f"object[{index}]"
            raise DataError("needs a name and four numbers in bndbox", file=path, row=where) from error
        left, top, right, bottom = sides  # from 1, both ends included
        difficult = (entry.findtext("difficult") or "").strip() == "1"
        found.append((name, [left - 1, top - 1, right - left + 1, bottom - top + 1], difficult))
    return found


def _difficult(boxes: list[list[float]], category_ids: list[int], path: str) -> list[bool]:
    """Whether the object of the XML that fits each mask best, of its class, is called difficult."""
    entries = _xml_objects(path)
    if not entries or not boxes:
        return [False] * len(boxes)
    overlaps = coco_mask.iou(np.array(boxes), np.array([box for _, box, _ in entries]), [0] * len(entries))
    flags = []
    for row, category_id in zip(overlaps, category_ids):
        same = np.array([name == CLASSES[category_id - 1] for name, _, _ in entries])
        best = int(np.where(same, row, 0).argmax())
        flags.append(bool(same[best] and row[best] >= _SAME_OBJECT and entries[best][2]))
    return flags
