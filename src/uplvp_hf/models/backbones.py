"""The backbone of a segmenter, built from its configuration, and the feature pyramid (arXiv 1612.03144) on it."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoBackbone, PreTrainedConfig, PreTrainedModel, TimmBackbone, initialization as init

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


def make_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """A backbone with weights by its own rule. A `timm_kwargs` dict on a `TimmBackboneConfig` goes to timm."""
    if config.model_type == "timm_backbone":
        return InitializedTimmBackbone(config, **(getattr(config, "timm_kwargs", None) or {}))
    return AutoBackbone.from_config(config)


def build_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """A backbone for segmenters that need four maps with strides 4, 8, 16 and 32, high to low resolution.

    Raises UserError for another number of maps.
    """
    backbone = make_backbone(config)
    if len(backbone.channels) != 4:
        raise UserError(
            f"The backbone gives {len(backbone.channels)} maps, but 4 are needed (strides 4, 8, 16, 32): set "
            "`out_features` or `out_indices` of its configuration to its four stages."
        )
    return backbone


class ConvNormAct(nn.Module):
    """Convolution without bias, group norm, ReLU: (B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, groups: int = 32):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
        self.norm = nn.GroupNorm(groups, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class FeaturePyramid(nn.Module):
    """Maps of a backbone, high to low resolution, -> as many maps of `channels` channels, without norms.

    Each map gets a 1x1 convolution, the next lower resolution is added (nearest neighbor), then a 3x3 convolution.
    Any canvas whose maps halve from level to level, rounded up, gives the same values on the image.
    """

    def __init__(self, in_channels: list[int], channels: int):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(count, channels, 1) for count in in_channels)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels)

    def forward(self, maps: tuple[Tensor, ...] | list[Tensor]) -> list[Tensor]:
        levels = [lateral(map_) for lateral, map_ in zip(self.lateral, maps, strict=True)]
        for index in range(len(levels) - 1, 0, -1):
            upper = F.interpolate(levels[index], size=levels[index - 1].shape[-2:], mode="nearest")
            levels[index - 1] = levels[index - 1] + upper
        return [output(level) for output, level in zip(self.output, levels, strict=True)]

    @torch.no_grad()
    def init_weights(self) -> None:
        """Xavier-uniform weights and zero biases, the rule of mmdetection's FPN. For `_init_weights` of a model."""
        for conv in [*self.lateral, *self.output]:
            init.xavier_uniform_(conv.weight)
            init.zeros_(conv.bias)
