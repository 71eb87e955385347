"""More ways in: a text file of image paths, and whatever the `datasets` library loads, streamed or not."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from ..models.images import bytes_size, image_size
from .dataset import InstanceDataset, LazyRows, Row, RowStream, empty_objects
from .errors import DataError, ImageError
from .fields import read_lines
from .hf_objects import ReadObjects, find_objects
from .layouts import choose_split

if TYPE_CHECKING:
    import datasets

LIST_SUFFIXES = (".txt", ".lst")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_SIZE_READERS = 16  # threads; reading the head of a file is waiting for the disk


def sizes_of(files: list[str]) -> Iterator[tuple[int, int] | ImageError]:
    """(width, height) of each image file, or why there is none, in order."""

    def read(file: str) -> tuple[int, int] | ImageError:
        try:
            return image_size(file)
        except ImageError as error:
            return error

    with ThreadPoolExecutor(_SIZE_READERS) as pool:
        for start in range(0, len(files), 4096):  # a million waiting calls would be memory for nothing
            yield from pool.map(read, files[start : start + 4096])


def rows_of_files(files: list[str], names: list[str], wheres: list[str]) -> tuple[list[Row], list[dict[str, Any]]]:
    """Unlabeled rows of the files that are images, and the failures of the others. `names` become image ids."""
    rows, failures = [], []
    for file, name, where, size in zip(files, names, wheres, sizes_of(files)):
        if not name.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in name):
            shown = file.encode("utf-8", "backslashreplace").decode()
            failures.append({"file": shown, "row": where, "reason": "its name is no UTF-8 text; rename it"})
            continue
        if isinstance(size, ImageError):
            failures.append({"file": file, "row": where, "reason": size.reason})
            continue
        sides = {"width": size[0], "height": size[1]}
        rows.append(Row(image=file, image_id=name, file_name=name, **sides, objects=empty_objects()))
    return rows, failures


def read_path_list(path: str | os.PathLike[str]) -> InstanceDataset:
    """Unlabeled rows for a text file with the path of one image a line, relative to the file; empty lines are left
    out. `image_id` and `file_name` are the line.

    Only the heads of the images are read; lines without a readable one are listed in `failures`. Raises DataError
    for a file that is not UTF-8, a path in two lines, and when no image is left.
    """
    path = os.path.abspath(os.fspath(path))
    lines = read_lines(path)
    seen: dict[str, str] = {}
    files = [os.path.normpath(os.path.join(os.path.dirname(path), line)) for _, line in lines]
    for file, (where, line) in zip(files, lines):
        if file in seen:
            raise DataError(f"the image {line!r} is also in {seen[file]}", file=path, row=where)
        seen[file] = where
    rows, failures = rows_of_files(files, [line for _, line in lines], [where for where, _ in lines])
    if not rows:
        reason = "names no images"
        if failures:
            reason = f"none of the {len(failures)} images it names can be read; {failures[0]['file']}: "
            reason += failures[0]["reason"]
        first = failures[0]["row"] if failures else None
        raise DataError(reason, file=path, row=first, remedy="Write one path a line, relative to the file itself.")
    return InstanceDataset(rows, [], path, failures)


def is_hub_name(path: str) -> bool:
    """Whether a path that does not exist may be the name of a dataset, OWNER/NAME, rather than a typing error."""
    return bool(_HUB_NAME.fullmatch(path)) and not os.path.isdir(os.path.dirname(path))


def is_saved_dataset(path: str) -> bool:
    """Whether a path is a Parquet file, a folder of them, or what `save_to_disk` of `datasets` wrote; a pseudo-label
    store stays one when it was exported into its own folder."""
    if os.path.isfile(path):
        return bool(_parquet_files(path))
    is_store = os.path.isfile(os.path.join(path, "header.json"))
    return not is_store and bool(_was_saved_to_disk(path) or _parquet_files(path))


def _was_saved_to_disk(path: str) -> bool:
    return any(os.path.isfile(os.path.join(path, name)) for name in ("dataset_dict.json", "dataset_info.json"))


def _parquet_files(path: str) -> list[str]:
    if os.path.isfile(path):
        return [path] if path.lower().endswith(".parquet") else []
    names = sorted(name for name in os.listdir(path) if name.endswith(".parquet") and not name.startswith("."))
    return [os.path.join(path, name) for name in names]


def read_huggingface(
    source: str,
    split: str | None = None,
    config: str | None = None,
    image_column: str | None = None,
    id_column: str | None = None,
) -> InstanceDataset:
    """Rows of a dataset of the `datasets` library; images are read one at a time, never all.

    Args:
        source: OWNER/NAME on the Hub, a folder written by `save_to_disk`, a Parquet file or a folder of them.
        split: needed where there are several. config: of a Hub dataset with several.
        image_column: None: "image", or the only column of images.
        id_column: numbers or texts that name an image; None: "image_id" if there is such a column, else the running
            number, which is the same in every run as long as the dataset is.

    Objects with masks are read in the form of `labeling.export_parquet` and in those that `hf_objects` lists; rows
    without are unlabeled. Category ids are those of the exported file, where it is at hand; 0, 1, ... in the order of
    the names of a ClassLabel or of texts; else the numbers themselves.
    Raises DataError where several splits or columns could be meant and for ids that are in two rows, and whatever
    `datasets` raises for a source that it cannot load.
    """
    data, categories, row, id_column = _prepared(source, False, split, config, image_column, id_column)
    identify = _identifier(data, id_column, source)
    return InstanceDataset(LazyRows(lambda k: row(k, data[k]), identify, range(len(data))), categories, source)


def stream_huggingface(source: str, split: str | None = None, **columns: str | None) -> RowStream:
    """As `read_huggingface`, one row after the other, without a copy of the dataset on the disk."""
    data, categories, row, _ = _prepared(source, True, split, **columns)
    return RowStream(lambda: (row(number, example) for number, example in enumerate(data)), categories, source)


def _prepared(
    source: str,
    streaming: bool,
    split: str | None = None,
    config: str | None = None,
    image_column: str | None = None,
    id_column: str | None = None,
) -> tuple[Any, list[dict[str, Any]], Callable[[int, dict[str, Any]], Row], str | None]:
    """The dataset with the columns that count, its categories, what makes a row of an example, and the id column."""
    data = _load(source, split, config, streaming)
    features = data.features if data.features is not None else data._resolve_features().features
    image = _image_column(features, image_column, source)
    if id_column is None and "image_id" in features:
        id_column = "image_id"
    if id_column is not None and id_column not in features:
        raise DataError(f"has no column {id_column!r}, only {sorted(features)}", file=source)
    kept = {image, id_column, "file_name", "width", "height", "as_stored", "objects"}
    data = data.select_columns([name for name in features if name in kept])  # others may hold more images
    if _is_image(features[image]):
        import datasets

        data = data.cast_column(image, datasets.Image(decode=False))
    local = os.path.exists(source) and not _was_saved_to_disk(source)
    categories, read_objects = find_objects(data, features, source, _parquet_files(source) if local else [])

    def row(number: int, example: dict[str, Any]) -> Row:
        image_id = number if id_column is None else example[id_column]
        return _row(source, example, example[image], image_id, read_objects)

    return data, categories, row, id_column


def _load(source: str, split: str | None, config: str | None, streaming: bool) -> datasets.Dataset:
    import datasets

    if os.path.isdir(source) and _was_saved_to_disk(source):
        _refuse_config(source, config)
        data = datasets.load_from_disk(source)
        data = _choose_split(data, split, source)
        return data.to_iterable_dataset() if streaming else data
    if os.path.exists(source):
        _refuse_config(source, config)
        if not _parquet_files(source):
            reason = "is no Parquet file, no folder of them, and was not written by `save_to_disk`"
            raise DataError(reason, file=source, remedy="Choose another `format`.")
        data = datasets.load_dataset("parquet", data_files=_parquet_files(source), streaming=streaming)
        return _choose_split(data, split, source)
    try:
        data = datasets.load_dataset(source, config, streaming=streaming)
    except (OSError, ValueError) as error:
        reason = f"no such file or folder, and no dataset of this name can be loaded ({error})"
        raise DataError(reason, file=source) from error
    return _choose_split(data, split, source)


def _refuse_config(source: str, config: str | None) -> None:
    if config is not None:
        raise DataError(f"a saved dataset has no configurations, {config!r} was asked for", file=source)


def _choose_split(data: Any, split: str | None, source: str) -> datasets.Dataset:
    if not isinstance(data, dict):
        if split is not None:
            raise DataError(f"has no splits, split {split!r} was asked for", file=source)
        return data
    return data[choose_split(list(data), split, source)]


def _is_image(feature: Any) -> bool:
    import datasets

    return isinstance(feature, datasets.Image)


def _image_column(features: dict[str, Any], wanted: str | None, source: str) -> str:
    if wanted is not None:
        if wanted not in features:
            raise DataError(f"has no column {wanted!r}, only {sorted(features)}", file=source)
        return wanted
    images = [name for name, feature in features.items() if _is_image(feature)]
    if "image" in images:
        return "image"
    if len(images) != 1:
        raise DataError(
            f"has {len(images)} columns of images {images} among {sorted(features)}",
            file=source,
            remedy="Choose one by `image_column`; a column of text is read as paths.",
        )
    return images[0]


def _identifier(data: datasets.Dataset, column: str | None, source: str) -> Callable[[int], int | str]:
    if column is None:
        return lambda number: number
    ids = data.with_format(None)[column][:]
    seen: dict[int | str, int] = {}
    for number, image_id in enumerate(ids):
        if isinstance(image_id, bool) or not isinstance(image_id, (int, str)):
            raise DataError(f"the image id {image_id!r} is no number or text", file=source, row=f"row {number}")
        if image_id in seen:
            raise DataError(f"image id {image_id!r} is also in row {seen[image_id]}", file=source, row=f"row {number}")
        seen[image_id] = number
    return ids.__getitem__


def _row(
    source: str, example: dict[str, Any], value: Any, image_id: int | str, read_objects: ReadObjects | None
) -> Row:
    image, path = _encoded_image(value, source)
    name = example.get("file_name") or (os.path.basename(path) if path else str(image_id))
    width, height = example.get("width"), example.get("height")
    if not (isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0):
        try:
            width, height = bytes_size(image, name) if isinstance(image, bytes) else image_size(image)
        except ImageError:
            width = height = 0  # opening it will say why
    objects = empty_objects()
    if read_objects is not None:
        objects = read_objects(example["objects"], height, width, f"image id {image_id!r}")
    row = Row(image=image, image_id=image_id, file_name=name, width=width, height=height, objects=objects)
    if example.get("as_stored") is True:
        row["as_stored"] = True
    return row


def _encoded_image(value: Any, source: str) -> tuple[str | bytes, str | None]:
    """(file or content, its path if it has one) of an encoded image, or of a path in a column of text."""
    if value is None:
        return b"", None
    encoded = isinstance(value, dict) and {"bytes", "path"} <= value.keys()
    if not isinstance(value, str) and not encoded:
        raise DataError(
            f"an image must be an image or a path, got {value!r:.60}",
            file=source,
            remedy="Choose another column by `image_column`.",
        )
    if isinstance(value, str):
        base = source if os.path.isdir(source) else os.path.dirname(source)
        return os.path.join(os.path.abspath(base), value), value
    content, path = value["bytes"], value["path"]
    if content is not None:
        return content, path
    if os.path.isfile(path) or "://" not in path:
        return os.path.abspath(path), path
    import fsspec

    with fsspec.open(path, "rb") as stream:  # inside of an archive, or remote
        return stream.read(), path
