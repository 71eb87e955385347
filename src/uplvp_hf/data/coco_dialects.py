"""COCO JSON as exporters write it, turned into COCO JSON as the format defines it.

`normalize` goes once over a parsed file, before `coco.py` reads it strictly. It repairs what can mean only one thing;
everything else stays as it is, and the reader says what is wrong with it. `IMAGE_FIELDS` and `ANNOTATION_FIELDS` list
what is accepted. Every kind of repair gives one `DataWarning` with its count.
"""

from __future__ import annotations

import ast
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

from pycocotools import mask as coco_mask

from ..models.images import image_size
from ..models.masks import segmentation_to_rle
from .coco_files import ImageFinder
from .errors import DataError, DataWarning, ImageError

_MISSING = object()  # a field that is not there; as a result: leave the field out
_FLAGS = {"false": 0, "true": 1, "": 0, "none": 0, "null": 0}
_SCALARS = (str, int, float)
_SAMPLE = 50  # images whose names say whether those of a file lead to its images
# Of images, where there is no "file_name".
_NAMES = ("path", "filename", "fileName", "file_path", "filepath", "img_path", "name", "image", "file", "coco_url")
_BACKGROUND = ("_background_", "__background__", "__ignore__")


class Repairs:
    """How often each kind of repair was made in a file, and the first of each kind."""

    def __init__(self, path: str) -> None:
        self.path, self._found = path, dict[str, list[Any]]()

    def note(self, kind: str, where: str | None, example: str = "") -> None:
        """One more repair of this kind."""
        self._found.setdefault(kind, [0, where, example])[0] += 1

    def warn(self) -> None:
        """One warning a kind."""
        for kind, (count, where, example) in self._found.items():
            told = "; ".join(part for part in (example, f"{count} times" if count > 1 else "") if part)
            warnings.warn(DataWarning(f"{kind} ({told})" if told else kind, self.path, where), stacklevel=5)


def _whole(value: Any) -> Any:
    """Whole numbers written as text."""
    if isinstance(value, str):
        try:
            number = float(value)
            exact = value.strip().lstrip("+-").isdecimal()  # ids of 64 bits are no floats
            return int(value) if exact else int(number) if number.is_integer() else value
        except (ValueError, OverflowError):
            return value
    return value


def _text(value: Any) -> Any:
    """Numbers as text."""
    return f"{value:g}" if type(value) in (int, float) else value


def _flag(value: Any) -> Any:
    """True, false, null and text."""
    if value is None or isinstance(value, bool):
        return int(bool(value))
    return _FLAGS.get(value.strip().lower(), _whole(value)) if isinstance(value, str) else value


def _number(value: Any) -> Any:
    """Numbers written as text; null, empty text, nan and infinity are left out."""
    if isinstance(value, str):
        try:
            value = float(value) if value.strip() else None
        except ValueError:
            return value
    return _MISSING if value is None or (isinstance(value, float) and not math.isfinite(value)) else value


def _area(value: Any) -> Any:
    """As a number; what cannot be an area is left out."""
    value = _number(value)
    return value if type(value) in (int, float) and value > 0 else _MISSING


def _box(value: Any) -> Any:
    """Four numbers, which may be text, or the list JSON in a text; anything else is left out: the mask has a box."""
    sides = _listed(value) if isinstance(value, str) else value
    if not isinstance(sides, list) or len(sides) != 4:
        return _MISSING
    numbers = [_number(side) for side in sides]
    if any(type(number) not in (int, float) for number in numbers) or min(numbers[2:]) < 0:
        return _MISSING
    return value if numbers == value else numbers


def _listed(text: str) -> Any:
    """What a text holds: JSON, or numbers between commas, semicolons or spaces; the text itself where it is neither."""
    if text[:1] in ("[", "{"):
        try:
            return json.loads(text)
        except ValueError:
            return text
    parts = re.split(r"[,;\s]+", text.strip(" ,;\n\t"))
    numbers = [_scalar(part) for part in parts]
    return text if len(parts) < 2 or None in numbers else numbers


def _segmentation(value: Any) -> Any:
    """Flat, nested and paired polygons, run lengths in a list, counts as text of bytes or as floats, JSON in a text."""
    if isinstance(value, str):
        value = _listed(value)
    if value in ("", {}, [[]], [None]):
        return []  # no mask
    if isinstance(value, dict):
        return _run_lengths(value)
    if not isinstance(value, list) or not value:
        return value
    if any(isinstance(part, str) for part in value):
        value = [_listed(part) if isinstance(part, str) else part for part in value]
    if all(isinstance(part, list) and len(part) > 2 and type(part[0]) in (int, float) for part in value):
        return value  # as the format has it
    if all(isinstance(part, dict) and "counts" in part for part in value):
        return _united([_run_lengths(part) for part in value], value)
    parts = _polygons(value)
    return value if parts is None or parts == value else parts


def _polygons(value: list[Any]) -> list[list[Any]] | None:
    """The polygons in a list of numbers, of points, or of such lists, however deep; None for anything else."""
    scalars = [_scalar(entry) for entry in value]
    if None not in scalars:
        return [scalars]
    points = [_point(entry) for entry in value]
    if len(points) > 2 and None not in points:
        return [[side for point in points for side in point]]
    found: list[list[Any]] = []
    for entry in value:
        parts = _polygons(entry) if isinstance(entry, list) and entry else None
        if parts is None:
            return None
        found += parts
    return found


def _scalar(value: Any) -> Any:
    value = _number(value) if isinstance(value, str) else value
    return value if type(value) in (int, float) else None


def _point(value: Any) -> list[Any] | None:
    if isinstance(value, dict) and {"x", "y"} <= value.keys():
        value = [value["x"], value["y"]]
    while isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
        value = value[0]  # OpenCV's contours
    sides = [_scalar(side) for side in value] if isinstance(value, list) and len(value) == 2 else [None]
    return None if None in sides else sides


def _run_lengths(value: dict[str, Any]) -> dict[str, Any]:
    counts, size = value.get("counts"), value.get("size")
    try:
        if isinstance(counts, str) and counts[:2] in ("b'", 'b"'):
            counts = ast.literal_eval(counts).decode("ascii")
        elif isinstance(counts, str):
            counts = _listed(counts)  # compressed counts hold neither commas nor spaces
    except (ValueError, SyntaxError):
        return value
    if isinstance(counts, list) and any(type(run) is not int for run in counts):
        runs = [_whole(run) for run in counts]
        counts = [int(run) if isinstance(run, float) and run.is_integer() else run for run in runs]
    if isinstance(size, list) and any(type(side) is not int for side in size):
        size = [_whole(side) for side in size]
    same = counts is value.get("counts") and size is value.get("size")
    return value if same else {**value, "counts": counts, "size": size}


def _united(parts: list[dict[str, Any]], value: Any) -> Any:
    if len(parts) == 1:
        return parts[0]
    try:
        rle = coco_mask.merge([segmentation_to_rle(part, *part["size"]) for part in parts])
    except (DataError, KeyError, TypeError, ValueError):
        return value
    return {"size": rle["size"], "counts": rle["counts"].decode("ascii")}


Field = tuple[Callable[[Any], Any], str]
# {field: (its repair, what the warning says)}. A repair gives the value itself back where there is nothing to do.
CATEGORY_FIELDS: dict[str, Field] = {
    "id": (_whole, "category ids are text and are read as numbers"),
    "name": (_text, "names of categories are numbers and are read as text"),
}
IMAGE_FIELDS: dict[str, Field] = {
    "width": (_whole, "the sizes of images are text and are read as numbers"),
    "height": (_whole, "the sizes of images are text and are read as numbers"),
}
ANNOTATION_FIELDS: dict[str, Field] = {
    "category_id": (_whole, "category ids are text and are read as numbers"),
    "iscrowd": (_flag, "'iscrowd' is not a number (false, null or text) and is read as 0 or 1"),
    "bbox": (_box, "'bbox' is empty, text or no box; it is repaired or taken from the mask"),
    "area": (_area, "'area' is text or no positive number; it is repaired or taken from the mask"),
    "segmentation": (_segmentation, "'segmentation' is nested or in another form than COCO's; it is read all the same"),
}  # fmt: skip


def _repair(entry: Any, fields: dict[str, Field], where: str, repairs: Repairs) -> None:
    if not isinstance(entry, dict):
        return
    for name, (repair, kind) in fields.items():
        value = entry.get(name, _MISSING)
        if value is _MISSING:
            continue
        new = repair(value)
        if new is value:
            continue
        repairs.note(kind, where)
        if new is _MISSING:
            del entry[name]
        else:
            entry[name] = new


def _entries(content: dict[str, Any], key: str) -> list[tuple[str, dict[str, Any]]]:
    """(place, entry) of the entries of a section that are objects; the reader complains of the others."""
    section = content.get(key)
    entries = enumerate(section) if isinstance(section, list) else ()
    return [(f"{key}[{index}]", entry) for index, entry in entries if isinstance(entry, dict)]


def normalize(content: Any, path: str, finder: ImageFinder) -> None:
    """Repair a parsed COCO file in place, and warn once of every kind of repair.

    `finder` knows the files of the image folder: names are looked up there where they are not plain relative paths or
    do not exist, and sizes that are missing are read from the images.
    """
    if not isinstance(content, dict):
        return
    repairs = Repairs(path)
    _repair_sections(content, repairs)
    for where, entry in _entries(content, "images"):
        _repair(entry, IMAGE_FIELDS, where, repairs)
    _repair_names(content, finder, repairs)
    for where, entry in _entries(content, "images"):
        _fill_size(entry, finder, where, repairs)
    for where, entry in _entries(content, "annotations"):
        _repair(entry, ANNOTATION_FIELDS, where, repairs)
    _match_image_ids(content, repairs)
    _repair_categories(content, repairs)
    repairs.warn()


def _repair_sections(content: dict[str, Any], repairs: Repairs) -> None:
    """Objects by id in place of lists, null among the entries, and images that are listed twice with equal fields."""
    for key in ("images", "annotations", "categories"):
        section = content.get(key)
        if isinstance(section, dict):
            content[key] = [_with_id(entry, name, key) for name, entry in section.items()]
            repairs.note(f"{key!r} is an object in place of a list; its values are read", None)
        elif isinstance(section, list) and any(entry is None for entry in section):
            content[key] = [entry for entry in section if entry is not None]
            repairs.note(f"null among the {key} is left out", None)
    unlike: dict[str, Any] = {}
    for where, entry in _entries(content, "images"):
        if unlike.setdefault(repr(entry.get("id")), entry) is not entry and unlike[repr(entry.get("id"))] == entry:
            repairs.note("an image is listed twice", where)
            content["images"] = [other for other in content["images"] if other is not entry]


def _with_id(entry: Any, name: str, key: str) -> Any:
    """An entry that stands under its id; of categories it may be the name alone."""
    if key == "categories" and isinstance(entry, str):
        entry = {"name": entry}
    return {"id": name, **entry} if isinstance(entry, dict) else entry


def _repair_names(content: dict[str, Any], finder: ImageFinder, repairs: Repairs) -> None:
    entries = _entries(content, "images")
    for where, entry in entries:
        other = next((key for key in _NAMES if isinstance(entry.get(key), str)), None)
        if entry.get("file_name") is None and other is not None:
            entry["file_name"] = entry[other]
            repairs.note(f"images have no 'file_name'; {other!r} is taken", where)
    named = [(where, entry) for where, entry in entries if isinstance(entry.get("file_name"), str)]
    all_there = all(finder.has(entry["file_name"]) for _, entry in named[:_SAMPLE])
    doubtful = [(where, entry) for where, entry in named if not (all_there and finder.is_plain(entry["file_name"]))]
    found = [finder.find(entry["file_name"]) for _, entry in doubtful]
    times = Counter(found)
    for (where, entry), file in zip(doubtful, found):
        name = entry["file_name"]
        if file is not None and file != name and times[file] == 1:  # two names cannot mean one image
            entry["file_name"] = file
            kind = "file names do not lead to the images, which are found by the end of the name"
            repairs.note(kind, where, f"{name!r} is {file!r}")


def _fill_size(entry: dict[str, Any], finder: ImageFinder, where: str, repairs: Repairs) -> None:
    if all(_is_size(entry.get(side)) for side in ("width", "height")) or not finder.has(entry.get("file_name")):
        return
    given = "width" in entry or "height" in entry
    try:
        entry["width"], entry["height"] = image_size(finder.path(entry["file_name"]))
    except ImageError:
        return  # the reader complains of the size, and opening the image says why
    if given:
        repairs.note("sizes of images are null or no positive number and are read from the files", where)


def _is_size(value: Any) -> bool:
    return isinstance(value, (int, float)) and value > 0


def _match_image_ids(content: dict[str, Any], repairs: Repairs) -> None:
    """Ids that are text in one section and numbers in the other, or `000012` in one and 12 in the other."""
    ids = [entry["id"] for _, entry in _entries(content, "images") if isinstance(entry.get("id"), _SCALARS)]
    known, by_text = set(ids), {_plain(value): value for value in ids}
    if len(by_text) < len(known):
        return  # 1 and "1" are two images
    for where, entry in _entries(content, "annotations"):
        value = entry.get("image_id")
        if isinstance(value, _SCALARS) and value not in known and _plain(value) in by_text:
            entry["image_id"] = by_text[_plain(value)]
            repairs.note("image ids are text in one section and numbers in the other", where)


def _plain(value: Any) -> str:
    """An id without what does not count in it: 7, 7.0, "7.0" and "007" are one."""
    value = _whole(value)
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()


def _repair_categories(content: dict[str, Any], repairs: Repairs) -> None:
    if not isinstance(content.get("categories"), list):
        return
    seen: set[tuple[str, str]] = set()
    for where, entry in _entries(content, "categories"):
        _repair(entry, CATEGORY_FIELDS, where, repairs)
        key = (repr(entry.get("id")), repr(entry.get("name")))
        if key in seen:
            repairs.note("a category is listed twice", where, repr(entry.get("name")))
            content["categories"].remove(entry)  # equal to the first one in all that counts
        seen.add(key)
    used = _number_categories(content, repairs)
    for where, entry in _entries(content, "categories"):
        if entry.get("id") not in used and is_group(entry, content["categories"]):
            repairs.note("a category that has no object and groups others is no class", where, repr(entry["name"]))
            content["categories"] = [other for other in content["categories"] if other is not entry]


def _number_categories(content: dict[str, Any], repairs: Repairs) -> set[Any]:
    """Gives numbers to category ids that are words. Returns the ids that objects have."""
    entries = _entries(content, "categories")
    words = [entry["id"] for _, entry in entries if isinstance(entry.get("id"), str)]
    numbers = [entry["id"] for _, entry in entries if type(entry.get("id")) is int]
    new = {word: number for number, word in enumerate(words, start=max(numbers, default=0) + 1)}
    for where, entry in entries:
        if isinstance(entry.get("id"), str):
            repairs.note("category ids are words and are numbered", where, f"{entry['id']!r} is {new[entry['id']]}")
            entry["id"] = new[entry["id"]]
    used = set()
    for _, entry in _entries(content, "annotations"):
        value = entry.get("category_id")
        if isinstance(value, _SCALARS):
            entry["category_id"] = new.get(value, value)
            used.add(entry["category_id"])
    return used


def is_group(category: dict[str, Any], categories: list[Any]) -> bool:
    """Whether a category that no object has stands for others, or for the ground, and is no class: exporters list the
    name of a group (Roboflow) or `_background_` (labelme) as if it were one."""
    name = category.get("name")
    others = (other for other in categories if isinstance(other, dict) and other is not category)
    return isinstance(name, str) and (
        name in _BACKGROUND or any(other.get("supercategory") == name for other in others)
    )
