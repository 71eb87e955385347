"""Building the backbone of a segmenter from its configuration."""

from transformers import AutoBackbone, PreTrainedConfig, PreTrainedModel, TimmBackbone


def build_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """A backbone with weights by its own rule; an optional `timm_kwargs` dict on a `TimmBackboneConfig` goes to timm.

    The segmenters need four maps with strides 4, 8, 16 and 32, high to low resolution. Raises ValueError for another
    number of maps.
    """
    extra = getattr(config, "timm_kwargs", None)
    backbone = TimmBackbone(config, **extra) if extra else AutoBackbone.from_config(config)
    if len(backbone.channels) != 4:
        raise ValueError(
            f"The backbone gives {len(backbone.channels)} maps, but 4 are needed (strides 4, 8, 16, 32): set "
            "`out_features` or `out_indices` of its configuration to its four stages."
        )
    return backbone
