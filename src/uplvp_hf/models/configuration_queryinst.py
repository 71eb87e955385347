"""Configuration of QueryInst (arXiv 2105.01928)."""

from huggingface_hub.dataclasses import strict

from .configuration_base import QuerySegmenterConfig
from .errors import UserError


@strict
class QueryInstConfig(QuerySegmenterConfig):
    r"""
    Configuration of [`QueryInstModel`] and [`QueryInstForInstanceSegmentation`]. Defaults are those of the paper
    (arXiv 2105.01928, section 4, and the released configuration with 100 queries). The settings that are not listed are
    those of [`QuerySegmenterConfig`] and [`OwnSegmenterConfig`]; the queries are learned proposals, each a box and a
    feature.

    Args:
        num_stages (`int`, *optional*, defaults to 6): Refinement stages, each with a box head and a mask head.
        dynamic_channels (`int`, *optional*, defaults to 64): Width between the two dynamic convolutions.
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
        use_auxiliary_loss (`bool`, *optional*, defaults to `True`): Whether all stages are supervised or the last one.
        box_weight, giou_weight, mask_weight (`float`, *optional*, defaults to 5, 2 and 8):
            Weights of the box L1, box GIoU and mask dice losses.
        box_cost, giou_cost (`float`, *optional*, defaults to 5 and 2): Weights in the matching.
        dice_eps (`float`, *optional*, defaults to 1e-5): Added to both sums of the denominator of the dice loss.
    """

    model_type = "queryinst"
    num_stages: int = 6
    dynamic_channels: int = 64
    num_box_layers: int = 3
    num_mask_layers: int = 4
    box_pool_size: int = 7
    mask_pool_size: int = 14
    pool_sampling_ratio: int = 2
    finest_scale: int = 56
    box_deviations: list[float] | tuple[float, ...] = (0.5, 0.5, 1.0, 1.0)
    mask_padding: bool = True
    use_auxiliary_loss: bool = True
    box_weight: float | int = 5.0
    giou_weight: float | int = 2.0
    mask_weight: float | int = 8.0
    box_cost: float | int = 5.0
    giou_cost: float | int = 2.0
    dice_eps: float = 1e-5

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.box_deviations = [float(value) for value in self.box_deviations]
        self.check(("dynamic_channels", "box_pool_size", "mask_pool_size", "pool_sampling_ratio", "finest_scale"))
        if len(self.box_deviations) != 4:
            raise UserError(f"box_deviations must hold 4 numbers, got {self.box_deviations}.")
