"""The data of a benchmark: as given, generated scenes, or a validation part cut from the training images."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from ..data import DataError, InstanceDataset, load_dataset_rows, write_coco
from ..data.synthetic import write_scenes
from ..training.config import ConfigError
from .plan import Sources
from .recipe import Benchmark

_SCENES = ("unlabeled", "train", "val")
_VALIDATION_SEED = 1  # of the cut; labels are drawn with seeds of their own


def prepare_sources(benchmark: Benchmark, output: Path) -> Sources:
    """Makes what is to be made, once, below `output/data`, and says where everything lies.

    Raises ConfigError and DataError for data that cannot be used.
    """
    data = benchmark.data
    if data.scenes is not None:
        sources = _scenes(benchmark, output / "data")
    else:
        given = {key: getattr(data, key) for key in ("train", "train_split", "train_images")}
        train = {key: value for key, value in given.items() if value is not None}
        given = {key: getattr(data, key) for key in ("val", "val_split", "val_images")}
        val = {key: value for key, value in given.items() if value is not None}
        sources = Sources(train, val, {"path": data.unlabeled} if data.unlabeled else _as_arguments(train))
    return _with_validation(benchmark, sources, output / "data") if benchmark.validation else sources


def _as_arguments(train: dict[str, str]) -> dict[str, str]:
    """Settings of training as arguments of `load_dataset_rows`."""
    names = {"train": "path", "train_split": "split", "train_images": "images"}
    return {names[key]: value for key, value in train.items()}


def _scenes(benchmark: Benchmark, folder: Path) -> Sources:
    given = dict(benchmark.data.scenes)
    look = {key: given.pop(key) for key in ("size", "cast", "crowded") if key in given}
    wanted = [name for name in _SCENES if name in given or name != "unlabeled" or benchmark.labels]
    if set(given) != set(wanted) or not all(isinstance(count, int) and count > 0 for count in given.values()):
        raise ConfigError(f"`data.scenes` holds a number for each of {', '.join(wanted)}, got {given}.")
    if not isinstance(look.get("crowded", False), bool):
        raise ConfigError(f"`data.scenes.crowded` is true or false, got {look['crowded']!r}.")
    for seed, name in enumerate(_SCENES):
        if name in given and not (folder / name / "annotations" / "instances.json").is_file():
            shutil.rmtree(folder / name, ignore_errors=True)  # what broke off: the annotations are written last
            write_scenes(folder / name, given[name], seed=seed, **look)
    paths = {name: str(folder / name) for name in given}
    return Sources({"train": paths["train"]}, {"val": paths["val"]}, {"path": paths.get("unlabeled", paths["train"])})


def _with_validation(benchmark: Benchmark, sources: Sources, folder: Path) -> Sources:
    """The training images in two parts; `val` is not touched."""
    path, marker = folder / "parts", folder / "parts" / "annotations" / "val.json"
    if not marker.is_file():
        rows = load_dataset_rows(**_as_arguments(sources.train))
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(_VALIDATION_SEED)).tolist()
        count = round(len(rows) * benchmark.validation)
        if not 0 < count < len(rows):
            raise ConfigError(f"`validation`: {benchmark.validation} of {len(rows)} images leaves a part empty.")
        (path / "annotations").mkdir(parents=True, exist_ok=True)
        link = path / "images"
        if not link.is_symlink():
            link.symlink_to(image_root(rows), target_is_directory=True)
        write_coco(rows.subset(sorted(order[count:])), path / "annotations" / "train.json")
        write_coco(rows.subset(sorted(order[:count])), marker)
    train = {"train": str(path), "train_split": "train"}
    given = benchmark.data.unlabeled
    same = benchmark.data.scenes is None and (given is None or _holds(Path(given), path / "images"))
    unlabeled = _as_arguments(train) if same else sources.unlabeled
    return Sources(train, {"val": str(path), "val_split": "val"}, unlabeled)


def _holds(folder: Path, images: Path) -> bool:
    """Whether one of the two lies in the other, so that images of the validation part would be pre-trained on."""
    folder, images = folder.resolve(), images.resolve()
    return folder in (images, *images.parents) or images in folder.parents


def image_root(rows: InstanceDataset) -> str:
    """The folder that all file names are relative to."""
    roots = set()
    for row in rows.rows:
        file, name = row["image"], row["file_name"]
        if not isinstance(file, str) or not file.endswith(f"{os.sep}{name}"):
            raise DataError("`validation` needs images in files", file=rows.name, row=str(row["image_id"]))
        roots.add(file.removesuffix(name))
    if len(roots) != 1:
        raise DataError(f"`validation` needs images below one folder, not {sorted(roots)[:3]}", file=rows.name)
    return roots.pop()
