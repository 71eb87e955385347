"""Feature pyramid network (arXiv 1612.03144) and the convolution block around it, as K-Net and QueryInst use them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init


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
