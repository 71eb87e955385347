"""Settings of a training run: dataclasses, read from a YAML recipe and overridden by `section.key=value` words."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml


class ConfigError(ValueError):
    """A setting that does not exist or has a wrong type or value."""


class TrainingAborted(RuntimeError):
    """A run that was stopped because going on would not help; the message says why and what to change."""


@dataclass
class DataSettings:
    """Where the pictures are and how they are cut.

    train, val: anything `load_dataset_rows` reads (COCO JSON, folder, pseudo-label store); val may be absent.
    train_split, val_split: picks `annotations/<split>.json` of a folder. train_images, val_images: folder of the
    pictures, where they do not lie beside the JSON or in `images/`. labels_per_class: so many labelled pictures of
    every class, drawn with split_seed; None takes all. size: side of the square training canvas and longer side at
    inference, pixels, a multiple of 32; image_mean, image_std: of pixels scaled to 0..1. These three default to those
    of `model.init`, else to 512 and ImageNet's. scale_range: large-scale jitter, as factors of the fitting scale.
    """

    train: str | None = None
    train_split: str | None = None
    train_images: str | None = None
    val: str | None = None
    val_split: str | None = None
    val_images: str | None = None
    labels_per_class: int | None = None
    split_seed: int = 0
    size: int | None = None
    scale_range: list[float] = field(default_factory=lambda: [0.5, 1.5])
    flip: float = 0.5
    color_jitter: float = 0.2
    max_instances: int = 100
    image_mean: list[float] | None = None
    image_std: list[float] | None = None
    workers: int = 0


@dataclass
class ModelSettings:
    """What is trained.

    init: checkpoint to start from, our own (pre-training or fine-tuned), a K-Net or QueryInst, or an official
    Mask2Former; None builds `segmenter` (settings of the segmenter's configuration: `model_type` mask2former, knet or
    queryinst, `backbone_config` and its own).
    backbone_weights: safetensors with the backbone's weights. freeze_backbone: no gradients, norms in eval mode.
    class_head: "remap" keeps rows of classes that the checkpoint knows by name, "new" starts afresh.
    class_agnostic: pre-train with one class, "object". text_features: text embeddings of the class names, a file that
    scripts/embed_classes.py writes: pre-trains with an additional class head on them. The others: see `UplvpConfig`;
    None keeps those of `init`.
    """

    init: str | None = None
    segmenter: dict[str, Any] | None = None
    backbone_weights: str | None = None
    freeze_backbone: bool = False
    class_head: str = "remap"
    class_agnostic: bool = False
    num_prompts: int | None = None
    prompt_matching: str | None = None
    prompt_slots: int | None = None
    prompt_injection: str | None = None
    prompt_pooling: str | None = None
    prompt_drop: float | None = None
    kernel_supervision_weight: float | None = None
    guidance_start: float | None = None
    guidance_epochs: float | None = None
    text_features: str | None = None
    text_form: str | None = None
    text_temperature: float | None = None


@dataclass
class OptimSettings:
    """AdamW and its schedule. batch_size is a process's micro-batch; the effective batch is batch_size x accumulation
    x processes. schedule: constant, linear, cosine or step (x0.1 at each fraction in `milestones`), after `warmup`
    steps of linear warm-up. backbone_multiplier scales the backbone's rate. clip: largest gradient norm, 0 for none.
    """

    steps: int = 500
    batch_size: int = 8
    accumulation: int = 1
    lr: float = 1e-4
    backbone_multiplier: float = 0.1
    weight_decay: float = 0.05
    schedule: str = "constant"
    milestones: list[float] = field(default_factory=lambda: [0.67, 0.92])
    warmup: int = 10
    clip: float = 1.0
    max_skipped: int = 20


@dataclass
class EvaluationSettings:
    """at: steps after which `data.val` is evaluated (the last step always is). class_agnostic ignores classes.
    mask_threshold: a pixel belongs to a mask when its probability is above this.
    """

    at: list[int] = field(default_factory=list)
    batch_size: int = 8
    class_agnostic: bool = False
    mask_threshold: float = 0.5


@dataclass
class CheckpointSettings:
    """every: steps between checkpoints, 0 for none but the final model. keep: how many of the newest stay."""

    every: int = 100
    keep: int = 1


@dataclass
class TrainSettings:
    """A whole run. stage: "pretrain" (prompts and kernel supervision) or "finetune"."""

    stage: str = "finetune"
    output: str = "runs/train"
    seed: int = 0
    mixed_precision: str = "no"
    log_every: int = 10
    tracker: str | None = None
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)

    def __post_init__(self):
        _choice("stage", self.stage, ("pretrain", "finetune"))
        _choice("mixed_precision", self.mixed_precision, ("no", "bf16", "fp16"))
        _choice("model.class_head", self.model.class_head, ("remap", "new"))
        _choice("optim.schedule", self.optim.schedule, ("constant", "linear", "cosine", "step"))
        _at_least("optim.steps", self.optim.steps, 1)
        _at_least("optim.batch_size", self.optim.batch_size, 1)
        _at_least("optim.accumulation", self.optim.accumulation, 1)
        _at_least("optim.lr", self.optim.lr, 0)
        _at_least("optim.clip", self.optim.clip, 0)
        _at_least("optim.weight_decay", self.optim.weight_decay, 0)
        _at_least("optim.max_skipped", self.optim.max_skipped, 1)
        _at_least("optim.warmup", self.optim.warmup, 0)
        _at_least("seed", self.seed, 0)
        _at_least("log_every", self.log_every, 1)
        _at_least("data.workers", self.data.workers, 0)
        _at_least("data.max_instances", self.data.max_instances, 1)
        _at_least("evaluation.batch_size", self.evaluation.batch_size, 1)
        if not 0 < self.evaluation.mask_threshold < 1:
            raise ConfigError(f"evaluation.mask_threshold lies between 0 and 1, got {self.evaluation.mask_threshold}.")
        _at_least("checkpoint.every", self.checkpoint.every, 0)
        _at_least("checkpoint.keep", self.checkpoint.keep, 1)
        if self.data.size is not None and (self.data.size < 32 or self.data.size % 32):
            raise ConfigError(f"data.size must be a positive multiple of 32 pixels, got {self.data.size}.")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def load_settings(recipe: str | None = None, overrides: list[str] | None = None, **defaults: Any) -> TrainSettings:
    """Settings from a recipe (a YAML file, or the name of one that ships with the package) and `key=value` words.

    Raises ConfigError for a missing recipe, an unknown key (naming the nearest known one), a wrong type or value.
    """
    values: dict[str, Any] = dict(defaults)
    if recipe is not None:
        for key, value in read_recipe(recipe).items():
            before = values.get(key)
            values[key] = {**before, **value} if isinstance(before, dict) and isinstance(value, dict) else value
    for word in overrides or []:
        key, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"`{word}` is not of the form section.key=value.")
        try:
            value = yaml.safe_load(text) if text else None
        except yaml.YAMLError as error:
            raise ConfigError(f"`{word}`: the value is not valid YAML: {error}") from error
        _set(values, key.lstrip("-").split("."), _Word(value, text))
    return _build(TrainSettings, values, "")


def read_recipe(name_or_path: str) -> dict[str, Any]:
    """Contents of a recipe file, or of a shipped recipe by name."""
    path = Path(name_or_path)
    if not path.is_file():
        shipped = resources.files("uplvp_hf.training") / "recipes"
        known = sorted(Path(entry.name).stem for entry in shipped.iterdir() if entry.name.endswith(".yaml"))
        if name_or_path not in known:
            raise ConfigError(f"No recipe file `{name_or_path}`. Shipped recipes: {', '.join(known)}.")
        path = Path(str(shipped / f"{name_or_path}.yaml"))
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold settings as `key: value`.")
    return content


@dataclass
class _Word:
    """A value from the command line: as YAML reads it, and as it was written (YAML takes `off` for False)."""

    value: Any
    text: str


def _plain(value: Any) -> Any:
    """`value` without `_Word`s, at any depth of dicts."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.value if isinstance(value, _Word) else value


def _set(values: dict[str, Any], path: list[str], value: Any) -> None:
    for key in path[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise ConfigError(f"`{'.'.join(path)}`: `{key}` is a value, not a section.")
    values[path[-1]] = value


def _build(cls: type, values: dict[str, Any], prefix: str) -> Any:
    known = {item.name: item for item in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        if key not in known:
            key = str(key)
            raise ConfigError(f"Unknown setting `{prefix}{key}`. {_suggestion(key, prefix, list(known))}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise ConfigError(f"`{prefix}{key}` is a section and needs `key: value` lines, got {_plain(value)!r}.")
            arguments[key] = _build(hints[key], value, f"{prefix}{key}.")
        else:
            arguments[key] = _coerce(f"{prefix}{key}", value, hints[key])
    return cls(**arguments)


def _all_keys() -> dict[str, list[str]]:
    """Last part of every key -> full keys."""
    keys: dict[str, list[str]] = {}
    for item in dataclasses.fields(TrainSettings):
        hint = typing.get_type_hints(TrainSettings)[item.name]
        keys.setdefault(item.name, []).append(item.name)
        if dataclasses.is_dataclass(hint):
            for inner in dataclasses.fields(hint):
                keys.setdefault(inner.name, []).append(f"{item.name}.{inner.name}")
    return keys


def _suggestion(key: str, prefix: str, siblings: list[str]) -> str:
    """The nearest known key, of the same section if one is near, otherwise of any."""
    for near in difflib.get_close_matches(key, siblings, n=1):
        return f"Did you mean `{prefix}{near}`?"
    for near in difflib.get_close_matches(key, _all_keys(), n=1):
        return f"Did you mean `{_all_keys()[near][0]}`?"
    return f"Known here: {', '.join(prefix + name for name in siblings)}."


def _coerce(key: str, value: Any, hint: Any) -> Any:
    """`value` as the annotated type: whole numbers become floats, `1e-3` (a string in YAML) too."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(value, _Word) and value.value is not None and str in options:
        return value.text
    value = _plain(value)
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


def _choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"`{key}` must be one of {', '.join(choices)}, got `{value}`.")


def _at_least(key: str, value: float, least: float) -> None:
    if value < least:
        raise ConfigError(f"`{key}` must be at least {least}, got {value}.")
