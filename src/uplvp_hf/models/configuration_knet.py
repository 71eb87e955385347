"""Configuration of K-Net (arXiv 2106.14855) for instance segmentation."""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_base import StrictConfigMixin
from .errors import UserError

SEMANTIC_TARGETS = ("majority", "touched")
OBJECT_POOLING = ("sum", "mean")


@strict
class KNetConfig(StrictConfigMixin, PreTrainedConfig):
    r"""
    Configuration of [`KNetModel`] and [`KNetForInstanceSegmentation`]. Defaults are those of the paper
    (arXiv 2106.14855, section 4, and the released instance segmentation configuration).

    Args:
        backbone_config (`dict` or `PreTrainedConfig`, *optional*, defaults to a ResNet-50):
            Any transformers backbone or `TimmBackboneConfig` that gives four maps with strides 4, 8, 16 and 32. A
            `timm_kwargs` dict on the latter is handed to timm.
        num_queries (`int`, *optional*, defaults to 100): Kernels, each the filter of one instance.
        hidden_size (`int`, *optional*, defaults to 256): Channels of the pyramid, of the maps and of the kernels.
        num_stages (`int`, *optional*, defaults to 3): Rounds of kernel updates.
        num_attention_heads (`int`, *optional*, defaults to 8): Heads of the self-attention over the kernels.
        intermediate_size (`int`, *optional*, defaults to 2048): Width of the feed-forward layer.
        num_localization_layers, num_semantic_layers (`int`, *optional*, defaults to 1):
            1 x 1 convolutions of the kernel head before the initial masks and before the class maps.
        num_class_layers, num_mask_layers (`int`, *optional*, defaults to 1):
            Linear layers before the class predictor and before the mask filters.
        norm_groups (`int`, *optional*, defaults to 32): Groups of the group norms.
        dropout (`float`, *optional*, defaults to 0.0): Of attention and feed-forward layers.
        class_weight, mask_weight, dice_weight, semantic_weight (`float`, *optional*, defaults to 2, 1, 4 and 1):
            Weights of the focal, mask cross-entropy, mask dice and class map losses.
        class_cost, mask_cost, dice_cost (`float`, *optional*, defaults to 2, 1 and 4): Weights in the matching.
        focal_alpha, focal_gamma (`float`, *optional*, defaults to 0.25 and 2): Of the focal losses and of their cost.
        dice_eps (`float`, *optional*, defaults to 1e-3): Added to both sums of the denominator of dice.
        text_class_weight, text_class_cost (`float`, *optional*, defaults to 2 and 2):
            Weights of the loss and the matching cost of an optional text class head on the kernels.
        semantic_targets (`str`, *optional*, defaults to `"majority"`):
            Cells that class maps learn as theirs. `majority`: where a mask of the class covers at least half of the
            cell, several classes at once where masks overlap. `touched`: any cell that a mask touches; of several, the
            mask matched to the last kernel takes it. The original implementation has the latter.
        prior_probability (`float`, *optional*, defaults to 0.01): Class probability at initialization.
        object_pooling (`str`, *optional*, defaults to `"sum"`):
            What a kernel takes in of the map under its mask: `sum` (the paper) or `mean`. A sum grows with the area of
            the object, up to hundreds of times the kernel; a small K-Net that has a few hundred steps to train ranks
            its instances much better with the mean (see docs/results.md).

    Raises:
        UserError: for a keyword that is not a setting (the nearest one is named) or a number out of range.

    Example:

    ```python
    >>> from uplvp_hf import KNetConfig, KNetForInstanceSegmentation

    >>> model = KNetForInstanceSegmentation(KNetConfig(id2label={0: "cat", 1: "dog"}))
    ```
    """

    model_type = "knet"
    sub_configs_defaults = {
        "backbone_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="resnet",
            init_kwargs={"out_features": ["stage1", "stage2", "stage3", "stage4"]},
        )
    }
    attribute_map = {"num_hidden_layers": "num_stages"}

    backbone_config: dict | PreTrainedConfig | None = None
    num_queries: int = 100
    hidden_size: int = 256
    num_stages: int = 3
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    num_localization_layers: int = 1
    num_semantic_layers: int = 1
    num_class_layers: int = 1
    num_mask_layers: int = 1
    norm_groups: int = 32
    dropout: float | int = 0.0
    class_weight: float | int = 2.0
    mask_weight: float | int = 1.0
    dice_weight: float | int = 4.0
    semantic_weight: float | int = 1.0
    class_cost: float | int = 2.0
    mask_cost: float | int = 1.0
    dice_cost: float | int = 4.0
    focal_alpha: float = 0.25
    focal_gamma: float | int = 2.0
    dice_eps: float = 1e-3
    text_class_weight: float | int = 2.0
    text_class_cost: float | int = 2.0
    semantic_targets: str = "majority"
    prior_probability: float = 0.01
    object_pooling: str = "sum"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for name in ("num_queries", "num_stages"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name, divisor in [
            ("num_attention_heads", self.num_attention_heads),
            ("norm_groups", self.norm_groups),
            ("the 4 parts of the position encoding (sine and cosine of two axes)", 4),
        ]:
            if self.hidden_size % divisor:
                raise UserError(f"hidden_size {self.hidden_size} is not a multiple of {name}: {divisor}.")
        if self.semantic_targets not in SEMANTIC_TARGETS:
            raise UserError(
                f"semantic_targets must be one of {', '.join(SEMANTIC_TARGETS)}, got `{self.semantic_targets}`."
            )
        if self.object_pooling not in OBJECT_POOLING:
            raise UserError(f"object_pooling must be one of {', '.join(OBJECT_POOLING)}, got `{self.object_pooling}`.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must lie in [0, 1), got {self.dropout}.")
        if not 0 < self.prior_probability < 1:
            raise UserError(f"prior_probability must lie between 0 and 1, got {self.prior_probability}.")


__all__ = ["KNetConfig"]
