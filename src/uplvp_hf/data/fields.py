"""Reading checked values out of parsed JSON; every complaint names the file, the row and the value."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from typing import Any
from xml.etree import ElementTree

from .errors import DataError


def read_json(path: str) -> Any:
    """The parsed file: UTF-8 with or without a byte order mark, or UTF-16 and UTF-32 with one.

    Raises DataError when the file is missing, has another encoding, or is not JSON.
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", file=path) from error
    try:
        return json.loads(content)
    except UnicodeDecodeError as error:
        remedy = "Save it as UTF-8; it was probably written in a code page of Windows such as cp1252."
        raise DataError(f"its encoding is not UTF-8 ({error})", file=path, remedy=remedy) from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"is not valid JSON ({error})", file=path, remedy="Is it cut off, or another format?"
        ) from error


def read_xml(path: str) -> ElementTree.Element:
    """The root of an XML file. Raises DataError when it is missing or not XML."""
    try:
        return ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise DataError(f"is not valid XML ({error})", file=path) from error


def read_lines(path: str) -> list[tuple[str, str]]:
    """("line 1", its text without spaces around it), ... of a UTF-8 file; empty lines are left out, as is the mark that
    editors of Windows put in front. Raises DataError when it is missing or has another encoding."""
    try:
        with open(path, encoding="utf-8-sig") as stream:
            return [(f"line {number}", line.strip()) for number, line in enumerate(stream, start=1) if line.strip()]
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", file=path) from error
    except UnicodeDecodeError as error:
        raise DataError(f"is no UTF-8 text ({error})", file=path) from error


def require(entry: Any, keys: Iterable[str], file: str, row: str | None) -> None:
    """Raise DataError unless `entry` is a dict with all of `keys`."""
    if not isinstance(entry, dict):
        raise DataError(f"must be a JSON object, got {type(entry).__name__}", file=file, row=row)
    for key in keys:
        if key not in entry:
            raise DataError(f"has no {key!r}, only {sorted(map(str, entry))[:12]}", file=file, row=row)


def require_list(entry: dict[str, Any], key: str, file: str, row: str | None = None) -> list[Any]:
    """The list at `key`. Raises DataError when it is missing or something else."""
    require(entry, [key], file, row)
    if not isinstance(entry[key], list):
        raise DataError(f"{key!r} must be a list, got {type(entry[key]).__name__}", file=file, row=row)
    return entry[key]


def whole_number(entry: dict[str, Any], key: str, file: str, row: str, minimum: int | None = None) -> int:
    """The whole number at `key` (3.0 counts as 3). Raises DataError for anything else, or below `minimum`."""
    value = entry[key]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value != int(value):
        raise DataError(f"{key!r} must be a whole number, got {value!r}", file=file, row=row)
    if minimum is not None and value < minimum:
        raise DataError(f"{key!r} must be at least {minimum}, got {value!r}", file=file, row=row)
    return int(value)


def image_identifier(entry: dict[str, Any], key: str, file: str, row: str) -> int | str:
    """An image's id: a whole number or a text that is not empty."""
    if isinstance(entry[key], str) and entry[key]:
        return entry[key]
    return whole_number(entry, key, file, row)


def finite_number(value: Any, what: str, file: str, row: str) -> float:
    """`value` as a float. Raises DataError when it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise DataError(f"{what} must be a finite number, got {value!r}", file=file, row=row)
    return float(value)


def inside(root: str, name: Any, file: str, row: str) -> str:
    """The absolute path of `name` below `root`. Raises DataError when it climbs out; links are not followed."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise DataError(f"a file name must be text, got {name!r}", file=file, row=row)
    root = os.path.abspath(root)
    path = os.path.normpath(os.path.join(root, name))
    if os.path.commonpath([root, path]) != root or path == root:
        raise DataError(
            f"the file name {name!r} leads out of the image folder {root}",
            file=file,
            row=row,
            remedy="Use names below the image folder, or pass the folder they are relative to as `images`.",
        )
    return path


def read_categories(entries: Any, file: str) -> list[dict[str, Any]]:
    """[{"id", "name"}, ...] sorted by id, checked. Raises DataError for missing keys, bad or repeated ids."""
    if not isinstance(entries, list):
        raise DataError(f"'categories' must be a list, got {type(entries).__name__}", file=file)
    categories: dict[int, dict[str, Any]] = {}
    for index, entry in enumerate(entries):
        row = f"categories[{index}]"
        require(entry, ("id", "name"), file, row)
        category_id = whole_number(entry, "id", file, row)
        if not isinstance(entry["name"], str) or not entry["name"].strip():
            raise DataError(f"'name' must be text, got {entry['name']!r}", file=file, row=row)
        if category_id in categories:
            raise DataError(f"category id {category_id} occurs twice", file=file, row=row)
        categories[category_id] = {"id": category_id, "name": entry["name"]}
    return [categories[category_id] for category_id in sorted(categories)]
