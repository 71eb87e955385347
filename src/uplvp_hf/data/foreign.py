"""Formats that are not read: each is called by its name, with the way from there to one that is."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any

from .errors import DataError

LABEL_BOXES = "It has boxes and no masks: make masks of them with `uplvp label --labeler boxes`."


def _is_list_of(content: Any, *keys: str) -> bool:
    return (
        isinstance(content, list) and bool(content) and isinstance(content[0], dict) and set(keys) <= content[0].keys()
    )


def _is_via(content: Any) -> bool:
    if not isinstance(content, dict):
        return False
    first = next(iter(content.values()), None)
    return "_via_img_metadata" in content or (isinstance(first, dict) and {"filename", "regions"} <= first.keys())


def _has(*keys: str) -> Callable[[Any], bool]:
    return lambda content: isinstance(content, dict) and set(keys) <= content.keys()


def _list_of(*keys: str) -> Callable[[Any], bool]:
    return lambda content: _is_list_of(content, *keys)


_STUDIO = "In Label Studio choose Export > COCO with images."
_PREDICTIONS = "Give the COCO file of the dataset, or take them as pseudo labels: `uplvp label --labeler masks`."
# (name, whether parsed JSON is of it, what to do)
_JSON: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("VGG Image Annotator (VIA)", _is_via, "In VIA choose Annotation > Export annotations (COCO format)."),
    ("Label Studio", _list_of("data", "annotations"), _STUDIO),
    ("Label Studio", _list_of("data", "completions"), _STUDIO),
    ("Label Studio (minimal form)", _list_of("image", "annotator"), _STUDIO),
    ("CreateML", _list_of("image", "annotations"), f"{LABEL_BOXES} It has to become COCO JSON first."),
    ("COCO results (predictions)", _list_of("image_id", "category_id"), _PREDICTIONS),
    ("labelme", _has("shapes", "imagePath"), "Give the folder of the labelme files, or choose the format `labelme`."),
    ("Datumaro", _has("items", "categories"), "Convert it: `datum convert -f coco_instances`."),
    ("Supervisely", _has("objects", "size"), "In Supervisely run the app Export to COCO."),
    ("Labelbox", _list_of("data_row"), "Export it as COCO JSON (instance segmentation) there."),
    ("GeoJSON", _has("type", "features"), "Draw its outlines in pixels into a COCO file first."),
)
_SUFFIXES = {
    ".csv": "a table", ".tfrecord": "TFRecord", ".record": "TFRecord", ".ndjson": "Labelbox or Ultralytics NDJSON",
    ".jsonl": "JSON lines", ".zip": "an archive; unpack it first", ".tar": "an archive; unpack it first",
    ".xml": "XML, but not that of CVAT for images (1.1)", ".yml": "a YAML file; give the folder it describes",
    ".yaml": "a YAML file; give the folder it describes",
}  # fmt: skip


def refuse_other_formats(content: Any, path: str) -> None:
    """Raises DataError naming the format of parsed JSON, where it is a known one that is no COCO."""
    if isinstance(content, dict) and "images" in content and "annotations" in content:
        return
    for name, fits, remedy in _JSON:
        if fits(content):
            raise DataError(f"is a file of {name}, not COCO JSON", file=path, remedy=remedy)


def refuse_file(path: str) -> None:
    """Raises DataError for a file that no reader takes."""
    suffix = os.path.splitext(path)[1].lower()
    known = f": it is {_SUFFIXES[suffix]}" if suffix in _SUFFIXES else ""
    raise DataError(
        f"is neither a folder nor a .json, .txt, .lst or .parquet file{known}", file=path,
        remedy="COCO JSON is what every annotation tool exports.",
    )  # fmt: skip


def other_files(folder: str, files: list[str]) -> str:
    """What lies in a folder beside its images, such as "12 .xml, 1 .csv", and the name of a format that is not read."""
    counts = Counter(os.path.splitext(file)[1].lower() or "without suffix" for file in files)
    listed = ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common(5))
    annotations = next((file for file in files if file.lower().endswith(".xml")), None)
    if annotations is not None and _is_voc_xml(annotations):
        listed += f" (Pascal VOC annotations. {LABEL_BOXES})"
    return listed


def _is_voc_xml(path: str) -> bool:
    try:
        with open(path, "rb") as stream:
            head = stream.read(4096).replace(b"\0", b"")  # of UTF-16
    except OSError:
        return False
    return b"<annotation" in head and b"<bndbox" in head
