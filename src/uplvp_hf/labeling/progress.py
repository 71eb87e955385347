"""How far a run is: a bar in a terminal, a line a minute in a log file; images a second, time left, counts."""

from __future__ import annotations

import logging
import time
from types import TracebackType

from tqdm import tqdm

from .processes import Processes

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 60.0


class Progress:
    """Shown by process 0 alone, of its own share; a context manager.

    Args:
        what: is being done. total: images of this process, or None where nobody knows. shown: False is silent.
    """

    def __init__(self, what: str, total: int | None, shown: bool, processes: Processes) -> None:
        self.what = what if processes.size == 1 else f"{what} (process 1 of {processes.size})"
        self.shown = shown and processes.rank == 0
        self.bar = tqdm(total=total, unit="image", desc=self.what, disable=None if self.shown else True)
        self.total, self.done, self.counts = total, 0, ""
        self.started = self.last_line = time.monotonic()

    def update(self, images: int, **counts: int) -> None:
        """So many more images are done; `counts` are shown as they are."""
        self.done += images
        self.counts = "".join(f", {value} {name}" for name, value in counts.items())
        if not self.bar.disable:
            self.bar.set_postfix(counts, refresh=False)
            self.bar.update(images)
        elif self.shown and time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            logger.info(self.line())

    def line(self) -> str:
        """The state in one line."""
        rate = self.done / max(time.monotonic() - self.started, 1e-9)
        of = "" if self.total is None else f" of {self.total}"
        left = ""
        if self.total is not None and rate > 0:
            left = f", {tqdm.format_interval((self.total - self.done) / rate)} left"
        return f"{self.what}: {self.done}{of} images, {rate:.2f} images/s{left}{self.counts}"

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()
