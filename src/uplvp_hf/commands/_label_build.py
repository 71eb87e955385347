"""From the arguments of `uplvp label` to a labeler and a namer."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..models.errors import UserError
from ._settings import Setting, check_name, coerce, read_assignments, read_options, settings_of, takes_anything

# Options that are settings by another name; those of the clip labeler's recipes are checked against `RECIPE_KNOBS`.
SHORTCUTS = ("attention", "sigma", "scale", "threshold", "image_size", "window", "stride", "min_area", "max_area")
# Knobs that only one recipe reads: giving them with another one is an error, not silence.
RECIPE_KNOBS = {
    "sigma": "naclip",
    "scale": "naclip",
    "gem_depth": "gem",
    "gem_iterations": "gem",
    "gem_temperature": "gem",
    "beta": "proxy",
    "gamma": "proxy",
}
# Options that a labeler or namer needs, or reads, beside the settings.
NEEDS = {
    "clip": ("vocabulary",),
    "saliency": ("backbone",),
    "foreground": ("backbone",),
    "ncut": ("backbone",),
    "file": ("masks",),
    "sam": ("model",),
    "segmenter": ("model",),
}
DEFAULT_NAMERS = {"clip": "clip", "file": "map", "segmenter": "map"}


@dataclass
class Part:
    """A labeler or a namer: how it is made, and what can be set. `provided` is what the command fills in itself."""

    title: str
    constructors: Sequence[Callable[..., Any]]
    settings: dict[str, Setting]
    anything: bool = False


def describe_labeler(name: str) -> Part:
    """Constructors and settings of a labeler by name, or of a user's own as `module:factory`."""
    if ":" in name:
        from ..labeling.labelers.plugin import find_factory

        factory = find_factory(name)
        return Part(f"labeler {name}", [factory], settings_of([factory], required=True), takes_anything(factory))
    from .. import labeling
    from ..labeling.cutting import cut
    from ..labeling.encoders import attention, windows
    from ..labeling.labelers import maskcut, saliency

    constructors, also = {
        "clip": ((labeling.DenseClipLabeler, attention.Recipe, cut.Cutting), (windows.View,)),
        "saliency": ((labeling.SaliencyLabeler,), (saliency.propose_batch, saliency.keep_plausible)),
        "foreground": ((labeling.ForegroundLabeler,), ()),
        "ncut": ((maskcut.NcutLabeler,), (maskcut.cut_out,)),
        "file": ((labeling.MaskFileLabeler,), ()),
        "sam": ((labeling.MaskGeneratorLabeler,), ()),
        "segmenter": ((labeling.SegmenterLabeler,), ()),
    }[name]
    provided = ("clip", "entries", "text", "guide", "encoder", "dataset", "model", "device", "dtype")
    return Part(f"labeler {name}", constructors, settings_of(constructors, provided, also))


def describe_namer(name: str) -> Part:
    """Constructor and settings of a namer; "none" and "map" have none."""
    from .. import labeling

    constructors = {"clip": (labeling.ClipZeroShotNamer,), "classifier": (labeling.ClassifierNamer,)}.get(name, ())
    return Part(f"namer {name}", constructors, settings_of(constructors, ("clip", "entries", "text", "encoder")))


def read_settings(args: argparse.Namespace, labeler: Part, namer: Part) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of the labeler and of the namer: from --options, --set and the options that are settings too.

    A name means the labeler's setting, or the namer's where only that has it; `namer.NAME` and `labeler.NAME` say
    which. Raises UserError for unknown names, names that both have, wrong values, and a setting given twice.
    """
    parts = {"labeler": labeler, "namer": namer}
    found: dict[str, dict[str, Any]] = {"labeler": {}, "namer": {}}
    assigned = read_assignments(args.set or [])
    given = read_options(args.options) if args.options is not None else {}
    doubled = sorted(given.keys() & assigned.keys())
    if doubled:
        raise UserError(f"--set {doubled[0]} is also in --options; give it once")
    for word, value in (given | assigned).items():
        owner, dot, name = word.partition(".")
        if not dot or owner not in parts:
            owner, name = _owner(word, labeler, namer), word
        part = parts[owner]
        if name not in part.settings and not part.anything:
            check_name(name, part.settings, f"the {part.title}")
        value = coerce(part.settings[name], value) if name in part.settings else value
        _put(found[owner], name, value, f"--set {word}")
    _add_shortcuts(args, labeler, namer, found)
    return found["labeler"], found["namer"]


def _owner(name: str, labeler: Part, namer: Part) -> str:
    if name in labeler.settings and name in namer.settings:
        both = f"the {labeler.title} and the {namer.title} both have it"
        raise UserError(f"--set {name}: {both}; write labeler.{name} or namer.{name}")
    if name in namer.settings:
        return "namer"
    if name not in labeler.settings and not labeler.anything:
        check_name(name, {**labeler.settings, **namer.settings}, f"the {labeler.title} with the {namer.title}")
    return "labeler"


def _put(values: dict[str, Any], name: str, value: Any, option: str) -> None:
    if name in values:
        raise UserError(f"{option}: the setting {name} is given twice")
    values[name] = value


def _add_shortcuts(args: argparse.Namespace, labeler: Part, namer: Part, found: dict[str, dict[str, Any]]) -> None:
    """--attention, --template and their like become settings of whom they concern. Without effect is an error."""
    own, names = found["labeler"], found["namer"]
    for name in (*SHORTCUTS, "calibration"):
        value = getattr(args, name)
        if value is not None:
            # Matrix NMS has a sigma too, which is not meant.
            meant = args.labeler == "clip" or name not in ("attention", "sigma", "scale")
            _has_effect(args, name, meant and name in labeler.settings)
            value = coerce(labeler.settings[name], value)
            _put(own, name, value, f"--{name.replace('_', '-')}")
    if args.labeler == "clip":
        chosen = own.get("attention", "naclip")
        for name, recipe in RECIPE_KNOBS.items():
            if name in own and chosen != recipe:
                option = f"--{name}" if getattr(args, name, None) is not None else f"--set {name}"
                raise UserError(f"{option} has no effect with --attention {chosen}; leave it out")
    if args.template is not None:
        # A single word may be a preset or a file.
        value = args.template[0] if len(args.template) == 1 else list(args.template)
        takers = [part for part, values in ((labeler, own), (namer, names)) if "templates" in part.settings]
        _has_effect(args, "template", bool(takers))
        for part, values in ((labeler, own), (namer, names)):
            if part in takers:
                _put(values, "templates", value, "--template")
    if args.background is not None:
        calibrated = own.get("calibration", "zscore") is not None
        to_labeler, to_namer = args.labeler == "clip" and not calibrated, args.namer == "clip"
        _has_effect(args, "background", to_labeler or to_namer)
        for wanted, values in ((to_labeler, own), (to_namer, names)):
            if wanted:
                _put(values, "background", args.background, "--background")


def _has_effect(args: argparse.Namespace, name: str, effect: bool) -> None:
    if not effect:
        option = f"--{name.replace('_', '-')}"
        raise UserError(f"{option} has no effect with --labeler {args.labeler} --namer {args.namer}; leave it out")


def check_needs(args: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Raises UserError for what the labeler and the namer need and did not get, and for files that nobody reads."""
    names = NEEDS.get(args.labeler, ())
    uses_clip = args.namer == "clip" or (args.labeler == "clip" and args.features is None)
    uses_text = args.labeler == "clip" or args.namer == "clip"
    proxy = settings.get("attention") == "proxy"
    classifies = args.namer == "classifier"
    needed = {
        "clip": uses_clip,
        "vocabulary": uses_text,
        "backbone": "backbone" in names or (classifies and args.classifier is None),
        "class_map": classifies,
        "guide": args.labeler == "clip" and proxy and args.features is None,
        "masks": "masks" in names,
        "model": "model" in names,
    }
    for name, wanted in needed.items():
        if wanted and getattr(args, name) is None:
            extra = " (or --features)" if name == "clip" and args.namer != "clip" else ""
            extra = " or --classifier" if name == "backbone" and "backbone" not in names else extra
            option = f"--{name.replace('_', '-')}{extra}"
            raise UserError(f"--labeler {args.labeler} with --namer {args.namer} needs {option}")
    if args.labeler == "clip" and args.features is not None and args.text_embeddings is None:
        raise UserError("--features needs --text-embeddings, the class names in the space of the same encoder")
    readers = {**needed, "features": args.labeler == "clip", "text_embeddings": uses_text, "classifier": classifies}
    for name, read in readers.items():
        if not read and getattr(args, name) is not None and name not in ("clip", "vocabulary", "backbone", "class_map"):
            _has_effect(args, name, False)
    if args.features_layout is not None and args.features is None:
        raise UserError("--features-layout has no effect without --features; leave it out")
    if args.namer == "map" and args.labeler in ("saliency", "foreground", "ncut", "sam"):
        raise UserError(
            f"--namer map: the {args.labeler} labeler has no classes of its own; use clip, classifier or none"
        )
    if args.dtype is not None and args.labeler in ("file", "segmenter") and args.namer in ("none", "map"):
        _has_effect(args, "dtype", False)


class Builder:
    """Loads what labeler and namer share, each once, and makes the two."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch

        from ..labeling.encoders import text
        from ..labeling.naming import class_map

        self.args = args
        local = os.environ.get("LOCAL_RANK", 0)
        self.device = args.device or (f"cuda:{local}" if torch.cuda.is_available() else "cpu")
        self.dtype = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
        self.entries = text.read_vocabulary(args.vocabulary) if args.vocabulary is not None else []
        self.class_map = class_map.read_class_map(args.class_map) if args.class_map is not None else {}
        if self.class_map and self.entries:
            names = [text.split_synonyms(entry)[0] for entry in self.entries]
            lacking = [name for name in names if name not in self.class_map]
            if lacking:
                raise UserError(f"class map {args.class_map} has no entry for {lacking[0]!r} of the vocabulary")
            self.class_map = {name: self.class_map[name] for name in names}
        self._clip = self._encoder = None

    @property
    def clip(self) -> Any:
        if self._clip is None:
            from ..labeling.encoders.clip import load_clip

            text_tower = self.args.text_embeddings is None
            self._clip = load_clip(self.args.clip, device=self.device, dtype=self.dtype, text_tower=text_tower)
        return self._clip

    @property
    def encoder(self) -> Any:
        if self._encoder is None:
            from ..labeling.encoders.backbone import load_encoder

            self._encoder = load_encoder(self.args.backbone, *self._weights(), device=self.device, dtype=self.dtype)
        return self._encoder

    def _weights(self) -> tuple[str | None, str | None]:
        return self.args.backbone_weights, self.args.pad_type or None

    def _classifier(self) -> Any:
        from ..labeling.encoders.backbone import load_classifier

        if self.args.classifier is not None:
            options = {"weights": self.args.classifier_weights, "device": self.device, "dtype": self.dtype}
            return load_classifier(self.args.classifier, **options)
        if self.args.labeler in ("saliency", "foreground", "ncut") and self.encoder.num_classes:
            return self.encoder
        return load_classifier(self.args.backbone, *self._weights(), device=self.device, dtype=self.dtype)

    def _text(self, background: Any) -> dict[str, Any]:
        if self.args.text_embeddings is None:
            return {}
        from ..labeling.encoders.prompt_templates import read_background
        from ..labeling.encoders.text import load_text_embeddings

        entries = [*self.entries, *read_background(background, self.entries)]
        return {"text": load_text_embeddings(self.args.text_embeddings, entries)}

    def labeler(self, part: Part, settings: dict[str, Any]) -> Any:
        """The labeler that `part` describes."""
        name, constructor = self.args.labeler, part.constructors[0]
        if ":" in name:
            from ..labeling.labelers.plugin import load_plugin

            return load_plugin(name, settings)
        if name == "clip":
            return self._dense_clip(constructor, settings)
        if name == "file":
            return constructor(self.args.masks, **settings)
        if name == "sam":
            return constructor(self.args.model, device=self.device, dtype=self.dtype, **settings)
        if name == "segmenter":
            return constructor(self.args.model, device=self.device, **settings)
        return constructor(self.encoder, **settings)

    def _dense_clip(self, constructor: Callable[..., Any], settings: dict[str, Any]) -> Any:
        source, extra = None, self._text(settings.get("background", ()))
        if self.args.features is not None:
            from ..labeling.encoders.precomputed import PrecomputedFeatures

            source = PrecomputedFeatures(self.args.features, self.args.features_layout or "dhw", device=self.device)
        if self.args.guide is not None:
            from ..labeling.encoders.backbone import load_encoder

            extra["guide"] = load_encoder(self.args.guide, device=self.device, dtype=self.dtype)
        return constructor(source or self.clip, self.entries, **settings, **extra)

    def namer(self, part: Part, settings: dict[str, Any]) -> Any:
        """The namer that `part` describes, or None for the labeler's own classes."""
        if self.args.namer == "map":
            return None
        if self.args.namer == "none":
            from ..labeling.naming.agnostic import AgnosticNamer

            return AgnosticNamer()
        if self.args.namer == "clip":
            extra = self._text(settings.get("background", ()))
            return part.constructors[0](self.clip, self.entries, **settings, **extra)
        return part.constructors[0](self._classifier(), self.class_map, **settings)
