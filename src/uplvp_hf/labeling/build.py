"""From names, files and settings to a labeler and a namer; what they share is loaded once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ..models.errors import UserError
from .catalog import NAMERS, Entry, labeler_entry
from .encoders.backbone import Encoder, load_classifier, load_encoder
from .encoders.clip import Clip, load_clip
from .encoders.precomputed import PrecomputedFeatures
from .encoders.prompt_templates import read_background
from .encoders.text import load_text_embeddings, read_vocabulary, split_synonyms
from .naming.class_map import read_class_map
from .prompt_settings import ExamplesSettings
from .settings import ClassifierSettings

# What each part is made of: a flag, and the setting of `networks` that may stand in its place.
SOURCES = {
    "encoder": ("backbone", None),
    "clip": ("clip", None),
    "dense_clip": ("clip", "features"),
    "entries": ("vocabulary", None),
    "classifier": ("backbone", "classifier"),
    "masks": ("masks", None),
    "model": ("model", None),
    "examples": ("examples", None),
}
# Parts that are the value of a flag itself.
NAMED = {"masks": "masks", "boxes": "masks", "model": "model", "detector": "detector"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Names:
    """What the user names: a labeler, a namer, and the files and networks that these are made with."""

    labeler: str = "clip"
    namer: str = "clip"
    vocabulary: str | None = None
    clip: str | None = None
    backbone: str | None = None
    backbone_weights: str | None = None
    model: str | None = None
    masks: str | None = None
    examples: str | None = None
    detector: str | None = None
    device: str | None = None


class Builder:
    """Makes the labeler and the namer of `names`.

    settings: as `catalog.label_settings` describes them. Raises UserError for what is needed and not named, and for
    what is named and not used.
    """

    def __init__(self, names: Names, settings: Any) -> None:
        self.names, self.settings, self.networks = names, settings, settings.networks
        self.entries_of = [entry for entry in (labeler_entry(names.labeler), NAMERS[names.namer]) if entry is not None]
        self.parts = {part for entry in self.entries_of for part in entry.parts}
        self._check()
        local = os.environ.get("LOCAL_RANK", 0)
        self.device = names.device or (f"cuda:{local}" if torch.cuda.is_available() else "cpu")
        self.dtype = DTYPES[self.networks.dtype] if "dtype" in self.networks.given else None

    @property
    def _who(self) -> str:
        return f"--labeler {self.names.labeler} with --namer {self.names.namer}"

    @property
    def _shown(self) -> bool:
        """Whether the examples tell the labeler what to find; the masks of others they can only name."""
        if self.names.examples is None:
            return False
        if self.names.labeler == "clip":
            return self.names.vocabulary is None and self.networks.features is None
        return self.names.labeler == "boxes" and self.names.detector is not None and self.names.namer != "examples"

    def _check(self) -> None:
        if "network" in self.parts and self.names.backbone is None and self.names.clip is None:
            raise UserError(f"{self._who} needs --backbone or --clip")
        for part in sorted(self.parts - {"network"}):
            flag, instead = SOURCES[part]
            if part == "entries" and self._shown and self.names.namer != "clip":
                continue
            if getattr(self.names, flag) is None and (instead is None or getattr(self.networks, instead) is None):
                other = "" if instead is None else f" (or networks.{instead})"
                raise UserError(f"{self._who} needs --{flag}{other}")
        if self.names.namer == "map" and not self.entries_of[0].names:
            raise UserError(
                f"--namer map: the {self.names.labeler} labeler has no classes of its own; use clip, classifier or none"
            )
        if "classifier" in self.parts and self.settings.namer.class_map is None:
            raise UserError(f"{self._who} needs namer.class_map")
        proxy = getattr(self.settings.labeler, "attention", None) == "proxy" and self.networks.features is None
        if proxy and self.networks.guide is None:
            raise UserError(f"{self._who} and labeler.attention=proxy needs networks.guide")
        if self.networks.features is not None and self.networks.text_embeddings is None:
            raise UserError(
                "networks.features needs networks.text_embeddings, the class names in the space of the same encoder"
            )
        self._check_unused(proxy)

    def _check_unused(self, proxy: bool) -> None:
        networks = {"encoder", "clip", "dense_clip", "classifier", "network"}
        loads = self.parts & networks or "dtype" in self.entries_of[0].extras
        reads = {
            "features": "dense_clip" in self.parts,
            "features_layout": self.networks.features is not None,
            "text_embeddings": any("text" in entry.extras for entry in self.entries_of[self._shown :]),
            "classifier": "classifier" in self.parts,
            "classifier_weights": self.networks.classifier is not None,
            "guide": proxy,
            "dtype": bool(loads),
            "pad_type": bool(self.parts & {"encoder", "classifier", "network"}),
        }
        unused = [f"networks.{name}" for name in sorted(self.networks.given) if not reads[name]]
        read = self.parts.union(*(set(entry.extras) - {"examples"} for entry in self.entries_of))
        read |= {"examples"} if self._shown else set()
        files = {"model": {"model"}, "masks": {"masks", "boxes"}, "examples": {"examples"}, "detector": {"detector"}}
        unused += [f"--{name}" for name, parts in files.items() if getattr(self.names, name) and not parts & read]
        if self.names.vocabulary and self.names.namer == "examples" and "entries" not in read:
            unused.append("--vocabulary (namer.classes chooses among the classes of the examples)")
        if unused:
            raise UserError(f"{unused[0]} has no effect with {self._who}; leave it out")

    @cached_property
    def entries(self) -> list[str]:
        """Entries of the vocabulary."""
        return [] if self.names.vocabulary is None else read_vocabulary(self.names.vocabulary)

    @cached_property
    def clip(self) -> Clip:
        """The image-text model."""
        text_tower = self.networks.text_embeddings is None
        return load_clip(str(self.names.clip), device=self.device, dtype=self.dtype, text_tower=text_tower)

    @cached_property
    def dense_clip(self) -> Clip | PrecomputedFeatures:
        """The image-text model, or the features that stand in its place."""
        if self.networks.features is None:
            return self.clip
        return PrecomputedFeatures(self.networks.features, self.networks.features_layout, device=self.device)

    @cached_property
    def encoder(self) -> Encoder:
        """The backbone."""
        return load_encoder(str(self.names.backbone), *self._weights, device=self.device, dtype=self.dtype)

    @cached_property
    def guide(self) -> Encoder | None:
        """The second backbone of attention "proxy"."""
        name = self.networks.guide
        return None if name is None else load_encoder(name, device=self.device, dtype=self.dtype)

    @cached_property
    def classifier(self) -> Encoder:
        """The image classifier: one of its own, else the backbone's."""
        if self.networks.classifier is not None:
            weights = self.networks.classifier_weights
            return load_classifier(self.networks.classifier, weights=weights, device=self.device, dtype=self.dtype)
        if "encoder" in self.parts and self.encoder.num_classes:
            return self.encoder
        return load_classifier(str(self.names.backbone), *self._weights, device=self.device, dtype=self.dtype)

    @property
    def _weights(self) -> tuple[str | None, str | None]:
        return self.names.backbone_weights, self.networks.pad_type

    @cached_property
    def examples(self) -> Any:
        """The annotated images, with the classes that the namer is to know, or None."""
        from .naming.examples import read_examples

        if self.names.examples is None:
            return None
        return read_examples(self.names.examples, getattr(self.settings.namer, "classes", None))

    @property
    def network(self) -> Encoder | Clip:
        """What looks at examples and masks: of the backbone and the CLIP the one that is named; of both, the one that
        the labeler leaves."""
        if self.names.clip is None or (self.names.backbone is not None and "dense_clip" in self.parts):
            return self.encoder
        return self.clip

    def _part(self, name: str, config: Any) -> Any:
        if name == "text":
            return self._text(config)
        if name == "examples" and not self._shown and not isinstance(config, ExamplesSettings):
            return None  # they name what the labeler finds; they do not tell it what to find
        return getattr(self.names, NAMED[name]) if name in NAMED else getattr(self, name)

    def _text(self, config: Any) -> Any:
        """Embeddings of the class names, then of the background names, from a file."""
        if self.networks.text_embeddings is None:
            return None
        names = [*self.entries, *read_background(config.background, self.entries)]
        return load_text_embeddings(self.networks.text_embeddings, names)

    def _make(self, entry: Entry, config: Any) -> Any:
        extras = {name: self._part(name, config) for name in entry.extras}
        return entry.load()(*[self._part(part, config) for part in entry.parts], config, **extras)

    def labeler(self) -> Any:
        """The labeler."""
        if ":" in self.names.labeler:
            from .labelers.plugin import load_plugin

            return load_plugin(self.names.labeler, self.settings.labeler.options)
        return self._make(labeler_entry(self.names.labeler), self.settings.labeler)

    def namer(self) -> Any:
        """The namer, or None for the labeler's own classes."""
        entry, config = NAMERS[self.names.namer], self.settings.namer
        if entry is None:
            return None
        if isinstance(config, ClassifierSettings) and self.entries:
            config = ClassifierSettings.of(config, class_map=self._map_of_vocabulary(config.class_map))
        return self._make(entry, config) if entry.parts else entry.load()()

    def _map_of_vocabulary(self, class_map: Any) -> dict[str, Any]:
        """The entries of a class map that the vocabulary names, in its order."""
        known, names = read_class_map(class_map), [split_synonyms(entry)[0] for entry in self.entries]
        lacking = [name for name in names if name not in known]
        if lacking:
            where = class_map if isinstance(class_map, str) else ""
            raise UserError(f"class map {where} has no entry for {lacking[0]!r} of the vocabulary")
        return {name: known[name] for name in names}
