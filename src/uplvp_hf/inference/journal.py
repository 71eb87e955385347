"""Keeps the results of a long run as they come, one line per image, so that a killed run can be resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from uplvp_hf.data import DataError, Row
from uplvp_hf.files import replacing, write_json_lines, writing

NAME = "predictions.partial.jsonl"
RESULT = "predictions.json"


def check_free(folder: Path, overwrite: bool) -> None:
    """Raises DataError when the folder has finished results that are not to be replaced."""
    if not overwrite and (folder / RESULT).exists():
        raise DataError(
            "there are results already", file=folder / RESULT, remedy="Name another --output, or --overwrite."
        )


def check_settings(file: Path, begun: dict[str, Any] | None, settings: dict[str, Any]) -> None:
    """Raises DataError unless the results of `file` were begun with these settings."""
    if begun == settings:
        return
    others = sorted(key for key in settings if (begun or {}).get(key) != settings[key])
    raise DataError(
        f"was begun with other settings ({', '.join(others)})",
        file=file,
        remedy="Repeat them to go on, name another --output, or --overwrite.",
    )


class Journal:
    """The file `predictions.partial.jsonl` of a folder, which `finish` turns into `predictions.json`.

    Args:
        folder: made if needed.
        settings: what the results depend on beside the images, as JSON takes it; the first line.
        overwrite: begin anew, whatever the folder holds.

    Raises DataError when the folder has finished results, or unfinished ones of other settings.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: dict[str, Any], overwrite: bool = False):
        self.folder = Path(folder)
        self.file = self.folder / NAME
        self.places: dict[int, int] = {}  # image id -> where its line begins
        self.instances = 0
        check_free(self.folder, overwrite)
        self.folder.mkdir(parents=True, exist_ok=True)
        if overwrite:
            self.file.unlink(missing_ok=True)
            (self.folder / RESULT).unlink(missing_ok=True)
        if self.file.exists():
            self._check(settings)
        else:
            write_json_lines(self.file, [settings])

    def _check(self, settings: dict[str, Any]) -> None:
        with open(self.file, "rb") as stream:
            check_settings(self.file, _parsed(stream.readline()), settings)

    def known(self, rows: list[Row]) -> set[int]:
        """Image ids of the rows whose results are in the journal, of the same file as it is now. A line that was cut
        off in writing, and all behind it, is removed."""
        wanted = {row["image_id"]: fingerprint(row) for row in rows}
        with writing(self.file), open(self.file, "r+b") as stream:
            stream.readline()
            place = stream.tell()
            for line in iter(stream.readline, b""):
                content = _parsed(line)
                if content is None:
                    stream.truncate(place)
                    break
                number = content["image"]["id"]
                if wanted.get(number) == content["source"]:
                    self.places[number] = place
                    self.instances += len(content["annotations"])
                place = stream.tell()
        return set(self.places)

    def add(self, row: Row, annotations: list[dict[str, Any]]) -> None:
        """Records an image as done. On return the operating system has the line: a killed process loses nothing."""
        image = {"id": row["image_id"], **{key: row[key] for key in ("file_name", "width", "height")}}
        line = json.dumps({"source": fingerprint(row), "image": image, "annotations": annotations}, allow_nan=False)
        with writing(self.file), open(self.file, "ab") as stream:
            self.places[row["image_id"]] = stream.tell()
            stream.write(line.encode() + b"\n")
        self.instances += len(annotations)

    def finish(self, categories: list[dict[str, Any]]) -> Path:
        """Writes `predictions.json`, a COCO file in order of image ids, in one step; removes the journal."""
        with open(self.file, "rb") as lines, replacing(self.folder / RESULT) as stream:
            stream.write('{"images": ')
            _write_list(stream, (content["image"] for content in self._contents(lines)))
            stream.write(f', "categories": {json.dumps(categories)}, "annotations": ')
            _write_list(stream, _numbered(self._contents(lines)))
            stream.write("}\n")
        self.file.unlink()
        return self.folder / RESULT

    def _contents(self, lines: IO[bytes]) -> Iterator[dict[str, Any]]:
        for number in sorted(self.places):
            lines.seek(self.places[number])
            yield json.loads(lines.readline())


def fingerprint(row: Row) -> list[Any]:
    """Identifies an image between runs: by path, size in bytes and time of change, or by its address."""
    name = row["file_name"]
    if name.startswith(("http://", "https://")):
        return [name]
    state = os.stat(row["image"])
    return [row["image"], state.st_size, state.st_mtime_ns]


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The content of a line, or None if it was cut off."""
    if not line.endswith(b"\n"):
        return None
    try:
        return json.loads(line)
    except ValueError:
        return None


def _numbered(contents: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    number = 0
    for content in contents:
        for entry in content["annotations"]:
            number += 1
            yield {**entry, "id": number}


def _write_list(stream: IO[str], values: Iterator[Any]) -> None:
    stream.write("[")
    for index, value in enumerate(values):
        stream.write((", " if index else "") + json.dumps(value, allow_nan=False))
    stream.write("]")
