"""Settings given as NAME=VALUE words, checked against the constructors that take them."""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import inspect
import math
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import yaml

from ..models.errors import UserError


@dataclasses.dataclass(frozen=True)
class Setting:
    """One keyword of a constructor. kind: its annotation, `Any` where there is none. meaning: from the docstring."""

    name: str
    default: Any
    kind: Any
    meaning: str

    @property
    def kind_text(self) -> str:
        """The annotation as it is written."""
        name = getattr(self.kind, "__name__", None)
        text = name if isinstance(self.kind, type) and name else str(self.kind)
        return re.sub(r"\b(typing|collections\.abc)\.", "", text).replace("NoneType", "None")


def settings_of(
    constructors: Sequence[Callable[..., Any]],
    provided: Collection[str] = (),
    also: Sequence[Callable[..., Any]] = (),
    required: bool = False,
) -> dict[str, Setting]:
    """{name: setting} of the keywords of `constructors`, the first one that has a name decides.

    provided: what the caller fills in, such as a loaded model. required: also keywords without a default, which are
    left out otherwise.
    also: functions that the constructors' docstrings refer to ("see `propose`").
    """
    found: dict[str, Setting] = {}
    for constructor in constructors:
        signature = inspect.signature(constructor)
        meanings = read_meanings(inspect.getdoc(constructor) or "", signature.parameters)
        for name, parameter in signature.parameters.items():
            open_ended = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            needed = parameter.default is parameter.empty
            if open_ended or name in provided or name in found or (needed and not required):
                continue
            meaning = meanings[name]
            if not meaning or meaning.startswith("see "):
                meaning = _meaning_elsewhere(name, constructor, also) or meaning
            default = "(has to be given)" if needed else parameter.default
            found[name] = Setting(name, default, _kind(parameter.annotation, constructor), meaning)
    return found


def _meaning_elsewhere(name: str, constructor: Callable[..., Any], also: Sequence[Callable[..., Any]]) -> str:
    """From a function that is referred to, else the first sentence that mentions the setting."""
    for function in also:
        meaning = read_meanings(inspect.getdoc(function) or "", inspect.signature(function).parameters).get(name)
        if meaning:
            return meaning
    module = sys.modules.get(constructor.__module__)
    for docstring in (inspect.getdoc(constructor), *map(inspect.getdoc, also), getattr(module, "__doc__", None)):
        for line in re.split(r"\n\s*\n|(?<=[.;:]) +|(?<=[.;:])\n|\n(?= {4}\w)", docstring or ""):
            sentence = " ".join(line.split())
            if not sentence.endswith(":") and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", sentence):
                return sentence
    return ""


def takes_anything(constructor: Callable[..., Any]) -> bool:
    """Whether it has **keywords."""
    kinds = [parameter.kind for parameter in inspect.signature(constructor).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds


def read_meanings(docstring: str, names: Collection[str]) -> dict[str, str]:
    """What a docstring says about each of `names`, "" where it says nothing. Understood is `name: text`, also for
    several names (`min_area, max_area: text`); the text ends at the next such entry or paragraph."""
    meanings = dict.fromkeys(names, "")
    head = re.compile(r"(?<![\w`.=])([a-z_]\w*(?:, [a-z_]\w*)*): ")
    for paragraph in re.split(r"\n\s*\n", docstring):
        text = " ".join(paragraph.split())
        heads = [match for match in head.finditer(text) if set(match[1].split(", ")) <= set(names)]
        for match, following in zip(heads, [*heads[1:], None]):
            end = len(text) if following is None else following.start()
            for name in match[1].split(", "):
                meanings[name] = meanings[name] or text[match.end() : end].strip()
    return meanings


def _kind(annotation: Any, constructor: Callable[..., Any]) -> Any:
    if annotation is inspect.Parameter.empty:
        return Any
    if not isinstance(annotation, str):
        return annotation
    module = sys.modules.get(constructor.__module__)
    try:
        return eval(annotation, dict(vars(module)) if module else {})
    except NameError:  # imported for type checkers only: a loaded object, which no word on a command line is
        return Any


def read_options(text: str) -> dict[str, Any]:
    """A JSON or YAML mapping, or the file that holds one. Raises UserError when it is neither."""
    where = f"--options {text}"
    if not text.lstrip().startswith("{"):
        try:
            with open(text, encoding="utf-8") as stream:
                text = stream.read()
        except FileNotFoundError as error:
            raise UserError(f"{where}: no such file; give one, or a mapping such as '{{\"level\": 3}}'") from error
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not JSON or YAML ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{where}: must map names of settings to values")
    return {str(name): value for name, value in content.items()}


def read_assignments(words: Sequence[str]) -> dict[str, Any]:
    """{name: value} of NAME=VALUE words, values as YAML. Raises UserError for other words and for a name twice."""
    values: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise UserError(f"--set {word}: write NAME=VALUE, such as --set top=20")
        if name in values:
            raise UserError(f"--set {name} is given twice")
        try:
            values[name] = yaml.safe_load(text) if text.strip() else ""
        except yaml.YAMLError:  # words such as {} or a: b
            values[name] = text
    return values


def check_name(name: str, known: Collection[str], owner: str) -> None:
    """Raises UserError for an unknown setting, with the nearest name and the list of all."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        listed = f"it has {', '.join(sorted(known))}" if known else "it has none"
        raise UserError(f"--set {name}: {owner} has no such setting.{hint} ({listed})")


def coerce(setting: Setting, value: Any) -> Any:
    """`value` as the setting's kind wants it. Raises UserError naming the setting, the kind and the value."""
    done, result = _as_kind(value, setting.kind)
    if not done:
        raise UserError(f"--set {setting.name}={value}: must be {setting.kind_text}, got {value!r}")
    return result


def _as_kind(value: Any, kind: Any) -> tuple[bool, Any]:
    """(whether it fits, the value). Whole numbers fit where numbers are wanted, 1e-3 too, which YAML takes for a word;
    a single value, or several with commas, fits where a sequence is wanted."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True, value
    if origin in (typing.Union, types.UnionType):
        if type(None) in inner and (value is None or str(value).lower() == "none"):
            return True, None
        # What YAML takes for a word is one where words are allowed; anything else becomes one last.
        order = sorted(inner, key=lambda part: (part is str) is not isinstance(value, str))
        tried = [_as_kind(value, part) for part in order]
        return next((outcome for outcome in tried if outcome[0]), (False, value))
    if origin is typing.Literal:
        return value in inner, value
    if kind in (bool, type(None)):
        return isinstance(value, kind), value
    if kind is int:
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        return (True, int(value)) if whole and not isinstance(value, bool) else (False, value)
    if kind is float:
        return _as_float(value)
    if kind is str:
        return not isinstance(value, (list, dict)), value if isinstance(value, str) else str(value)
    if origin in (collections.abc.Sequence, list, tuple):
        return _as_sequence(value, origin, inner)
    if origin in (collections.abc.Mapping, dict) or kind in (dict, list):
        return isinstance(value, origin or kind), value
    return False, value  # an object that no word can be


def _as_float(value: Any) -> tuple[bool, Any]:
    try:
        good = not isinstance(value, (bool, list, dict, type(None)))
        return (True, float(value)) if good and math.isfinite(float(value)) else (False, value)
    except ValueError:
        return False, value


def _as_sequence(value: Any, origin: Any, inner: tuple[Any, ...]) -> tuple[bool, Any]:
    if isinstance(value, str):
        value = [yaml.safe_load(part) for part in value.split(",") if part.strip()]
    parts = value if isinstance(value, list) else [value]
    fixed = origin is tuple and Ellipsis not in inner
    if fixed and len(parts) != len(inner):
        return False, value
    kinds = inner if fixed else [inner[0] if inner else Any] * len(parts)
    done = [_as_kind(part, kind) for part, kind in zip(parts, kinds)]
    values = [part for _, part in done]
    return all(fits for fits, _ in done), tuple(values) if origin is tuple else values


def describe(title: str, settings: Mapping[str, Setting]) -> str:
    """Names, defaults, kinds and meanings, for people."""
    lines = [title]
    for setting in settings.values():
        lines.append(f"  {setting.name} = {_shown(setting.default)}    ({setting.kind_text})")
        lines += textwrap.wrap(setting.meaning, 112, initial_indent="      ", subsequent_indent="      ")
    return "\n".join([*lines, ""] if settings else [*lines, "  no settings", ""])


def _shown(value: Any) -> str:
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 90 else f"{text[:86]} ..."
