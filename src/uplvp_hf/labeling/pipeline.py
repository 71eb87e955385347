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
from .encoders.weights import join_licenses, licenses_of
from .part import Part
from .processes import Processes, decode_workers
from .protocol import AGNOSTIC_NAME, Labeler, Namer
from .run import LabelSummary, Run, apply_floor, proposals_to_row
from .settings import RunSettings
from .store import StoreWriter, make_header

__all__ = [
    "AGNOSTIC_NAME",
    "LabelSummary",
    "Labeler",
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
    settings: RunSettings | None = None,
    progress: bool = True,
    limit: int | None = None,
    min_confidence: float = 0.0,
    save_images: bool = True,
    shard_size: int = 50,
    part: Part | None = None,
    **changes: Any,
) -> LabelSummary:
    """Label images and write them to a store (see `store`), alone or together with the other processes of an
    `accelerate launch` or torchrun, which all write into the same folder.

    Args:
        dataset: its objects, if any, are not looked at.
        namer: names the labeler's masks; None keeps the labeler's own classes, if it has any.
        settings, changes: see `RunSettings`; for example `batch_size=4`.
        limit: only the first `limit` images.
        min_confidence: of the namer. `unnamed` says what becomes of masks below it, and of those it left unnamed.
        save_images: images that are in no file are saved in the store's folder `images`; False refuses them.
        shard_size: rows a shard, rounded up to whole batches; at most that many are lost by a kill.
        part: of the images, None for all; the others are labeled elsewhere, and `merge_stores` makes one store of all.

    Memory does not grow with the number of images, their ids and paths aside: at most four batches exist. Rows are
    equal to the byte for equal batches and torch threads, whatever the processes. Images that fail are skipped, counted
    and listed. Raises StoreError as `StoreWriter` does and, when all is written, when more than the share `max_failed`
    of the images failed; OSError when the store cannot be written. Finished shards stay valid. Returns the sums of all.
    """
    if (root := changes.get("image_root")) is not None:
        changes["image_root"] = os.fspath(root)
    run = RunSettings.of(settings, **changes)
    processes, part = Processes(), part or Part()
    header = _header(dataset, labeler, namer, run, min_confidence, part.record(dataset, limit, run.batch_size))
    with StoreWriter(output_dir, header, run.resume, processes.rank, shard_size) as store:
        # A namer that looks at the masks replaces what the labeler saw of them.
        store.about_features = getattr(namer, "about_features", None) or getattr(labeler, "about_features", None)
        work = Run(
            dataset,
            labeler,
            namer,
            store,
            processes,
            run.batch_size,
            limit,
            workers=run.workers or decode_workers(processes),
            category_ids=[category["id"] for category in header["categories"]],
            min_confidence=min_confidence,
            unnamed=header["vocabulary"].index(AGNOSTIC_NAME) if run.unnamed == "keep" else None,
            image_root=header["image_root"],
            save_images=save_images,
            features=run.features,
            progress=progress,
            part=part,
            calibration=run.calibration,
        )
        return work.label(run.calibration_images, run.max_failed)


def _header(
    dataset: InstanceDataset | RowStream,
    labeler: Labeler,
    namer: Namer | None,
    run: RunSettings,
    min_confidence: float,
    part: dict[str, Any] | None,
) -> dict[str, Any]:
    """The store's header: all that the labels depend on, their names and categories."""
    names = list(labeler.vocabulary if namer is None else namer.names) or [AGNOSTIC_NAME]
    kept = {**labeler.settings, "min_confidence": min_confidence, "calibration_images": run.calibration_images}
    kept["namer"] = None if namer is None else {"name": namer.name, **namer.settings}
    if run.unnamed == "keep":
        kept["unnamed"] = run.unnamed
        names += [AGNOSTIC_NAME] if AGNOSTIC_NAME not in names else []
    root = None if run.image_root is None else os.path.abspath(run.image_root)
    categories = choose_categories(names, dataset)
    licenses = licenses_of(labeler, namer)
    license = labeler.license if licenses.keys() <= {labeler.encoder_name} else join_licenses(licenses)
    look = getattr(getattr(labeler, "encoder", None), "look", None)
    return make_header(
        labeler.name, labeler.encoder_name, names, kept, categories, root, license, run.batch_size, look, part
    )
