"""What a labeler and a namer have to be for `label_images`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from PIL import Image

from ..data.dataset import Row
from ..settings import Settings
from .cutting.proposals import Proposals
from .settings import NoSettings

AGNOSTIC_NAME = "object"
Finish = Callable[[], Iterable[Proposals]]  # one `Proposals` an image, made when it is asked for


class Labeler(Protocol):
    """What proposes masks. `vocabulary` is empty for a class-agnostic one; `settings` must survive JSON and hold all
    that the labels depend on. `license`: of the weights, where it is known. `LabelerBase` has the rest for a labeler
    that calibrates nothing.

    `rows` are the dataset's rows of the same images, for labelers that look something up; None: there are none.
    """

    name: str
    encoder_name: str
    vocabulary: Sequence[str]
    license: str | None

    @property
    def settings(self) -> dict[str, Any]: ...

    def measure(self, images: Sequence[Image.Image], rows: Sequence[Row] | None = None) -> list[Any]:
        """One JSON value an image, for `calibrate`; [] when there is nothing to calibrate."""
        ...

    def calibrate(self, statistics: list[Any]) -> dict[str, Any]:
        """From what `measure` gave for all calibration images, in the dataset's order, to a state: JSON values."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a state that `calibrate` returned, in this run, another process or an earlier run."""
        ...

    def __call__(self, images: Sequence[Image.Image], rows: Sequence[Row] | None = None) -> list[Proposals]: ...

    def begin(self, images: Sequence[Image.Image], rows: Sequence[Row] | None = None) -> Finish:
        """The part of `__call__` that keeps the device busy; what it returns is called in another thread and does the
        rest, while this one begins with the next images."""
        ...


class LabelerBase:
    """A labeler without calibration, without classes and of unknown license; subclasses replace what differs.

    config: its settings dataclass, which becomes the `settings` of the store's header.
    """

    vocabulary: Sequence[str] = ()
    license: str | None = None
    config: Settings = NoSettings()

    @property
    def settings(self) -> dict[str, Any]:
        """What the labels depend on, for the store's header."""
        return self.config.as_dict()

    def measure(self, images: Sequence[Image.Image], rows: Sequence[Row] | None = None) -> list[Any]:
        """Nothing to measure."""
        return []

    def calibrate(self, statistics: list[Any]) -> dict[str, Any]:
        """Nothing to calibrate."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore."""

    def __call__(self, images: Sequence[Image.Image], rows: Sequence[Row] | None = None) -> list[Proposals]:
        """One `Proposals` an image. A subclass defines this, or `begin`."""
        return list(self.begin(images, rows)())

    def begin(self, images: Sequence[Image.Image], rows: Sequence[Row] | None = None) -> Finish:
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
