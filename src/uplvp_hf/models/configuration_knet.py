"""Configuration of K-Net (arXiv 2106.14855) for instance segmentation."""

from huggingface_hub.dataclasses import strict

from .configuration_base import QuerySegmenterConfig
from .errors import UserError

SEMANTIC_TARGETS = ("majority", "touched")
OBJECT_POOLING = ("sum", "mean")


@strict
class KNetConfig(QuerySegmenterConfig):
    r"""
    Configuration of [`KNetModel`] and [`KNetForInstanceSegmentation`]. Defaults are those of the paper
    (arXiv 2106.14855, section 4, and the released instance segmentation configuration). The settings that are not
    listed are those of [`QuerySegmenterConfig`] and [`OwnSegmenterConfig`]; the queries are kernels, each the filter of
    one instance, and `num_stages` is 3.

    Args:
        num_localization_layers, num_semantic_layers (`int`, *optional*, defaults to 1):
            1 x 1 convolutions of the kernel head before the initial masks and before the class maps.
        num_mask_layers (`int`, *optional*, defaults to 1): Linear layers before the mask filters.
        norm_groups (`int`, *optional*, defaults to 32): Groups of the group norms.
        dropout (`float`, *optional*, defaults to 0.0): Of attention and feed-forward layers.
        mask_weight, dice_weight, semantic_weight (`float`, *optional*, defaults to 1, 4 and 1):
            Weights of the mask cross-entropy, mask dice and class map losses.
        mask_cost, dice_cost (`float`, *optional*, defaults to 1 and 4): Weights in the matching.
        dice_eps (`float`, *optional*, defaults to 1e-3): Added to both sums of the denominator of dice.
        semantic_targets (`str`, *optional*, defaults to `"majority"`):
            Cells that class maps learn as theirs. `majority`: where a mask of the class covers at least half of the
            cell, several classes at once where masks overlap. `touched`: any cell that a mask touches; of several, the
            mask matched to the last kernel takes it. The original implementation has the latter.
        object_pooling (`str`, *optional*, defaults to `"sum"`):
            What a kernel takes in of the map under its mask: `sum` (the paper) or `mean`. A sum grows with the area of
            the object, up to hundreds of times the kernel; a small K-Net that has a few hundred steps to train ranks
            its instances much better with the mean (see docs/results.md).
    """

    model_type = "knet"
    num_localization_layers: int = 1
    num_semantic_layers: int = 1
    num_mask_layers: int = 1
    norm_groups: int = 32
    dropout: float | int = 0.0
    mask_weight: float | int = 1.0
    dice_weight: float | int = 4.0
    semantic_weight: float | int = 1.0
    mask_cost: float | int = 1.0
    dice_cost: float | int = 4.0
    dice_eps: float = 1e-3
    semantic_targets: str = "majority"
    object_pooling: str = "sum"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.check_divisor("norm_groups", self.norm_groups)
        self.check_divisor("the 4 parts of the position encoding (sine and cosine of two axes)", 4)
        self.check(semantic_targets=SEMANTIC_TARGETS, object_pooling=OBJECT_POOLING)
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must lie in [0, 1), got {self.dropout}.")
