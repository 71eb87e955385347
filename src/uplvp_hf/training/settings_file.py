"""Settings: nested dicts and `section.key=value` words into dataclasses, with errors that name the key."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass
from typing import Any

import yaml

from ..models.errors import UserError


class ConfigError(UserError):
    """A setting that does not exist or has a wrong type or value."""


def merge_words(values: dict[str, Any], words: list[str]) -> None:
    """Puts `section.key=value` words into `values`, in place. Raises ConfigError for words of another form."""
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"`{word}` is not of the form section.key=value.")
        try:
            value = yaml.safe_load(text) if text else None
        except yaml.YAMLError as error:
            raise ConfigError(f"`{word}`: the value is not valid YAML: {error}") from error
        _set(values, key.lstrip("-").split("."), _Word(value, text))


@dataclass
class _Word:
    """A value from the command line: as YAML reads it, and as it was written (YAML takes `off` for False)."""

    value: Any
    text: str


def plain(value: Any) -> Any:
    """`value` without `_Word`s, at any depth of dicts."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value.value if isinstance(value, _Word) else value


def _set(values: dict[str, Any], path: list[str], value: Any) -> None:
    for key in path[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise ConfigError(f"`{'.'.join(path)}`: `{key}` is a value, not a section.")
    values[path[-1]] = value


def build_settings(cls: type, values: dict[str, Any]) -> Any:
    """A dataclass of sections (dataclasses) from nested dicts, every value as the annotated type.

    Raises ConfigError for an unknown key, naming the nearest known one, and for a value of a wrong type.
    """
    return _build(cls, values, "", cls)


def _build(cls: type, values: dict[str, Any], prefix: str, root: type) -> Any:
    known = {item.name: item for item in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        if key not in known:
            key = str(key)
            raise ConfigError(f"Unknown setting `{prefix}{key}`. {_suggestion(key, prefix, list(known), root)}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise ConfigError(f"`{prefix}{key}` is a section and needs `key: value` lines, got {plain(value)!r}.")
            arguments[key] = _build(hints[key], value, f"{prefix}{key}.", root)
        elif (section := _section_of_table(hints[key])) is not None:
            arguments[key] = _build_table(section, value, f"{prefix}{key}", root)
        else:
            arguments[key] = _coerce(f"{prefix}{key}", value, hints[key])
    return cls(**arguments)


def _section_of_table(hint: Any) -> type | None:
    """The dataclass of a `dict[str, dataclass]`."""
    if typing.get_origin(hint) is dict and dataclasses.is_dataclass(typing.get_args(hint)[1]):
        return typing.get_args(hint)[1]
    return None


def _build_table(section: type, value: Any, prefix: str, root: type) -> dict[str, Any]:
    """{name: section} of a dict of dicts; the names are free, None is a section of defaults."""
    if not isinstance(value, dict):
        raise ConfigError(f"`{prefix}` is a table and needs `name: {{...}}` lines, got {plain(value)!r}.")
    for name, entry in value.items():
        if entry is not None and not isinstance(entry, dict):
            raise ConfigError(f"`{prefix}.{name}` is a section and needs `key: value` lines, got {plain(entry)!r}.")
    return {str(name): _build(section, entry or {}, f"{prefix}.{name}.", root) for name, entry in value.items()}


def _all_keys(root: type) -> dict[str, list[str]]:
    """Last part of every key -> full keys."""
    keys: dict[str, list[str]] = {}
    for item in dataclasses.fields(root):
        hint = typing.get_type_hints(root)[item.name]
        keys.setdefault(item.name, []).append(item.name)
        if dataclasses.is_dataclass(hint):
            for inner in dataclasses.fields(hint):
                keys.setdefault(inner.name, []).append(f"{item.name}.{inner.name}")
    return keys


def _suggestion(key: str, prefix: str, siblings: list[str], root: type) -> str:
    """The nearest known key, of the same section if one is near, otherwise of any."""
    for near in difflib.get_close_matches(key, siblings, n=1):
        return f"Did you mean `{prefix}{near}`?"
    for near in difflib.get_close_matches(key, _all_keys(root), n=1):
        return f"Did you mean `{_all_keys(root)[near][0]}`?"
    return f"Known here: {', '.join(prefix + name for name in siblings)}."


def _coerce(key: str, value: Any, hint: Any) -> Any:
    """`value` as the annotated type: whole numbers become floats, `1e-3` (a string in YAML) too."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(value, _Word) and value.value is not None and str in options:
        return value.text
    value = plain(value)
    if value is None:
        if types.NoneType in options:
            return None
        raise ConfigError(f"`{key}` needs a value.")
    for option in options:
        origin = typing.get_origin(option) or option
        if origin is float and not isinstance(value, bool):
            try:
                number = float(value)
            except (TypeError, ValueError):
                continue
            if math.isfinite(number):
                return number
        if origin is list and isinstance(value, (list, tuple)):
            return [_coerce(f"{key}[{i}]", item, typing.get_args(option)[0]) for i, item in enumerate(value)]
        if origin is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
        if isinstance(value, origin) and not (origin is int and isinstance(value, bool)):
            return value
    name = getattr(hint, "__name__", str(hint))
    raise ConfigError(f"`{key}` must be of type {name}, got {value!r}.")


def choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ConfigError unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(f"`{key}` must be one of {', '.join(choices)}, got `{value}`.")


def at_least(key: str, value: float, least: float) -> None:
    """Raises ConfigError for a smaller `value`."""
    if value < least:
        raise ConfigError(f"`{key}` must be at least {least}, got {value}.")
