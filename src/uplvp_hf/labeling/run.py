"""One process's part of a labeling run: calibration, the stages that blocks go through, what is kept of them."""

from __future__ import annotations

import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from ..data.dataset import InstanceDataset, Row, RowStream
from ..data.errors import DataError, ImageError
from ..models.masks import encode_masks, mask_area, tight_boxes
from .blocks import Deal, LoadedBlock, block_count, calibration_blocks, iterate_blocks, load_blocks
from .cutting.proposals import Proposals
from .failures import UnexpectedFailure, as_failure, each, one_by_one
from .part import Part
from .processes import Processes
from .progress import Progress
from .protocol import Labeler, Namer
from .store import StoreError, StoreWriter

logger = logging.getLogger(__name__)

HOPELESS = 50  # images that failed for no known reason, before any was labeled, that end a run
AHEAD = 2  # blocks whose instances are being cut, and whose rows are being made, while the labeler goes on


@dataclass
class LabelSummary:
    """done: images labeled now. skipped: had a row before. failed: in the store's failure list. instances: of done.

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
    """What became of a block: lines of the store, images without one, and how many it had one of before."""

    images: int
    skipped: int
    rows: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    features: list[np.ndarray | None] = field(default_factory=list)
    failures: list[tuple[Row, int, DataError]] = field(default_factory=list)
    instances: int = 0


def apply_floor(proposals: Proposals, min_confidence: float, unnamed: int | None = None) -> Proposals:
    """Masks that the namer left unnamed (label -1) or was less sure of than `min_confidence` are dropped, or get the
    label `unnamed`. They keep the namer's low confidence, so that they score below the named masks of equal outline."""
    if proposals.labels is None and proposals.confidences is None:
        return proposals
    count = len(proposals)
    labels = np.zeros(count, dtype=np.int64) if proposals.labels is None else proposals.labels
    confidences = np.ones(count, dtype=np.float32) if proposals.confidences is None else proposals.confidences
    named = (labels >= 0) & (confidences >= min_confidence)
    if unnamed is None:
        return proposals.take(named)
    return replace(proposals, labels=np.where(named, labels, unnamed), confidences=confidences)


def proposals_to_row(
    row: Row, proposals: Proposals, category_ids: Sequence[int], image: str, size: tuple[int, int]
) -> dict:
    """A store row: `row` with the proposals as objects. `size` is (width, height) of the loaded image.

    The score is the mask's score times the namer's confidence; the latter is also kept as `confidence`.
    """
    count = len(proposals)
    labels = [0] * count if proposals.labels is None else [int(label) for label in proposals.labels]
    confidences = [1.0] * count if proposals.confidences is None else [float(value) for value in proposals.confidences]
    boxes = tight_boxes(proposals.masks).astype(float).tolist()
    objects = {
        "segmentation": encode_masks(proposals.masks) if count else [],
        "category_id": [category_ids[label] for label in labels],
        "bbox": [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in boxes],
        "area": [int(area) for area in mask_area(proposals.masks)],
        "iscrowd": [0] * count,
        "score": [round(float(s) * c, 5) for s, c in zip(proposals.scores, confidences)],
        "confidence": [round(value, 5) for value in confidences],
    }
    kept = {key: row[key] for key in ("image_id", "file_name", "as_stored") if key in row}
    return {"image": image, **kept, "width": size[0], "height": size[1], "objects": objects}


@dataclass
class Run:
    """One process's part of `label_images`, which says more about the fields.

    category_ids: of each label. unnamed: the label of masks without a name, None drops them. part: of the images, that
    this run labels; it is calibrated on all of them.
    """

    dataset: InstanceDataset | RowStream
    labeler: Labeler
    namer: Namer | None
    store: StoreWriter
    processes: Processes
    batch_size: int
    limit: int | None
    workers: int
    category_ids: Sequence[int]
    min_confidence: float
    unnamed: int | None
    image_root: str | None
    save_images: bool
    features: bool
    progress: bool
    part: Part
    calibration: str | None

    def label(self, calibration_images: int, max_failed: float) -> LabelSummary:
        """All of it; the sums over all processes. Raises as `label_images` does."""
        started = time.monotonic()
        count = None if isinstance(self.dataset, RowStream) else len(range(len(self.dataset))[: self.limit])
        chosen = calibration_blocks(count, self.batch_size, min(calibration_images, self.limit or 10**9))
        deal = Deal(chosen, self.processes.rank, self.processes.size)
        self._calibrate(deal, min(calibration_images, calibration_images if count is None else count))
        self.summary = LabelSummary(output=os.fspath(self.store.folder), processes=self.processes.size)
        if self.processes.rank == 0:
            self.store.unfinish()
            if self.part.number == 1:
                self._list_unread()
        self._work(deal, count)
        self.store.flush()
        self.summary.seconds = time.monotonic() - started
        parts = self.processes.gather((self.summary, self.store.repaired))
        total = LabelSummary.total([summary for summary, _ in parts])
        if self.processes.rank == 0:
            self.store.merge_failures(set().union(*(repaired for _, repaired in parts)))
            images = total.done + total.skipped + total.failed
            if total.failed > max_failed * images:
                raise StoreError(
                    f"{total.failed} of {images} images failed, more than the share {max_failed:g} that is allowed "
                    f"(max_failed); {self.store.failures_file} lists them"
                )
            self.store.finish(images)
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
            if self.processes.rank == 0:
                self.store.merge_failures()
        elif self.calibration is not None:
            self.store.start(self.store.state_of(self.calibration))
        else:
            found = self.processes.gather(self._measure(deal))
            parts = sorted(entry for measured, _ in found for entry in measured)
            faults = [fault for _, fault in found if fault is not None]
            try:
                state = self.labeler.calibrate([json.loads(entry) for *_, entry in parts])
            except ValueError as error:  # a labeler that calibrates nothing takes an empty list
                if parts or not faults:
                    raise
                raise StoreError(f"no image can be calibrated on; the first: {faults[0]}") from error
            self.store.start(self.processes.share(state))
        self.processes.gather(None)
        self.store.check_header_is_there()
        self.labeler.restore(self.store.header.get("state", {}))

    def _check_calibration(self, possible: int) -> None:
        """A store that was begun on a few images, with `limit`, keeps its calibration: say so."""
        images = self.store.header.get("state", {}).get("calibration", {}).get("images", possible)
        if 2 * images < possible and self.processes.rank == 0:
            logger.warning(
                "%s was calibrated on %d images, a new store would be on %d: labels get better in a new folder.",
                self.store.folder,
                images,
                possible,
            )

    def _measure(self, deal: Deal) -> tuple[list[tuple[int, int, str]], str | None]:
        """(block, position, statistics as JSON) of each image of the calibration blocks of this process, and why
        the first one that has none could not be measured.

        Images that cannot be read are reported when their turn to be labeled comes.
        """
        measured: list[tuple[int, int, str]] = []
        faults: list[str] = []
        mine = [number for number in deal.calibration if deal.mine(number)]
        limit = (mine[-1] + 1) * self.batch_size if mine else 0  # a stream is not read beyond it
        limit = limit if self.limit is None else min(limit, self.limit)
        blocks = iterate_blocks(self.dataset, self.batch_size, limit, set(mine).__contains__)
        with Progress("calibrating", self._images_in(mine), self.progress, self.processes) as bar:
            for loaded in load_blocks(blocks, (), self.workers):
                kept, (images, rows) = loaded.positions(), loaded.readable()
                entries = each(self.labeler.measure, images, rows) if images else []
                found = [(k, entry) for k, entry in zip(kept, entries) if not isinstance(entry, DataError)]
                measured += [(loaded.block.number, k, json.dumps(entry)) for k, entry in found]
                bar.update(len(loaded.images))
                if images and not entries:
                    return [], None  # a labeler that calibrates nothing
                faults = faults or [str(fault) for fault in (*loaded.images, *entries) if isinstance(fault, DataError)]
        return measured, faults[0] if faults else None

    def _images_in(self, numbers: Sequence[int]) -> int | None:
        if isinstance(self.dataset, RowStream):
            return None
        return sum(len(self._images_of(number)) for number in numbers)

    def _images_of(self, number: int) -> range:
        return range(len(self.dataset))[: self.limit][number * self.batch_size : (number + 1) * self.batch_size]

    def _unfinished(self, deal: Deal, count: int | None) -> tuple[Callable[[int], bool], int | None]:
        """Which blocks are to be worked on, and how many images they hold; counts those that are skipped."""
        if count is None:
            return lambda number: self.part.has(number) and deal.mine(number // self.part.of), None
        numbers = set()
        for number in filter(deal.mine, self.part.blocks(block_count(count, self.batch_size))):
            if all(self.dataset.image_id(k) in self.store.finished for k in self._images_of(number)):
                self.summary.skipped += len(self._images_of(number))
            else:
                numbers.add(number)
        return numbers.__contains__, self._images_in(sorted(numbers))

    def _work(self, deal: Deal, count: int | None) -> None:
        wanted, images = self._unfinished(deal, count)
        blocks = iterate_blocks(self.dataset, self.batch_size, self.limit, wanted)
        self.cutting: deque = deque()
        self.writing: deque = deque()
        self.unforeseen = 0
        threads = torch.get_num_threads()
        with (
            ThreadPoolExecutor(min(AHEAD, self.workers), "instances", torch.set_num_threads, (1,)) as pool,
            Progress("labeling", images, self.progress, self.processes) as bar,
        ):
            try:
                for loaded in load_blocks(blocks, self.store.finished, self.workers):
                    self._submit(loaded, pool)
                    self._advance(AHEAD, pool, bar)
                self._advance(0, pool, bar)
            except OSError:
                raise  # the disk itself may be the trouble
            except BaseException:
                self._advance(0, pool, bar)  # rows that are complete are kept whatever stopped the run
                raise
            finally:
                torch.set_num_threads(threads)  # the pool's own number became that of all threads to come

    def _submit(self, loaded: LoadedBlock, pool: ThreadPoolExecutor) -> None:
        """The labeler's part that keeps the device busy, here; the rest in the pool."""
        images, rows = loaded.readable()
        try:
            finish = self.labeler.begin(images, rows) if images else list
        except Exception as error:  # one image is at fault: the others are labeled nonetheless
            as_failure(error)
            finish = partial(iter, one_by_one(self.labeler, images, rows))
        if self.namer is None:
            self.writing.append((loaded, pool.submit(self._make_rows, loaded, finish)))
        else:
            self.cutting.append((loaded, pool.submit(lambda: list(finish()))))

    def _advance(self, ahead: int, pool: ThreadPoolExecutor, bar: Progress) -> None:
        """Name and write blocks, in order, until at most `ahead` are left in each of the two queues."""
        while len(self.cutting) > ahead:
            loaded, cut = self.cutting.popleft()
            named = self._name(loaded, self._result(loaded, cut))
            self.writing.append((loaded, pool.submit(self._make_rows, loaded, partial(iter, named))))
        while len(self.writing) > ahead:
            loaded, written = self.writing.popleft()
            outcome = self._result(loaded, written)
            if not isinstance(outcome, _Finished):
                outcome = self._make_rows(loaded, lambda outcome=outcome: outcome)
            self._keep(outcome, bar)

    def _result(self, loaded: LoadedBlock, future: Future) -> Any:
        """Of a task; image by image where an image made it fail."""
        try:
            return future.result()
        except Exception as error:
            as_failure(error)
        return one_by_one(self.labeler, *loaded.readable())

    def _name(self, loaded: LoadedBlock, proposals: list[Proposals | DataError]) -> list[Proposals | DataError]:
        images, _ = loaded.readable()
        good = [k for k, outcome in enumerate(proposals) if isinstance(outcome, Proposals)]
        named = each(self.namer, [images[k] for k in good], [proposals[k] for k in good]) if good else []
        results = list(proposals)
        for k, outcome in zip(good, named):
            results[k] = outcome
        return results

    def _make_rows(self, loaded: LoadedBlock, propose: Callable[[], Iterable[Proposals | DataError]]) -> _Finished:
        """Lines of a block. The masks of one image at a time, where `propose` makes them so."""
        block, rows, todo = loaded.block, loaded.block.rows, set(loaded.todo)
        result = _Finished(len(rows), len(rows) - len(todo))
        errors = {k: loaded.images[k] for k in todo if isinstance(loaded.images[k], DataError)}
        for k, outcome in zip(loaded.positions(), propose(), strict=True):
            if k not in todo:
                continue
            if isinstance(outcome, DataError):
                errors[k] = outcome
                continue
            try:
                proposals = apply_floor(outcome, self.min_confidence, self.unnamed)
                image = self.store.image_reference(rows[k], block.first + k, self.image_root, self.save_images)
                row = proposals_to_row(rows[k], proposals, self.category_ids, image, loaded.images[k].size)
            except Exception as error:
                errors[k] = as_failure(error)
                continue
            result.rows.append(json.dumps(row))
            result.files.append(image_file(rows[k]))
            empty = np.zeros((0, 0), np.float16)
            result.features.append((proposals.features if len(proposals) else empty) if self.features else None)
            result.instances += len(proposals)
        result.failures = [(rows[k], block.first + k, errors[k]) for k in sorted(errors)]
        return result

    def _keep(self, result: _Finished, bar: Progress) -> None:
        for row, number, error in result.failures:
            reason = error.reason if isinstance(error, ImageError) else str(error)
            self.store.fail(image_file(row), f"row {number} (image id {row['image_id']!r})", reason)
        self.store.add_block(result.rows, result.files, result.features)
        summary = self.summary
        summary.done += len(result.rows)
        summary.skipped += result.skipped
        summary.failed += len(result.failures)
        summary.instances += result.instances
        unforeseen = [error for *_, error in result.failures if isinstance(error, UnexpectedFailure)]
        self.unforeseen += len(unforeseen)
        if unforeseen and not summary.done and self.unforeseen >= HOPELESS:
            raise StoreError(
                f"none of the first {summary.failed} images could be labeled; the last one: {unforeseen[-1]}. "
                f"{self.store.failures_file} lists them all"
            )
        bar.update(result.images, instances=summary.instances, failed=summary.failed)


def image_file(row: Row) -> str:
    """What failure lists call the image of a row."""
    return os.fspath(row["image"]) if isinstance(row["image"], (str, os.PathLike)) else row["file_name"]
