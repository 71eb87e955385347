"""YOLO segmentation (https://docs.ultralytics.com/datasets/segment/): one text file an image, under labels/ in place of
images/; a line is a class number and the outline in shares of width and height. data.yaml names classes and splits.

Images without a text file, or with an empty one, are images without objects. Lines of five numbers are boxes.
"""

from __future__ import annotations

import os
from typing import Any

import yaml

from ..models.images import image_size
from .coco import read_content
from .coco_files import has_image_suffix, walk_files
from .dataset import InstanceDataset
from .errors import DataError, ImageError
from .fields import read_lines
from .layouts import choose_split
from .shapes import Shapes

_SPLITS = ("train", "val", "valid", "test")


def _settings(folder: str) -> tuple[str | None, dict[str, Any]]:
    """The YAML file that names classes, and what it holds. Raises DataError where there is none but a broken one."""
    broken = None
    for name in sorted(os.listdir(folder), key=lambda name: (name != "data.yaml", name)):
        if name.lower().endswith((".yaml", ".yml")):
            file = os.path.join(folder, name)
            try:
                with open(file, encoding="utf-8-sig") as stream:
                    content = yaml.safe_load(stream)
            except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
                broken = broken or DataError(f"cannot be read ({' '.join(str(error).split())[:200]})", file=file)
                continue
            if isinstance(content, dict) and "names" in content:
                return file, content
    if broken is not None:  # without it classes would have numbers for names
        raise broken
    return None, {}


def _label_file(image: str) -> str:
    """labels/ in place of the last images/ of the path, .txt in place of the suffix; else beside the image."""
    head, found, tail = image.rpartition(f"{os.sep}images{os.sep}")
    stem = os.path.splitext(f"{head}{os.sep}labels{os.sep}{tail}" if found else image)[0]
    return stem + ".txt"


def _split_folders(folder: str) -> dict[str, list[str]]:
    """{split: folders of images} as the YAML file says, else as the folders are named."""
    file, content = _settings(folder)
    found: dict[str, list[str]] = {}
    root = os.path.join(folder, str(content.get("path") or ""))
    for split in _SPLITS:
        places = content.get(split)
        for place in [places] if isinstance(places, str) else places or []:
            # Roboflow writes ../train/images into a file that lies beside train/.
            tries = [os.path.join(base, part) for base in (root, folder) for part in (place, place.removeprefix("../"))]
            there = next((os.path.normpath(path) for path in tries if os.path.exists(path)), None)
            if there is not None:
                found.setdefault(split, []).append(there)
    if found:
        return found
    for split in _SPLITS:
        for place in (os.path.join("images", split), os.path.join(split, "images")):
            if os.path.isdir(os.path.join(folder, place)):
                found.setdefault(split, []).append(os.path.join(folder, place))
    if not found and os.path.isdir(os.path.join(folder, "images")) and (file or _has_labels(folder)):
        found["all"] = [os.path.join(folder, "images")]
    return found


def _has_labels(folder: str) -> bool:
    labels = os.path.join(folder, "labels")
    return os.path.isdir(labels) and any(name.endswith(".txt") for name in os.listdir(labels))


def is_yolo(path: str) -> bool:
    """Whether a folder has images and text files in the places of YOLO."""
    if not os.path.isdir(path):
        return False
    folders = [place for places in _split_folders(path).values() for place in places if os.path.isdir(place)]
    for place in folders:
        labels = os.path.dirname(_label_file(os.path.join(place, "x.jpg")))
        if os.path.isdir(labels) and any(name.endswith(".txt") for name in os.listdir(labels)):
            return True
    return False


def _images(places: list[str]) -> list[str]:
    files: list[str] = []
    for place in places:
        if os.path.isdir(place):
            files += sorted(file for file in walk_files(place) if has_image_suffix(file))
            continue
        base = os.path.dirname(place)  # of a list of images
        files += [os.path.normpath(os.path.join(base, line)) for _, line in read_lines(place)]
    return files


def read_yolo(folder: str | os.PathLike[str], split: str | None = None, unlabeled: bool = False) -> InstanceDataset:
    """Rows of a split of a YOLO segmentation dataset.

    split: train, val (or valid) or test; None: the only one there is. Category ids are the class numbers plus 1;
    where no file names the classes, 1, 2, ... as they are met.
    Raises DataError for a split that is not there, lines that are no outline, and as `read_coco` does.
    """
    folder = os.path.abspath(os.fspath(folder))
    splits = _split_folders(folder)
    split = {"val": "valid", "valid": "val"}.get(split or "", split) if split not in splits else split
    split = choose_split(list(splits), split, folder)
    names = _names(folder)
    shapes, failures = Shapes(names), []
    for file in _images(splits[split]):
        name = os.path.relpath(file, folder).replace(os.sep, "/")
        try:
            width, height = image_size(file)
        except ImageError as error:
            failures.append({"file": file, "row": name, "reason": error.reason})
            continue
        shapes.add_image(name, name, width, height)
        labels = _label_file(file)
        if not unlabeled and os.path.isfile(labels):
            _add(shapes, name, labels, names, width, height)
    dataset = read_content(shapes.content(), folder, folder, unlabeled)
    dataset.failures += failures
    return dataset


def _names(folder: str) -> list[str]:
    file, content = _settings(folder)
    names = content.get("names")
    if isinstance(names, dict):
        names = [names.get(number, str(number)) for number in range(max(map(int, names), default=-1) + 1)]
    listed = os.path.join(folder, "classes.txt")
    if names is None and os.path.isfile(listed):
        names = [line for _, line in read_lines(listed)]
    names = [str(name) for name in names or ()]
    if len(set(names)) < len(names):
        raise DataError(f"a class is named twice: {names}", file=file or listed)
    return names


def _add(shapes: Shapes, image_id: str, file: str, names: list[str], width: int, height: int) -> None:
    for line, text in read_lines(file):
        where, words = f"{os.path.relpath(file, os.path.dirname(os.path.dirname(file)))}, {line}", text.split()
        try:
            label, sides = int(float(words[0])), [float(word) for word in words[1:]]
        except ValueError as error:
            raise DataError(f"must be numbers, got {text!r:.60}", file=file, row=line) from error
        if names and not 0 <= label < len(names):
            reason = f"class {label} is none of the {len(names)} that are named"
            raise DataError(reason, file=file, row=line)
        pixels = [side * (height if k % 2 else width) for k, side in enumerate(sides)]
        name, box = names[label] if names else str(label), None
        if len(pixels) == 4:
            x, y, w, h = pixels
            box = [x - w / 2, y - h / 2, w, h]
        shapes.add(image_id, name, where, None if box else pixels, box)
