"""SCUT-CTW1500 (https://github.com/Yuliang-Liu/Curve-Text-Detector): outlines of text lines, one class.

Images and annotations of a split lie in one of the pairs of folders in `PLACES`. Annotations come in three forms,
told from the file itself:

    XML (training)    <image file="0001.jpg"><box left top width height><label>text</label><segs>x,y,...</segs></box>
    text (test)       x1,y1,...,x14,y14,####text
    text (older)      xmin,ymin,xmax,ymax and 14 points as offsets from (xmin, ymin)

The text "###" marks a region that is not to be read: a crowd here.
"""

from __future__ import annotations

import os
import warnings

from ..models.images import image_size
from ..models.masks import polygon_fault
from .coco import clean_segmentation
from .dataset import InstanceDataset
from .errors import DataError, DataWarning
from .fields import read_lines, read_xml
from .layouts import Labels, Pair, PairReader, choose_split, image_files, lazy_dataset, missing, objects_of, stems

# Folders of a split: as the archives unpack, as mmocr arranges them, and as the first release of 2017 had them.
PLACES = {
    "train": (
        ("train_images", "imgs/training", "train/text_image"),
        ("ctw1500_train_labels", "train_labels", "annotations/training", "train/text_label_curve"),
    ),
    "test": (
        ("test_images", "imgs/test", "test/text_image"),
        ("gt_ctw1500", "test_labels", "annotations/test", "test/text_label_curve"),
    ),
}
_OWN_NAMES = ("ctw1500", "text_label_curve")
_SUFFIXES = (".xml", ".txt")
_DO_NOT_CARE = "###"
_MARK = "####"  # in front of the text
_OLDER = 4 + 28  # numbers of a line of the older form


def ctw_splits(folder: str) -> dict[str, tuple[str, str]]:
    """{split: (folder of images, folder of annotations)} of what is there."""
    found = {}
    for split, (images, labels) in PLACES.items():
        image_dir = next((place for place in images if os.path.isdir(os.path.join(folder, place))), None)
        label_dir = next((place for place in labels if stems(os.path.join(folder, place), _SUFFIXES)), None)
        if image_dir and label_dir:
            found[split] = (os.path.join(folder, image_dir), os.path.join(folder, label_dir))
    return found


def is_ctw1500(folder: str) -> bool:
    """Whether a folder has images and annotations of CTW1500. Some of the names in `PLACES` are common, so one that
    is the set's own, or a folder called after it, is asked for."""
    labels = [os.path.relpath(label_dir, folder) for _, label_dir in ctw_splits(folder).values()]
    named = "ctw" in os.path.basename(os.path.abspath(folder)).lower()
    return bool(labels) and (named or any(own in label for own in _OWN_NAMES for label in labels))


def read_ctw1500(folder: str | os.PathLike[str], split: str | None = None, unlabeled: bool = False) -> InstanceDataset:
    """Rows of a CTW1500 split; no file is opened before its row is asked for.

    Args:
        folder: the root, see `PLACES`. split: train or test; None: the only one there is. unlabeled: images alone.

    Outlines are in the frame of the image as it is stored: EXIF rotations are ignored, as in the published
    training settings. Outlines are clipped to the image; one that lies outside of it is left out with a DataWarning
    when its row is read. Images without annotations and the reverse are left out and listed in `failures`.
    Raises DataError for a missing split, and when a row is asked for whose annotation file is broken.
    """
    folder = os.path.abspath(os.fspath(folder))
    splits = ctw_splits(folder)
    split = choose_split(list(splits), {"training": "train"}.get(split, split), folder)
    image_dir, label_dir = splits[split]
    images, labels = image_files(image_dir), stems(label_dir, _SUFFIXES)
    labels = {_number(name): file for name, file in labels.items()}
    pairs, failures = [], []
    for name, file in images.items():
        label = labels.pop(_number(name), None)
        if label is None and not unlabeled:
            failures.append(missing(file, f"has no annotation in {label_dir}"))
            continue
        file_name = os.path.relpath(file, folder).replace(os.sep, "/")
        pairs.append(Pair(name, file_name, file, () if unlabeled else (label,)))
    if not unlabeled:
        failures += [missing(file, f"its image is not in {image_dir}") for file in labels.values()]
    reader = PairReader(pairs, _labels, exif=False)
    return lazy_dataset(reader, [{"id": 1, "name": "text"}], folder, failures, f"ctw1500 {split}")


def _number(name: str) -> str:
    """What an image and its annotation have in common: 1001.jpg belongs to 0001001.txt."""
    return name.lstrip("0") if name.isdecimal() else name


def _labels(pair: Pair) -> Labels:
    (path,) = pair.annotations
    width, height = image_size(pair.image, exif=False)
    entries = _read_xml(path, pair) if path.lower().endswith(".xml") else _read_text(path)
    segmentations, rles, crowds = [], [], []
    for where, polygon, text in entries:
        fault = polygon_fault(polygon, height, width)
        if fault is not None:
            raise DataError(fault, file=path, row=where)
        reasons: list[str] = []
        cleaned = clean_segmentation([polygon], height, width, reasons.append)
        if cleaned is None:
            warnings.warn(DataWarning(f"left out: {reasons[0]}", path, where), stacklevel=2)
            continue
        segmentations.append(cleaned[0])
        rles.append(cleaned[1])
        crowds.append(text == _DO_NOT_CARE)
    objects = objects_of(rles, [1] * len(rles), crowds)
    return Labels(width, height, {**objects, "segmentation": segmentations})


def _read_xml(path: str, pair: Pair) -> list[tuple[str, list[float], str]]:
    """(place, polygon, text) of each box of a training file."""
    root = read_xml(path)
    named = [image.get("file", "") for image in root.iter("image")]
    if len(named) != 1:
        raise DataError(f"must be about one image, it names {named}", file=path)
    if named[0] and _number(os.path.splitext(named[0])[0]) != _number(pair.image_id):
        warnings.warn(
            DataWarning(f"says it is about {named[0]!r}, its name about {pair.image_id!r}", path, "image"), stacklevel=2
        )
    entries = []
    for index, box in enumerate(root.iter("box")):
        where = f"box[{index}]"
        segs = box.findtext("segs")
        if segs is None:
            raise DataError("has no 'segs', the points of the outline", file=path, row=where)
        entries.append((where, _numbers(segs, path, where), (box.findtext("label") or "").strip()))
    return entries


def _read_text(path: str) -> list[tuple[str, list[float], str]]:
    """(place, polygon, text) of each line of a text file; the older form has no texts."""
    entries = []
    for where, line in read_lines(path):
        points, mark, text = line.partition(_MARK)
        numbers = _numbers(points, path, where)
        if not mark and len(numbers) == _OLDER:
            left, top = numbers[:2]
            numbers = [value + (top if k % 2 else left) for k, value in enumerate(numbers[4:])]
        elif not mark:
            raise DataError(
                f"holds {len(numbers)} numbers and no {_MARK}", file=path, row=where,
                remedy=f"Write x,y,...,{_MARK}text, or the {_OLDER} numbers of the older form.",
            )  # fmt: skip
        entries.append((where, numbers, text.strip()))
    return entries


def _numbers(text: str, path: str, where: str) -> list[float]:
    try:
        return [float(value) for value in text.strip().strip(",").split(",")]
    except ValueError as error:
        raise DataError(f"coordinates must be numbers with commas, got {text!r:.60}", file=path, row=where) from error
