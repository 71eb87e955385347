"""Configuration of UPLVP models: a query segmenter and how prompts and kernel supervision act on it."""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_base import StrictConfigMixin, checked_category_ids
from .configuration_knet import KNetConfig
from .configuration_queryinst import QueryInstConfig
from .configuration_vit_mask_decoder import VitMaskDecoderConfig
from .errors import UserError

MATCHING = ("cosine", "sequential", "random", "hungarian", "none")
POOLING = ("mask", "box")
INJECTION = ("add", "every_stage", "concat")
KERNEL_TARGETS = ("prompt", "labeler")
KERNEL_LOSSES = ("cosine", "contrastive")
KERNEL_HEADS = ("none", "linear")
KERNEL_QUERIES = ("all", "unprompted")
# One line each, here and in `SEGMENTERS`: a saved model leaves out those that it does not use (remote_code.py).
OWN_SEGMENTERS = {
    "knet": KNetConfig,
    "queryinst": QueryInstConfig,
    "vit_mask_decoder": VitMaskDecoderConfig,
}
# Share of queries without prompt in the released recipes; 0.05 for the other segmenters.
PROMPT_DROP = {"knet": 0.1}


@strict
class UplvpConfig(StrictConfigMixin, PreTrainedConfig):
    r"""
    Configuration of [`UplvpForPreTraining`] and [`UplvpForInstanceSegmentation`].

    Args:
        segmenter_config (`dict` or `PreTrainedConfig`, *optional*, defaults to `Mask2FormerConfig()`):
            The query segmenter: a `mask2former`, `knet`, `queryinst`, `eomt`, `eomt_dinov3`, `rf_detr` or
            `vit_mask_decoder`. Its `id2label` is always replaced by the one given here.
        category_ids (`list[int]`, *optional*, defaults to `[1, 2, ..., num_labels]`):
            Original category id of every class, so that results leave with the ids of the dataset.
        class_agnostic (`bool`, *optional*, defaults to `False`):
            Whether the single class stands for "any object" (labels are then collapsed to class 0).
        num_prompts (`int`, *optional*, defaults to 20):
            Most prompts an image; the best by score are kept (SP keeps 20 masks an image).
        prompt_matching (`str`, *optional*, defaults to `"cosine"`):
            `cosine` (SP eq. 2: each query takes the prompt of largest cosine similarity), `sequential` (equal runs of
            queries take the prompts in order, as in the authors' released recipe), `random`, `hungarian` (sequential,
            and the class of a query's prompt guides the assignment of masks to queries, less and less: see
            `guidance_epochs`) or `none` (nothing is injected: pre-training on pseudo masks, with kernel supervision
            unless its weight is 0).
        prompt_slots (`int`, *optional*):
            Repeat the prompts of an image to fill so many slots before matching. The released code does so with 20,
            which changes `sequential` runs where the number of prompts does not divide 20. Not done by default.
        prompt_injection (`str`, *optional*, defaults to `"add"`):
            `add` (once, to the initial queries), `every_stage` (at the start of every stage, the same prompts kept;
            the "conv" variant of the released code) or `concat` (a linear layer on query and prompt, which starts as
            their sum).
        prompt_pooling (`str`, *optional*, defaults to `"mask"`):
            `mask` (average of the feature under the mask) or `box` (of the cells of its tight box, cut to whole cells
            as in the released code).
        prompt_drop (`float`, *optional*, defaults to 0.1 for K-Net and 0.05 for the other segmenters):
            Probability that a query of an image gets no prompt.
        prompt_epochs (`float`, *optional*):
            Injection fades out: the share of queries without prompt rises linearly from `prompt_drop` to 1 after so
            many epochs (fractions count), so that pre-training ends as fine-tuning begins. By default it stays (SP).
        kernel_supervision_weight (`float`, *optional*, defaults to 1.0):
            Weight of the loss between queries and their kernel targets (SP eq. 3); 0 switches it off.
        kernel_loss_share (`float`, *optional*):
            In place of that weight: what the loss is made to be of the sum of the segmenter's own terms, at every step.
            0.1 keeps it at a tenth of them; a term that falls below 0.1 by itself is not raised any further.
        kernel_target (`str`, *optional*, defaults to `"prompt"`):
            `prompt` (the network's own prompt of the mask, which moves with the network; SP eq. 3) or `labeler` (a
            frozen vector a mask, given to `forward` as `kernel_targets`; DETReg, arXiv 2106.04550). In a training run
            these come from the pseudo-label store: see docs/labeling.md.
        kernel_target_dim (`int`, *optional*):
            Width of these vectors, with `labeler` only.
        kernel_head (`str`, *optional*, defaults to `"linear"` with `labeler`, else `"none"`):
            `linear` (a linear layer on the query before it is compared, dropped after pre-training, as DETReg's
            embedding head) or `none` (the query itself; SP).
        kernel_loss (`str`, *optional*, defaults to `"cosine"`):
            `cosine` (1 - cosine; SP eq. 3) or `contrastive` (InfoNCE, arXiv 1807.03748, among the targets of all masks
            of the micro-batch). Masks of one class are no negatives (where the model has several classes), nor are
            masks of one image that overlap by `kernel_overlap` (as the positives of ProSeCo, arXiv 2310.16835).
        kernel_temperature (`float`, *optional*, defaults to 0.1):
            Divides the cosines of the contrastive loss (SimCLR's value, arXiv 2002.05709).
        kernel_overlap (`float`, *optional*, defaults to 0.5):
            Least IoU at which two masks of an image are no negatives (ProSeCo's value).
        kernel_centering (`float`, *optional*, defaults to 0.0):
            Momentum of a running mean that is subtracted from the targets, such as 0.9 (DINO, arXiv 2104.14294, where
            it is added to logits); 0 leaves them as they are (SP).
        kernel_queries (`str`, *optional*, defaults to `"all"`):
            `all` (SP) or `unprompted` (only queries that got no prompt: one that got it is told the answer).
        guidance_start (`float`, *optional*, defaults to 0.1), guidance_epochs (`float`, *optional*, defaults to 6.0):
            With `hungarian`, the weight of the true matching cost: from `guidance_start` linearly to 1 after
            `guidance_epochs` epochs (fractions count), as in the released code. The rest is the label-guided cost.
        text_dim (`int`, *optional*):
            Width of the text embeddings of an additional class head for pre-training; none is built by default. Give
            the embeddings with [`UplvpForPreTraining.set_text_features`]. The weights of its loss and matching cost
            are settings of the segmenter (`text_class_weight`, `text_class_cost`; Mask2Former: its `class_weight`).
        text_temperature (`float`, *optional*, defaults to 0.07):
            Initial temperature of the cosine, learned from there (CLIP's own initial value).
        text_classes (`list[str]`, *optional*):
            Names of the classes whose text embeddings the checkpoint holds. Set by `set_text_features`.
        default_threshold (`float`, *optional*):
            Least score at which instances are shown where none is given: that of the best F1 on validation images, as
            training and `uplvp evaluate --store-threshold` measure it. By default 0.5 (thresholds.py).
        duplicate_iou (`float`, *optional*):
            Of two instances of one class whose masks have a larger IoU, the worse one is left out of predictions. By
            default none is: see docs/inference.md.

    Raises:
        UserError: for a keyword that is not a setting (the nearest one is named), an unknown choice, a number out of
            range, or `category_ids` of another length than the classes.

    Example:

    ```python
    >>> from uplvp_hf import UplvpConfig, UplvpForInstanceSegmentation

    >>> config = UplvpConfig(id2label={0: "cat", 1: "dog"}, segmenter_config={"model_type": "mask2former"})
    >>> model = UplvpForInstanceSegmentation(config)
    ```
    """

    model_type = "uplvp"
    sub_configs_defaults = {"segmenter_config": SubConfigSpec(config_class=AutoConfig, model_type="mask2former")}

    segmenter_config: dict | PreTrainedConfig | None = None
    category_ids: list[int] | tuple[int, ...] | None = None
    class_agnostic: bool = False
    num_prompts: int = 20
    prompt_matching: str = "cosine"
    prompt_slots: int | None = None
    prompt_injection: str = "add"
    prompt_pooling: str = "mask"
    prompt_drop: float | int | None = None
    prompt_epochs: float | int | None = None
    kernel_supervision_weight: float | int = 1.0
    kernel_loss_share: float | int | None = None
    kernel_target: str = "prompt"
    kernel_target_dim: int | None = None
    kernel_head: str | None = None
    kernel_loss: str = "cosine"
    kernel_temperature: float | int = 0.1
    kernel_overlap: float | int = 0.5
    kernel_centering: float | int = 0.0
    kernel_queries: str = "all"
    guidance_start: float | int = 0.1
    guidance_epochs: float | int = 6.0
    text_dim: int | None = None
    text_temperature: float | int = 0.07
    text_classes: list[str] | tuple[str, ...] | None = None
    default_threshold: float | int | None = None
    duplicate_iou: float | int | None = None

    def __post_init__(self, **kwargs):
        if kwargs.get("num_labels") is None and self.id2label is None and kwargs.get("label2id") is None:
            segmenter = self.segmenter_config
            names = segmenter.get("id2label") if isinstance(segmenter, dict) else getattr(segmenter, "id2label", None)
            self.id2label = dict(names) if names else None
        if isinstance(self.segmenter_config, dict) and self.segmenter_config.get("model_type") in OWN_SEGMENTERS:
            # Not left to AutoConfig, which knows ours only where the package is installed.
            given = dict(self.segmenter_config)
            self.segmenter_config = OWN_SEGMENTERS[given.pop("model_type")](**given)
        super().__post_init__(**kwargs)
        self.sync_classes(self.id2label, self.category_ids)
        if self.prompt_drop is None:
            self.prompt_drop = PROMPT_DROP.get(getattr(self.segmenter_config, "model_type", None), 0.05)
        if self.kernel_head is None:
            self.kernel_head = "linear" if self.kernel_target == "labeler" else "none"
        self._check_settings()

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in `StrictConfigMixin`; other classes given by keyword (`num_labels`, `id2label`) also drop the stored
        `category_ids`."""
        config_dict = dict(config_dict)
        if "category_ids" not in kwargs and any(kwargs.get(key) is not None for key in ("num_labels", "id2label")):
            config_dict.pop("category_ids", None)
        segmenter = config_dict.get("segmenter_config")
        if isinstance(segmenter, dict) and segmenter.get("model_type") in OWN_SEGMENTERS:
            # With the allowance for settings of later versions, which the constructor does not make.
            config_dict["segmenter_config"] = OWN_SEGMENTERS[segmenter["model_type"]].from_dict(segmenter)
        return super().from_dict(config_dict, **kwargs)

    def sync_classes(self, id2label: dict[int, str], category_ids: list[int] | None = None) -> None:
        """Sets the classes here and in the segmenter. `id2label` maps 0..K-1 to names; `category_ids` has K ids."""
        self.id2label = {int(key): str(name) for key, name in id2label.items()}
        self.label2id = {name: key for key, name in self.id2label.items()}
        self.category_ids = checked_category_ids(self.id2label, category_ids)
        if self.segmenter_config is not None:
            self.segmenter_config.id2label = dict(self.id2label)
            self.segmenter_config.label2id = dict(self.label2id)

    @property
    def supervises_kernels(self) -> bool:
        """Whether pre-training has a loss between queries and kernel targets."""
        return self.kernel_loss_share is not None or self.kernel_supervision_weight > 0

    @property
    def most_targets(self) -> int:
        """Most pseudo masks of an image that have a kernel target."""
        return self.num_prompts if self.kernel_target == "prompt" else 10**9

    def _check_settings(self) -> None:
        self.check_shown()
        self.check(
            ("num_prompts", "prompt_slots", "text_dim", "kernel_target_dim"),
            shares=("prompt_drop", "guidance_start", "kernel_overlap", "kernel_centering"),
            prompt_matching=MATCHING,
            prompt_pooling=POOLING,
            prompt_injection=INJECTION,
            kernel_target=KERNEL_TARGETS,
            kernel_loss=KERNEL_LOSSES,
            kernel_head=KERNEL_HEADS,
            kernel_queries=KERNEL_QUERIES,
        )
        for name in ("kernel_supervision_weight", "guidance_epochs"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must not be negative, got {getattr(self, name)}.")
        for name in ("text_temperature", "kernel_temperature", "kernel_loss_share", "prompt_epochs"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise UserError(f"{name} must be positive, got {getattr(self, name)}.")
        if self.kernel_centering == 1:
            raise UserError("kernel_centering must be below 1: a mean of that momentum never moves.")
        self._check_kernel_target()

    def _check_kernel_target(self) -> None:
        if (self.kernel_target == "labeler") != (self.kernel_target_dim is not None):
            raise UserError("kernel_target_dim is the width of the vectors of kernel_target `labeler`: set both.")
        if self.kernel_target == "labeler" and self.kernel_head == "none":
            raise UserError("kernel_target `labeler` needs kernel_head `linear`: its vectors are no queries.")
