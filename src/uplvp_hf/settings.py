"""One settings language: dataclasses, filled from nested dicts (YAML files) and `section.key=value` words.

    @dataclass(frozen=True)
    class SaliencySettings(Settings):
        threshold: float = setting(0.5, "similarity that a cell needs to belong to a mask", least=0, most=1)

    build_settings(SaliencySettings, {"threshold": "1e-3"})     # converted and checked
    describe(SaliencySettings, "labeler.")                      # the lines of --help

A value means the same in every verb, in a word and in a file:

    none, null, nothing at all     None, where the setting may be None and has no choice of that name
    640,800 and 640                lists, where a list is wanted
    1e-3, 7.0                      numbers; 7.0 is a whole one
    off, 12, @x, *.json            stay as they are written where text is wanted

OmegaConf 2.3, jsonargparse 4 and tyro 1 were tried for this. None of them reads `640,800` as a list or `none` as None,
knows ranges, or prints meanings that lie beside the fields; `@x` ends OmegaConf with an error of the YAML scanner, and
the messages of the other two span up to twelve lines. Conversion, ranges and messages are most of this file.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import yaml

from .models.errors import UserError

_NOTHING = ("none", "null", "~")


class ConfigError(UserError):
    """A setting that does not exist or has a wrong type or value."""


class _Unfit(Exception):
    """A value that is not of the wanted kind. `place`: of the element of a list, such as "[1]"."""

    def __init__(self, kind: Any, value: Any, place: str = "") -> None:
        super().__init__(kind, value, place)
        self.kind, self.value, self.place = kind, value, place


def setting(default: Any, meaning: str, **limits: Any) -> Any:
    """A field of a settings dataclass with its meaning, in words that complete "NAME: ...".

    Args:
        default: its value; lists and dicts are copied for every object.
        meaning: what it does, with units and, where it has one, the source of the default.
        limits: any of `choices` (a sequence), `least`, `most` (inclusive), `above`, `below` (exclusive), which hold for
            every element of a list, and `only`, a pair (name, value): without that value of that other setting this
            one has no effect, and giving it is an error.
    """
    unknown = limits.keys() - {"choices", "least", "most", "above", "below", "only"}
    if unknown:
        raise TypeError(f"setting() has no {sorted(unknown)}")
    metadata = {"meaning": meaning, **limits}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Settings:
    """Base of settings dataclasses: limits are checked however an object is made."""

    open_ended: ClassVar[bool] = False  # names that are no field are taken too, into `options`
    _given: frozenset[str] | None = None
    _more: Mapping[str, Any] = types.MappingProxyType({})

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            _check_limits(item.name, getattr(self, item.name), item.metadata)

    @property
    def given(self) -> frozenset[str]:
        """Names that were set by a word, a file or a keyword; of an object made directly, those that differ from their
        defaults."""
        if self._given is not None:
            return self._given
        return frozenset(
            item.name
            for item in dataclasses.fields(self)  # type: ignore[arg-type]
            if getattr(self, item.name) != _default(item)
        )

    @property
    def options(self) -> dict[str, Any]:
        """The given settings alone, as keyword arguments."""
        known = [name for name in self.given if hasattr(self, name)]
        return {name: getattr(self, name) for name in known} | dict(self._more)

    def as_dict(self) -> dict[str, Any]:
        """All settings as JSON values: tuples become lists."""
        values = dataclasses.asdict(self)  # type: ignore[call-overload]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def of(cls, settings: Any = None, **changes: Any) -> Any:
        """`settings` (None: the defaults) with `changes`, which are converted and checked as words are."""
        given = {} if settings is None else {name: getattr(settings, name) for name in settings.given}
        return build_settings(cls, given | changes)


def merge_words(values: dict[str, Any], words: Sequence[str]) -> None:
    """Puts `section.key=value` words into `values`, in place; later words win. Raises ConfigError for other forms."""
    for word in words:
        key, equals, text = word.partition("=")
        path = key.lstrip("-").split(".")
        if not equals or not all(path):
            raise ConfigError(f"`{word}` is not of the form section.key=value.")
        section = values
        for part in path[:-1]:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise ConfigError(f"`{'.'.join(path)}`: `{part}` is a value, not a section.")
        section[path[-1]] = Word(_read(text), text)


def _read(text: str) -> Any:
    """A word's value as YAML reads it; the text itself where it is no YAML, such as `@x` and `*.json`."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


@dataclass
class Word:
    """A value from the command line: as YAML reads it, and as it was written (YAML takes `off` for False)."""

    value: Any
    text: str


def plain(value: Any) -> Any:
    """`value` without `Word`s, at any depth of dicts."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value.value if isinstance(value, Word) else value


def build_settings(cls: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    """A dataclass, whose sections are dataclasses again, from nested dicts; every value becomes the annotated type.

    prefix: in front of names in messages. Raises ConfigError for an unknown key, naming the nearest known one, for a
    value of a wrong type or outside of its limits, and for a setting without effect.
    """
    return _build(cls, values, prefix, (cls, prefix))


def _build(cls: type, values: Mapping[str, Any], prefix: str, root: tuple[type, str]) -> Any:
    known, hints = {item.name: item for item in dataclasses.fields(cls)}, typing.get_type_hints(cls)
    arguments: dict[str, Any] = {}
    more: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in known:
            if not getattr(cls, "open_ended", False):
                raise ConfigError(f"Unknown setting `{name}`. {_suggestion(str(key), prefix, list(known), root)}")
            more[key] = plain(value)
        elif dataclasses.is_dataclass(hints[key]):
            arguments[key] = _build(hints[key], _mapping(name, value, "section"), f"{name}.", root)
        elif (section := _section_of_table(hints[key])) is not None:
            table = _mapping(name, value, "table")
            sections = {str(one): _mapping(f"{name}.{one}", entry or {}, "section") for one, entry in table.items()}
            arguments[key] = {one: _build(section, entry, f"{name}.{one}.", root) for one, entry in sections.items()}
        else:
            arguments[key] = _converted(name, value, hints[key], known[key].metadata)
            _check_limits(name, arguments[key], known[key].metadata)
    for name, item in known.items():
        if name not in arguments and _default(item) is dataclasses.MISSING:
            raise ConfigError(f"`{prefix}{name}` has to be given.")
    result = cls(**arguments)
    if isinstance(result, Settings):
        object.__setattr__(result, "_given", frozenset(values))
        object.__setattr__(result, "_more", more)
    for key in arguments:
        other, needed = known[key].metadata.get("only", (key, arguments[key]))
        if getattr(result, other) != needed:
            raise ConfigError(
                f"`{prefix}{key}` has no effect with `{prefix}{other}={getattr(result, other)}`; leave it out."
            )
    return result


def _mapping(name: str, value: Any, kind: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        form = "key: value" if kind == "section" else "name: {...}"
        raise ConfigError(f"`{name}` is a {kind} and needs `{form}` lines, got {plain(value)!r}.")
    return value


def _section_of_table(hint: Any) -> type | None:
    """The dataclass of a `dict[str, dataclass]`."""
    if typing.get_origin(hint) is dict and dataclasses.is_dataclass(typing.get_args(hint)[1]):
        return typing.get_args(hint)[1]
    return None


def _suggestion(key: str, prefix: str, siblings: list[str], root: tuple[type, str]) -> str:
    """The nearest known key, of the same section if one is near, otherwise of any."""
    for near in difflib.get_close_matches(key, siblings, n=1):
        return f"Did you mean `{prefix}{near}`?"
    everywhere = _all_keys(*root)
    for near in difflib.get_close_matches(key, everywhere, n=1):
        return f"Did you mean {' or '.join(f'`{name}`' for name in everywhere[near])}?"
    return f"Known here: {', '.join(prefix + name for name in siblings) or 'nothing'}."


def _all_keys(cls: type, prefix: str) -> dict[str, list[str]]:
    """Last part of every key -> full keys."""
    keys: dict[str, list[str]] = {}
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        keys.setdefault(item.name, []).append(prefix + item.name)
        if dataclasses.is_dataclass(hints[item.name]):
            for last, names in _all_keys(hints[item.name], f"{prefix}{item.name}.").items():
                keys.setdefault(last, []).extend(names)
    return keys


def _converted(key: str, value: Any, hint: Any, limits: Mapping[str, Any]) -> Any:
    """`value` as the annotated type. Raises ConfigError naming the key, what is wanted and what was given."""
    optional = types.NoneType in typing.get_args(hint) or hint in (Any, types.NoneType)
    text = value.text if isinstance(value, Word) else value
    empty = plain(value) is None or (isinstance(text, str) and text.lower() in _NOTHING)
    if empty and optional and text not in limits.get("choices", ()):
        return None
    if plain(value) is None and text not in _NOTHING:
        raise ConfigError(f"`{key}` needs a value: {_kind_text(hint)}.")
    try:
        return _convert(value, hint)
    except _Unfit as unfit:
        raise ConfigError(f"`{key}{unfit.place}` must be {_kind_text(unfit.kind)}, got {unfit.value!r}.") from None


def _convert(value: Any, kind: Any) -> Any:
    written, value = value.text if isinstance(value, Word) else value, plain(value)
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        for part in sorted(inner, key=lambda part: _rank(value, part)):
            try:
                return _convert(Word(value, written) if isinstance(written, str) else value, part)
            except _Unfit:
                continue
    elif kind is str:
        if isinstance(written, str):
            return written
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
    elif kind in (int, float):
        number = _number(value)
        if number is not None and (kind is float or number.is_integer()):
            return kind(number) if kind is float or not isinstance(value, int) else value
    elif origin in (list, tuple):
        return _convert_list(value, kind, origin, inner)
    elif kind not in (types.NoneType,) and isinstance(value, origin):
        return value
    raise _Unfit(kind, value)


def _rank(value: Any, kind: Any) -> int:
    """The order in which the kinds of a union are tried: what the value is, other single values, text, lists."""
    several = (typing.get_origin(kind) or kind) in (list, tuple)
    if (isinstance(value, str) and kind is str) or (isinstance(value, (list, tuple)) and several):
        return 0
    return 3 if several else 2 if kind is str else 1


def _number(value: Any) -> float | None:
    """A finite number, also written as text (YAML takes `1e-3` for text), or None."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _convert_list(value: Any, kind: Any, origin: type, inner: tuple[Any, ...]) -> Any:
    if isinstance(value, dict):
        raise _Unfit(kind, value)
    if isinstance(value, str):
        value = [Word(_read(part), part.strip()) for part in value.split(",") if part.strip()]
    parts = list(value) if isinstance(value, (list, tuple)) else [value]
    fixed = origin is tuple and Ellipsis not in inner
    if fixed and len(parts) != len(inner):
        raise _Unfit(kind, [plain(part) for part in parts])
    kinds = inner if fixed else [inner[0] if inner else Any] * len(parts)
    converted = []
    for place, (part, wanted) in enumerate(zip(parts, kinds)):
        try:
            converted.append(_convert(part, wanted))
        except _Unfit as unfit:
            raise _Unfit(unfit.kind, unfit.value, f"[{place}]{unfit.place}") from None
    return tuple(converted) if origin is tuple else converted


def _check_limits(key: str, value: Any, limits: Mapping[str, Any]) -> None:
    """Raises ConfigError for a value outside of the limits of its field."""
    for one in value if isinstance(value, (list, tuple)) else [value]:
        if one is None:
            continue
        choices = limits.get("choices")
        if choices is not None and one not in choices:
            near = difflib.get_close_matches(str(one), [str(choice) for choice in choices], n=1)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            raise ConfigError(f"`{key}` must be one of {_choices_text(choices)}, got `{one}`.{hint}")
        number = isinstance(one, (int, float)) and not isinstance(one, bool)
        good = not number or (
            limits.get("least", -math.inf) <= one <= limits.get("most", math.inf)
            and limits.get("above", -math.inf) < one < limits.get("below", math.inf)
        )
        if not good or (number and math.isnan(one)):
            raise ConfigError(f"`{key}` must be {_range_text(limits)}, got {one}.")


def _range_text(limits: Mapping[str, Any]) -> str:
    if {"least", "most"} <= limits.keys():
        return f"from {limits['least']:g} to {limits['most']:g}"
    words = {"least": "at least", "above": "above", "most": "at most", "below": "below"}
    return " and ".join(f"{text} {limits[name]:g}" for name, text in words.items() if name in limits)


def _choices_text(choices: Sequence[Any]) -> str:
    return ", ".join("none" if choice is None else str(choice) for choice in choices)


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "none"}
_PLURALS = {int: "whole numbers", float: "numbers", str: "texts"}


def _kind_text(kind: Any) -> str:
    """A type in words."""
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_kind_text(part) for part in inner)
    if origin is tuple and Ellipsis not in inner:
        return f"{len(inner)} {_PLURALS.get(inner[0], 'values')}"
    if origin in (list, tuple):
        return f"a list of {_PLURALS.get(inner[0], 'values') if inner else 'values'}"
    if origin is dict:
        return "a mapping"
    return "anything" if kind is Any else _KINDS.get(kind, getattr(kind, "__name__", str(kind)))


def _default(item: dataclasses.Field) -> Any:
    """The default value of a field; MISSING where it has none."""
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def describe(cls: type, prefix: str = "", width: int = 100) -> str:
    """Every setting with its default, what it may be, and its meaning; sections one after another."""
    lines: list[str] = []
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        hint = hints[item.name]
        if dataclasses.is_dataclass(hint):
            lines.append(describe(typing.cast(type, hint), f"{prefix}{item.name}.", width))
            continue
        default = _default(item)
        shown = "has to be given" if default is dataclasses.MISSING else f"default {_shown(default)}"
        limits = item.metadata
        kind = _kind_text(hint)
        if "choices" in limits:
            none = " or none" if types.NoneType in typing.get_args(hint) else ""
            kind = f"one of {_choices_text(limits['choices'])}{none}"
        bounds = "" if "choices" in limits or not _range_text(limits) else f", {_range_text(limits)}"
        text = f"{kind}{bounds}; {shown}. {limits.get('meaning', '')}".strip()
        lines.append(f"  {prefix}{item.name}")
        lines += textwrap.wrap(text, width, initial_indent="      ", subsequent_indent="      ", break_on_hyphens=False)
    return "\n".join(line for line in lines if line)


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(str(part) for part in value) or "none"
    if value is None or value == {}:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value) or "empty"
