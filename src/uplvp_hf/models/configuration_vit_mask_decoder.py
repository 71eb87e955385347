"""Configuration of a plain mask decoder on any ViT."""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_base import OwnSegmenterConfig
from .errors import UserError


@strict
class VitMaskDecoderConfig(OwnSegmenterConfig):
    r"""
    Configuration of [`VitMaskDecoder`].

    Args:
        backbone_config (`dict` or `PreTrainedConfig`, *optional*, defaults to a DINOv2-S/14 with registers):
            Any transformers backbone or `TimmBackboneConfig` of a ViT: one or several maps of one size (`out_features`,
            `out_indices`), which are added up.
        hidden_size (`int`, *optional*, defaults to 256): Channels of the decoder.
        num_blocks (`int`, *optional*, defaults to 4): Blocks that update queries and tokens together.
        num_queries (`int`, *optional*, defaults to 100): Learned queries, one an instance.
        num_attention_heads (`int`, *optional*, defaults to 8): Heads of the attention.
        mlp_ratio (`int`, *optional*, defaults to 4): Width of the feed-forward layers over `hidden_size`.
        class_weight, mask_weight, dice_weight (`float`, *optional*, defaults to 2, 5 and 5): As of Mask2Former.
        no_object_weight (`float`, *optional*, defaults to 0.1): Weight of "no object" in the class term.
        train_num_points (`int`, *optional*, defaults to 12544): Points a mask in the loss.
        oversample_ratio, importance_sample_ratio (`float`, *optional*, defaults to 3 and 0.75): Of these points.
        use_auxiliary_loss (`bool`, *optional*, defaults to `True`): Whether earlier blocks are supervised.
        output_auxiliary_logits (`bool`, *optional*): Whether the output holds the predictions of the earlier blocks.
        hidden_act, layer_norm_eps, layerscale_value, drop_path_rate, attention_dropout, initializer_range,
        use_swiglu_ffn: of the blocks, which are transformers' of EoMT, with its defaults.

    Raises UserError for a keyword that is not a setting (the nearest one is named) or a number out of range.

    Example:

    ```python
    >>> from uplvp_hf.models.configuration_vit_mask_decoder import VitMaskDecoderConfig
    >>> from uplvp_hf.models.modeling_vit_mask_decoder import VitMaskDecoder

    >>> model = VitMaskDecoder(VitMaskDecoderConfig(id2label={0: "cat", 1: "dog"}))
    ```
    """

    model_type = "vit_mask_decoder"
    sub_configs_defaults = {
        "backbone_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="dinov2_with_registers",
            init_kwargs={"hidden_size": 384, "num_attention_heads": 6, "image_size": 518, "out_features": ["stage12"]},
        )
    }

    backbone_config: dict | PreTrainedConfig | None = None
    num_blocks: int = 4
    num_queries: int = 100
    num_attention_heads: int = 8
    mlp_ratio: int = 4
    class_weight: float | int = 2.0
    mask_weight: float | int = 5.0
    dice_weight: float | int = 5.0
    no_object_weight: float = 0.1
    train_num_points: int = 12544
    oversample_ratio: float | int = 3.0
    importance_sample_ratio: float = 0.75
    use_auxiliary_loss: bool = True
    output_auxiliary_logits: bool | None = None
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    layerscale_value: float | int = 1.0
    drop_path_rate: float | int = 0.0
    attention_dropout: float | int = 0.0
    initializer_range: float = 0.02
    use_swiglu_ffn: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.check(("num_blocks", "num_queries", "num_attention_heads", "train_num_points"))
        if self.hidden_size % (4 * self.num_attention_heads):
            raise UserError(
                f"hidden_size {self.hidden_size} is not a multiple of 4 x num_attention_heads, which is "
                f"{4 * self.num_attention_heads}."
            )
