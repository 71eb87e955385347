"""Settings of a training run: dataclasses, read from a YAML recipe and overridden by `section.key=value` words."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from .recipes_file import merge_settings, read_recipe
from .settings_file import ConfigError, at_least, build_settings, choice, merge_words


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
        choice("stage", self.stage, ("pretrain", "finetune"))
        choice("mixed_precision", self.mixed_precision, ("no", "bf16", "fp16"))
        choice("model.class_head", self.model.class_head, ("remap", "new"))
        choice("optim.schedule", self.optim.schedule, ("constant", "linear", "cosine", "step"))
        at_least("optim.steps", self.optim.steps, 1)
        at_least("optim.batch_size", self.optim.batch_size, 1)
        at_least("optim.accumulation", self.optim.accumulation, 1)
        at_least("optim.lr", self.optim.lr, 0)
        at_least("optim.clip", self.optim.clip, 0)
        at_least("optim.weight_decay", self.optim.weight_decay, 0)
        at_least("optim.max_skipped", self.optim.max_skipped, 1)
        at_least("optim.warmup", self.optim.warmup, 0)
        at_least("seed", self.seed, 0)
        at_least("log_every", self.log_every, 1)
        at_least("data.workers", self.data.workers, 0)
        at_least("data.max_instances", self.data.max_instances, 1)
        at_least("evaluation.batch_size", self.evaluation.batch_size, 1)
        if not 0 < self.evaluation.mask_threshold < 1:
            raise ConfigError(f"evaluation.mask_threshold lies between 0 and 1, got {self.evaluation.mask_threshold}.")
        at_least("checkpoint.every", self.checkpoint.every, 0)
        at_least("checkpoint.keep", self.checkpoint.keep, 1)
        if self.data.size is not None and (self.data.size < 32 or self.data.size % 32):
            raise ConfigError(f"data.size must be a positive multiple of 32 pixels, got {self.data.size}.")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


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
