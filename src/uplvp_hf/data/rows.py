"""One way in for every kind of data: COCO files and folders, the layouts of Cityscapes, CTW1500 and Pascal VOC,
pseudo-label stores, folders and lists of images, datasets of the `datasets` library."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable

from ..models.images import IMAGE_SUFFIXES
from .cityscapes import is_cityscapes, read_cityscapes
from .coco import read_coco
from .coco_files import coco_files, find_annotations, has_image_suffix, looks_like_coco, walk_files
from .ctw1500 import is_ctw1500, read_ctw1500
from .cvat import is_cvat, read_cvat
from .dataset import InstanceDataset, RowStream
from .errors import DataError, DataWarning
from .foreign import other_files, refuse_file
from .inputs import (
    LIST_SUFFIXES,
    is_hub_name,
    is_saved_dataset,
    read_huggingface,
    read_path_list,
    rows_of_files,
    stream_huggingface,
)
from .label_map_folder import is_label_map_folder, read_label_map_folder
from .label_map_sets import is_ade20k_full, is_coco_stuff, read_ade20k_full, read_coco_stuff
from .labelme import is_labelme, read_labelme
from .store_reader import read_store
from .voc import read_voc, voc_root
from .yolo import is_yolo, read_yolo

# {format: (whether a path is of it, reader of (path, split, unlabeled))}. A new format is one more line.
LAYOUTS: dict[str, tuple[Callable[[str], object], Callable[..., InstanceDataset]]] = {
    "cityscapes": (is_cityscapes, read_cityscapes),
    "ctw1500": (is_ctw1500, read_ctw1500),
    "voc": (voc_root, read_voc),
    "labelme": (is_labelme, read_labelme),
    "yolo": (is_yolo, read_yolo),
    "cvat": (is_cvat, read_cvat),
    "coco_stuff": (is_coco_stuff, read_coco_stuff),
    "ade20k_full": (is_ade20k_full, read_ade20k_full),
    "label_maps": (is_label_map_folder, read_label_map_folder),
}
FORMATS = ("coco", *LAYOUTS, "store", "images", "list", "datasets")
# What people take for images and is not read.
UNREAD_SUFFIXES = {".heic", ".heif", ".avif", ".svg", ".pdf", ".psd", ".dng", ".cr2", ".nef", ".arw", ".raw", ".exr",
                   ".hdr", ".dcm", ".npy", ".npz", ".mp4", ".avi", ".mov", ".mkv", ".jxl", ".tga", ".jfif"}  # fmt: skip


def read_image_folder(path: str | os.PathLike[str]) -> InstanceDataset:
    """Every image below a folder as an unlabeled row; `image_id` and `file_name` are the path relative to it.

    Only the heads of the files are read, for the sizes; a file without a readable one is left out and listed in
    `failures`. Raises DataError when the folder is missing or no image is left.
    """
    path = os.path.abspath(os.fspath(path))
    if not os.path.isdir(path):
        raise DataError("no such folder", file=path)
    files: list[str] = []
    others: list[str] = []
    for file in sorted(walk_files(path)):
        (files if has_image_suffix(file) else others).append(file)
    names = [os.path.relpath(file, path).replace(os.sep, "/") for file in files]
    rows, failures = rows_of_files(files, names, [f"image {index}" for index in range(len(files))])
    if not rows:
        reason = f"none of its {len(failures)} images can be read" if failures else "holds no images"
        listed = f"; there are {other_files(path, others)}" if others else ""
        raise DataError(
            reason + listed, file=path, remedy=f"Looked for {' '.join(sorted(IMAGE_SUFFIXES))} in it and below."
        )
    skipped = Counter(
        suffix for suffix in (os.path.splitext(file)[1].lower() for file in others) if suffix in UNREAD_SUFFIXES
    )
    if skipped:
        listed = ", ".join(f"{count} {suffix}" for suffix, count in skipped.most_common())
        reason = f"images and videos of other kinds are skipped: {listed}"
        warnings.warn(DataWarning(reason, path, None), stacklevel=2)
    return InstanceDataset(rows, [], path, failures)


def load_dataset_rows(
    path: str | os.PathLike[str],
    images: str | os.PathLike[str] | None = None,
    split: str | None = None,
    config: str | None = None,
    image_column: str | None = None,
    id_column: str | None = None,
    unlabeled: bool = False,
    format: str | None = None,
    strict: bool = True,
) -> InstanceDataset:
    """Load whatever `path` is.

    Args:
        path: one of
            a COCO instance file (.json);
            a folder with `annotations/*.json` and `images/`: its only file, or `instances.json`, or `{split}.json`;
            the root of Cityscapes, CTW1500, VOC2012 or VOC2007 as published (docs/data.md shows the trees): masks are
            made when a row is asked for;
            a folder with `images/`, `annotations/` of label maps, and `classes.txt` (see `label_map_folder`);
            a pseudo-label store (a folder with `header.json`);
            a folder of images, searched recursively: unlabeled rows;
            a text file (.txt, .lst) of image paths, one a line, relative to the file: unlabeled rows;
            a dataset of the `datasets` library (see `inputs.read_huggingface`): OWNER/NAME on the Hub, a folder
            written by `save_to_disk`, a Parquet file or a folder of them.
        images: folder that the file names of COCO files and stores are relative to; None: found beside the file.
        split: which file of `annotations/`, which split of a published layout or of a `datasets` dataset.
        config, image_column, id_column: of a `datasets` dataset.
        unlabeled: the images alone are of interest: annotations are not read, and none are needed.
        format: one of `FORMATS`, where the path could be several; None: what it looks like.
        strict: False lists faulty entries of a COCO file or a store in `failures` instead of raising at the first.

    Images are opened when they are used, and `load_image` raises ImageError then; `uplvp data check --images-too` opens
    all of them.
    Raises DataError for a path that is none of these or could be several, and as the readers do.
    """
    given, path = os.fspath(path), os.path.abspath(os.fspath(path))
    if format is not None and format not in FORMATS:
        raise DataError(f"no format {format!r}", file=path, remedy=f"Choose one of {', '.join(FORMATS)}.")
    hub = _is_on_the_hub(given)
    if images is not None and not os.path.isdir(images):
        raise DataError("no such image folder", file=os.fspath(images))
    kind = format or ("datasets" if hub else _format_of(path, split, unlabeled))
    columns = {"config": config, "image_column": image_column, "id_column": id_column}
    if kind == "datasets":
        return read_huggingface(given if hub else path, split, **columns)
    _refuse(path, **columns)
    return _load_files(kind, path, images, split, unlabeled, strict)


def stream_dataset_rows(path: str | os.PathLike[str], split: str | None = None, **columns: str | None) -> RowStream:
    """The rows of a dataset of the `datasets` library one after the other, without a copy of it on the disk.

    columns: `config`, `image_column` and `id_column`, as of `load_dataset_rows`. Raises DataError for any other data.
    """
    given, path = os.fspath(path), os.path.abspath(os.fspath(path))
    hub = _is_on_the_hub(given)
    if not hub and _format_of(path, split, unlabeled=True) != "datasets":
        raise DataError("only datasets of the `datasets` library are read as a stream, which this is not", file=path)
    return stream_huggingface(given if hub else path, split, **columns)


def _is_on_the_hub(given: str) -> bool:
    """Whether a path is the name of a dataset on the Hub. Raises DataError for one that is nothing at all."""
    if os.path.exists(given):
        return False
    if not is_hub_name(given):
        raise DataError("no such file or folder", file=os.path.abspath(given))
    return True


def _refuse(path: str, **options: object) -> None:
    for name, value in options.items():
        if value:
            raise DataError(f"`{name}` is for datasets of the `datasets` library, which this is not", file=path)


def _format_of(path: str, split: str | None, unlabeled: bool) -> str:
    """The format that a path looks like. Raises DataError for a file of none, and a folder that may be of several."""
    if is_saved_dataset(path):
        return "datasets"
    if os.path.isfile(path) and path.lower().endswith(LIST_SUFFIXES):
        return "list"
    if os.path.isfile(os.path.join(path, "header.json")):
        return "store"
    found = [name for name, (fits, _) in LAYOUTS.items() if fits(path)]
    if os.path.isfile(path):
        if found and not looks_like_coco(path):
            return found[0]
        if not path.lower().endswith(".json"):
            refuse_file(path)
        return "coco"
    files, in_folder = coco_files(path), os.path.isdir(os.path.join(path, "annotations"))
    if found and in_folder and files and split not in files:
        found.append("coco")
    if len(found) > 1:
        raise DataError(f"may be {' or '.join(found)}", file=path, remedy="Choose one by `format`.")
    if found and not (in_folder and files):
        return found[0]
    # Of a folder of images with a COCO file among them, all images are to be labeled.
    beside = files and not (unlabeled and split is None)
    return "coco" if beside or in_folder else "images"


def _load_files(
    kind: str, path: str, images: str | os.PathLike[str] | None, split: str | None, unlabeled: bool, strict: bool
) -> InstanceDataset:
    if kind in LAYOUTS:
        if images is not None:
            raise DataError(f"`images` is for COCO files and stores; {kind} has its images in the folder", file=path)
        return LAYOUTS[kind][1](path, split, unlabeled)
    folder = kind == "coco" and os.path.isdir(path)
    if split is not None and not folder:
        raise DataError(f"split {split!r} needs a folder with annotations/{split}.json", file=path)
    if kind == "coco":
        return read_coco(find_annotations(path, split) if folder else path, images, unlabeled, strict)
    if kind == "store":
        return read_store(path, images, strict)
    return read_path_list(path) if kind == "list" else read_image_folder(path)
