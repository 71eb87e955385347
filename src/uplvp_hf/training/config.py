"""Settings of a training run, read from YAML recipes and overridden by `section.key=value` words."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from ..models.errors import UserError
from ..settings import ConfigError, Settings, build_settings, merge_words, setting
from .few_shot_settings import FewShotSettings
from .recipes_file import merge_settings, read_recipe
from .teacher_settings import TeacherSettings, check_teacher

READABLE = "anything that load_dataset_rows reads: COCO JSON, folder, pseudo-label store"
PRETRAINING = "pretraining"
OWN_DIVISOR = ("eomt", "eomt_dinov3", "vit_mask_decoder", "rf_detr")  # segmenters with one of their own
OF_INIT = "none keeps the value of `model.init`; see UplvpConfig"


class TrainingAborted(UserError):
    """A run that was stopped because going on would not help; the message says why and what to change."""


@dataclass
class DataSettings(Settings):
    """Where the images are and how they are cut. docs/augmentation.md has the papers' values."""

    train: str | None = setting(None, READABLE)
    train_split: str | None = setting(None, "`annotations/<split>.json` of a folder, or a split of a published layout")
    train_format: str | None = setting(None, "the format, where a folder could be of several (`data.rows.FORMATS`)")
    train_images: str | None = setting(None, "folder of the images, if not beside the JSON or in images/")
    val: str | None = setting(None, f"{READABLE}; none: nothing is evaluated")
    val_split: str | None = setting(None, "as `train_split`")
    val_format: str | None = setting(None, "as `train_format`")
    val_images: str | None = setting(None, "as `train_images`")
    labels_per_class: int | None = setting(None, "labeled images of every class, drawn with `split_seed`; none: all")
    subset: str | None = setting(
        None,
        "another low-data split, by name (1@10 for 10 % of the images with seed 1, 5shot, ...: docs/data.md) or as a "
        "manifest of `uplvp data split`; a name without a seed takes `split_seed`",
    )
    allow_fewer: bool = setting(False, "a class that has less than the split asks for gives all it has")
    crowds_as_objects: bool = setting(
        False, "objects with iscrowd = 1 are single objects, as in files that write every run-length mask so (CVAT)"
    )
    split_seed: int | None = setting(
        None, "seed of the low-data split, which is recorded in split.json; none: the run's `seed`"
    )
    extra: str | None = setting(
        PRETRAINING,
        f"mixed into fine-tuning: {READABLE}, with the same class names; {PRETRAINING}: the labels that `model.init` "
        "was pre-trained on, where it is a pre-training of ours and they are still there; null: nothing",
    )
    extra_share: list[float] | None = setting(
        None,
        "share of the images of every step that come from `extra`; two numbers: at the first and at the last step; "
        "none: the AP50 of the pre-trained `model.init` on the labeled images (100 at most) less 0.25, from 0 to 0.5; "
        "0.5 for other labels than those of the pre-training, and with `model.class_head=new`",
        least=0,
        most=1,
    )
    unlabeled: str | None = setting(
        None,
        f"{READABLE}, whose labels are not used: a teacher finds instances in them while the labels are fine-tuned on "
        "(settings of `teacher`)",
    )
    unlabeled_split: str | None = setting(None, "as `train_split`")
    unlabeled_images: str | None = setting(None, "as `train_images`")
    size: int | None = setting(
        None,
        "side of the square training canvas and longer side at inference, pixels, a multiple of 32 (of a ViT's "
        "patches); none: that of `model.init`, else 512",
        least=32,
    )
    scale_range: list[float] = setting([0.5, 1.5], "large-scale jitter, as factors of the fitting scale")
    flip: float = setting(0.5, "probability of a horizontal flip", least=0, most=1)
    color_jitter: float = setting(0.2, "strength of random brightness, contrast and saturation", least=0, most=1)
    short_edges: list[int] | None = setting(
        None,
        "multi-scale resizing in place of the jitter: the shorter side is drawn from [low, high] pixels (one number: "
        "fixed); at inference `high` is taken",
        least=32,
    )
    longest_edge: int | None = setting(None, "most pixels of the longer side, with `short_edges`")
    keep_ratio: bool = setting(True, "false makes every image `longest_edge` wide and the drawn edge high")
    rotate: float = setting(0.0, "largest angle in degrees", least=0, most=45)
    rotate_probability: float = setting(0.5, "probability that an image is rotated", least=0, most=1)
    copy_paste: float = setting(0.0, "probability that instances of another image are pasted", least=0, most=1)
    side_by_side: float = setting(0.0, "probability that one is pasted beside one of its class", least=0, most=1)
    canvas: str | None = setting(
        None,
        "square pads every batch to size x size, batch to the largest image in it, in multiples of 32; none: batch "
        "with `short_edges`, else square",
        choices=("square", "batch"),
    )
    max_instances: int = setting(100, "most instances of an image", least=1)
    image_mean: list[float] | None = setting(None, "of pixels scaled to 0..1; none: of `model.init`, else ImageNet's")
    image_std: list[float] | None = setting(None, "of pixels scaled to 0..1; none: of `model.init`, else ImageNet's")
    cache_features: bool = setting(
        False, "the frozen backbone sees every image and view once, and the rest is trained from its features on disk"
    )
    cache_views: int = setting(8, "augmented views of an image that are cached; epoch e shows view e mod this", least=1)
    cache_folder: str | None = setting(None, "where, for several runs; none: `features` in the output folder")
    cache_gib: float = setting(20.0, "most room that the features of a run may take, GiB", above=0)
    workers: int = setting(0, "processes that load images; 0: the training process itself", least=0)

    @property
    def square(self) -> bool:
        """Whether every batch has `size` x `size` pixels."""
        return self.canvas == "square" or (self.canvas is None and self.short_edges is None)


@dataclass
class ModelSettings(Settings):
    """What is trained."""

    init: str | None = setting(
        None,
        "checkpoint to start from: our own (pre-training or fine-tuned), a K-Net or QueryInst, or an official "
        "Mask2Former; none builds `segmenter`",
    )
    segmenter: dict[str, Any] | None = setting(
        None,
        "settings of the segmenter's configuration: `model_type` mask2former, knet, queryinst, eomt or eomt_dinov3, or "
        "the baseline mask_rcnn, which is only fine-tuned; `backbone_config` and its own",
    )
    backbone_weights: str | None = setting(
        None,
        "safetensors with the backbone's weights, or hf-hub:OWNER/NAME, which downloads them; `model.init` has its own",
    )
    freeze_backbone: bool = setting(False, "no gradients, norms in evaluation mode")
    freeze_stages: int = setting(
        0,
        "so many first stages of the backbone are frozen with their norms; 1 is the stem and the first stage, as "
        "mmdetection's `frozen_stages=1`",
        least=0,
    )
    freeze_backbone_norm: bool = setting(
        False, "batch norms of the backbone keep their statistics; their scales and shifts are trained"
    )
    class_head: str = setting(
        "remap",
        "remap keeps the rows of classes that the checkpoint knows by name, spread also starts the other classes from "
        "the mean of its rows, new starts afresh",
        choices=("remap", "spread", "new"),
    )
    class_agnostic: bool = setting(False, 'pre-train with one class, "object"')
    num_prompts: int | None = setting(None, f"most prompts of an image; {OF_INIT}")
    prompt_matching: str | None = setting(
        None,
        f"which prompt a query gets; {OF_INIT}",
        choices=("cosine", "sequential", "random", "hungarian", "none"),
    )
    prompt_slots: int | None = setting(None, f"repeat the prompts to so many; {OF_INIT}")
    prompt_injection: str | None = setting(None, f"how prompts enter the queries; {OF_INIT}")
    prompt_pooling: str | None = setting(None, f"over the mask or its box; {OF_INIT}")
    prompt_drop: float | None = setting(None, f"share of the queries that get no prompt; {OF_INIT}")
    prompt_epochs: float | None = setting(None, f"epochs until no query gets a prompt any more; {OF_INIT}")
    kernel_supervision_weight: float | None = setting(None, f"0 switches it off; {OF_INIT}")
    kernel_loss_share: float | None = setting(
        None, f"in place of the weight: share of the segmenter's own loss that it is made to be; {OF_INIT}"
    )
    kernel_target: str | None = setting(
        None,
        "what queries are drawn towards: prompt; labeler, the features of the masks that lie in the store; or a folder "
        f"with other features of them; {OF_INIT}",
    )
    kernel_head: str | None = setting(
        None, f"linear layer on the query before it is compared, or none; {OF_INIT}", choices=("none", "linear")
    )
    kernel_loss: str | None = setting(
        None, f"contrastive compares with the other masks of the batch; {OF_INIT}", choices=("cosine", "contrastive")
    )
    kernel_temperature: float | None = setting(None, f"of contrastive; {OF_INIT}")
    kernel_overlap: float | None = setting(
        None, f"IoU from which two masks of an image are no negatives of contrastive; {OF_INIT}"
    )
    kernel_centering: float | None = setting(
        None, f"momentum of a running mean that is subtracted from the targets, 0 for none; {OF_INIT}"
    )
    kernel_queries: str | None = setting(
        None, f"unprompted leaves out those that got a prompt; {OF_INIT}", choices=("all", "unprompted")
    )
    guidance_start: float | None = setting(None, f"of hungarian: the true cost's first weight; {OF_INIT}")
    guidance_epochs: float | None = setting(None, f"epochs until that weight is 1; {OF_INIT}")
    text_features: str | None = setting(
        None,
        "text embeddings of the class names, a file of scripts/embed_classes.py: pre-trains with an additional class "
        "head on them",
    )
    text_temperature: float | None = setting(None, f"initial temperature of that head; {OF_INIT}")
    attn_mask_start: float | None = setting(
        None,
        "of EoMT: share of the steps after which masked attention begins to fade, block by block; none: 1/6 in "
        "fine-tuning, and it stays in pre-training",
        least=0,
        below=1,
    )
    attn_mask_end: float | None = setting(None, "and after which it is gone; none: 5/6", above=0, most=1)


@dataclass
class OptimSettings(Settings):
    """The optimizer and its schedule."""

    steps: int = setting(500, "updates of the weights", least=1)
    epochs: float | None = setting(None, "in place of steps: ceil(epochs x images / effective batch)", above=0)
    batch_size: int = setting(
        8, "images of a micro-batch of a process; the effective batch is this x accumulation x processes", least=1
    )
    accumulation: int = setting(1, "micro-batches of an update", least=1)
    optimizer: str = setting("adamw", "sgd uses `momentum`", choices=("adamw", "sgd"))
    momentum: float = setting(0.9, "of sgd", least=0, below=1)
    lr: float = setting(1e-4, "learning rate", least=0)
    backbone_multiplier: float = setting(0.1, "factor on the rate of the backbone", least=0)
    layer_decay: float = setting(
        1.0,
        "of a ViT: factor on the rate of a block for every block behind it, such as 0.8 (EoMT's fine-tuning); its "
        "embeddings are of the first block",
        above=0,
        most=1,
    )
    weight_decay: float = setting(0.05, "not of norms, embeddings and biases", least=0)
    schedule: str = setting(
        "constant",
        "of the rate after the warm-up; poly: the share of steps left, to `power`; step: x0.1 at each of `milestones`",
        choices=("constant", "linear", "cosine", "poly", "step"),
    )
    power: float = setting(0.9, "of poly", least=0)
    milestones: list[float] = setting([0.67, 0.92], "of step: fractions of the steps", above=0)
    warmup: int = setting(10, "steps of linear warm-up", least=0)
    warmup_factor: float | None = setting(
        None, "share of the rate that the warm-up starts from; none: 1 / (warmup + 1)", least=0, most=1
    )
    clip: float = setting(1.0, "largest norm of the gradient, 0 for none", least=0)
    ema: float = setting(
        0.0,
        "decay of the moving average of the weights, such as 0.999, which is then what is evaluated and saved at the "
        "end; 0 for none",
        least=0,
        below=1,
    )
    max_skipped: int = setting(20, "the run is stopped at so many steps that were not finite", least=1)


@dataclass
class EvaluationSettings(Settings):
    """When and how `data.val` is evaluated; the last step always is."""

    at: list[int] = setting([], "steps after which it is evaluated", least=1)
    every: int = setting(0, "so many steps, 0 for none", least=0)
    every_epochs: float | None = setting(None, "so many passes over the images (fractions count)", above=0)
    patience: int = setting(0, "training ends after so many evaluations without a better AP, 0 for never", least=0)
    batch_size: int = setting(8, "images predicted together", least=1)
    class_agnostic: bool = setting(False, "ignore the classes")
    mask_threshold: float = setting(
        0.5, "a pixel belongs to a mask when its probability is above this", above=0, below=1
    )
    backend: str = setting(
        "streaming",
        "what computes the AP; streaming needs no package",
        choices=("streaming", "pycocotools", "hotcoco"),
    )


@dataclass
class CheckpointSettings(Settings):
    """Which checkpoints of a run are kept."""

    every: int = setting(100, "steps between checkpoints, 0 for none but the final model", least=0)
    keep: int = setting(1, "how many of the newest stay", least=1)
    stay: bool = setting(
        False, "checkpoints and best models stay when the run has finished, so that it can be made longer"
    )
    best: bool = setting(False, "the final model is the one of best AP among those evaluated, not the last one")


@dataclass
class TrainSettings(Settings):
    """A whole run."""

    stage: str = setting(
        "finetune", "pretrain has prompts, fewshot has episodes", choices=("pretrain", "finetune", "fewshot")
    )
    output: str = setting("runs/train", "folder for checkpoints and the model")
    seed: int = setting(0, "of everything random", least=0)
    mixed_precision: str = setting("no", "fp16 on CUDA only", choices=("no", "bf16", "fp16"))
    log_every: int = setting(10, "steps between lines of the log", least=1)
    gradients_every: int = setting(
        100,
        "steps between measurements of each loss term's share of the gradient, for the log, which the last step has "
        "too; 0 for none",
        least=0,
    )
    tracker: str | None = setting(None, "one that Accelerate knows, such as tensorboard")
    fsdp: bool = setting(False, "weights, gradients and moments are spread over the processes")
    overfit_one_batch: bool = setting(
        False, "every step trains on the first batch, without augmentation, to see that the loss can fall"
    )
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    fewshot: FewShotSettings = field(default_factory=FewShotSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fsdp and self.mixed_precision == "fp16":
            raise ConfigError("`fsdp` works with mixed_precision no or bf16, not with fp16.")
        _check_data(self.data)
        _check_size(self.data.size, self.model)
        check_teacher(self)
        evaluation, val = self.evaluation, self.data.val
        often = evaluation.every or evaluation.every_epochs or len(evaluation.at) > 1
        if evaluation.patience and (val is None or not often):
            raise ConfigError(
                "`evaluation.patience` needs several evaluations: set `data.val`, and `evaluation.every` or "
                "`every_epochs`."
            )
        if self.checkpoint.best and val is None:
            raise ConfigError("`checkpoint.best` needs images to evaluate on: set `data.val`.")

    @property
    def average_decay(self) -> float:
        """Of the moving average of the weights, which a teacher needs; 0 for none."""
        return self.optim.ema or (self.teacher.decay if self.data.unlabeled else 0.0)

    @property
    def prompted(self) -> bool:
        """Whether the run has a model with prompts and kernel supervision."""
        return self.stage == "pretrain" or self.teacher.prompts

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts, as recipes hold them."""
        return dataclasses.asdict(self)


def _check_data(data: DataSettings) -> None:
    if data.subset is not None and data.labels_per_class is not None:
        raise ConfigError("Set `data.subset` or `data.labels_per_class`, not both: each draws a low-data split.")
    if data.extra_share is not None and len(data.extra_share) not in (1, 2):
        raise ConfigError(f"`data.extra_share` must be one or two shares, got {data.extra_share}.")
    if len(data.scale_range) != 2 or not 0 < data.scale_range[0] <= data.scale_range[1]:
        raise ConfigError(f"`data.scale_range` must be two positive numbers, the lower first, got {data.scale_range}.")
    edges, longest = data.short_edges, data.longest_edge
    if edges is None:
        if longest is not None or not data.keep_ratio:
            raise ConfigError("`data.longest_edge` and `data.keep_ratio=false` need `data.short_edges`.")
        return
    if len(edges) not in (1, 2) or edges[0] > edges[-1]:
        raise ConfigError(f"`data.short_edges` must be one or two numbers, the lower first, got {edges}.")
    if longest is None and not data.keep_ratio:
        raise ConfigError("`data.keep_ratio=false` needs `data.longest_edge`, the width of every image.")
    if longest is not None and longest < (edges[-1] if data.keep_ratio else 32):
        raise ConfigError(f"`data.longest_edge` must not be shorter than `data.short_edges` {edges}, got {longest}.")
    if data.square and data.size is not None and (longest is None or max(longest, edges[-1]) > data.size):
        raise ConfigError(
            f"`data.canvas=square` of {data.size} pixels does not hold every image of `data.short_edges` {edges} and "
            f"`data.longest_edge` {longest}: raise `data.size`, or leave `data.canvas` out."
        )


def _check_size(size: int | None, model: ModelSettings) -> None:
    """Of segmenters on four maps, the coarsest of which has the stride 32; others say it once they are built."""
    name = None if model.segmenter is None else model.segmenter.get("model_type")
    if size is not None and size % 32 and model.init is None and name not in OWN_DIVISOR:
        raise ConfigError(f"`data.size` must be a multiple of 32 pixels, got {size}.")


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
    "FewShotSettings",
    "ModelSettings",
    "OptimSettings",
    "TeacherSettings",
    "TrainSettings",
    "TrainingAborted",
    "load_settings",
    "read_recipe",
]
