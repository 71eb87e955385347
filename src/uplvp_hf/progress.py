"""How far a run is: a bar in a terminal, a line now and then in a log file; rate, time left, counts."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

logger = logging.getLogger(__name__)

SECONDS_TO_FIRST_LINE = 10.0
SECONDS_BETWEEN_LINES = 60.0
_Item = TypeVar("_Item")


class Progress:
    """A context manager around work that is done piece by piece.

    Args:
        what: is being done. total: units in all, or None where nobody knows. shown: False is silent. unit: in the
            plural. initial: units that an earlier run has done.

    Rate and time left leave out the first piece, which also sets up what the others find ready: they are those of the
    work that is left. So the first line waits for the second piece.
    """

    def __init__(self, what: str, total: int | None, shown: bool, unit: str = "images", initial: int = 0) -> None:
        self.what, self.unit, self.shown = what, unit, shown
        self.bar = tqdm(
            total=total, initial=initial, unit=unit.removesuffix("s"), desc=what, disable=None if shown else True
        )
        self.total, self.done, self.counts = total, initial, ""
        self.next_line = time.monotonic() + SECONDS_TO_FIRST_LINE
        self.first: tuple[float, int] | None = None  # time and count after the first piece

    def update(self, count: int = 1, **counts: float) -> None:
        """So many more units are done. `counts` are shown: whole numbers as `3 failed`, others as `loss 2.5`."""
        self.done += count
        if counts:
            self.counts = "".join(
                f", {name} {value:.3g}" if isinstance(value, float) else f", {value} {name}"
                for name, value in counts.items()
            )
        now = time.monotonic()
        if not self.bar.disable:
            if counts:
                self.bar.set_postfix(counts, refresh=False)
            self.bar.update(count)
        elif self.shown and self.first is not None and now >= self.next_line:
            self.next_line = now + SECONDS_BETWEEN_LINES
            logger.info(self.line())
        if count and self.first is None:
            self.first = now, self.done

    def line(self) -> str:
        """The state in one line."""
        began, before = self.first or (time.monotonic(), self.done)
        rate = (self.done - before) / max(time.monotonic() - began, 1e-9)
        of = "" if self.total is None else f" of {self.total}"
        speed = f", {rate:.2f} {self.unit}/s" if rate > 0 else ""
        left = ""
        if self.total is not None and rate > 0:
            left = f", {tqdm.format_interval((self.total - self.done) / rate)} left"
        return f"{self.what}: {self.done}{of} {self.unit}{speed}{left}{self.counts}"

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the bar."""
        self.bar.close()


def with_progress(items: Iterable[_Item], what: str, shown: bool, unit: str = "images") -> Iterator[_Item]:
    """The items, one after the other, with their progress."""
    with Progress(what, len(items) if isinstance(items, Sized) else None, shown, unit) as bar:
        for item in items:
            yield item
            bar.update()
