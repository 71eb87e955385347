"""Cityscapes (https://www.cityscapes-dataset.com): fine instance annotations of the 8 classes that have instances.

leftImg8bit/<split>/<city>/<name>_leftImg8bit.png
gtFine/<split>/<city>/<name>_gtFine_instanceIds.png    labelId * 1000 + k; a plain labelId is a group
gtFine/<split>/<city>/<name>_gtFine_polygons.json      {"imgHeight", "imgWidth", "objects": [{"label", "polygon"}]}
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..models.errors import UserError
from ..models.masks import encode_id_map, polygon_fault
from .dataset import InstanceDataset
from .errors import DataError
from .fields import read_json, require, require_list, whole_number
from .layouts import (
    Labels,
    Pair,
    PairReader,
    choose_split,
    lazy_dataset,
    missing,
    objects_of,
    present_ids,
    read_id_map,
    stems,
)

# The labels by id. Those that are no class hide what was drawn before them. License plates lie on vehicles and are not
# drawn.
_LABELS = (
    "unlabeled", "ego vehicle", "rectification border", "out of roi", "static", "dynamic", "ground", "road", "sidewalk",
    "parking", "rail track", "building", "wall", "fence", "guard rail", "bridge", "tunnel", "pole", "polegroup",
    "traffic light", "traffic sign", "vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus",
    "caravan", "trailer", "train", "motorcycle", "bicycle",
)  # fmt: skip
CLASSES = {label_id: _LABELS[label_id] for label_id in (24, 25, 26, 27, 28, 31, 32, 33)}
_IDS = {name: label_id for label_id, name in enumerate(_LABELS)}
_NUMBERED = {*CLASSES, 29, 30}  # caravans and trailers have instances, too
# What the benchmark does not judge (ignoreInEval in labels.py of cityscapesScripts): pixels of exactly these values, so
# of caravans and trailers the groups alone.
VOID = (0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30)
_NOT_DRAWN = "license plate"
_SPLITS = ("train", "val", "test", "train_extra")
_IMAGE, _MAP, _POLYGONS = "_leftImg8bit.png", "_gtFine_instanceIds.png", "_gtFine_polygons.json"


def is_cityscapes(folder: str) -> bool:
    """Whether a folder has the two trees of Cityscapes."""
    return all(os.path.isdir(os.path.join(folder, name)) for name in ("leftImg8bit", "gtFine"))


def read_cityscapes(
    folder: str | os.PathLike[str], split: str | None = None, unlabeled: bool = False, source: str | None = None
) -> InstanceDataset:
    """Rows of a Cityscapes split; no file is opened before its row is asked for.

    Args:
        folder: the root, with leftImg8bit/ and gtFine/.
        split: train, val, test or train_extra; None: the only one there is. The published annotations of test are
            empty stand-ins, and train_extra has coarse ones alone: both are read as unlabeled images.
        unlabeled: the images alone.
        source: "instanceIds" or "polygons"; None: the id map of an image, or where it has none its polygons.

    Regions without an instance number (groups) become crowds. Classes keep the published label ids 24 to 33. `void` of
    a labeled row is what the benchmark does not judge, as one region.
    Images without annotations and the reverse are left out and listed in `failures`. Raises DataError for a missing
    split, and when a row is asked for whose annotation file is broken.
    """
    folder = os.path.abspath(os.fspath(folder))
    if source not in (None, "instanceIds", "polygons"):
        raise UserError(f"source must be instanceIds or polygons, got {source!r}")
    images = os.path.join(folder, "leftImg8bit")
    split = choose_split([name for name in _SPLITS if os.path.isdir(os.path.join(images, name))], split, folder)
    labeled = split in ("train", "val") and not unlabeled
    pairs, failures = [], []
    labels = os.path.join(folder, "gtFine", split)
    for city in _cities(os.path.join(images, split), labels if labeled else None):
        found = stems(os.path.join(images, split, city), [_IMAGE])
        if labeled:
            annotations, lacking = _annotations(os.path.join(labels, city), found, source)
            failures += lacking
            found = {name: file for name, file in found.items() if name in annotations}
        for name, file in found.items():
            file_name = os.path.relpath(file, folder).replace(os.sep, "/")
            pairs.append(Pair(name, file_name, file, (annotations[name],) if labeled else ()))
    categories = [{"id": label_id, "name": name} for label_id, name in CLASSES.items()]
    return lazy_dataset(PairReader(pairs, _labels), categories, folder, failures, f"cityscapes {split}")


def _cities(*folders: str | None) -> list[str]:
    names = {name for folder in folders if folder and os.path.isdir(folder) for name in os.listdir(folder)}
    return sorted(name for name in names if not name.startswith("."))


def _annotations(
    folder: str, wanted: dict[str, str], source: str | None
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """{name: annotation file}, and images without one and annotations without an image."""
    maps = {} if source == "polygons" else stems(folder, [_MAP])
    polygons = {} if source == "instanceIds" else stems(folder, [_POLYGONS])
    found = {**polygons, **maps}
    kinds = " or ".join(suffix for suffix, kind in ((_MAP, "polygons"), (_POLYGONS, "instanceIds")) if source != kind)
    failures = [
        missing(file, f"has no annotation {name}{kinds} in {folder}")
        for name, file in wanted.items()
        if name not in found
    ]
    failures += [missing(file, "its image is missing") for name, file in found.items() if name not in wanted]
    return found, failures


def _labels(pair: Pair) -> Labels:
    (path,) = pair.annotations
    ids = read_id_map(path) if path.endswith(".png") else draw_polygons(path)
    wanted = [value for value in present_ids(ids) if (value if value < 1000 else value // 1000) in CLASSES]
    classes = [value if value < 1000 else value // 1000 for value in wanted]
    objects = objects_of(encode_id_map(ids, wanted), classes, [value < 1000 for value in wanted])
    void = np.isin(ids, VOID)
    return Labels(ids.shape[1], ids.shape[0], objects, encode_id_map(void.view(np.uint8), [1]) if void.any() else [])


def draw_polygons(path: str) -> np.ndarray:
    """(H, W) int32 id map of a polygon file: objects are drawn in their order, later ones cover earlier ones, and
    instances of a class are numbered from 0. Groups and labels without instances are their plain label id.

    Raises DataError, naming file and object, for missing keys, unknown labels and coordinates that are not finite.
    """
    content = read_json(path)
    require(content, ("imgWidth", "imgHeight"), path, None)
    size = tuple(whole_number(content, key, path, "head", minimum=1) for key in ("imgWidth", "imgHeight"))
    canvas = Image.new("I", size, 0)
    draw, numbers = ImageDraw.Draw(canvas), dict.fromkeys(_NUMBERED, 0)
    for index, entry in enumerate(require_list(content, "objects", path)):
        where = f"objects[{index}]"
        require(entry, ("label", "polygon"), path, where)
        if entry.get("deleted"):
            continue
        value = _value(entry["label"], numbers, path, where)
        if value is not None:
            draw.polygon(_points(entry, size, path, where), fill=value)
    return np.asarray(canvas, dtype=np.int32)


def _value(label: Any, numbers: dict[int, int], path: str, where: str) -> int | None:
    """What to draw for a label; None: nothing. Counts up the number of the class."""
    if not isinstance(label, str):
        raise DataError(f"'label' must be text, got {label!r:.60}", file=path, row=where)
    if label == _NOT_DRAWN:
        return None
    label_id = _IDS.get(label, _IDS.get(label.removesuffix("group")))
    if label_id is None:
        raise DataError(f"the label {label!r} is none of Cityscapes", file=path, row=where)
    if label not in _IDS or label_id not in _NUMBERED:
        return label_id
    numbers[label_id] += 1
    return label_id * 1000 + numbers[label_id] - 1


def _points(entry: dict[str, Any], size: tuple[int, int], path: str, where: str) -> list[tuple[float, float]]:
    points = require_list(entry, "polygon", path, where)
    for point in points:
        if not isinstance(point, list) or len(point) != 2:
            raise DataError(f"a point must be [x, y], got {point!r:.60}", file=path, row=where)
    fault = polygon_fault([value for point in points for value in point], size[1], size[0])
    if fault is not None:
        raise DataError(fault, file=path, row=where)
    return [(x, y) for x, y in points]
