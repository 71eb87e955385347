"""Which classes of a classifier make up each of the user's classes: read from a file, resolved by index or by name."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from ...models.errors import UserError

_RANGE = re.compile(r"(\d+)\s*-\s*(\d+)")

ClassMap = dict[str, list[int | str]]


def read_class_map(source: str | os.PathLike[str] | Mapping[str, Any] | None) -> ClassMap:
    """{class name: [classes of a classifier]} from a YAML or JSON file, or from such a mapping.

    An entry may be an index (294), an inclusive range of indices (294-297), a class name of the classifier
    (brown bear), or a list of these. Names are resolved by `resolve_class_map`, which knows the classifier.
    Raises UserError naming the file and the entry.
    """
    where, content = "class map", source
    if isinstance(source, (str, os.PathLike)):
        where = f"class map {os.fspath(source)}"
        try:
            with open(source, encoding="utf-8") as stream:
                content = yaml.safe_load(stream)
        except FileNotFoundError as error:
            raise UserError(f"{where}: no such file") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{where}: not YAML or JSON ({error})") from error
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{where}: must map class names to classes, such as 'bear: [294, brown bear]'")
    return {str(name): _entries(value, f"{where}, {str(name)!r}") for name, value in content.items()}


def _entries(value: object, where: str) -> list[int | str]:
    entries: list[int | str] = []
    for part in value if isinstance(value, (list, tuple)) else [value]:
        text = part.strip() if isinstance(part, str) else part
        if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
            entries.append(text)
        elif isinstance(text, str) and text.isdigit():
            entries.append(int(text))
        elif isinstance(text, str) and (match := _RANGE.fullmatch(text)):
            low, high = int(match[1]), int(match[2])
            if low > high:
                raise UserError(f"{where}: the range {text} is empty; write the smaller index first")
            entries.extend(range(low, high + 1))
        elif isinstance(text, str) and text:
            entries.append(text)
        else:
            raise UserError(
                f"{where}: {part!r} is neither an index such as 294, nor a range such as 294-297, nor a class name"
            )
    if not entries:
        raise UserError(f"{where}: no class of the classifier")
    return entries


def resolve_class_map(
    class_map: Mapping[str, Sequence[int | str]],
    num_classes: int,
    id2label: Mapping[int, str] | None = None,
    classifier: str = "the classifier",
) -> dict[str, list[int]]:
    """Indices for names: {class name: [indices, each once, ascending]}.

    Args:
        class_map: as `read_class_map` returns it.
        num_classes: of the classifier.
        id2label: its class names; a name of `class_map` must equal one of them, or one of the synonyms that it lists
            between commas ("tench, Tinca tinca"). Case counts only between names that differ in nothing else.
        classifier: its name, for messages.

    Raises UserError naming the class for an index beyond the classifier's classes, for a name that it does not have
    or has twice, for names where it has none, and for a class of the classifier that two classes claim.
    """
    id2label = id2label or {}
    places = _places(id2label)
    resolved: dict[str, list[int]] = {}
    owner: dict[int, str] = {}
    for name, entries in class_map.items():
        indices = sorted({_index(entry, name, num_classes, places, classifier, id2label) for entry in entries})
        if not indices:
            raise UserError(f"class map, {name!r}: no class of {classifier}")
        for index in indices:
            if index in owner:
                label = f" ({id2label[index]})" if id2label else ""
                raise UserError(f"class map: {name!r} and {owner[index]!r} both claim class {index}{label}")
            owner[index] = name
        resolved[name] = indices
    return resolved


def _places(id2label: Mapping[int, str]) -> dict[str, list[int]]:
    """Lower-case names and synonyms -> indices; a full name takes precedence over a synonym of another class."""
    full: dict[str, list[int]] = {}
    parts: dict[str, list[int]] = {}
    for index, label in id2label.items():
        full.setdefault(label.strip().lower(), []).append(int(index))
        for part in {part.strip().lower() for part in label.split(",")} - {""}:
            parts.setdefault(part, []).append(int(index))
    return parts | full


def _index(
    entry: int | str,
    name: str,
    num_classes: int,
    places: Mapping[str, Sequence[int]],
    classifier: str,
    id2label: Mapping[int, str],
) -> int:
    if isinstance(entry, int):
        if not 0 <= entry < num_classes:
            raise UserError(f"class map, {name!r}: {classifier} has no class {entry}, only 0 to {num_classes - 1}")
        return entry
    if not places:
        raise UserError(
            f"class map, {name!r}: {entry!r} is a name, but {classifier} comes without class names; give its index"
        )
    found = places.get(entry.strip().lower(), [])
    found = [index for index in found if id2label[index].strip() == entry.strip()] or found
    if not found:
        near = difflib.get_close_matches(entry.strip().lower(), places, n=3)
        hint = f"; it has {', '.join(near)}" if near else ""
        raise UserError(f"class map, {name!r}: {classifier} has no class named {entry!r}{hint}")
    if len(found) > 1:
        raise UserError(
            f"class map, {name!r}: {classifier} has {len(found)} classes named {entry!r}, {found}; give the index"
        )
    return found[0]
