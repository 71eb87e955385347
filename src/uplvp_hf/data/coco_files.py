"""Where the files of a COCO dataset lie: its JSON in a folder, its images, and the image that a file name means."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from ..models.images import IMAGE_SUFFIXES
from .errors import DataError

_HEAD = 65536  # bytes at each end of a file that are searched for the keys of COCO
_DRIVE = re.compile(r"^[A-Za-z]:")


def walk_files(folder: str) -> Iterator[str]:
    """Files below a folder, hidden ones left out, links followed without going round in circles."""
    visited = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.join(root, name) for name in files if not name.startswith("."))


def has_image_suffix(name: str) -> bool:
    """Whether a file is an image by its name."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _json_files(folder: str) -> list[str]:
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(name for name in names if name.lower().endswith(".json") and not name.startswith("."))


def looks_like_coco(path: str) -> bool:
    """Whether a JSON file has the sections of COCO, told from its head and its tail."""
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD)
            file.seek(max(0, os.path.getsize(path) - _HEAD))
            found = (head + file.read()).replace(b"\0", b"")  # UTF-16
    except OSError:
        return False
    if not found.lstrip(b"\xef\xbb\xbf\xff\xfe \r\n\t").startswith(b"{"):
        return False
    return sum(f'"{key}"'.encode() in found for key in ("images", "annotations", "categories")) >= 2


def coco_files(folder: str) -> dict[str, str]:
    """{split: annotation file} of a folder: `annotations/*.json`; else the COCO files beside the images; else those
    of its subfolders, one each, under the subfolder's name (Roboflow's train/, valid/ and test/)."""
    annotations = os.path.join(folder, "annotations")
    named = {os.path.splitext(name)[0]: os.path.join(annotations, name) for name in _json_files(annotations)}
    if named or not os.path.isdir(folder):
        return named
    beside = _beside(folder)
    if beside:
        return {os.path.splitext(os.path.basename(file))[0]: file for file in beside}
    below = {entry.name: _beside(entry.path) for entry in sorted(os.scandir(folder), key=lambda entry: entry.name)
             if entry.is_dir() and not entry.name.startswith(".")}  # fmt: skip
    return {name: files[0] for name, files in below.items() if len(files) == 1}


def _beside(folder: str) -> list[str]:
    names = _json_files(folder)[:20]  # of thousands, such as labelme's, none is COCO
    return [file for file in (os.path.join(folder, name) for name in names) if looks_like_coco(file)]


def find_annotations(folder: str, split: str | None) -> str:
    """The annotation file of a folder. Raises DataError where there is none, or several could be meant."""
    found = coco_files(folder)
    annotations = os.path.join(folder, "annotations")
    place = annotations if os.path.isdir(annotations) else folder
    if split is not None:
        if split not in found:
            there = sorted(os.path.relpath(file, place) for file in found.values())
            raise DataError(f"has no {split}.json for split {split!r}, only {there}", file=place)
        return found[split]
    if len(found) == 1:
        return next(iter(found.values()))
    if "instances" in found:
        return found["instances"]
    if not found:
        raise DataError("holds no .json file", file=place)
    raise DataError(f"holds {len(found)} files", file=place, remedy=f"Choose one by `split`: {', '.join(found)}.")


def find_images(annotations: str, names: list[str]) -> str:
    """The image folder of an annotation file: the first of images/ beside annotations/ or beside the file, a folder
    named like the split (COCO's own instances_train2017.json and train2017/), the file's own folder (Roboflow) and the
    one above that holds one of `names`; else the first that is there."""
    folder, file = os.path.split(annotations)
    split = os.path.splitext(file)[0].removeprefix("instances_").removeprefix("image_info_")
    above = os.path.dirname(folder)
    bases = [os.path.join(above, "images"), os.path.join(folder, "images"), above]
    candidates = [os.path.join(base, split) for base in bases] + bases[:2] if split != "images" else bases[:2]
    there = [candidate for candidate in [*candidates, folder, above] if os.path.isdir(candidate)]
    for candidate in there:
        finder = ImageFinder(candidate)
        if any(finder.has(name) for name in names):
            return candidate
    return there[0]


def _files(folder: str) -> list[str]:
    return [path for path in (os.path.join(folder, name) for name in os.listdir(folder)) if os.path.isfile(path)]


def _key(name: str) -> str:
    """What two spellings of a file name have in common."""
    return unicodedata.normalize("NFC", unquote(name)).strip().lower()


def _folder_ends(name: str) -> list[int]:
    """Where the folders of a name end, without the last one: dropping them leaves a folder and a file."""
    return [start for start, letter in enumerate(name) if letter == "/"][:-1]


class ImageFinder:
    """Finds the images of a folder by names as exporters write them."""

    def __init__(self, root: str, deep: bool = True) -> None:
        """deep: whether the only file of a name is looked for below subfolders too."""
        self.root, self.deep = os.path.abspath(root), deep
        self._ends: dict[str, list[str]] | None = None

    def path(self, name: str) -> str:
        """The file of a relative name."""
        return os.path.normpath(os.path.join(self.root, name))

    def is_plain(self, name: str) -> bool:
        """Whether a name is a path below the folder in the usual form."""
        odd = "\\" in name or "%" in name or "?" in name or os.path.isabs(name) or ".." in name.split("/")
        return bool(name) and not odd and "\0" not in name

    def has(self, name: Any) -> bool:
        """Whether a file of this very name lies below the folder."""
        if not isinstance(name, str) or not name or "\0" in name or os.path.isabs(name):
            return False
        path = self.path(name)
        return path.startswith(self.root + os.sep) and os.path.isfile(path)

    def find(self, name: str) -> str | None:
        """The relative name of the image that `name` means: itself, with `/` in place of backslashes, without escapes
        (%20) or the address around it (/data/local-files/?d=..., ?signature=...), without leading folders, or else the
        only image whose path ends as `name` does; case, escapes and the form of accents do not count in its last part.
        None where no image or several could be meant."""
        forms = [name, name.replace("\\", "/")]
        forms += [unquote(form) for form in forms]
        forms += [form.partition("?d=")[2] for form in forms if "?d=" in form]
        forms += [form.partition("?")[0] for form in forms if "://" in form and "?d=" not in form]
        forms += [form[start + 1 :] for form in forms for start in _folder_ends(form)]
        forms = [form for form in dict.fromkeys(forms) if "\0" not in form]
        for form in forms:
            if self.has(form):
                return form
        for form in reversed(forms):
            found = self._by_end(form.replace("\\", "/"))
            if found is not None:
                return found
        return None

    def _by_end(self, name: str) -> str | None:
        parts = [part for part in _DRIVE.sub("", name).split("/") if part not in ("", ".", "..")]
        if self._ends is None:
            self._ends = {}
            for file in walk_files(self.root) if self.deep else _files(self.root):
                if has_image_suffix(file):
                    relative = os.path.relpath(file, self.root).replace(os.sep, "/")
                    self._ends.setdefault(_key(os.path.basename(file)), []).append(relative)
        candidates = self._ends.get(_key(parts[-1]), []) if parts else []
        for count in range(1, len(parts) + 1):
            if len(candidates) <= 1:
                break
            end = parts[-count:]
            exact = [found for found in candidates if found.split("/")[-count:] == end]
            candidates = exact or (candidates if count == 1 else [])
        return candidates[0] if len(candidates) == 1 else None
