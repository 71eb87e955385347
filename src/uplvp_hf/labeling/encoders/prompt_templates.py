"""Sentences that class names are put into, and names of what is no object."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ...data.fields import read_lines
from ...models.errors import UserError

# Seven of the eighty below that CLIP's authors report to do about as well as all of them.
TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)

# The eighty templates for ImageNet, published with CLIP: https://github.com/openai/CLIP, notebook "Prompt Engineering
# for ImageNet", Copyright (c) 2021 OpenAI, MIT license.
OPENAI80 = (
    "a bad photo of a {}.", "a photo of many {}.", "a sculpture of a {}.", "a photo of the hard to see {}.",
    "a low resolution photo of the {}.", "a rendering of a {}.", "graffiti of a {}.", "a bad photo of the {}.",
    "a cropped photo of the {}.", "a tattoo of a {}.", "the embroidered {}.", "a photo of a hard to see {}.",
    "a bright photo of a {}.", "a photo of a clean {}.", "a photo of a dirty {}.", "a dark photo of the {}.",
    "a drawing of a {}.", "a photo of my {}.", "the plastic {}.", "a photo of the cool {}.",
    "a close-up photo of a {}.", "a black and white photo of the {}.", "a painting of the {}.", "a painting of a {}.",
    "a pixelated photo of the {}.", "a sculpture of the {}.", "a bright photo of the {}.", "a cropped photo of a {}.",
    "a plastic {}.", "a photo of the dirty {}.", "a jpeg corrupted photo of a {}.", "a blurry photo of the {}.",
    "a photo of the {}.", "a good photo of the {}.", "a rendering of the {}.", "a {} in a video game.",
    "a photo of one {}.", "a doodle of a {}.", "a close-up photo of the {}.", "a photo of a {}.",
    "the origami {}.", "the {} in a video game.", "a sketch of a {}.", "a doodle of the {}.",
    "a origami {}.", "a low resolution photo of a {}.", "the toy {}.", "a rendition of the {}.",
    "a photo of the clean {}.", "a photo of a large {}.", "a rendition of a {}.", "a photo of a nice {}.",
    "a photo of a weird {}.", "a blurry photo of a {}.", "a cartoon {}.", "art of a {}.",
    "a sketch of the {}.", "a embroidered {}.", "a pixelated photo of a {}.", "itap of the {}.",
    "a jpeg corrupted photo of the {}.", "a good photo of a {}.", "a plushie {}.", "a photo of the nice {}.",
    "a photo of the small {}.", "a photo of the weird {}.", "the cartoon {}.", "art of the {}.",
    "a drawing of the {}.", "a photo of the large {}.", "a black and white photo of a {}.", "the plushie {}.",
    "a dark photo of a {}.", "itap of a {}.", "graffiti of the {}.", "a toy {}.",
    "itap of my {}.", "a photo of a cool {}.", "a photo of a small {}.", "a tattoo of the {}.",
)  # fmt: skip

TEMPLATE_PRESETS = {"bare": ("{}",), "openai7": TEMPLATES, "openai80": OPENAI80}

BACKGROUND_PRESETS = {
    # What fills images of everyday scenes without being countable.
    "stuff": (
        "sky", "clouds", "wall", "brick wall", "floor", "ceiling", "window", "curtain", "road", "pavement", "ground",
        "grass", "field", "tree", "bush", "leaves", "forest", "mountain", "hill", "rock", "sand", "snow", "water",
        "sea", "river", "building", "house", "bridge", "fence", "railing", "carpet", "table top", "shelf", "fog",
    ),
}  # fmt: skip


def lines_of(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a text file without comments (#) and empty ones. Raises DataError for a file that is not UTF-8."""
    lines = (line.split("#", 1)[0].strip() for _, line in read_lines(os.fspath(path)))
    return [line for line in lines if line]


def read_templates(value: str | os.PathLike[str] | Sequence[str]) -> tuple[str, ...]:
    """Prompt templates: a preset's name ("bare", "openai7", "openai80"), one template, a text file with one a line (#
    begins a comment line), or a sequence of templates. Raises UserError for a template without {}, or none at all."""
    if isinstance(value, (str, os.PathLike)):
        text = os.fspath(value)
        if text in TEMPLATE_PRESETS:
            return TEMPLATE_PRESETS[text]
        if "{}" in text:
            templates = (text,)
        elif os.path.isfile(text):
            templates = tuple(line for _, line in read_lines(text) if not line.startswith("#"))
        else:
            raise UserError(
                f"templates {text!r}: neither a preset ({', '.join(TEMPLATE_PRESETS)}), nor a file, nor a template "
                "with {}"
            )
    else:
        templates = tuple(value)
    wrong = [template for template in templates if "{}" not in template]
    if wrong or not templates:
        raise UserError(f"prompt templates need a {{}} for the class name, got {wrong or 'no template'}")
    return templates


def read_background(value: str | os.PathLike[str] | Sequence[str] | None, entries: Sequence[str] = ()) -> list[str]:
    """Names of what is no object: a preset ("stuff"), a text file with one a line, names separated by commas, or a
    sequence; None: no name. Names of a preset that are a class, or a synonym of one, in `entries` are left out."""
    if value is None:
        return []
    if not isinstance(value, (str, os.PathLike)):
        return list(value)
    text = os.fspath(value)
    if text in BACKGROUND_PRESETS:
        taken = {name.strip().lower() for entry in entries for name in entry.split(",")}
        return [name for name in BACKGROUND_PRESETS[text] if name not in taken]
    if os.path.isfile(text):
        return lines_of(text)
    return [name.strip() for name in text.split(",") if name.strip()]
