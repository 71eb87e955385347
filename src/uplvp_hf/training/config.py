"""Settings of a training run: dataclasses, read from a YAML recipe and overridden by `section.key=value` words."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from ..models.errors import UserError
from .recipes_file import merge_settings, read_recipe
from .settings_file import ConfigError, at_least, build_settings, choice, merge_words


class TrainingAborted(UserError):
    """A run that was stopped because going on would not help; the message says why and what to change."""


@dataclass
class DataSettings:
    """Where the images are and how they are cut.

    train, val: anything `load_dataset_rows` reads (COCO JSON, folder, pseudo-label store); val may be absent.
    train_split, val_split: picks `annotations/<split>.json` of a folder, or the split of a published layout.
    train_format, val_format: where a folder could be of several formats (`data.rows.FORMATS`). train_images,
    val_images: folder of the images, where they do not lie beside the JSON or in `images/`. labels_per_class: so many
    labeled images of every class, drawn with split_seed; None takes all. subset: another low-data split, by name
    (1@10 for 10 % of the images with seed 1, 5shot, ...: docs/data.md) or as a manifest of `uplvp data split`; a name
    without a seed takes split_seed. The run's split is recorded in split.json. size: side of the square training canvas
    and longer side at inference, pixels, a multiple of 32; image_mean, image_std: of pixels scaled to 0..1. These three
    default to those of `model.init`, else to 512 and ImageNet's. scale_range: large-scale jitter, as factors of the
    fitting scale.

    short_edges: multi-scale resizing in place of that jitter, the shorter side drawn from [low, high] pixels (one
    number: fixed), the longer one at most longest_edge; at inference `high` is taken. keep_ratio: false makes every
    image longest_edge wide and the drawn edge high. rotate: largest angle in degrees, drawn with
    rotate_probability. copy_paste: probability that instances of another training image are pasted.
    canvas: "square" pads every batch to size x size, "batch" to the largest image in it, in multiples of 32; None is
    "batch" with short_edges, else "square". docs/augmentation.md has the papers' values.
    """

    train: str | None = None
    train_split: str | None = None
    train_format: str | None = None
    train_images: str | None = None
    val: str | None = None
    val_split: str | None = None
    val_format: str | None = None
    val_images: str | None = None
    labels_per_class: int | None = None
    subset: str | None = None
    split_seed: int = 0
    size: int | None = None
    scale_range: list[float] = field(default_factory=lambda: [0.5, 1.5])
    flip: float = 0.5
    color_jitter: float = 0.2
    short_edges: list[int] | None = None
    longest_edge: int | None = None
    keep_ratio: bool = True
    rotate: float = 0.0
    rotate_probability: float = 0.5
    copy_paste: float = 0.0
    canvas: str | None = None
    max_instances: int = 100
    image_mean: list[float] | None = None
    image_std: list[float] | None = None
    workers: int = 0

    @property
    def square(self) -> bool:
        """Whether every batch has `size` x `size` pixels."""
        return self.canvas == "square" or (self.canvas is None and self.short_edges is None)


@dataclass
class ModelSettings:
    """What is trained.

    init: checkpoint to start from, our own (pre-training or fine-tuned), a K-Net or QueryInst, or an official
    Mask2Former; None builds `segmenter` (settings of the segmenter's configuration: `model_type` mask2former, knet or
    queryinst, or the baseline mask_rcnn, which is only fine-tuned; `backbone_config` and its own).
    backbone_weights: safetensors with the backbone's weights, or hf-hub:OWNER/NAME, which downloads them.
    freeze_backbone: no gradients, norms in eval mode. freeze_stages: so many first stages of the backbone are frozen,
    norms in eval mode; 1 is the stem and the first stage (`frozen_stages=1` of mmdetection), 0 none.
    freeze_backbone_norm: the batch norms of the backbone keep their statistics; their scales and shifts are trained.
    class_head: "remap" keeps rows of classes that the checkpoint knows by name, "spread" also starts the other classes
    from the mean of its rows, "new" starts afresh.
    class_agnostic: pre-train with one class, "object". text_features: text embeddings of the class names, a file that
    scripts/embed_classes.py writes: pre-trains with an additional class head on them. The others: see `UplvpConfig`;
    None keeps those of `init`.
    """

    init: str | None = None
    segmenter: dict[str, Any] | None = None
    backbone_weights: str | None = None
    freeze_backbone: bool = False
    freeze_stages: int = 0
    freeze_backbone_norm: bool = False
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
    """The optimizer and its schedule. optimizer: adamw, or sgd with `momentum`. batch_size is a process's micro-batch;
    the effective batch is batch_size x accumulation x processes. epochs, if set, replaces steps: ceil(epochs x images
    / effective batch).
    schedule: constant, linear, cosine, poly (the share of steps left, to `power`) or step (x0.1 at each fraction of the
    steps in `milestones`), after `warmup` steps of linear warm-up, which starts from `warmup_factor` of the rate (None:
    from 1 / (warmup + 1)). backbone_multiplier scales the backbone's rate. clip: largest gradient norm, 0 for none.
    ema: decay of the moving average of the weights, which is then what is evaluated and saved at the end; 0 for none.
    max_skipped: the run is stopped at so many steps that were not finite.
    """

    steps: int = 500
    epochs: float | None = None
    batch_size: int = 8
    accumulation: int = 1
    optimizer: str = "adamw"
    momentum: float = 0.9
    lr: float = 1e-4
    backbone_multiplier: float = 0.1
    weight_decay: float = 0.05
    schedule: str = "constant"
    power: float = 0.9
    milestones: list[float] = field(default_factory=lambda: [0.67, 0.92])
    warmup: int = 10
    warmup_factor: float | None = None
    clip: float = 1.0
    ema: float = 0.0
    max_skipped: int = 20


@dataclass
class EvaluationSettings:
    """at: steps after which `data.val` is evaluated (the last step always is); every: so many steps, 0 for none;
    every_epochs: so many passes over the images (fractions count). patience: training ends after so many evaluations
    without a better AP, 0 for never. class_agnostic ignores classes. mask_threshold: a pixel belongs to a mask when its
    probability is above this. backend: what computes the AP, "streaming" (no package needed) or one of pycocotools,
    hotcoco, faster_coco_eval.
    """

    at: list[int] = field(default_factory=list)
    every: int = 0
    every_epochs: float | None = None
    patience: int = 0
    batch_size: int = 8
    class_agnostic: bool = False
    mask_threshold: float = 0.5
    backend: str = "streaming"


@dataclass
class CheckpointSettings:
    """every: steps between checkpoints, 0 for none but the final model. keep: how many of the newest stay. best: the
    final model is the one of best AP among those evaluated, not the last one.
    """

    every: int = 100
    keep: int = 1
    best: bool = False


@dataclass
class TrainSettings:
    """A whole run. stage: "pretrain" (prompts and kernel supervision) or "finetune".

    mixed_precision: no, bf16 or fp16 (CUDA only). log_every: steps. tracker: one that Accelerate knows, such as
    tensorboard. fsdp: weights, gradients and moments are spread over the processes. overfit_one_batch: every step
    trains on the first batch, without augmentation, to see that the loss can fall.
    """

    stage: str = "finetune"
    output: str = "runs/train"
    seed: int = 0
    mixed_precision: str = "no"
    log_every: int = 10
    tracker: str | None = None
    fsdp: bool = False
    overfit_one_batch: bool = False
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)

    def __post_init__(self):
        choice("stage", self.stage, ("pretrain", "finetune"))
        choice("mixed_precision", self.mixed_precision, ("no", "bf16", "fp16"))
        choice("model.class_head", self.model.class_head, ("remap", "spread", "new"))
        at_least("model.freeze_stages", self.model.freeze_stages, 0)
        at_least("seed", self.seed, 0)
        at_least("log_every", self.log_every, 1)
        if self.fsdp and self.mixed_precision == "fp16":
            raise ConfigError("`fsdp` works with mixed_precision no or bf16, not with fp16.")
        _check_data(self.data)
        _check_optim(self.optim)
        _check_evaluation(self.evaluation, self.data)
        at_least("checkpoint.every", self.checkpoint.every, 0)
        at_least("checkpoint.keep", self.checkpoint.keep, 1)
        if self.checkpoint.best and self.data.val is None:
            raise ConfigError("`checkpoint.best` needs images to evaluate on: set `data.val`.")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _check_data(data: DataSettings) -> None:
    at_least("data.workers", data.workers, 0)
    if data.subset is not None and data.labels_per_class is not None:
        raise ConfigError("Set `data.subset` or `data.labels_per_class`, not both: each draws a low-data split.")
    at_least("data.max_instances", data.max_instances, 1)
    if data.size is not None and (data.size < 32 or data.size % 32):
        raise ConfigError(f"data.size must be a positive multiple of 32 pixels, got {data.size}.")
    for key in ("flip", "color_jitter", "rotate_probability", "copy_paste"):
        if not 0 <= getattr(data, key) <= 1:
            raise ConfigError(f"data.{key} must be within 0 to 1, got {getattr(data, key)}.")
    if not 0 <= data.rotate <= 45:
        raise ConfigError(f"data.rotate must be within 0 to 45 degrees, got {data.rotate}.")
    if len(data.scale_range) != 2 or not 0 < data.scale_range[0] <= data.scale_range[1]:
        raise ConfigError(f"data.scale_range must be two positive numbers, the lower first, got {data.scale_range}.")
    if data.canvas is not None:
        choice("data.canvas", data.canvas, ("square", "batch"))
    _check_edges(data)


def _check_edges(data: DataSettings) -> None:
    edges, longest = data.short_edges, data.longest_edge
    if edges is None:
        if longest is not None or not data.keep_ratio:
            raise ConfigError("data.longest_edge and data.keep_ratio=false need data.short_edges, which is not set.")
        return
    if len(edges) not in (1, 2) or not 32 <= edges[0] <= edges[-1]:
        raise ConfigError(f"data.short_edges must be one or two numbers from 32 on, the lower first, got {edges}.")
    if longest is None and not data.keep_ratio:
        raise ConfigError("data.keep_ratio=false needs data.longest_edge, the width of every image.")
    if longest is not None and longest < (edges[-1] if data.keep_ratio else 32):
        raise ConfigError(f"data.longest_edge must not be shorter than data.short_edges {edges}, got {longest}.")
    if data.square and data.size is not None and (longest is None or max(longest, edges[-1]) > data.size):
        raise ConfigError(
            f"data.canvas=square of {data.size} pixels does not hold every image of data.short_edges {edges} and "
            f"data.longest_edge {longest}: raise data.size, or leave data.canvas out."
        )


def _check_optim(optim: OptimSettings) -> None:
    choice("optim.optimizer", optim.optimizer, ("adamw", "sgd"))
    choice("optim.schedule", optim.schedule, ("constant", "linear", "cosine", "poly", "step"))
    for key, least in {
        "steps": 1, "batch_size": 1, "accumulation": 1, "lr": 0, "backbone_multiplier": 0, "clip": 0, "weight_decay": 0,
        "max_skipped": 1, "warmup": 0, "power": 0,
    }.items():  # fmt: skip
        at_least(f"optim.{key}", getattr(optim, key), least)
    if optim.epochs is not None and optim.epochs <= 0:
        raise ConfigError(f"optim.epochs must be above 0, got {optim.epochs}.")
    if not 0 <= optim.momentum < 1:
        raise ConfigError(f"optim.momentum must be within 0 to below 1, got {optim.momentum}.")
    if not 0 <= optim.ema < 1:
        raise ConfigError(f"optim.ema is a decay of 0 (none) to below 1, such as 0.999; got {optim.ema}.")
    if optim.warmup_factor is not None and not 0 <= optim.warmup_factor <= 1:
        raise ConfigError(f"optim.warmup_factor is a share of the rate, 0 to 1, got {optim.warmup_factor}.")
    if min(optim.milestones, default=1.0) <= 0:
        raise ConfigError(f"optim.milestones are fractions of the steps, above 0; got {optim.milestones}.")


def _check_evaluation(evaluation: EvaluationSettings, data: DataSettings) -> None:
    choice("evaluation.backend", evaluation.backend, ("streaming", "pycocotools", "hotcoco", "faster_coco_eval"))
    at_least("evaluation.batch_size", evaluation.batch_size, 1)
    at_least("evaluation.at", min(evaluation.at, default=1), 1)
    at_least("evaluation.every", evaluation.every, 0)
    at_least("evaluation.patience", evaluation.patience, 0)
    if evaluation.every_epochs is not None and evaluation.every_epochs <= 0:
        raise ConfigError(f"evaluation.every_epochs must be above 0, got {evaluation.every_epochs}.")
    if not 0 < evaluation.mask_threshold < 1:
        raise ConfigError(f"evaluation.mask_threshold lies between 0 and 1, got {evaluation.mask_threshold}.")
    often = evaluation.every or evaluation.every_epochs or len(evaluation.at) > 1
    if evaluation.patience and (data.val is None or not often):
        raise ConfigError(
            "`evaluation.patience` needs several evaluations: set `data.val`, and `evaluation.every` or `every_epochs`."
        )


def load_settings(
    recipe: str | list[str] | None = None, overrides: list[str] | None = None, **defaults: Any
) -> TrainSettings:
    """Settings from a recipe (a YAML file, or the name of one that ships with the package) and `key=value` words.

    Of several recipes, later ones win. Raises ConfigError for a missing recipe, an unknown key (naming the nearest
    known one), a wrong type or value.
    """
    values = merge_settings(defaults, read_recipe(recipe or []))
    merge_words(values, overrides or [])
    return build_settings(TrainSettings, values)


__all__ = [
    "CheckpointSettings",
    "ConfigError",
    "DataSettings",
    "EvaluationSettings",
    "ModelSettings",
    "OptimSettings",
    "TrainSettings",
    "TrainingAborted",
    "load_settings",
    "read_recipe",
]
