"""Configuration of QueryInst (arXiv 2105.01928)."""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_base import StrictConfigMixin
from .errors import UserError


@strict
class QueryInstConfig(StrictConfigMixin, PreTrainedConfig):
    r"""
    Configuration of [`QueryInstModel`] and [`QueryInstForInstanceSegmentation`]. Defaults are those of the paper
    (arXiv 2105.01928, section 4, and the released configuration with 100 queries).

    Args:
        backbone_config (`dict` or `PreTrainedConfig`, *optional*, defaults to a ResNet-50):
            Any transformers backbone or `TimmBackboneConfig` that gives four maps with strides 4, 8, 16 and 32. A
            `timm_kwargs` dict on the latter is handed to timm.
        num_queries (`int`, *optional*, defaults to 100): Learned proposals, each a box and a feature.
        hidden_size (`int`, *optional*, defaults to 256): Channels of the pyramid and of the queries.
        num_stages (`int`, *optional*, defaults to 6): Refinement stages, each with a box head and a mask head.
        num_attention_heads (`int`, *optional*, defaults to 8): Heads of the self-attention over the queries.
        intermediate_size (`int`, *optional*, defaults to 2048): Width of the feed-forward layer.
        dynamic_channels (`int`, *optional*, defaults to 64): Width between the two dynamic convolutions.
        num_class_layers (`int`, *optional*, defaults to 1): Layers before the class predictor.
        num_box_layers (`int`, *optional*, defaults to 3): Layers before the box predictor.
        num_mask_layers (`int`, *optional*, defaults to 4): 3 x 3 convolutions of the mask head.
        box_pool_size (`int`, *optional*, defaults to 7): Side of the pooled regions of the box head, in cells.
        mask_pool_size (`int`, *optional*, defaults to 14):
            Side of the pooled regions of the mask head, in cells. Masks come out at twice this side.
        pool_sampling_ratio (`int`, *optional*, defaults to 2): Samples a side in every cell of a pooled region.
        finest_scale (`int`, *optional*, defaults to 56):
            Regions of a scale (root of the area, in pixels) below twice this are pooled from the finest level.
        box_deviations (`list[float]`, *optional*, defaults to `[0.5, 0.5, 1.0, 1.0]`):
            Factors of the four predicted box changes.
        mask_padding (`bool`, *optional*, defaults to `True`):
            Whether padding is masked, so that a prediction does not depend on the size of the batch. With `False`
            padding takes part as zeros, as in the original implementation; the pixel mask then gives sizes only.
        pooling_gradient (`bool`, *optional*, defaults to `False`):
            Whether the learned proposal boxes also get gradients through the regions pooled in them. Compiled
            implementations of RoIAlign give none; one written in plain tensor operations does.
        use_auxiliary_loss (`bool`, *optional*, defaults to `True`): Whether all stages are supervised or the last one.
        class_weight, box_weight, giou_weight, mask_weight (`float`, *optional*, defaults to 2, 5, 2 and 8):
            Weights of the focal, box L1, box GIoU and mask dice losses.
        class_cost, box_cost, giou_cost (`float`, *optional*, defaults to 2, 5 and 2): Weights in the matching.
        focal_alpha, focal_gamma (`float`, *optional*, defaults to 0.25 and 2): Of the focal loss and its cost.
        dice_eps (`float`, *optional*, defaults to 1e-5): Added to both sums of the denominator of the dice loss.
        text_class_weight, text_class_cost (`float`, *optional*, defaults to 2 and 2):
            Weights of the loss and the matching cost of an optional text class head on the queries.
        prior_probability (`float`, *optional*, defaults to 0.01): Class probability at initialization.

    Raises:
        UserError: for a keyword that is not a setting (the nearest one is named) or a number out of range.

    Example:

    ```python
    >>> from uplvp_hf import QueryInstConfig, QueryInstForInstanceSegmentation

    >>> model = QueryInstForInstanceSegmentation(QueryInstConfig(id2label={0: "cat", 1: "dog"}))
    ```
    """

    model_type = "queryinst"
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
    num_stages: int = 6
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    dynamic_channels: int = 64
    num_class_layers: int = 1
    num_box_layers: int = 3
    num_mask_layers: int = 4
    box_pool_size: int = 7
    mask_pool_size: int = 14
    pool_sampling_ratio: int = 2
    finest_scale: int = 56
    box_deviations: list[float] | tuple[float, ...] = (0.5, 0.5, 1.0, 1.0)
    mask_padding: bool = True
    pooling_gradient: bool = False
    use_auxiliary_loss: bool = True
    class_weight: float | int = 2.0
    box_weight: float | int = 5.0
    giou_weight: float | int = 2.0
    mask_weight: float | int = 8.0
    class_cost: float | int = 2.0
    box_cost: float | int = 5.0
    giou_cost: float | int = 2.0
    focal_alpha: float = 0.25
    focal_gamma: float | int = 2.0
    dice_eps: float = 1e-5
    text_class_weight: float | int = 2.0
    text_class_cost: float | int = 2.0
    prior_probability: float = 0.01

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.box_deviations = [float(value) for value in self.box_deviations]
        self._check_settings()

    def _check_settings(self) -> None:
        for name in ("num_queries", "num_stages", "dynamic_channels", "box_pool_size", "mask_pool_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.pool_sampling_ratio < 1 or self.finest_scale < 1:
            raise UserError(
                "pool_sampling_ratio and finest_scale must be at least 1, got "
                f"{self.pool_sampling_ratio} and {self.finest_scale}."
            )
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}."
            )
        if len(self.box_deviations) != 4:
            raise UserError(f"box_deviations must hold 4 numbers, got {self.box_deviations}.")
        if not 0 < self.prior_probability < 1:
            raise UserError(f"prior_probability must lie between 0 and 1, got {self.prior_probability}.")


__all__ = ["QueryInstConfig"]
