"""Settings of what labels from examples, from words and from boxes. Light: nothing here loads a network library."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..settings import Settings, setting

VIEWS = ("crop", "image")
SURROUNDINGS = ("both", "keep", "paint")


@dataclass(frozen=True)
class LookSettings(Settings):
    """How a mask is looked at to compare it with others."""

    view: str = setting(
        "crop",
        "crop looks at a square around each mask, so that small objects are seen at full size; image looks at the "
        "whole image once, which is cheaper where images have many masks",
        choices=VIEWS,
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
        choices=SURROUNDINGS,
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
        "a mask less similar to its class than this stays unnamed (a cosine, centered); none: three standard "
        "deviations below the mean of the examples, each of them left out in turn, or their least; -1 names all",
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
