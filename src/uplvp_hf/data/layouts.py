"""What the readers of official layouts share: pairs of image and annotation files, rows made when they are asked for,
and the counts that the publishers of the sets give."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..models.images import IMAGE_SUFFIXES, image_size
from ..models.masks import rle_areas, rle_boxes
from .dataset import InstanceDataset, LazyRows, Objects, Row, empty_objects
from .errors import DataError, ImageError

# Images of each published split. Cityscapes: cityscapes-dataset.com (fine annotations); CTW1500: Liu et al., "Curved
# scene text detection via transverse and longitudinal sequence connection"; VOC: host.robots.ox.ac.uk, statistics of
# the segmentation sets; COCO: cocodataset.org, download page.
OFFICIAL_COUNTS = {
    "cityscapes train": 2975,
    "cityscapes val": 500,
    "cityscapes test": 1525,
    "ctw1500 train": 1000,
    "ctw1500 test": 500,
    "voc2012 train": 1464,
    "voc2012 val": 1449,
    "voc2012 trainval": 2913,
    "voc2007 train": 209,
    "voc2007 val": 213,
    "voc2007 trainval": 422,
    "voc2007 test": 210,
    "coco train2017": 118287,
    "coco val2017": 5000,
    "coco test2017": 40670,
    "coco unlabeled2017": 123403,
    "coco train2014": 82783,
    "coco val2014": 40504,
    "coco test2014": 40775,
    "coco test2015": 81434,
}


@dataclass(frozen=True)
class Pair:
    """An image file and its annotation files, as absolute paths; no annotations: an unlabeled image."""

    image_id: str
    file_name: str
    image: str
    annotations: tuple[str, ...] = ()


class Labels(NamedTuple):
    """What the annotations of an image say; `void` as of `Row`, None where the layout has none."""

    width: int
    height: int
    objects: Objects
    void: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class PairReader:
    """Makes the row of a pair. `read_labels` is asked for pairs with annotations."""

    pairs: Sequence[Pair]
    read_labels: Callable[[Pair], Labels]
    exif: bool = True

    def read(self, index: int) -> Row:
        pair = self.pairs[index]
        labels = self.read_labels(pair) if pair.annotations else Labels(*self._size(pair.image), empty_objects())
        row = Row(image=pair.image, image_id=pair.image_id, file_name=pair.file_name, width=labels.width,
                  height=labels.height, objects=labels.objects)  # fmt: skip
        if not self.exif:
            row["as_stored"] = True
        if labels.void is not None:
            row["void"] = labels.void
        return row

    def identify(self, index: int) -> str:
        return self.pairs[index].image_id

    def _size(self, image: str) -> tuple[int, int]:
        try:
            return image_size(image, self.exif)
        except ImageError:
            return 0, 0  # opening it will say why


def lazy_dataset(
    reader: PairReader, categories: list[dict[str, Any]], folder: str, failures: list[dict[str, Any]], official: str
) -> InstanceDataset:
    """The dataset of a reader, whose rows are made when they are asked for.

    Warns once of `failures`. Raises DataError when there are no pairs.
    """
    if not reader.pairs:
        first = f"; the first: {failures[0]['file']}: {failures[0]['reason']}" if failures else ""
        raise DataError(f"holds no image of {official} with its annotation{first}", file=folder)
    if failures:
        warnings.warn(
            f"{folder}: {len(failures)} files of {official} are left out; the first: {failures[0]['file']}: "
            f"{failures[0]['reason']}. See `failures` of the dataset.",
            stacklevel=4,
        )
    rows = LazyRows(reader.read, reader.identify, range(len(reader.pairs)))
    return InstanceDataset(rows, categories, folder, failures, official)


def stems(folder: str, suffixes: Iterable[str]) -> dict[str, str]:
    """{name without suffix: absolute path} of the files of a folder with one of the suffixes, sorted; hidden files are
    left out. Nothing where there is no such folder."""
    if not os.path.isdir(folder):
        return {}
    found = {}
    for name in sorted(os.listdir(folder)):
        suffix = next((suffix for suffix in suffixes if name.lower().endswith(suffix.lower())), None)
        if suffix is not None and not name.startswith("."):
            found[name[: -len(suffix)]] = os.path.join(os.path.abspath(folder), name)
    return found


def image_files(folder: str) -> dict[str, str]:
    """`stems` of the images of a folder."""
    return stems(folder, sorted(IMAGE_SUFFIXES))


def choose_split(found: Sequence[str], split: str | None, folder: str) -> str:
    """`split`, or the only one there is. Raises DataError where it is not there, or several could be meant."""
    if not found:
        raise DataError("has no split with images", file=folder)
    if split is None and len(found) > 1:
        raise DataError(f"has {len(found)} splits", file=folder, remedy=f"Choose one by `split`: {', '.join(found)}.")
    split = split or found[0]
    if split not in found:
        raise DataError(f"has no split {split!r}", file=folder, remedy=f"It has: {', '.join(found)}.")
    return split


def read_id_map(path: str) -> np.ndarray:
    """(H, W) whole numbers of a PNG of ids: 8 bits (with a palette: its indices) or 16 bits. Raises DataError."""
    try:
        with Image.open(path) as image:
            ids = np.asarray(image)
            mode = image.mode
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise DataError(f"cannot be read as a map of ids ({type(error).__name__}: {error})", file=path) from error
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise DataError(
            f"is no map of ids: one number a pixel is needed, its mode is {mode}",
            file=path,
            remedy="Was it converted to colors? Take the original PNG.",
        )
    return ids


def present_ids(ids: np.ndarray) -> list[int]:
    """The numbers >= 0 that occur in a map, sorted; counting 2 million pixels is faster than sorting them."""
    return np.flatnonzero(np.bincount(ids.ravel())).tolist()


def objects_of(rles: Sequence[dict[str, Any]], category_ids: Sequence[int], crowds: Sequence[bool]) -> Objects:
    """Objects of human labels, their boxes and areas those of the masks."""
    return {
        "segmentation": list(rles),
        "category_id": list(category_ids),
        "bbox": rle_boxes(rles).tolist(),
        "area": [float(area) for area in rle_areas(rles)],
        "iscrowd": [int(crowd) for crowd in crowds],
        "score": [1.0] * len(category_ids),
    }


def missing(file: str, reason: str) -> dict[str, Any]:
    """An entry of `failures` for a file without its counterpart."""
    return {"file": file, "row": os.path.basename(file), "reason": reason}
