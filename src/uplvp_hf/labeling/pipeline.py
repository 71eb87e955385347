"""Pictures in, pseudo-label store out: batches, naming, scores, progress, resuming, failures."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from PIL import Image
from tqdm import tqdm

from ..data.dataset import InstanceDataset, Row
from ..data.errors import DataError, ImageError
from ..data.rle import encode_masks, mask_area, masks_to_boxes
from .instances import Proposals
from .store import StoreWriter, make_header

logger = logging.getLogger(__name__)

AGNOSTIC_NAME = "object"


class Labeler(Protocol):
    """A mask source. `vocabulary` is empty for a class-agnostic one; `settings` must survive JSON and hold everything
    that the labels depend on. `licence`: of the weights, where it is known. `LabelerBase` has the rest for a source
    that calibrates nothing.

    `rows` are the data set's rows of the same pictures, for sources that look something up; None: there are none.
    """

    name: str
    encoder_name: str
    vocabulary: Sequence[str]
    licence: str | None

    @property
    def settings(self) -> dict[str, Any]: ...

    def measure(self, images: Sequence[Image.Image], rows: Sequence[Row] | None = None) -> list[Any]:
        """One JSON value a picture, for `calibrate`; [] when there is nothing to calibrate."""
        ...

    def calibrate(self, statistics: list[Any]) -> dict[str, Any]:
        """From what `measure` gave for all calibration pictures, in the data set's order, to a state: JSON values."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a state that `calibrate` returned, in this run, another process or an earlier run."""
        ...

    def __call__(self, images: Sequence[Image.Image], rows: Sequence[Row] | None = None) -> list[Proposals]: ...


class LabelerBase:
    """A labeler without calibration, without classes and of unknown licence; subclasses replace what differs."""

    vocabulary: Sequence[str] = ()
    licence: str | None = None

    def measure(self, images: Sequence[Image.Image], rows: Sequence[Row] | None = None) -> list[Any]:
        """Nothing to measure."""
        return []

    def calibrate(self, statistics: list[Any]) -> dict[str, Any]:
        """Nothing to calibrate."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore."""


class Namer(Protocol):
    """Gives proposals `labels` (indices into `names`) and `confidences`."""

    name: str
    names: Sequence[str]

    @property
    def settings(self) -> dict[str, Any]: ...

    def __call__(self, images: Sequence[Image.Image], proposals: Sequence[Proposals]) -> list[Proposals]: ...


@dataclass
class LabelSummary:
    """done: pictures labelled now. skipped: had a row before. failed: listed in failures.jsonl. instances: of done."""

    output: str
    done: int = 0
    skipped: int = 0
    failed: int = 0
    instances: int = 0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def choose_categories(names: Sequence[str], dataset: InstanceDataset) -> list[dict[str, Any]]:
    """Categories for `names`, in their order: the data set's own ids where it knows all the names, else 1, 2, ..."""
    known = {category["name"]: category["id"] for category in dataset.categories}
    if all(name in known for name in names):
        return [{"id": known[name], "name": name} for name in names]
    return [{"id": index, "name": name} for index, name in enumerate(names, start=1)]


def proposals_to_row(
    row: Row, proposals: Proposals, category_ids: Sequence[int], image: str, size: tuple[int, int]
) -> dict:
    """A store row: `row` with the proposals as objects. `size` is (width, height) of the loaded picture.

    The score is the mask's score times the namer's confidence; the latter is also kept as `confidence`.
    """
    count = len(proposals)
    labels = [0] * count if proposals.labels is None else [int(label) for label in proposals.labels]
    confidences = [1.0] * count if proposals.confidences is None else [float(value) for value in proposals.confidences]
    boxes = masks_to_boxes(proposals.masks).tolist()
    objects = {
        "segmentation": encode_masks(proposals.masks) if count else [],
        "category_id": [category_ids[label] for label in labels],
        "bbox": [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in boxes],
        "area": [int(area) for area in mask_area(proposals.masks)],
        "iscrowd": [0] * count,
        "score": [round(float(s) * c, 5) for s, c in zip(proposals.scores, confidences)],
        "confidence": [round(value, 5) for value in confidences],
    }
    kept = {key: row[key] for key in ("image_id", "file_name")}
    return {"image": image, **kept, "width": size[0], "height": size[1], "objects": objects}


def _image_reference(row: Row, image_root: str | None) -> str:
    if not isinstance(row["image"], (str, os.PathLike)):
        raise DataError(
            "the picture is in memory; a store refers to picture files",
            file=row["file_name"],
            remedy="Save the pictures first.",
        )
    path = os.path.abspath(os.fspath(row["image"]))
    if image_root is None:
        return path
    relative = os.path.relpath(path, os.path.abspath(image_root))
    if relative.startswith(os.pardir):
        raise DataError(f"lies outside image_root {image_root}", file=path, remedy="Leave image_root out.")
    return relative.replace(os.sep, "/")


def _spread(count: int, wanted: int) -> list[int]:
    """`wanted` indices spread evenly over range(count)."""
    return [int(k * count / min(wanted, count)) for k in range(min(wanted, count))] if count else []


def _readable(dataset: InstanceDataset, indices: Sequence[int], progress: bool) -> Iterator[Image.Image]:
    """Pictures for calibration; those that cannot be read are reported when their turn to be labelled comes."""
    for index in tqdm(indices, unit="picture", desc="calibrating", leave=False, disable=None if progress else True):
        try:
            image = dataset.load_image(index)
        except ImageError:
            continue
        yield image


def _check_calibration(store: StoreWriter, possible: int) -> None:
    """A store that was begun on a few pictures, with `limit`, keeps its calibration: say so."""
    pictures = store.header.get("state", {}).get("calibration", {}).get("pictures", possible)
    if 2 * pictures < possible:
        logger.warning(
            "%s was calibrated on %d pictures, a new store would be on %d: labels get better in a new folder.",
            store.folder,
            pictures,
            possible,
        )


def label_images(
    dataset: InstanceDataset,
    labeler: Labeler,
    namer: Namer | None,
    output_dir: str | os.PathLike[str],
    batch_size: int = 8,
    resume: bool = True,
    progress: bool = True,
    limit: int | None = None,
    min_confidence: float = 0.0,
    calibration_pictures: int = 200,
    image_root: str | None = None,
    shard_size: int = 50,
    rank: int = 0,
    world_size: int = 1,
) -> LabelSummary:
    """Label pictures and write them to a store (see `store`).

    Args:
        dataset: its objects, if any, are not looked at.
        labeler: the mask source. namer: names its masks; None keeps the labeler's own classes, if it has any.
        resume: continue a store of equal settings; pictures with a row are skipped, failed ones are tried again.
        limit: only the first `limit` pictures.
        min_confidence: drop masks that the namer was less sure of.
        calibration_pictures: at most so many pictures, spread over the set, for `labeler.measure`.
        image_root: write picture paths relative to this folder; None writes absolute ones.
        rank, world_size: this process takes every `world_size`-th picture.

    Undecodable pictures are skipped, counted and listed. Raises StoreError as `StoreWriter` does, OSError when the
    store cannot be written; finished shards stay valid whatever happens.
    """
    started = time.monotonic()
    names = list(labeler.vocabulary if namer is None else namer.names) or [AGNOSTIC_NAME]
    categories = choose_categories(names, dataset)
    settings = {**labeler.settings, "min_confidence": min_confidence, "calibration_pictures": calibration_pictures}
    settings["namer"] = None if namer is None else {"name": namer.name, **namer.settings}
    root = None if image_root is None else os.path.abspath(image_root)
    header = make_header(labeler.name, labeler.encoder_name, names, settings, categories, root)
    summary = LabelSummary(output=os.fspath(output_dir))
    everything = range(len(dataset))[:limit]
    with StoreWriter(output_dir, header, resume, rank, shard_size) as store:
        if store.resumed:
            labeler.restore(store.header.get("state", {}))
            _check_calibration(store, min(calibration_pictures, len(everything)))
        else:
            picked = [everything[k] for k in _spread(len(everything), calibration_pictures)]
            statistics: list[Any] = []
            for image in _readable(dataset, picked, progress):
                statistics += labeler.measure([image])
            state = labeler.calibrate(statistics)
            labeler.restore(state)
            store.start(state)
        if rank == 0:
            # Failures that an annotation file is named for are about objects, which nobody looks at here.
            unread = [failure for failure in dataset.failures if failure["file"] != dataset.name]
            for failure in unread:
                store.fail(str(failure["file"]), failure["row"], failure["reason"])
            summary.failed += len(unread)
        mine = everything[rank::world_size]
        todo = [index for index in mine if dataset[index]["image_id"] not in store.finished]
        summary.skipped = len(mine) - len(todo)
        category_ids = [category["id"] for category in categories]
        with tqdm(total=len(todo), unit="picture", desc="labelling", disable=None if progress else True) as bar:
            for start in range(0, len(todo), batch_size):
                batch = todo[start : start + batch_size]
                _label_batch(dataset, batch, labeler, namer, store, category_ids, min_confidence, root, summary)
                bar.update(len(batch))
                bar.set_postfix(instances=summary.instances, failed=summary.failed)
        store.flush()
    summary.seconds = time.monotonic() - started
    return summary


def _label_batch(
    dataset: InstanceDataset,
    indices: Sequence[int],
    labeler: Labeler,
    namer: Namer | None,
    store: StoreWriter,
    category_ids: Sequence[int],
    min_confidence: float,
    image_root: str | None,
    summary: LabelSummary,
) -> None:
    images: list[Image.Image] = []
    loaded: list[int] = []
    for index in indices:
        try:
            images.append(dataset.load_image(index))
            loaded.append(index)
        except ImageError as error:
            row = dataset[index]
            store.fail(str(error.file or row["file_name"]), f"row {index} (image id {row['image_id']!r})", error.reason)
            summary.failed += 1
    if not images:
        return
    results = labeler(images, [dataset[index] for index in loaded])
    if namer is not None:
        results = namer(images, results)
    for index, image, proposals in zip(loaded, images, results):
        if proposals.confidences is not None:
            proposals = proposals.take(proposals.confidences >= min_confidence)
        row = dataset[index]
        entry = proposals_to_row(row, proposals, category_ids, _image_reference(row, image_root), image.size)
        store.add(entry, file=os.fspath(row["image"]))
        summary.done += 1
        summary.instances += len(proposals)
