"""What a low-data benchmark runs: a YAML file of data, label sets, segmenters and arms.

    name: animals7
    variables: {data: null, weights: null}       # filled by --var data=DIR --var weights=FILE; null has to be given
    data: {train: "${data}", train_split: train, val: "${data}", val_split: val}
    labels:                                      # label sets that arms pre-train on
      named: {label: {labeler: foreground, backbone: "timm:mobilenetv2_100", namer: classifier}}   # `uplvp label`
      truth: {truth: true}                       # the true masks of the unlabeled images: an upper bound
    segmenters:
      mask2former: {pretrain: small_pretrain, finetune: small_finetune}       # recipes of training
    settings: {data.size: 160}                   # section.key: value, of every training
    pretrain: {optim.steps: 400}                 # of every pre-training
    finetune: {optim.steps: 200}                 # of every fine-tuning
    arms:
      scratch: {}
      full: {labels: named}
      no prompts: {labels: named, pretrain: {model.prompt_matching: none}}
    labels_per_class: [5, 10, 20]
    seeds: [0, 1, 2]

Pre-training is shared by all arms that describe it alike, labeling by all that name the same label set.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ..data.errors import DataError
from ..data.splits import parse_split
from ..settings import ConfigError, Settings, build_settings, merge_words, plain, setting

_VARIABLE = re.compile(r"\$\{(\w+)\}")
_NAME = re.compile(r"[\w.+-]+( [\w.+-]+)*")


@dataclass
class BenchmarkData(Settings):
    """The images of a benchmark."""

    train: str | None = setting(None, "as `data.train` of training; the few labels are drawn from it")
    train_split: str | None = setting(None, "as `data.train_split` of training")
    train_images: str | None = setting(None, "as `data.train_images` of training")
    val: str | None = setting(None, "as `data.val` of training; it is only evaluated on")
    val_split: str | None = setting(None, "as `data.val_split` of training")
    val_images: str | None = setting(None, "as `data.val_images` of training")
    unlabeled: str | None = setting(
        None, "images for label sets and pre-training; none: those of `train`, without their labels"
    )
    scenes: dict[str, Any] | None = setting(
        None,
        "synthetic scenes that are generated in place of all that: counts {unlabeled, train, val}, the first one only "
        "with label sets; also size (pixels), cast (of colored light) and crowded (true: groups of touching objects of "
        "one class), as `write_scenes` takes them",
    )


@dataclass
class LabelSet(Settings):
    """Labels to pre-train on: one of the three."""

    store: str | None = setting(None, "a pseudo-label store (or COCO file) that exists")
    label: dict[str, Any] | None = setting(
        None,
        "the arguments of `uplvp label` by name: lists repeat an argument, true is a flag, `settings` holds "
        "section.key: value",
    )
    truth: bool = setting(False, "the true labels of the unlabeled images")


@dataclass
class SegmenterRecipes(Settings):
    """How a segmenter is trained."""

    pretrain: str = setting("", "recipe of training, by name or file")
    finetune: str = setting("", "recipe of training, by name or file")
    settings: dict[str, Any] = setting({}, "section.key: value, of both stages with this segmenter")


@dataclass
class Arm(Settings):
    """One way to train, which is compared with the others."""

    labels: str | None = setting(None, "the label set to pre-train on; none: no pre-training")
    pretrain: dict[str, Any] = setting({}, "settings of pre-training in this arm alone")
    finetune: dict[str, Any] = setting({}, "settings of fine-tuning in this arm alone")
    unlabeled: bool = setting(
        False, "fine-tune with a teacher on the unlabeled images of the benchmark (`data.unlabeled` of training)"
    )
    steps: float = setting(
        1.0, "fine-tuning steps as a factor of the usual number; 0 evaluates the pre-trained model as it is", least=0
    )
    equal_total: bool = setting(False, "fine-tune for as many steps more as a pre-training takes")
    segmenters: list[str] | None = setting(None, "only these of the benchmark's")
    labels_per_class: list[int | str] | None = setting(None, "only these of the benchmark's")
    seeds: list[int] | None = setting(None, "only these of the benchmark's")
    order: int = setting(0, "arms of a lower number come first, with all their seeds", least=0)
    about: str = setting("", "a remark for tables")


@dataclass
class Benchmark(Settings):
    """A whole benchmark, see the head of this file."""

    name: str = setting("", "of the benchmark, for folders and tables")
    about: str = setting("", "what its page says at the top; an empty line parts paragraphs")
    variables: dict[str, Any] = setting({}, "what `${name}` in any text stands for; null has to be given")
    data: BenchmarkData = field(default_factory=BenchmarkData)
    labels: dict[str, LabelSet] = setting({}, "label sets that arms pre-train on")
    segmenters: dict[str, SegmenterRecipes] = setting({}, "segmenters that every arm trains")
    arms: dict[str, Arm] = setting({}, "what is compared")
    settings: dict[str, Any] = setting({}, "section.key: value, of every training")
    pretrain: dict[str, Any] = setting({}, "section.key: value, of every pre-training")
    finetune: dict[str, Any] = setting({}, "section.key: value, of every fine-tuning")
    labels_per_class: list[int | str] = setting(
        [10],
        "labeled images of a class, or names of low-data splits as `data.subset` takes them, such as 1@5 for 5 % of "
        "the images",
        least=1,
    )
    seeds: list[int] = setting([0, 1, 2], "every one trains all arms once more")
    shared_pretraining: bool = setting(
        False, "one pre-training (with the smallest seed) for all fine-tuning seeds; otherwise one a seed"
    )
    curve: list[float] = setting(
        [0.25, 0.5],
        "fractions of the fine-tuning steps at which `val` is evaluated, the end apart (of epochs: at every multiple "
        "of the smallest)",
        above=0,
        below=1,
    )
    validation: float = setting(
        0.0,
        "fraction of the training images that stand in for `val` and are kept out of everything else, to choose "
        "settings by",
        least=0,
        below=1,
    )
    processes: int = setting(1, "of every training, one a GPU", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for section in ("name", "segmenters", "arms", "seeds", "labels_per_class"):
            if not getattr(self, section):
                raise ConfigError(f"A benchmark needs `{section}`.")
        for table in (self.arms, self.labels, self.segmenters, [self.name]):
            for name in table:  # they become names of folders
                if not _NAME.fullmatch(name):
                    raise ConfigError(f"`{name}`: names are made of letters, digits and . _ + - with single spaces.")
        for count in self.labels_per_class:
            if isinstance(count, str):
                try:
                    parse_split(count)
                except DataError as error:
                    raise ConfigError(f"`labels_per_class`: {error}") from error
        if self.data.scenes is None and not (self.data.train and self.data.val):
            raise ConfigError("`data` needs `train` and `val`, or `scenes`.")
        for name, labels in self.labels.items():
            if sum((labels.store is not None, labels.label is not None, labels.truth)) != 1:
                raise ConfigError(f"`labels.{name}` needs one of `store`, `label` and `truth: true`.")
            if labels.label is not None and self.data.train_images and not self.data.unlabeled:
                raise ConfigError(f"`labels.{name}.label` with `data.train_images` needs `data.unlabeled`, a folder.")
        for name, arm in self.arms.items():
            self._check_arm(name, arm)
        folders = [name.replace(" ", "_") for name in self.arms]
        if len(set(folders)) < len(folders):
            raise ConfigError(f"`arms`: two names differ in spaces and _ alone: {sorted(self.arms)}.")

    def _check_arm(self, name: str, arm: Arm) -> None:
        if arm.labels is not None and arm.labels not in self.labels:
            known = ", ".join(self.labels) or "none"
            raise ConfigError(f"`arms.{name}.labels`: no label set `{arm.labels}`; there are: {known}.")
        if arm.steps == 0 and arm.labels is None:
            raise ConfigError(f"`arms.{name}.steps`: 0 needs `labels`, as only a pre-trained model can be evaluated.")
        if arm.pretrain and arm.labels is None:
            raise ConfigError(f"`arms.{name}.pretrain` has no effect without `labels`.")


def load_benchmark(
    recipe: str,
    words: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
    arms: Sequence[str] | None = None,
    segmenters: Sequence[str] | None = None,
    kind: type = Benchmark,
) -> Any:
    """A benchmark from a YAML file, or the name of one that ships with the package, and `section.key=value` words
    (`pretrain.optim.steps=50` for a setting of training).

    arms, segmenters: some of the recipe's only. kind: the dataclass of the recipe.

    Raises ConfigError for a missing file, an unknown key, a wrong value, and a variable without a value.
    """
    path, content = read_benchmark(recipe)
    known = dict(content.get("variables") or {})
    for name, value in (variables or {}).items():
        if name not in known:
            raise ConfigError(f"{path} has no variable `{name}`; it has: {', '.join(known) or 'none'}.")
        known[name] = value
    content["variables"] = known
    merge_words(content, [word for word in words if not _of_training(content, word)])
    content = _filled_in(content, known, str(path))
    for name, arm in (content.get("arms") or {}).items():
        lacking = sorted(set((arm or {}).get("segmenters") or ()) - set(content.get("segmenters") or ()))
        if lacking:
            raise ConfigError(f"`arms.{name}.segmenters`: {path} has no segmenters {lacking}.")
    for table, chosen in (("arms", arms), ("segmenters", segmenters)):
        further = sorted(set(chosen or ()) - set(content.get(table) or ()))
        if further:
            raise ConfigError(f"{path} has no {table} {further}; it has: {', '.join(content.get(table) or ())}.")
        if chosen:
            content[table] = {name: content[table][name] for name in content[table] if name in chosen}
    return build_settings(kind, content)


def read_benchmark(recipe: str) -> tuple[Path, dict[str, Any]]:
    """The file of a recipe, by its path or as the name of a shipped one, and what it holds. Raises ConfigError."""
    path = Path(recipe)
    if not path.is_file():
        shipped = Path(str(resources.files("uplvp_hf.benchmark") / "recipes"))
        known = sorted(file.stem for file in shipped.glob("*.yaml"))
        if recipe not in known:
            raise ConfigError(f"No benchmark recipe `{recipe}`. Shipped: {', '.join(known)}.")
        path = shipped / f"{recipe}.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold settings as `key: value`.")
    return path, content


def _of_training(content: dict[str, Any], word: str) -> bool:
    """Whether a word is `pretrain.optim.steps=50` or the like; it is put into its table, whose keys have dots."""
    table, _, setting = word.partition(".")
    if table not in ("settings", "pretrain", "finetune") or "=" not in setting:
        return False
    key, _, text = setting.partition("=")
    value: dict[str, Any] = {}
    merge_words(value, [f"value={text}"])
    content[table] = {**(content.get(table) or {}), key: plain(value)["value"]}
    return True


def _filled_in(value: Any, variables: Mapping[str, Any], path: str) -> Any:
    """`value` with every `${name}` in it, at any depth, replaced."""
    if isinstance(value, dict):
        return {key: item if key == "variables" else _filled_in(item, variables, path) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled_in(item, variables, path) for item in value]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match) -> str:
        if variables.get(match[1]) is None:
            raise ConfigError(f"{path} needs the variable `{match[1]}`: give --var {match[1]}=VALUE.")
        return str(variables[match[1]])

    return _VARIABLE.sub(replace, value)
