"""Head of Panoptic Feature Pyramid Networks (arXiv 1901.02446) for semantic segmentation, as mmsegmentation has it."""

from torch import Tensor, nn
from torch.nn import functional as F


class _ConvNormRelu(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class SemanticFpnHead(nn.Module):
    """Four maps with strides 4 to 32 -> class logits (B, K, H / 4, W / 4).

    Each map is doubled until it has stride 4, with a convolution before each doubling; then the maps are added.
    """

    def __init__(self, in_channels: int, channels: int, num_classes: int, dropout: float):
        super().__init__()
        self.scales = nn.ModuleList(
            nn.ModuleList(_ConvNormRelu(channels if step else in_channels, channels) for step in range(max(1, level)))
            for level in range(4)
        )
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        total = self.scale(0, maps[0])
        for level in range(1, 4):
            x = self.scale(level, maps[level])
            total = total + F.interpolate(x, size=total.shape[-2:], mode="bilinear", align_corners=False)
        return self.classifier(self.dropout(total))

    def scale(self, level: int, x: Tensor) -> Tensor:
        """One map at stride 4, whose size may exceed the first map's by rounding."""
        for block in self.scales[level]:
            x = block(x)
            if level:
                x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return x
