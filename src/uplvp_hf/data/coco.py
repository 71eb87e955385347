"""COCO instance JSON (https://cocodataset.org/#format-data) to rows and back."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from tempfile import TemporaryFile
from typing import IO, Any

from ..files import replacing, writing
from ..models.masks import polygon_fault, polygon_overhang, rle_areas, rle_boxes, segmentation_to_rle
from .coco_dialects import normalize
from .coco_files import ImageFinder, find_images
from .dataset import InstanceDataset, Row, RowStream, empty_objects
from .errors import DataError, DataWarning
from .fields import (
    finite_number,
    image_identifier,
    inside,
    read_categories,
    read_json,
    require,
    require_list,
    whole_number,
)
from .foreign import refuse_other_formats
from .frames import fits, turned_images
from .layouts import OFFICIAL_COUNTS

# Of a row, and of an image entry in files that we write.
AS_STORED, VOID = "as_stored", "void"
PLACE = "place"  # of an annotation that a reader of another format made: where in its file it stands
BOXES_REMEDY = "Make masks of the boxes with `uplvp label --labeler boxes`, or export masks."


def clean_segmentation(
    segmentation: Any, height: int, width: int, complain: Callable[[str], None]
) -> tuple[Any, dict[str, Any], bool] | None:
    """(segmentation to keep, its RLE, whether it was changed), or None when no pixel is left.

    Polygons inside of the image are kept as they are; polygons that reach out, and uncompressed RLEs, become
    compressed RLEs of what is inside. `complain` is called with each reason for which something is left out.
    """
    changed = False
    if isinstance(segmentation, list):
        parts = []
        for part in segmentation:
            fault = polygon_fault(part, height, width)
            if fault is None:
                parts.append(part)
            else:
                complain(fault)
        if not parts:
            if not segmentation:
                complain("the segmentation is empty")
            return None
        changed = len(parts) < len(segmentation)
        segmentation = parts
    elif isinstance(segmentation, dict) and "counts" in segmentation and segmentation.get("size") is None:
        segmentation = {**segmentation, "size": [height, width]}  # a wrong one does not fit the run lengths
    try:
        rle = segmentation_to_rle(segmentation, height, width)
    except DataError as error:
        complain(error.reason)
        return None
    if rle_areas([rle])[0] == 0:
        complain("no pixel of the object is inside of the image")
        return None
    if isinstance(segmentation, dict):
        return rle, rle, changed
    reaches_out = any(min(part) < 0 or max(part[0::2]) > width or max(part[1::2]) > height for part in segmentation)
    return (rle if reaches_out else segmentation), rle, changed or reaches_out


class _Reader:
    """One pass over a parsed COCO file."""

    def __init__(self, content: Any, path: str, image_dir: str, unlabeled: bool, strict: bool) -> None:
        require(content, ("images",) if unlabeled else ("images", "annotations", "categories"), path, None)
        self.content, self.path, self.image_dir = content, path, image_dir
        self.unlabeled, self.strict = unlabeled, strict
        self.failures: list[dict[str, Any]] = []
        self.dropped = self.boxes = self.clipped = 0
        self.categories = read_categories(content.get("categories", []), path)
        self.known = {category["id"] for category in self.categories}
        self.rows: dict[int | str, Row] = {}
        self.annotation_ids: set[str] = set()
        self.remarks: list[DataWarning] = []
        self.misfits: set[int | str] = set()  # images with objects that do not fit the frame that the file says

    def read_images(self) -> None:
        for index, entry in enumerate(require_list(self.content, "images", self.path)):
            self._tolerantly(self._read_image, entry, f"images[{index}]")
        if not self.rows:
            first = f" that can be used; the first: {self.failures[0]['reason']}" if self.failures else ""
            raise DataError(f"lists no images{first}", file=self.path)

    def _tolerantly(self, read: Callable[[Any, str], None], entry: Any, where: str) -> bool:
        """Whether the entry could be read; a fault is raised, or when not strict listed."""
        try:
            read(entry, where)
        except DataError as error:
            if self.strict:
                raise
            self._fail(error.row or where, error.reason)
            return False
        return True

    def _fail(self, where: str, reason: str) -> None:
        self.failures.append({"file": self.path, "row": where, "reason": reason})

    def _read_image(self, entry: Any, where: str) -> None:
        require(entry, ("id", "file_name", "width", "height"), self.path, where)
        image_id = image_identifier(entry, "id", self.path, where)
        where = f"{where} (id {image_id})"
        if image_id in self.rows:
            raise DataError(f"image id {image_id!r} occurs twice", file=self.path, row=where)
        row = Row(
            image=inside(self.image_dir, entry["file_name"], self.path, where),
            image_id=image_id,
            file_name=entry["file_name"],
            width=whole_number(entry, "width", self.path, where, minimum=1),
            height=whole_number(entry, "height", self.path, where, minimum=1),
            objects=empty_objects(),
        )
        if entry.get(AS_STORED) is True:
            row[AS_STORED] = True
        if VOID in entry and not self.unlabeled:
            regions = require_list(entry, VOID, self.path, where)
            try:
                row[VOID] = [segmentation_to_rle(region, row["height"], row["width"]) for region in regions]
            except DataError as error:
                raise DataError(f"'void': {error.reason}", file=self.path, row=where) from error
        self.rows[image_id] = row

    def read_annotations(self) -> None:
        entries = require_list(self.content, "annotations", self.path)
        if entries and not self.known:
            raise DataError(f"has {len(entries)} annotations and an empty 'categories' list", file=self.path)
        for index, entry in enumerate(entries):
            if not self._tolerantly(self._read_annotation, entry, f"annotations[{index}]"):
                self.dropped += 1

    def report(self) -> None:
        """Says what was left out, in one warning a kind. Raises DataError when no annotation has a usable mask."""
        total = len(self.content["annotations"])
        for remark in self.remarks:
            warnings.warn(remark, stacklevel=5)
        if self.boxes:
            reason = f"{self.boxes} of {total} annotations have a box and no mask"
            if self.boxes == total and self.strict:
                raise DataError(
                    f"none of the {total} annotations has a mask: all are boxes", file=self.path, remedy=BOXES_REMEDY
                )
            warnings.warn(DataWarning(f"{reason}; they are left out. {BOXES_REMEDY}", self.path, None), stacklevel=5)
        if self.strict and total and self.dropped == total:
            raise DataError(
                f"none of the {total} annotations has a usable mask; the first: {self.failures[0]['reason']}",
                file=self.path,
            )
        if self.dropped > self.boxes:
            warnings.warn(
                f"{self.path}: {self.dropped} of {total} annotations have no usable mask and are left out; "
                f"the first: {self.failures[0]['row']}: {self.failures[0]['reason']}. See `failures` of the dataset.",
                stacklevel=5,
            )
        if self.clipped and self.strict:
            reason = f"the outlines of {self.clipped} objects reach out of their images; they are clipped"
            warnings.warn(DataWarning(reason, self.path, None), stacklevel=5)

    def _read_annotation(self, entry: Any, where: str) -> None:
        path = self.path
        require(entry, ("image_id", "category_id"), path, where)
        if entry.get("segmentation") in (None, []) and entry.get("bbox"):
            where = f"{where} (id {entry['id']})" if "id" in entry else where
            self._fail(where, "the segmentation is empty: a box without a mask")
            self.boxes += 1
            self.dropped += 1
            return
        require(entry, ("segmentation",), path, where)
        where = entry.get(PLACE) or (f"{where} (id {entry['id']})" if "id" in entry else where)
        image_id = image_identifier(entry, "image_id", path, where)
        category_id = whole_number(entry, "category_id", path, where)
        if image_id not in self.rows:
            raise DataError(f"image id {image_id!r} is not in 'images'", file=path, row=where)
        if category_id not in self.known:
            raise DataError(f"category id {category_id} is not in 'categories'", file=path, row=where)
        row = self.rows[image_id]
        if not self.strict:
            self._look_closer(entry, row, where)
        complain = partial(self._fail, where)
        cleaned = clean_segmentation(entry["segmentation"], row["height"], row["width"], complain)
        if (cleaned is None or cleaned[2]) and not fits(entry["segmentation"], row["width"], row["height"]):
            self.misfits.add(image_id)
            self.clipped += cleaned is not None
        if cleaned is None:
            self.dropped += 1
            return
        segmentation, rle, changed = cleaned
        values = {
            "segmentation": segmentation,
            "category_id": category_id,
            "bbox": self._bbox(entry, rle, changed, where),
            "area": self._area(entry, rle, changed, where),
            "iscrowd": int(bool(whole_number({"iscrowd": 0, **entry}, "iscrowd", path, where))),
            "score": finite_number(entry.get("score", 1.0), "'score'", path, where),
        }
        for key, value in values.items():  # all or none: a fault above leaves the lists of equal length
            row["objects"][key].append(value)

    def _look_closer(self, entry: dict[str, Any], row: Row, where: str) -> None:
        """Remarks on what is read all the same: an id that other tools take for one annotation, and polygons that are
        clipped by more than rounding."""
        if "id" in entry:
            if str(entry["id"]) in self.annotation_ids:
                self.remarks.append(DataWarning(f"the id {entry['id']!r} occurs twice", self.path, where))
            self.annotation_ids.add(str(entry["id"]))
        parts = entry["segmentation"]
        for part in parts if isinstance(parts, list) else ():
            if polygon_fault(part, row["height"], row["width"]) is not None:
                continue  # is listed as broken
            if overhang := polygon_overhang(part, row["height"], row["width"]):
                self.remarks.append(DataWarning(f"{overhang}; it is clipped", self.path, where))

    def _bbox(self, entry: dict[str, Any], rle: dict[str, Any], changed: bool, where: str) -> list[float]:
        bbox = entry.get("bbox")
        if bbox is None or changed:
            return rle_boxes([rle])[0].tolist()
        if not isinstance(bbox, list) or len(bbox) != 4:
            raise DataError(f"'bbox' must be [x, y, width, height], got {bbox!r:.60}", file=self.path, row=where)
        bbox = [finite_number(value, "'bbox'", self.path, where) for value in bbox]
        if min(bbox[2:]) < 0:
            raise DataError(
                f"'bbox' has a negative side: {bbox}",
                file=self.path,
                row=where,
                remedy="Write [x, y, width, height], or leave the box out: it is then taken from the mask.",
            )
        return bbox

    def _area(self, entry: dict[str, Any], rle: dict[str, Any], changed: bool, where: str) -> float:
        if entry.get("area") is None or changed:
            return float(rle_areas([rle])[0])
        return finite_number(entry["area"], "'area'", self.path, where)


def read_coco(
    path: str | os.PathLike[str],
    images: str | os.PathLike[str] | None = None,
    unlabeled: bool = False,
    strict: bool = True,
) -> InstanceDataset:
    """Read a COCO instance file.

    Args:
        path: the JSON file.
        images: the folder that its file names are relative to; None: found near the file. Images are not opened,
            except for sizes that the file does not have.
        unlabeled: do not look at the objects; then the file needs no annotations and no categories, such as COCO's own
            `image_info_unlabeled2017.json`.
        strict: False lists faulty entries in `failures` and goes on, where otherwise the first raises.

    Crowds, compressed and uncompressed RLEs, polygons of several parts, sparse ids and images without objects are
    all kept; what exporters write otherwise is repaired with a warning (`coco_dialects`). Polygons are clipped to the
    image. Objects without a usable mask (outside of the image, fewer than three points, coordinates that are not
    finite, malformed RLE) are left out, listed in `failures`, and warned of once. `bbox` and `area` come from the
    file; where they are missing, or the mask was clipped, from the mask.

    Raises DataError, naming file and row, for invalid JSON, missing keys, unknown or repeated ids, file names that
    lead out of `images`, no images, annotations without categories, and when no annotation has a usable mask.
    """
    path = os.path.abspath(os.fspath(path))
    dataset = read_content(read_json(path), path, images, unlabeled, strict)
    dataset.official = _official(path)
    return dataset


def read_content(
    content: Any,
    path: str,
    images: str | os.PathLike[str] | None = None,
    unlabeled: bool = False,
    strict: bool = True,
) -> InstanceDataset:
    """The dataset of COCO content that was read from `path`, or made of another format by its reader, which gives every
    annotation its `PLACE` in the file. The content is changed. Arguments and errors as of `read_coco`."""
    refuse_other_formats(content, path)
    if images is None:
        entries = content.get("images") if isinstance(content, dict) else None
        some = entries[:20] if isinstance(entries, list) else []
        images = find_images(path, [entry.get("file_name") for entry in some if isinstance(entry, dict)])
    # The folder of the file is a guess, and may hold everything that its owner has: no search below it.
    finder = ImageFinder(os.fspath(images), deep=os.path.abspath(images) != os.path.dirname(path))
    normalize(content, path, finder)
    reader = _read(content, path, finder.root, unlabeled, strict)
    turned = turned_images(reader.rows, content, reader.misfits) if reader.misfits else set()
    if turned:
        for entry in content["images"]:
            if isinstance(entry, dict) and entry.get("id") in turned:
                entry["width"], entry["height"] = entry["height"], entry["width"]
        reason = (
            f"width and height of {len(turned)} images are those of the other frame than their outlines (EXIF rotation)"
        )
        warnings.warn(DataWarning(f"{reason}; the outlines decide", path, None), stacklevel=3)
        reader = _read(content, path, finder.root, unlabeled, strict)
    if not unlabeled:
        reader.report()
    return InstanceDataset(list(reader.rows.values()), reader.categories, path, reader.failures)


def _read(content: Any, path: str, images: str, unlabeled: bool, strict: bool) -> _Reader:
    reader = _Reader(content, path, images, unlabeled, strict)
    reader.read_images()
    if not unlabeled:
        reader.read_annotations()
    return reader


def _official(path: str) -> str:
    """The split that a file named as COCO's own says it is, or ""."""
    stem = os.path.splitext(os.path.basename(path))[0]
    name = f"coco {stem.removeprefix('instances_').removeprefix('image_info_')}"
    return name if name in OFFICIAL_COUNTS and not stem.startswith(name[5:]) else ""


def write_coco(
    dataset: InstanceDataset | RowStream,
    path: str | os.PathLike[str],
    progress: Callable[[Iterable[Row]], Iterable[Row]] = lambda rows: rows,
) -> tuple[int, int]:
    """Write rows as a COCO instance file (with a `score` in each annotation), all of it or nothing, a row at a time.

    `read_coco` gives the same rows again, given the folder that the file names are relative to. Every row is asked for
    once; annotations wait in a temporary file until the images are written. `progress` wraps the rows, such as
    `tqdm.tqdm`. Returns the numbers of images and of objects written. Raises DataError when an image id occurs
    twice, ValueError for numbers that JSON cannot hold (nan), OSError when it cannot be written.
    """
    path = os.path.abspath(os.fspath(path))
    seen: set[int | str] = set()
    number = 0
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with (
        replacing(path) as stream,
        writing(path),
        TemporaryFile("w+", encoding="utf-8", dir=os.path.dirname(path)) as rest,
    ):
        stream.write('{"images": [')
        for row in progress(dataset):
            if row["image_id"] in seen:
                raise DataError(f"image id {row['image_id']!r} occurs twice", file=dataset.name or None)
            entry = {"id": row["image_id"], **{key: row[key] for key in ("file_name", "width", "height")}}
            entry |= {key: row[key] for key in (AS_STORED, VOID) if key in row}
            _write_entry(stream, entry, first=not seen)
            seen.add(row["image_id"])
            objects = row["objects"]
            for k in range(len(objects["category_id"])):
                number += 1
                values = {key: objects[key][k] for key in objects}
                _write_entry(rest, {"id": number, "image_id": row["image_id"], **values}, first=number == 1)
        stream.write('], "annotations": [')
        rest.seek(0)
        shutil.copyfileobj(rest, stream)
        stream.write(f'], "categories": {json.dumps(dataset.categories)}}}\n')
    return len(seen), number


def _write_entry(stream: IO[str], entry: dict[str, Any], first: bool) -> None:
    stream.write(("\n" if first else ",\n") + json.dumps(entry, allow_nan=False))
