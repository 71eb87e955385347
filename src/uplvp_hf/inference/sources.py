"""Turns files, folders, patterns and addresses into rows to predict, with a limit on pixels."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from PIL import Image

from uplvp_hf.data import DataError, ImageError, InstanceDataset, Row, empty_objects, image_size, read_image_folder
from uplvp_hf.files import replacing

from ..models.errors import UserError
from .download import LIMITS, Limits, fetch_image, is_url

# 100 million: 300 MB as RGB. A small file can claim billions.
MAX_PIXELS = 100_000_000


_unbounded = threading.Lock()
_inside: list[int | None] = []  # Pillow's own bound, once for every block that is active


@contextmanager
def pixels_unbounded() -> Iterator[None]:
    """Disables Pillow's own limit, which first warns and then refuses; sizes are checked here instead.

    It is one for the whole process: blocks of several threads may overlap, the last to end restores it.
    """
    with _unbounded:
        _inside.append(_inside[0] if _inside else Image.MAX_IMAGE_PIXELS)
        Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        with _unbounded:
            bound = _inside.pop()
            if not _inside:
                Image.MAX_IMAGE_PIXELS = bound


def check_pixels(size: tuple[int, int], max_pixels: int, file: object) -> None:
    """Raises ImageError for an image of `size` (width, height) with more pixels than allowed."""
    width, height = size
    if width * height > max_pixels:
        raise ImageError(
            f"{width} x {height} are {width * height / 1e6:,.0f} million pixels, more than the {max_pixels / 1e6:,.0f} "
            "million allowed",
            file=file,
            remedy="Raise the limit (--max-pixels N, `max_pixels`) if there is memory for it: 3 bytes a pixel.",
        )


def find_images(
    paths: Sequence[str],
    downloads: str | os.PathLike[str] | None = None,
    max_pixels: int = MAX_PIXELS,
    limits: Limits = LIMITS,
    leave_out: Sequence[str | os.PathLike[str]] = (),
) -> InstanceDataset:
    """Unlabeled rows of all images in `paths`, numbered from 1, in that order.

    Args:
        paths: files; folders, searched recursively; patterns such as `shots/**/*.jpg`, where no file has that name;
            addresses of http and https.
        downloads: folder that downloaded images are kept in and looked up in; needed for addresses.
        max_pixels: images with more are left out; only their heads are read for that.
        limits: of every download.
        leave_out: folders whose images do not count, such as the overlays of an earlier run among the images.

    What cannot be read is in `failures`. Raises DataError for a path that does not exist, a pattern without matches, a
    folder without images, an address of another kind, and when nothing is left (ImageError: of a single image).
    """
    rows: list[Row] = []
    failures: list[dict[str, Any]] = []
    with pixels_unbounded():
        fetched = _fetch_all([path for path in paths if is_url(path)], downloads, limits)
        for path in paths:
            found = _rows_of(path, fetched)
            failures += found.failures
            for row in found.rows:
                if any(Path(row["image"]).is_relative_to(os.path.abspath(folder)) for folder in leave_out):
                    continue
                try:
                    check_pixels((row["width"], row["height"]), max_pixels, row["file_name"])
                except ImageError as error:
                    failures.append({"file": error.file, "row": None, "reason": f"{error.reason}. {error.remedy}"})
                    continue
                rows.append(row)
    numbered = [Row(**{**row, "image_id": number}) for number, row in enumerate(rows, start=1)]
    if not numbered and not failures:
        raise DataError("holds overlays of an earlier run only", file=leave_out[0], remedy="Name the images.")
    if not numbered:
        first = failures[0]
        if len(failures) == 1:
            raise ImageError(first["reason"], file=first["file"])
        raise DataError(
            f"none of the {len(failures)} images can be read; the first: {first['file']}: {first['reason']}"
        )
    return InstanceDataset(numbered, [], "", failures)


def _rows_of(path: str, fetched: dict[str, Path | ImageError]) -> InstanceDataset:
    if is_url(path):
        return _rows_of_files([(fetched[path], path)])
    if os.path.isdir(path):
        return read_image_folder(path)
    if os.path.isfile(path):
        return _rows_of_files([(path, os.path.basename(path))])
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", path):
        raise DataError("is not an address of http or https", file=path, remedy="Name files by their path.")
    if glob.has_magic(path):
        files = sorted(file for file in glob.glob(path, recursive=True) if os.path.isfile(file))
        if not files:
            raise DataError("no file has such a name", file=path)
        return _rows_of_files([(file, os.path.basename(file)) for file in files])
    raise DataError("no such file or folder", file=path)


def _rows_of_files(files: Sequence[tuple[str | Path | ImageError, str]]) -> InstanceDataset:
    """Rows of (file, or why there is none; name to report)."""
    rows, failures = [], []
    for file, name in files:
        try:
            if isinstance(file, ImageError):
                raise file
            width, height = image_size(file)
        except ImageError as error:
            reason = error.reason if error.remedy is None else f"{error.reason}. {error.remedy}"
            failures.append({"file": name if is_url(name) else os.fspath(file), "row": None, "reason": reason})
            continue
        rows.append(
            Row(
                image=os.path.abspath(file), image_id=0, file_name=name, width=width, height=height,
                objects=empty_objects(),
            )
        )  # fmt: skip
    return InstanceDataset(rows, [], "", failures)


def _fetch_all(urls: Sequence[str], folder: str | os.PathLike[str] | None, limits: Limits) -> dict:
    """The downloaded file for every address, or the ImageError that came instead."""
    if urls and folder is None:
        raise UserError(f"{urls[0]}: addresses need a folder for downloads.")

    def fetch(url: str) -> Path | ImageError:
        # Named after the address by a hash: nothing in an address can lead out of the folder.
        file = Path(folder) / hashlib.sha256(url.encode()).hexdigest()[:32]
        if file.is_file():
            return file
        try:
            content = fetch_image(url, limits)
        except ImageError as error:
            return error
        with replacing(file, "wb") as stream:
            stream.write(content)
        return file

    unique = list(dict.fromkeys(urls))
    if not unique:
        return {}
    with ThreadPoolExecutor(min(8, len(unique))) as pool:
        return dict(zip(unique, pool.map(fetch, unique), strict=True))


def plain_stem(name: str) -> str:
    """The last part of a path or an address without its suffix, as a part of a file name that is safe everywhere:
    letters, digits, `_`, `-` and dots inside, at most 80 characters."""
    path = unquote(urlsplit(name).path) if is_url(name) else name
    stem = Path(path.replace("\\", "/")).stem
    return re.sub(r"[^\w.-]+", "_", stem).strip("._")[:80] or "image"
