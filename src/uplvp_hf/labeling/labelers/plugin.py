"""Mask sources of one's own, named as `my_package.my_module:factory`.

The factory is called with the user's options and returns a source: any callable

    source(images, rows) -> one result an image

`images` are PIL images (RGB), `rows` their rows in the dataset (image_id, file_name, width, height). A result is a
`Proposals`, or a dictionary:

    masks   (N, H, W) bool, or a list of (H, W) bool, at the image's size
    scores  (N,) in [0, 1], higher is better; default 1
    labels  (N,) indices into the source's `vocabulary`; left out by a source without classes

The source may have these attributes: `name` and `encoder_name` (for the store's header), `vocabulary` (class names),
`settings` (a dictionary of JSON values that the labels depend on, beside the options), `license` (of its weights). A
source that must see images before it labels any can have the methods `measure`, `calibrate` and `restore` of
`pipeline.Labeler`. Example:

    def bright_regions(level: int = 200):
        def source(images, rows):
            return [{"masks": [np.asarray(image.convert("L")) > level]} for image in images]
        return source
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import os
import sys
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ...data import Row
from ...models.errors import UserError
from ...settings import Settings, setting
from ..cutting.proposals import Proposals
from ..protocol import Labeler


def find_factory(reference: str) -> Callable[..., Any]:
    """What `package.module:name` refers to; modules beside the working folder are found too.

    Raises UserError when there is no such module or name, or it cannot be called.
    """
    module_name, _, attribute = reference.partition(":")
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise UserError(f"labeler {reference}: its module needs {error.name}, which is not installed") from error
        raise UserError(f"labeler {reference}: no module {module_name} in {here} or among the packages") from error
    finally:
        if added:
            sys.path.remove(here)
    factory = getattr(module, attribute, None)
    if not callable(factory):
        known = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise UserError(f"labeler {reference}: {module_name} has no function {attribute!r}; it has {known}")
    return factory


def settings_of_factory(reference: str) -> type:
    """The settings of a user's factory: its own dataclass in the attribute `Settings`, else the keywords that it takes,
    with their annotations and defaults. With **keywords it takes any name. Raises UserError as `find_factory` does."""
    factory = find_factory(reference)
    own = getattr(factory, "Settings", None)
    if isinstance(own, type) and dataclasses.is_dataclass(own):
        return own
    try:
        hints = typing.get_type_hints(factory.__init__ if inspect.isclass(factory) else factory)
    except (NameError, AttributeError):  # names that are imported for type checkers only; builtins
        hints = {}
    fields: list[Any] = []
    parameters = inspect.signature(factory).parameters.values()
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        default = dataclasses.field(kw_only=True)
        if parameter.default is not parameter.empty:
            default = setting(parameter.default, "")
        fields.append((parameter.name, hints.get(parameter.name, Any), default))
    fields.sort(key=lambda item: item[2].default is not dataclasses.MISSING)
    made = dataclasses.make_dataclass("PluginSettings", fields, bases=(Settings,), kw_only=True)
    made.open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    return made


def load_plugin(reference: str, options: Mapping[str, Any] | None = None) -> PluginLabeler:
    """The labeler that `package.module:factory` makes of `options`, with its results checked.

    Raises UserError as `find_factory` does, and for options that the factory does not take, needs and did not get, or
    JSON cannot hold.
    """
    factory, options = find_factory(reference), dict(options or {})
    try:
        json.dumps(options)
    except (TypeError, ValueError) as error:
        raise UserError(f"labeler {reference}: options must be JSON values ({error})") from error
    try:
        inspect.signature(factory).bind(**options)
    except TypeError as error:
        raise UserError(f"labeler {reference}: {error}; give its options as labeler.NAME=VALUE") from error
    return PluginLabeler(factory(**options), reference, options)


class PluginLabeler(Labeler):
    """A user's source as a labeler; see the module. `options` become part of the settings.

    Raises UserError for a source that cannot be called, or that has settings which JSON cannot hold.
    """

    def __init__(self, source: Callable[..., Any], reference: str, options: Mapping[str, Any] | None = None) -> None:
        if not callable(source):
            raise UserError(f"labeler {reference}: made {type(source).__name__}, which is no callable source")
        self.source, self.reference, self.options = source, reference, dict(options or {})
        self.name = str(getattr(source, "name", reference))
        self.encoder_name = str(getattr(source, "encoder_name", reference))
        vocabulary = getattr(source, "vocabulary", ())
        if isinstance(vocabulary, str):
            raise UserError(f"labeler {reference}: vocabulary must be a list of class names, got {vocabulary!r}")
        self.vocabulary = [str(name) for name in vocabulary]
        self.license = getattr(source, "license", None)
        try:
            json.dumps(self.settings)
        except (TypeError, ValueError) as error:
            raise UserError(f"labeler {reference}: settings must be JSON values ({error})") from error

    @property
    def settings(self) -> dict[str, Any]:
        """For the store's header."""
        return {"source": self.reference, "options": self.options, **getattr(self.source, "settings", {})}

    @property
    def notes(self) -> list[str]:
        """What the source has to say after a run."""
        return list(getattr(self.source, "notes", ()))

    def measure(self, images: Sequence[Image.Image], rows: Sequence[Row] | None = None) -> list[Any]:
        """The source's own, or nothing."""
        return self._own("measure", [], images, rows)

    def calibrate(self, statistics: list[Any]) -> dict[str, Any]:
        """The source's own, or nothing."""
        return self._own("calibrate", {}, statistics)

    def _own(self, method: str, otherwise: Any, *args: Any) -> Any:
        value = getattr(self.source, method)(*args) if hasattr(self.source, method) else otherwise
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UserError(f"labeler {self.reference}: {method} must return JSON values ({error})") from error
        return value

    def restore(self, state: Mapping[str, Any]) -> None:
        """The source's own, or nothing."""
        if hasattr(self.source, "restore"):
            self.source.restore(state)

    def __call__(self, images: Sequence[Image.Image], rows: Sequence[Row] | None = None) -> list[Proposals]:
        """One checked `Proposals` an image. Raises UserError naming the source, the image and what is wrong."""
        results = self.source(images, rows)
        if not isinstance(results, Iterable):
            raise UserError(f"labeler {self.reference}: must return one result an image, got {results!r:.80}")
        results = list(results)
        if len(results) != len(images):
            raise UserError(f"labeler {self.reference}: {len(results)} results for {len(images)} images")
        names = [row["file_name"] for row in rows] if rows is not None else [f"image {k}" for k in range(len(images))]
        return [self._checked(*item) for item in zip(results, images, names)]

    def _checked(self, result: Any, image: Image.Image, name: str) -> Proposals:
        size = (image.height, image.width)
        if isinstance(result, Proposals):
            result = {"masks": result.masks, "scores": result.scores, "labels": result.labels}
        if not isinstance(result, Mapping) or "masks" not in result:
            raise self._error(name, f"a result is a Proposals or has 'masks', got {type(result).__name__}")
        unknown = sorted(map(str, result.keys() - {"masks", "scores", "labels"}))
        if unknown:
            raise self._error(name, f"a result has masks, scores and labels, not {unknown[0]!r}")
        if not isinstance(result["masks"], Iterable):
            raise self._error(name, f"masks must be an array or a list, got {result['masks']!r:.80}")
        masks = [np.asarray(mask.cpu() if hasattr(mask, "cpu") else mask) for mask in result["masks"]]
        for mask in masks:
            if mask.shape != size or mask.dtype != bool:
                raise self._error(name, f"a mask must be bool {size} (height, width), got {mask.dtype} {mask.shape}")
        scores = _floats(result.get("scores"), len(masks))
        if scores is None or scores.shape != (len(masks),) or not ((scores >= 0) & (scores <= 1)).all():
            raise self._error(name, f"scores must be {len(masks)} numbers from 0 to 1, got {result['scores']!r:.80}")
        labels = result.get("labels")
        if self.vocabulary and (labels is not None or not masks):
            labels = np.asarray([] if labels is None else labels)
            whole = labels.size == 0 or np.issubdtype(labels.dtype, np.integer)
            if labels.shape != (len(masks),) or not whole or ((labels < -1) | (labels >= len(self.vocabulary))).any():
                known = f"{len(masks)} indices from 0 to {len(self.vocabulary) - 1}"
                raise self._error(name, f"labels must be {known}, got {labels.tolist()!r:.80}")
        elif self.vocabulary:
            raise self._error(name, "no labels, but the source has a vocabulary; give one index a mask")
        elif labels is not None:
            raise self._error(name, "labels, but the source has no vocabulary; give it one, or leave labels out")
        keep = [k for k, mask in enumerate(masks) if mask.any()]
        named = None if labels is None else np.asarray(labels)[keep]
        return Proposals.build([masks[k] for k in keep], scores[keep], size, named)

    def _error(self, name: str, reason: str) -> ValueError:
        return ValueError(f"labeler {self.reference}, {name}: {reason}")


def _floats(values: Any, count: int) -> np.ndarray | None:
    """(N,) float64, ones for None, or None where the values are no numbers."""
    if values is None:
        return np.ones(count)
    try:
        return np.asarray(values.cpu() if hasattr(values, "cpu") else values, dtype=np.float64)
    except (TypeError, ValueError):
        return None
