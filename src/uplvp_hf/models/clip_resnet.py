"""CLIP's ResNet with its attention pool (Radford et al. 2021), which transformers does not have.

Parameters have OpenAI's names, so that its weights load as they are. DenseCLIP's reading of the attention pool: every
cell is a query, not only the mean, which gives a map in the space of the texts.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ClipBottleneck(nn.Module):
    """Residual block whose stride is an average pool, in the main path and in the shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * channels)
        self.stride = stride
        self.downsample = None
        if stride > 1 or in_channels != 4 * channels:
            conv = nn.Conv2d(in_channels, 4 * channels, 1, bias=False)
            self.downsample = nn.Sequential(OrderedDict([("0", conv), ("1", nn.BatchNorm2d(4 * channels))]))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self._pool(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x = F.relu(self.bn1(self.conv1(x)))
        x = self._pool(F.relu(self.bn2(self.conv2(x))))
        return F.relu(self.bn3(self.conv3(x)) + shortcut)

    def _pool(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, self.stride) if self.stride > 1 else x


class ClipAttentionPool(nn.Module):
    """Attention over the mean of a map and all its cells: (B, C, H, W) -> the mean's result (B, D), the cells' (B, D,
    H, W). The position table is resized to the map, bilinearly; the row of the mean is not."""

    def __init__(self, size: int, channels: int, heads: int, output_dim: int):
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(size**2 + 1, channels) / channels**0.5)
        self.k_proj = nn.Linear(channels, channels)
        self.q_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.c_proj = nn.Linear(channels, output_dim)
        self.heads = heads

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        height, width = x.shape[-2:]
        cells = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([cells.mean(1, keepdim=True), cells], dim=1)
        tokens = tokens + resized_positions(self.positional_embedding, (height, width), "bilinear").to(tokens.dtype)
        query, key, value = (
            projection(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        out = self.c_proj(mixed.transpose(1, 2).flatten(2))
        return out[:, 0], out[:, 1:].transpose(1, 2).unflatten(2, (height, width))


class ClipResNet(nn.Module):
    """(B, 3, H, W) -> maps with strides 4, 8, 16, 32, the pooled image (B, D), and its map (B, D, H / 32, W / 32)."""

    def __init__(self, width: int, depths: list[int], pool_heads: int, pool_size: int, output_dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.channels = [width * 4 * 2**stage for stage in range(4)]
        incoming = width
        for stage, depth in enumerate(depths):
            blocks = []
            for index in range(depth):
                blocks.append(ClipBottleneck(incoming, width * 2**stage, 2 if stage and not index else 1))
                incoming = self.channels[stage]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.attnpool = ClipAttentionPool(pool_size, incoming, pool_heads, output_dim)

    def to_texts(self) -> list[nn.Module]:
        """The parts that only the space of the texts needs."""
        return [self.attnpool]

    def forward(self, pixel_values: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        x = pixel_values.to(self.conv1.weight.dtype)
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(norm(conv(x)))
        x = F.avg_pool2d(x, 2)
        maps = []
        for stage in range(4):
            x = getattr(self, f"layer{stage + 1}")(x)
            maps.append(x)
        pooled, local = self.attnpool(x)
        return maps, pooled, local


def resized_positions(table: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Rows of a position table, the first for a summary token, the others for a square grid, resized to another grid:
    (1 + S * S, C) -> (1 + H * W, C)."""
    side = round((table.shape[0] - 1) ** 0.5)
    if (side, side) == tuple(size):
        return table
    grid = table[1:].T.unflatten(1, (side, side))[None].float()
    grid = F.interpolate(grid, size=size, mode=mode, align_corners=False)[0]
    return torch.cat([table[:1], grid.flatten(1).T.to(table.dtype)])
