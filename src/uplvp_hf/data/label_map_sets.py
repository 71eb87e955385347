"""COCO-Stuff-10k and ADE20K-Full as published: images with the class of every pixel, in files of their own kinds.

    coco_stuff10k/images/*.jpg, annotations/*.mat, imageLists/{train,test}.txt      v1.1: ids 1..182 with gaps, 0: none
    ADE20K_2021_17_01/images/ADE/{training,validation}/SCENE/*.jpg with *_seg.png   id = red // 10 * 256 + green

The class ids stay those of the files, so nothing is reduced. ADE20K-Full has thousands of names; its classes are those
of `classes.txt` ("2978: wall" a line), or without it those that occur as whole objects in the training and in the
validation images, as `index_ade20k.pkl` says: MaskFormer's rule for its 847 as its paper words it. All other pixels are
not labeled.
"""

from __future__ import annotations

import io
import os
import pickle
from collections import Counter
from typing import Any

import numpy as np

from .coco_classes import COCO_CLASSES
from .coco_files import has_image_suffix, walk_files
from .dataset import InstanceDataset, Row
from .errors import DataError
from .fields import read_lines
from .inputs import rows_of_files
from .label_map_files import ADE_MAP, MAT
from .label_map_folder import CLASS_LISTS, label_map_dataset, read_classes

INDEX = "index_ade20k.pkl"
_LISTS = "imageLists"
_GAPS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)  # of COCO's 91 things
_STUFF = """
    banner, blanket, branch, bridge, building-other, bush, cabinet, cage, cardboard, carpet, ceiling-other,
    ceiling-tile, cloth, clothes, clouds, counter, cupboard, curtain, desk-stuff, dirt, door-stuff, fence,
    floor-marble, floor-other, floor-stone, floor-tile, floor-wood, flower, fog, food-other, fruit, furniture-other,
    grass, gravel, ground-other, hill, house, leaves, light, mat, metal, mirror-stuff, moss, mountain, mud, napkin,
    net, paper, pavement, pillow, plant-other, plastic, platform, playingfield, railing, railroad, river, road,
    rock, roof, rug, salad, sand, sea, shelf, sky-other, skyscraper, snow, solid-other, stairs, stone, straw,
    structural-other, table, tent, textile-other, towel, tree, vegetable, wall-brick, wall-concrete, wall-other,
    wall-panel, wall-stone, wall-tile, wall-wood, water-other, waterdrops, window-blind, window-other, wood
"""
_THING_IDS = [number for number in range(1, 92) if number not in _GAPS]
COCO_STUFF: dict[int, str] = dict(zip(_THING_IDS, COCO_CLASSES, strict=True)) | dict(
    enumerate((" ".join(name.split()) for name in _STUFF.split(",")), start=92)
)
"""Name by id of the 171 classes of COCO-Stuff-10k v1.1."""


def is_coco_stuff(path: str) -> bool:
    """Whether a folder is the root of COCO-Stuff-10k: images, lists of them, and label maps of MATLAB."""
    maps = os.path.join(path, "annotations")
    return os.path.isdir(os.path.join(path, _LISTS)) and os.path.isdir(maps) and _has(maps, MAT)


def _has(folder: str, suffix: str) -> bool:
    with os.scandir(folder) as entries:
        return any(entry.name.endswith(suffix) for entry in entries)


def read_coco_stuff(path: str, split: str | None = None, unlabeled: bool = False) -> InstanceDataset:
    """The images that a list names, with their label maps. Raises DataError for a split without a list, and for an
    image without a map."""
    lists = os.path.join(path, _LISTS)
    known = sorted(name.removesuffix(".txt") for name in os.listdir(lists) if name.endswith(".txt"))
    if split not in known:
        reason = "has several splits" if split is None else f"has no split {split}"
        raise DataError(reason, file=path, remedy=f"Choose one of {', '.join(known)} (split=..., --split).")
    stems = [text.strip() for _, text in read_lines(os.path.join(lists, f"{split}.txt"))]
    files = [os.path.join(path, "images", f"{stem}.jpg") for stem in stems]
    rows, failures = rows_of_files(files, [os.path.basename(file) for file in files], [f"image {s}" for s in stems])
    categories = [{"id": number, "name": name} for number, name in COCO_STUFF.items()]
    maps = [os.path.join(path, "annotations", os.path.splitext(row["file_name"])[0] + MAT) for row in rows]
    return _dataset(path, rows, maps, categories, failures, unlabeled)


def is_ade20k_full(path: str) -> bool:
    """Whether a folder is the root of ADE20K with all its classes."""
    return os.path.isdir(os.path.join(path, "images", "ADE"))


def read_ade20k_full(path: str, split: str | None = None, unlabeled: bool = False) -> InstanceDataset:
    """The images below `images/ADE/SPLIT` with their maps. Raises DataError for a split that is not there, an image
    without a map, and a folder without a list of classes."""
    top = os.path.join(path, "images", "ADE")
    known = sorted(entry.name for entry in os.scandir(top) if entry.is_dir())
    if split not in known:
        reason = "has several splits" if split is None else f"has no split {split}"
        raise DataError(reason, file=path, remedy=f"Choose one of {', '.join(known)} (split=..., --split).")
    folder = os.path.join(top, split)
    files = sorted(file for file in walk_files(folder) if has_image_suffix(file) and file.lower().endswith(".jpg"))
    names = [os.path.relpath(file, folder).replace(os.sep, "/") for file in files]
    rows, failures = rows_of_files(files, names, [f"image {name}" for name in names])
    maps = [os.path.splitext(os.path.join(folder, row["file_name"]))[0] + ADE_MAP for row in rows]
    return _dataset(path, rows, maps, ade20k_full_classes(path), failures, unlabeled)


def ade20k_full_classes(path: str) -> list[dict[str, Any]]:
    """The categories: of `classes.txt`, else of the index, by its first synonym, and the second one where the first is
    not unique."""
    if os.path.isfile(os.path.join(path, CLASS_LISTS[0])):
        return read_classes(path)
    file = os.path.join(path, INDEX)
    if not os.path.isfile(file):
        raise DataError(f"has neither {CLASS_LISTS[0]} nor {INDEX}", file=path, remedy="Copy one of them there.")
    index = _read_index(file)
    try:
        whole = np.asarray(index["objectPresence"]) - np.asarray(index["objectIsPart"]) > 0  # (names, images)
        training = np.array(["training" in folder for folder in index["folder"]])
        both = whole[:, training].any(1) & whole[:, ~training].any(1)
        names = [str(index["objectnames"][place]) for place in both.nonzero()[0]]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise DataError(f"is no index of ADE20K ({error!r})", file=file, remedy="Write classes.txt.") from error
    synonyms = [[one.strip() for one in name.split(",")] for name in names]
    first = Counter(words[0] for words in synonyms)
    spoken = [words[0] if first[words[0]] == 1 else ", ".join(words[:2]) for words in synonyms]
    # The maps count names from 1 on.
    return [{"id": int(place) + 1, "name": name} for place, name in zip(both.nonzero()[0], spoken, strict=True)]


class _Index(pickle.Unpickler):
    """Lists, texts, numbers and arrays of numpy, and nothing that runs."""

    def find_class(self, module: str, name: str) -> Any:
        plain = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name in ("_reconstruct", "scalar"):
            return getattr(np._core.multiarray, name)
        if (module, name) not in plain:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return plain[module, name]


def _read_index(file: str) -> Any:
    try:
        with open(file, "rb") as stream:
            return _Index(io.BytesIO(stream.read()), encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, AttributeError, ValueError, TypeError) as error:
        raise DataError(f"cannot be read ({error})", file=file, remedy="Write classes.txt in its place.") from error


def _dataset(
    path: str,
    rows: list[Row],
    maps: list[str],
    categories: list[dict[str, Any]],
    failures: list[dict[str, Any]],
    unlabeled: bool,
) -> InstanceDataset:
    if not rows:
        raise DataError("holds no images", file=path)
    if unlabeled:
        return InstanceDataset(rows, categories, path, failures)
    lacking = next((file for file in maps if not os.path.isfile(file)), None)
    if lacking is not None:
        raise DataError("no label map", file=lacking, remedy="Every image needs one, or remove the image.")
    return label_map_dataset(path, rows, maps, categories, failures)


__all__ = ["COCO_STUFF", "read_ade20k_full", "read_coco_stuff"]
