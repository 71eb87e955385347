"""Labelers and namers by name. Light: their modules are loaded when they are built.

A new labeler is one file in `labelers/` and one line here:

    "bright": Entry("labelers.bright:BrightLabeler", "labelers.bright:BrightSettings"),

The class is called with its `parts` and its settings: `BrightLabeler(*parts, settings)`. `tests/labeling/
test_new_labeler.py` does it. A user's own labeler needs no line: `--labeler my_package.my_module:factory`.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from dataclasses import dataclass
from typing import Any

from ..models.errors import UserError
from .settings import ImagesSettings, NetworkSettings, OutputSettings, RunSettings


@dataclass(frozen=True)
class Entry:
    """How a labeler or a namer is made.

    target: its class, as module:name below this package. settings: the dataclass of its settings, likewise; better in
    `settings` than in a module that loads torch, for `--help` to be quick. parts: what its constructor is given first,
    attributes of `build.Builder` such as "encoder", "clip", "entries", "masks", "model". extras: keywords that it is
    given beside. namer: of a labeler, the namer that goes with it where the user names none. names: whether a labeler
    has classes of its own, so that `--namer map` can keep them.
    """

    target: str
    settings: str = "settings:NoSettings"
    parts: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()
    namer: str = "none"
    names: bool = False

    def load(self) -> Any:
        """The class."""
        return _load(self.target)

    def load_settings(self) -> type:
        """The dataclass of its settings."""
        return _load(self.settings)


def _load(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(f".{module}", __package__), name)


LABELERS: dict[str, Entry] = {
    "clip": Entry(
        "labelers.dense_clip:DenseClipLabeler",
        "settings:DenseClipSettings",
        ("dense_clip", "entries"),
        ("text", "guide", "examples"),
        namer="clip",
        names=True,
    ),
    "saliency": Entry("labelers.saliency:SaliencyLabeler", "settings:SaliencySettings", ("encoder",)),
    "foreground": Entry("labelers.foreground:ForegroundLabeler", "settings:ForegroundSettings", ("encoder",)),
    "ncut": Entry("labelers.maskcut:NcutLabeler", "settings:NcutSettings", ("encoder",)),
    "file": Entry(
        "labelers.mask_file:MaskFileLabeler", "settings:MaskFileSettings", ("masks",), namer="map", names=True
    ),
    "sam": Entry(
        "labelers.mask_generator:MaskGeneratorLabeler",
        "settings:MaskGeneratorSettings",
        ("model",),
        ("device", "dtype"),
    ),
    "segmenter": Entry(
        "labelers.segmenter:SegmenterLabeler", "settings:SegmenterSettings", ("model",), ("device",), "map", True
    ),
    "concept": Entry(
        "labelers.concept:ConceptLabeler",
        "prompt_settings:ConceptSettings",
        ("model", "entries"),
        ("device", "dtype"),
        namer="map",
        names=True,
    ),
    "boxes": Entry(
        "labelers.boxes:BoxesLabeler",
        "prompt_settings:BoxesSettings",
        ("model",),
        ("detector", "entries", "boxes", "examples", "device", "dtype"),
        namer="map",
        names=True,
    ),
    "center_box": Entry("labelers.baselines:CenterBoxLabeler", "settings:CenterBoxSettings"),
}
NAMERS: dict[str, Entry | None] = {
    "none": Entry("naming.agnostic:AgnosticNamer"),
    "clip": Entry("naming.zero_shot:ClipZeroShotNamer", "settings:ZeroShotSettings", ("clip", "entries"), ("text",)),
    "classifier": Entry("naming.classifier:ClassifierNamer", "settings:ClassifierSettings", ("classifier",)),
    "examples": Entry("naming.examples:ExamplesNamer", "prompt_settings:ExamplesSettings", ("network", "examples")),
    "map": None,  # the labeler's own classes
}


def labeler_entry(name: str) -> Entry:
    """The entry of a labeler; of a user's own, `module:factory`, one without parts. Raises UserError."""
    if ":" in name:
        return Entry(name, namer="map", names=True)
    if name not in LABELERS:
        near = difflib.get_close_matches(name, LABELERS, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        known = ", ".join(LABELERS)
        raise UserError(f"--labeler {name} is unknown. {hint}Use {known}, or your own as my_package.module:factory.")
    return LABELERS[name]


def label_settings(labeler: str, namer: str) -> type:
    """The dataclass of all settings of a labeling run: sections labeler, namer, run, networks, images, output."""
    from .settings import NoSettings

    if ":" in labeler:
        from .labelers.plugin import settings_of_factory

        own: Any = settings_of_factory(labeler)
    else:
        own = labeler_entry(labeler).load_settings()
    entry = NAMERS[namer]
    sections = {"labeler": own, "namer": NoSettings if entry is None else entry.load_settings()}
    sections |= {"run": RunSettings, "networks": NetworkSettings, "images": ImagesSettings, "output": OutputSettings}
    fields = [(name, section, dataclasses.field(default_factory=section)) for name, section in sections.items()]
    return dataclasses.make_dataclass("LabelSettings", fields)
