"""Images in, pseudo-label store out: blocks of images through labeler and namer, scores, resuming, failures.

decode (threads, ahead) -> labeler's forward -> instances (threads, behind) -> namer -> floor, RLE, rows (the same
threads) -> store. Models are called by the main thread alone. Threads, as what takes long in them (decoders, torch,
numpy) works outside of Python's lock. Processes would not pay: to copy masks to one takes about as long as to
encode them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ..data.dataset import InstanceDataset, RowStream
from ..models.errors import UserError
from .processes import Processes, decode_workers
from .protocol import AGNOSTIC_NAME, Labeler, LabelerBase, Namer
from .run import LabelSummary, Run, apply_floor, proposals_to_row
from .store import StoreWriter, make_header

__all__ = [
    "AGNOSTIC_NAME",
    "LabelSummary",
    "Labeler",
    "LabelerBase",
    "Namer",
    "apply_floor",
    "choose_categories",
    "label_images",
    "proposals_to_row",
]


def choose_categories(names: Sequence[str], dataset: InstanceDataset | RowStream) -> list[dict[str, Any]]:
    """Categories for `names`, in their order: the dataset's own ids where it knows all the names, else 1, 2, ..."""
    known = {category["name"]: category["id"] for category in dataset.categories}
    if all(name in known for name in names):
        return [{"id": known[name], "name": name} for name in names]
    return [{"id": index, "name": name} for index, name in enumerate(names, start=1)]


def label_images(
    dataset: InstanceDataset | RowStream,
    labeler: Labeler,
    namer: Namer | None,
    output_dir: str | os.PathLike[str],
    batch_size: int = 8,
    resume: bool = True,
    progress: bool = True,
    limit: int | None = None,
    min_confidence: float = 0.0,
    unnamed: str = "drop",
    calibration_images: int = 200,
    image_root: str | None = None,
    save_images: bool = True,
    shard_size: int = 50,
    workers: int | None = None,
    max_failed: float = 0.5,
) -> LabelSummary:
    """Label images and write them to a store (see `store`), alone or together with the other processes of an
    `accelerate launch` or torchrun, which all write into the same folder.

    Args:
        dataset: its objects, if any, are not looked at.
        labeler: the mask source. namer: names its masks; None keeps the labeler's own classes, if it has any.
        batch_size: images that are labeled together. It is no setting of the labels, but another one may change
            their last digits.
        resume: continue a store of equal settings; images with a row are skipped, failed ones are tried again.
        limit: only the first `limit` images.
        min_confidence: of the namer. Masks below it, and those it left unnamed, are dropped, or with unnamed="keep"
            get the class "object", which comes after the others.
        calibration_images: about so many images, in whole batches spread over the set (of a stream: its first),
            for `labeler.measure`.
        image_root: write image paths relative to this folder; None writes absolute ones.
        save_images: images that are in no file are saved in the store's folder `images`; False refuses them.
        shard_size: rows a shard, rounded up to whole batches; at most that many are lost by a kill.
        workers: threads that decode images; None: this process's share of the cores, at most 8.
        max_failed: share of the images, 0 to 1.

    Memory does not grow with the number of images, their ids and paths aside: two batches wait decoded, and the masks
    of two to four exist. Rows are equal to the byte for equal batches and torch threads, whatever the processes.
    Undecodable images, and those for which the labeler raises a DataError, are skipped, counted and listed. Raises
    StoreError as `StoreWriter` does and, when all is written, when more than `max_failed` of the images failed;
    OSError when the store cannot be written. Finished shards stay valid whatever happens.
    Returns the sums over all processes, in each of them.
    """
    if unnamed not in ("drop", "keep"):
        raise UserError(f"unnamed {unnamed!r} is unknown; use 'drop' or 'keep'")
    if batch_size < 1 or not 0 <= max_failed <= 1:
        raise UserError(f"batch_size {batch_size} must be at least 1, max_failed {max_failed} a share of 0 to 1")
    processes = Processes()
    names = list(labeler.vocabulary if namer is None else namer.names) or [AGNOSTIC_NAME]
    settings = {**labeler.settings, "min_confidence": min_confidence, "calibration_images": calibration_images}
    settings["namer"] = None if namer is None else {"name": namer.name, **namer.settings}
    if unnamed == "keep":
        settings["unnamed"] = unnamed
        names += [AGNOSTIC_NAME] if AGNOSTIC_NAME not in names else []
    categories = choose_categories(names, dataset)
    root = None if image_root is None else os.path.abspath(image_root)
    header = make_header(
        labeler.name, labeler.encoder_name, names, settings, categories, root, labeler.license, batch_size
    )
    with StoreWriter(output_dir, header, resume, processes.rank, shard_size) as store:
        run = Run(
            dataset,
            labeler,
            namer,
            store,
            processes,
            batch_size,
            limit,
            workers=workers or decode_workers(processes),
            category_ids=[category["id"] for category in categories],
            min_confidence=min_confidence,
            unnamed=names.index(AGNOSTIC_NAME) if unnamed == "keep" else None,
            image_root=root,
            save_images=save_images,
            progress=progress,
        )
        return run.label(calibration_images, max_failed)
