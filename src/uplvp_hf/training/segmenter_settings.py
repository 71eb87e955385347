"""The keys of `model.segmenter`: which there are, and where a checkpoint differs from them."""

from __future__ import annotations

import difflib

from transformers import PreTrainedConfig

from .config import ConfigError, ModelSettings

# Our own settings of Mask2Former, which transformers' configuration does not have, and what they are where they lack.
OFF = {"position_octaves": 0, "hard_points": False}
# Beside them: properties of backbone configurations, and our own addition to timm's.
FURTHER = (*OFF, "out_features", "out_indices", "timm_kwargs")


def refuse_unknown(given: dict, config: PreTrainedConfig, prefix: str = "model.segmenter.") -> None:
    """Raises ConfigError for a misspelled key of a segmenter or backbone: transformers would take it silently."""
    refuse_unknown_names(given, type(config), prefix)
    for key, value in given.items():
        if isinstance(value, dict) and isinstance(getattr(config, key, None), PreTrainedConfig):
            refuse_unknown(value, getattr(config, key), f"{prefix}{key}.")


def refuse_unknown_names(given: dict, kind: type[PreTrainedConfig], prefix: str) -> None:
    known = {*kind.__dataclass_fields__, *kind.attribute_map, "model_type", "num_labels"}
    for key in given:
        if key not in known and key not in FURTHER:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean `{prefix}{near[0]}`?" if near else ""
            raise ConfigError(f"`{prefix}{key}` is no setting of a {kind.model_type}.{hint}")


def refuse_other_segmenter(model: ModelSettings, found: PreTrainedConfig) -> None:
    """Raises ConfigError where `model.init` holds another segmenter than `model.segmenter` describes."""
    unlike = differences(model.segmenter or {}, found.to_dict())
    if unlike:
        raise ConfigError(
            f"{model.init} does not hold the segmenter that the settings describe ({'; '.join(unlike)}). Start from "
            "another checkpoint, or give settings without `model.segmenter`."
        )


def differences(wanted: dict, found: dict, prefix: str = "model.segmenter.") -> list[str]:
    """The settings in which `found` differs from `wanted`."""
    unlike = []
    found = {**found, **{key: off for key, off in OFF.items() if key in wanted and key not in found}}
    for key, value in wanted.items():
        if isinstance(value, dict) and isinstance(found.get(key), dict):
            unlike += differences(value, found[key], f"{prefix}{key}.")
        elif key in found and found[key] != (list(value) if isinstance(value, tuple) else value):
            unlike.append(f"{prefix}{key} is {value!r}, there {found[key]!r}")
    return unlike
