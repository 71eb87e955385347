"""Settings of what labels from examples, from words and from boxes. Light: nothing here loads a network library."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..settings import Settings, setting
from .settings import FileSettings


@dataclass(frozen=True)
class LookSettings(Settings):
    """How a mask is looked at to compare it with others."""

    view: str = setting(
        "crop",
        "crop looks at a square around each mask, so that small objects are seen at full size; image looks at the "
        "whole image once, which is cheaper where images have many masks",
        choices=("crop", "image"),
    )
    image_size: int | None = setting(
        None,
        "side of a crop, or longer side of the image, in pixels; none: 224 for crops and 448 for images, for a CLIP "
        "the size that it was trained with and twice that",
        least=1,
    )
    context: float = setting(0.1, "share of the box's longer side that a crop shows around the object", least=0)
    surroundings: str = setting(
        "both",
        "what a crop shows around the object: what is there (keep), the network's mean color (paint), or each once "
        "(both), at twice the cost",
        choices=("both", "keep", "paint"),
    )
    batch_size: int = setting(32, "crops of a forward pass", least=1)


@dataclass(frozen=True)
class ExamplesSettings(LookSettings):
    """Names after the annotated examples that look most like a mask."""

    classes: list[str] | None = setting(None, "classes to name, of those in the examples; none: all with an example")
    neighbors: int | None = setting(
        None,
        "examples of a class, the most similar ones, whose similarities are averaged; none: all of them, which was "
        "better for few examples; give a small number where the objects of a class look very different",
        least=1,
    )
    ground: int = setting(4, "places in each example image that show what is no object", least=0)
    temperature: float | None = setting(
        None,
        "divides the similarities before the softmax; none: what makes each example likeliest when it is left out",
        above=0,
    )
    min_similarity: float | None = setting(
        None,
        "a mask less similar to its class than this stays unnamed (a cosine, centered); -1 names all. none: a little "
        "below the least similar of the examples, each left out in turn; what is no object with a probability of .8 "
        "then stays unnamed too",
        least=-1,
        most=1,
    )
    nms: float | None = setting(
        0.5,
        "IoU above which the worse of two masks is dropped, whatever their classes, as is a mask that lies to 80 % in "
        "a better one of its class; none keeps all",
        least=0,
        most=1,
    )


def look(settings: LookSettings) -> LookSettings:
    """The part of larger settings that says how a mask is looked at."""
    return LookSettings(**{item.name: getattr(settings, item.name) for item in fields(LookSettings)})


@dataclass(frozen=True)
class KeptMasksSettings(Settings):
    """Which of the masks that a network made are kept."""

    min_area: float = setting(0.0, "share of the image", least=0, most=1)
    max_area: float = setting(1.0, "share of the image", least=0, most=1)
    mask_nms: float = setting(
        0.7, "mask IoU above which the worse of two masks is dropped, whatever their classes", least=0, most=1
    )
    top: int = setting(100, "most masks of an image, best scores first", least=1)


@dataclass(frozen=True)
class ConceptSettings(KeptMasksSettings):
    """Masks of what words name, by SAM 3."""

    threshold: float = setting(
        0.5, "score that an instance needs, its query's times the class's presence", least=0, most=1
    )
    mask_threshold: float = setting(0.5, "probability that a pixel needs", above=0, below=1)
    phrases_per_pass: int = setting(8, "phrases that are looked for in one pass of the decoder", least=1)


@dataclass(frozen=True)
class BoxesSettings(KeptMasksSettings, FileSettings):
    """Boxes of a zero-shot detector or a file, turned into masks by a SAM."""

    threshold: float | None = setting(
        None,
        "score that a box needs; none: .3 for Grounding DINO and OmDet-Turbo, .2 for OWL, 0 for boxes from a file",
        least=0,
        most=1,
    )
    box_nms: float = setting(
        0.7, "box IoU above which the worse of two boxes is dropped, whatever their classes", least=0, most=1
    )
    phrases_per_pass: int | None = setting(
        None,
        "phrases that the detector is asked for at once; none: as many as its text takes, 20 for OmDet-Turbo",
        least=1,
    )
    boxes_per_pass: int = setting(64, "boxes of an image that the SAM is asked for at once", least=1)
