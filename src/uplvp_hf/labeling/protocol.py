"""What a labeler and a namer have to be for `label_images`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from PIL import Image

from ..data.dataset import Row
from ..settings import Settings
from .cutting.proposals import Proposals
from .settings import NoSettings

if TYPE_CHECKING:
    from .encoders.backbone import Encoder

AGNOSTIC_NAME = "object"
Finish = Callable[[], Iterable[Proposals]]  # one `Proposals` an image, made when it is asked for


class Labeler:
    """What proposes masks. A subclass defines `__call__`, or `begin`, and replaces what differs from the defaults: no
    classes, nothing to calibrate, a license that is not known.

    name, encoder_name: for the store's header. vocabulary: its classes, empty for a class-agnostic one. license: of the
    weights. config: its settings dataclass, which becomes the `settings` of the store's header.

    `images` are PIL images (RGB), `rows` the dataset's rows of the same images, for labelers that look something up;
    None: there are none.
    """

    name: str
    encoder_name: str
    vocabulary: Sequence[str] = ()
    license: str | None = None
    config: Settings = NoSettings()

    @property
    def settings(self) -> dict[str, Any]:
        """All that the labels depend on, as JSON values, for the store's header."""
        return self.config.as_dict()

    def measure(self, images: Sequence[Image.Image], rows: Sequence[Row] | None = None) -> list[Any]:
        """One JSON value an image, for `calibrate`; [] when there is nothing to calibrate."""
        return []

    def calibrate(self, statistics: list[Any]) -> dict[str, Any]:
        """From what `measure` gave for all calibration images, in the dataset's order, to a state: JSON values."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a state that `calibrate` returned, in this run, another process or an earlier run."""

    def __call__(self, images: Sequence[Image.Image], rows: Sequence[Row] | None = None) -> list[Proposals]:
        """One `Proposals` an image."""
        return list(self.begin(images, rows)())

    def begin(self, images: Sequence[Image.Image], rows: Sequence[Row] | None = None) -> Finish:
        """The part of `__call__` that keeps the device busy; what it returns is called in another thread and does the
        rest, while this one begins with the next images. By default all the work at once."""
        results = self(images, rows)
        return lambda: results


class BackboneLabeler(Labeler):
    """A class-agnostic labeler that looks with a frozen backbone.

    encoder: the backbone. settings, changes: of the dataclass `settings_class`.
    """

    settings_class: ClassVar[type[Settings]]

    def __init__(self, encoder: Encoder, settings: Settings | None = None, **changes: Any) -> None:
        self.encoder, self.encoder_name, self.license = encoder, encoder.name, encoder.license
        self.config = self.settings_class.of(settings, **changes)

    @property
    def settings(self) -> dict[str, Any]:
        """What the labels depend on, for the store's header."""
        return self.config.as_dict() | {"dtype": self.encoder.dtype_name}

    @property
    def about_features(self) -> dict[str, Any]:
        """Of the vectors that are kept of the masks: the map that the labeler looks at, under each mask."""
        return {"network": self.encoder_name, "of": f"map of {self.name}", **self.settings}


class Namer(Protocol):
    """Gives proposals `labels` (indices into `names`; -1: none of them) and `confidences`."""

    name: str
    names: Sequence[str]

    @property
    def settings(self) -> dict[str, Any]: ...

    def __call__(self, images: Sequence[Image.Image], proposals: Sequence[Proposals]) -> list[Proposals]: ...
