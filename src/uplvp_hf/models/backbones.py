"""Building the backbone of a segmenter from its configuration."""

import torch
from torch import nn
from transformers import AutoBackbone, PreTrainedConfig, PreTrainedModel, TimmBackbone
from transformers import initialization as init

from .errors import UserError


class InitializedTimmBackbone(TimmBackbone):
    """transformers' wrapper of timm, with weights even where a checkpoint has none.

    transformers builds models without storage, then fills them from the checkpoint; timm weights that are missing there
    would stay whatever the memory held.
    """

    def __init__(self, config: PreTrainedConfig, **kwargs):
        self.timm_settings = {"in_chans": config.num_channels, **kwargs}
        super().__init__(config, **kwargs)

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: all our initialization goes through `transformers.initialization`."""
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if module is self and self.built_without_storage:
            import timm  # there already: only timm backbones come here

            fresh = timm.create_model(
                self.config.backbone,
                features_only=self.config.features_only,
                out_indices=self.config.out_indices,
                output_stride=self.config.output_stride,
                **self.timm_settings,
            ).state_dict()
            for name, tensor in self._backbone.state_dict(keep_vars=True).items():
                init.copy_(tensor, fresh[name])  # leaves alone what was loaded

    def post_init(self):
        self.built_without_storage = next(self._backbone.parameters()).is_meta
        super().post_init()


def build_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """A backbone with weights by its own rule; an optional `timm_kwargs` dict on a `TimmBackboneConfig` goes to timm.

    The segmenters need four maps with strides 4, 8, 16 and 32, high to low resolution. Raises UserError for another
    number of maps.
    """
    if config.model_type == "timm_backbone":
        backbone = InitializedTimmBackbone(config, **(getattr(config, "timm_kwargs", None) or {}))
    else:
        backbone = AutoBackbone.from_config(config)
    if len(backbone.channels) != 4:
        raise UserError(
            f"The backbone gives {len(backbone.channels)} maps, but 4 are needed (strides 4, 8, 16, 32): set "
            "`out_features` or `out_indices` of its configuration to its four stages."
        )
    return backbone
