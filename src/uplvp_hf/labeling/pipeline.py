"""Pictures in, pseudo-label store out: blocks of pictures through labeler and namer, scores, resuming, failures.

decode (threads, ahead) -> labeler -> instances, namer, confidence floor, RLE and rows (a thread, behind) -> store
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ..data.dataset import InstanceDataset, Row, RowStream
from ..data.errors import DataError, ImageError
from ..data.rle import encode_masks, mask_area, masks_to_boxes
from .blocks import Deal, LoadedBlock, block_count, calibration_blocks, iterate_blocks, load_blocks
from .instances import Proposals
from .processes import Processes, decode_workers
from .progress import Progress
from .store import StoreError, StoreWriter, make_header

logger = logging.getLogger(__name__)

AGNOSTIC_NAME = "object"
AHEAD = 2  # blocks whose rows are being made while the labeler goes on


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

    def begin(self, images: Sequence[Image.Image], rows: Sequence[Row] | None = None) -> Callable[[], list[Proposals]]:
        """The part of `__call__` that keeps the device busy; what it returns is called in another thread and does the
        rest, while this one begins with the next pictures."""
        ...


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

    def __call__(self, images: Sequence[Image.Image], rows: Sequence[Row] | None = None) -> list[Proposals]:
        """One `Proposals` a picture. A subclass defines this, or `begin`."""
        return self.begin(images, rows)()

    def begin(self, images: Sequence[Image.Image], rows: Sequence[Row] | None = None) -> Callable[[], list[Proposals]]:
        """All the work at once, for a labeler that does not part it."""
        results = self(images, rows)
        return lambda: results


class Namer(Protocol):
    """Gives proposals `labels` (indices into `names`; -1: none of them) and `confidences`."""

    name: str
    names: Sequence[str]

    @property
    def settings(self) -> dict[str, Any]: ...

    def __call__(self, images: Sequence[Image.Image], proposals: Sequence[Proposals]) -> list[Proposals]: ...


@dataclass
class LabelSummary:
    """done: pictures labelled now. skipped: had a row before. failed: in the store's failure list. instances: of done.

    processes: that shared the work; the counts are sums over all of them.
    """

    output: str
    done: int = 0
    skipped: int = 0
    failed: int = 0
    instances: int = 0
    seconds: float = 0.0
    processes: int = 1

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def total(cls, parts: Sequence[LabelSummary]) -> LabelSummary:
        """Of all processes."""
        sums = {name: sum(getattr(part, name) for part in parts) for name in ("done", "skipped", "failed", "instances")}
        return cls(parts[0].output, **sums, seconds=max(part.seconds for part in parts), processes=len(parts))


@dataclass
class _Finished:
    """What became of a block: lines of the store, pictures without one, and how many it had one of before."""

    pictures: int
    skipped: int
    rows: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    failures: list[tuple[Row, int, DataError]] = field(default_factory=list)
    instances: int = 0


def choose_categories(names: Sequence[str], dataset: InstanceDataset | RowStream) -> list[dict[str, Any]]:
    """Categories for `names`, in their order: the data set's own ids where it knows all the names, else 1, 2, ..."""
    known = {category["name"]: category["id"] for category in dataset.categories}
    if all(name in known for name in names):
        return [{"id": known[name], "name": name} for name in names]
    return [{"id": index, "name": name} for index, name in enumerate(names, start=1)]


def apply_floor(proposals: Proposals, min_confidence: float, unnamed: int | None = None) -> Proposals:
    """Masks that the namer left unnamed (label -1) or was less sure of than `min_confidence` are dropped, or get the
    label `unnamed` with their mask's score alone."""
    if proposals.labels is None and proposals.confidences is None:
        return proposals
    count = len(proposals)
    labels = np.zeros(count, dtype=np.int64) if proposals.labels is None else proposals.labels
    confidences = np.ones(count, dtype=np.float32) if proposals.confidences is None else proposals.confidences
    named = (labels >= 0) & (confidences >= min_confidence)
    if unnamed is None:
        return proposals.take(named)
    ones = np.ones_like(confidences)
    return replace(proposals, labels=np.where(named, labels, unnamed), confidences=np.where(named, confidences, ones))


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
    calibration_pictures: int = 200,
    image_root: str | None = None,
    save_images: bool = True,
    shard_size: int = 50,
    workers: int | None = None,
    max_failed: float = 0.5,
) -> LabelSummary:
    """Label pictures and write them to a store (see `store`), alone or together with the other processes of an
    `accelerate launch` or torchrun, which all write into the same folder.

    Args:
        dataset: its objects, if any, are not looked at.
        labeler: the mask source. namer: names its masks; None keeps the labeler's own classes, if it has any.
        batch_size: pictures that are labelled together. It is no setting of the labels, but another one may change
            their last digits.
        resume: continue a store of equal settings; pictures with a row are skipped, failed ones are tried again.
        limit: only the first `limit` pictures.
        min_confidence: of the namer. Masks below it, and those it left unnamed, are dropped, or with unnamed="keep"
            get the class "object", which comes after the others.
        calibration_pictures: about so many pictures, in whole batches spread over the set (of a stream: its first),
            for `labeler.measure`.
        image_root: write picture paths relative to this folder; None writes absolute ones.
        save_images: pictures that are in no file are saved in the store's folder `images`; False refuses them.
        shard_size: rows a shard, rounded up to whole batches; at most that many are lost by a kill.
        workers: threads that decode pictures; None: this process's share of the cores, at most 8.
        max_failed: share of the pictures, 0 to 1.

    Memory does not grow with the number of pictures: at most 2 batches wait decoded and 2 are being written.
    Undecodable pictures, and those for which the labeler raises a DataError, are skipped, counted and listed. Raises
    StoreError as `StoreWriter` does and, when all is written, when more than `max_failed` of the pictures failed;
    OSError when the store cannot be written. Finished shards stay valid whatever happens.
    Returns the sums over all processes, in each of them.
    """
    if unnamed not in ("drop", "keep"):
        raise ValueError(f"unnamed {unnamed!r} is unknown; use 'drop' or 'keep'")
    if batch_size < 1 or not 0 <= max_failed <= 1:
        raise ValueError(f"batch_size {batch_size} must be at least 1, max_failed {max_failed} a share of 0 to 1")
    processes = Processes()
    names = list(labeler.vocabulary if namer is None else namer.names) or [AGNOSTIC_NAME]
    settings = {**labeler.settings, "min_confidence": min_confidence, "calibration_pictures": calibration_pictures}
    settings["namer"] = None if namer is None else {"name": namer.name, **namer.settings}
    if unnamed == "keep":
        settings["unnamed"] = unnamed
        names += [AGNOSTIC_NAME] if AGNOSTIC_NAME not in names else []
    categories = choose_categories(names, dataset)
    root = None if image_root is None else os.path.abspath(image_root)
    header = make_header(
        labeler.name, labeler.encoder_name, names, settings, categories, root, labeler.licence, batch_size
    )
    with StoreWriter(output_dir, header, resume, processes.rank, shard_size) as store:
        run = _Run(dataset, labeler, namer, store, processes, batch_size, limit, workers or decode_workers(processes))
        run.category_ids = [category["id"] for category in categories]
        run.min_confidence, run.image_root, run.save_images, run.progress = min_confidence, root, save_images, progress
        run.unnamed = names.index(AGNOSTIC_NAME) if unnamed == "keep" else None
        return run.label(calibration_pictures, max_failed)


@dataclass
class _Run:
    """One process's part of `label_images`."""

    dataset: InstanceDataset | RowStream
    labeler: Labeler
    namer: Namer | None
    store: StoreWriter
    processes: Processes
    batch_size: int
    limit: int | None
    workers: int
    category_ids: Sequence[int] = ()
    min_confidence: float = 0.0
    unnamed: int | None = None
    image_root: str | None = None
    save_images: bool = True
    progress: bool = True

    def label(self, calibration_pictures: int, max_failed: float) -> LabelSummary:
        started = time.monotonic()
        count = None if isinstance(self.dataset, RowStream) else len(range(len(self.dataset))[: self.limit])
        chosen = calibration_blocks(count, self.batch_size, min(calibration_pictures, self.limit or 10**9))
        deal = Deal(chosen, self.processes.rank, self.processes.size)
        self._calibrate(deal, min(calibration_pictures, calibration_pictures if count is None else count))
        self.summary = LabelSummary(output=os.fspath(self.store.folder), processes=self.processes.size)
        if self.processes.rank == 0:
            self._list_unread()
        self._work(deal, count)
        self.store.flush()
        self.summary.seconds = time.monotonic() - started
        parts = self.processes.gather((self.summary, self.store.repaired))
        total = LabelSummary.total([summary for summary, _ in parts])
        if self.processes.rank == 0:
            self.store.merge_failures(set().union(*(repaired for _, repaired in parts)))
            if total.failed > max_failed * (total.done + total.skipped + total.failed):
                raise StoreError(
                    f"{total.failed} of {total.done + total.skipped + total.failed} pictures failed, more than the "
                    f"share {max_failed:g} that is allowed (max_failed); {self.store.failures_file} lists them"
                )
        return total

    def _list_unread(self) -> None:
        # Failures that an annotation file is named for are about objects, which nobody looks at here.
        for failure in self.dataset.failures:
            if failure["file"] != self.dataset.name:
                self.store.fail(str(failure["file"]), failure["row"], failure["reason"])
                self.summary.failed += 1

    def _calibrate(self, deal: Deal, possible: int) -> None:
        """All processes measure their share, and take over what process 0 makes of it and writes into the header."""
        resumed = any(self.processes.gather(self.store.resumed))  # nobody writes before all have looked
        if resumed:
            self._check_calibration(possible)
        else:
            statistics = self._measure(deal)
            parts = sorted(entry for part in self.processes.gather(statistics) for entry in part)
            state = self.labeler.calibrate([json.loads(entry) for *_, entry in parts])
            self.store.start(self.processes.share(state))
        self.processes.gather(None)
        self.store.check_header_is_there()
        self.labeler.restore(self.store.header.get("state", {}))

    def _check_calibration(self, possible: int) -> None:
        """A store that was begun on a few pictures, with `limit`, keeps its calibration: say so."""
        pictures = self.store.header.get("state", {}).get("calibration", {}).get("pictures", possible)
        if 2 * pictures < possible and self.processes.rank == 0:
            logger.warning(
                "%s was calibrated on %d pictures, a new store would be on %d: labels get better in a new folder.",
                self.store.folder,
                pictures,
                possible,
            )

    def _measure(self, deal: Deal) -> list[tuple[int, int, str]]:
        """(block, position, statistics as JSON) of each picture of the calibration blocks of this process.

        Pictures that cannot be read are reported when their turn to be labelled comes.
        """
        measured: list[tuple[int, int, str]] = []
        mine = [number for number in deal.calibration if deal.mine(number)]
        limit = (mine[-1] + 1) * self.batch_size if mine else 0  # a stream is not read beyond it
        limit = limit if self.limit is None else min(limit, self.limit)
        blocks = iterate_blocks(self.dataset, self.batch_size, limit, set(mine).__contains__)
        with Progress("calibrating", self._pictures_in(mine), self.progress, self.processes) as bar:
            for loaded in load_blocks(blocks, (), self.workers):
                kept, (images, rows) = loaded.positions(), loaded.readable()
                entries = self._measure_block(images, rows)
                found = [(k, entry) for k, entry in zip(kept, entries) if not isinstance(entry, DataError)]
                measured += [(loaded.block.number, k, json.dumps(entry)) for k, entry in found]
                bar.update(len(loaded.pictures))
                if images and not entries:
                    break  # a labeler that calibrates nothing
        return measured

    def _measure_block(self, images: Sequence[Image.Image], rows: Sequence[Row]) -> list[Any]:
        if not images:
            return []
        try:
            return self.labeler.measure(images, rows)
        except DataError:
            return one_by_one(self.labeler.measure, images, rows)

    def _pictures_in(self, numbers: Sequence[int]) -> int | None:
        if isinstance(self.dataset, RowStream):
            return None
        return sum(len(self._pictures_of(number)) for number in numbers)

    def _pictures_of(self, number: int) -> range:
        return range(len(self.dataset))[: self.limit][number * self.batch_size : (number + 1) * self.batch_size]

    def _unfinished(self, deal: Deal, count: int | None) -> tuple[Callable[[int], bool], int | None]:
        """Which blocks are to be worked on, and how many pictures they hold; counts those that are skipped."""
        if count is None:
            return deal.mine, None
        numbers = set()
        for number in filter(deal.mine, range(block_count(count, self.batch_size))):
            if all(self.dataset.image_id(k) in self.store.finished for k in self._pictures_of(number)):
                self.summary.skipped += len(self._pictures_of(number))
            else:
                numbers.add(number)
        return numbers.__contains__, self._pictures_in(sorted(numbers))

    def _work(self, deal: Deal, count: int | None) -> None:
        wanted, pictures = self._unfinished(deal, count)
        blocks = iterate_blocks(self.dataset, self.batch_size, self.limit, wanted)
        waiting: deque[Future[_Finished]] = deque()
        with (
            ThreadPoolExecutor(1, "instances") as pool,
            Progress("labelling", pictures, self.progress, self.processes) as bar,
        ):
            try:
                for loaded in load_blocks(blocks, self.store.finished, self.workers):
                    images, rows = loaded.readable()
                    waiting.append(pool.submit(self._finish, loaded, self._begin(images, rows)))
                    if len(waiting) > AHEAD:
                        self._keep(waiting.popleft().result(), bar)
                while waiting:
                    self._keep(waiting.popleft().result(), bar)
            except OSError:
                raise  # the disk itself may be the trouble
            except BaseException:
                while waiting:  # rows that are complete are kept whatever stopped the run
                    self._keep(waiting.popleft().result(), bar)
                raise

    def _begin(self, images: Sequence[Image.Image], rows: Sequence[Row]) -> Callable[[], list[Proposals | DataError]]:
        """The labeler's `begin`; where one picture's data are at fault, the others are labelled nonetheless."""
        if not images:
            return list
        try:
            finish = self.labeler.begin(images, rows)
        except DataError:
            results = one_by_one(self.labeler, images, rows)
            return lambda: results

        def guarded() -> list[Proposals | DataError]:
            try:
                return finish()
            except DataError:
                return one_by_one(self.labeler, images, rows)

        return guarded

    def _finish(self, loaded: LoadedBlock, propose: Callable[[], list[Proposals | DataError]]) -> _Finished:
        """Instances, names and lines of a block. Runs in a thread beside the labeler's next block."""
        block, rows = loaded.block, loaded.block.rows
        result = _Finished(len(rows), len(rows) - len(loaded.todo))
        outcomes: dict[int, Any] = {k: loaded.pictures[k] for k in loaded.todo}  # errors so far, in the block's order
        proposed = dict(zip(loaded.positions(), propose()))
        good = [k for k, proposals in proposed.items() if isinstance(proposals, Proposals)]
        if self.namer is not None and good:
            proposed |= zip(good, self.namer([loaded.pictures[k] for k in good], [proposed[k] for k in good]))
        for k in loaded.todo:
            outcome, row = proposed.get(k, outcomes[k]), rows[k]
            if isinstance(outcome, DataError):
                result.failures.append((row, block.first + k, outcome))
                continue
            proposals = apply_floor(outcome, self.min_confidence, self.unnamed)
            image = self.store.picture_reference(row, block.first + k, self.image_root, self.save_images)
            size = loaded.pictures[k].size
            result.files.append(picture_file(row))
            result.rows.append(json.dumps(proposals_to_row(row, proposals, self.category_ids, image, size)))
            result.instances += len(proposals)
        return result

    def _keep(self, result: _Finished, bar: Progress) -> None:
        for row, number, error in result.failures:
            reason = error.reason if isinstance(error, ImageError) else str(error)
            self.store.fail(picture_file(row), f"row {number} (image id {row['image_id']!r})", reason)
        self.store.add_block(result.rows, result.files)
        summary = self.summary
        summary.done += len(result.rows)
        summary.skipped += result.skipped
        summary.failed += len(result.failures)
        summary.instances += result.instances
        bar.update(result.pictures, instances=summary.instances, failed=summary.failed)


def picture_file(row: Row) -> str:
    """What failure lists call the picture of a row."""
    return os.fspath(row["image"]) if isinstance(row["image"], (str, os.PathLike)) else row["file_name"]


def one_by_one(function: Callable[..., list], images: Sequence[Image.Image], rows: Sequence[Row]) -> list:
    """`function(images, rows)` picture by picture, with the DataError in place of what it raised one for."""
    results: list[Any] = []
    for image, row in zip(images, rows):
        try:
            results += function([image], [row])
        except DataError as error:
            results.append(error)
    return results
