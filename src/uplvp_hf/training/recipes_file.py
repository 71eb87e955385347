"""Recipes: YAML files of settings that may build on one another.

    base: paper/knet_coco10_finetune          # or a list of them, merged in order; shipped names or paths
    model:
      backbone_weights: models/mocov2/model.safetensors

A file's own settings win over those of its bases, a later base over an earlier one. Sections merge key by key; a dict
with another `model_type` (another segmenter or backbone) takes the place of the earlier one as a whole.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ..settings import ConfigError

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same, many times faster where PyYAML was built with it


def read_recipe(name_or_path: str | list[str]) -> dict[str, Any]:
    """Settings of a recipe with its bases, or of several recipes merged in order, as nested dicts without `base`.

    A recipe is a path (in a `base`, relative to the file that names it), or the name of a shipped recipe. Raises
    ConfigError for one that does not exist, a cycle of bases, and a file that is not YAML of `key: value`.
    """
    names = [name_or_path] if isinstance(name_or_path, str) else name_or_path
    values: dict[str, Any] = {}
    for name in names:
        values = merge_settings(values, _read(_find(name, Path()), ()))
    return values


def merge_settings(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` over `below`: dicts merge at any depth unless their `model_type` differs, other values replace."""
    merged = dict(below)
    for key, value in above.items():
        before = merged.get(key)
        if isinstance(before, dict) and isinstance(value, dict):
            kinds = {one["model_type"] for one in (before, value) if "model_type" in one}
            merged[key] = value if len(kinds) > 1 else merge_settings(before, value)
        else:
            merged[key] = value
    return merged


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package, such as `small_finetune` and `paper/knet_coco10_finetune`.

    The parts that these build on, which say no `stage`, are not among them: see `shipped_parts`.
    """
    return [name for name in _shipped_names() if "stage" in read_recipe(name)]


def shipped_parts() -> list[str]:
    """Names of what comes with the package for recipes to build on: initializations, datasets, segmenters."""
    return [name for name in _shipped_names() if "stage" not in read_recipe(name)]


def _shipped_folder() -> Path:
    return Path(str(resources.files("uplvp_hf.training") / "recipes"))


def _shipped_names() -> list[str]:
    folder = _shipped_folder()
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def _find(name: str, beside: Path) -> Path:
    """The file that a name means: one beside the file that names it, else a shipped recipe."""
    if not isinstance(name, str):
        raise ConfigError(f"A recipe is named by a word, got {name!r}.")
    path = beside / name
    if path.is_file():
        return path
    shipped = _shipped_folder() / f"{name}.yaml"
    if shipped.is_file() and not Path(name).is_absolute():
        return shipped
    known, parts = ", ".join(shipped_recipes()), ", ".join(shipped_parts())
    raise ConfigError(f"No recipe file `{path}`. Shipped recipes: {known}. Parts of recipes: {parts}.")


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """Reads the file at `path` and merges it over its bases. `above`: the files whose bases led here."""
    file = path.resolve()
    if file in above:
        circle = " -> ".join(str(one) for one in (*above[above.index(file) :], file))
        raise ConfigError(f"Recipes build on each other in a circle: {circle}.")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold settings as `key: value`.")
    bases = content.pop("base", [])
    if not isinstance(bases, (str, list)):
        raise ConfigError(f"{path}: `base` is the name of a recipe, or a list of them, got {bases!r}.")
    values: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        try:
            found = _find(base, path.parent)
        except ConfigError as error:
            raise ConfigError(f"{path}, `base`: {error}") from error
        values = merge_settings(values, _read(found, (*above, file)))
    return merge_settings(values, content)
