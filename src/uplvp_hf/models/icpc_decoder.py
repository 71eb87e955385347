"""DenseCLIP's context decoder (arXiv 2112.01518, section 3.2): text features look at the image after the text tower."""

from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_icpc import IcpcConfig


class ContextAttention(nn.Module):
    """Multi-head attention whose projections of queries, keys and values have no bias."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """x (B, N, C) attends to memory (B, M, C)."""
        query, key, value = (
            projection(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection, tokens in ((self.q_proj, x), (self.k_proj, memory), (self.v_proj, memory))
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.dropout(self.proj(mixed.transpose(1, 2).flatten(2)))


class ContextDecoderLayer(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.self_attn = ContextAttention(width, heads, dropout)
        self.cross_attn = ContextAttention(width, heads, dropout)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.self_attn(h, h)
        x = x + self.cross_attn(self.norm2(x), memory)
        return x + self.dropout(self.mlp(self.norm3(x)))


class ContextDecoder(nn.Module):
    """Text features (B, K, D) and image (B, M, D) -> what to add to the text features (B, K, D)."""

    def __init__(self, config: IcpcConfig):
        super().__init__()
        dim, width = config.projection_dim, config.decoder_width
        self.memory_proj = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width), nn.LayerNorm(width))
        self.text_proj = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width))
        layers = (
            ContextDecoderLayer(width, config.decoder_heads, config.dropout) for _ in range(config.decoder_layers)
        )
        self.decoder = nn.ModuleList(layers)
        self.out_proj = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim))

    def forward(self, text: Tensor, visual: Tensor) -> Tensor:
        memory = self.memory_proj(visual)
        x = self.text_proj(text)
        for layer in self.decoder:
            x = layer(x, memory)
        return self.out_proj(x)
