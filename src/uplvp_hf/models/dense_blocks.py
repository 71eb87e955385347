"""The last block of a CLIP vision transformer without residual and MLP: its patches lie closer to the texts."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class DenseBlock:
    """kind: `identity`, every token keeps its own value; `clearclip`, attention between queries (arXiv 2407.12442);
    `naclip`, attention between keys that favors near patches (arXiv 2404.08181), by `scale` times a gaussian of width
    `sigma` patches."""

    kind: str
    sigma: float = 5.0
    scale: float = 1.0


def dense_tokens(block: nn.Module, x: Tensor, grid: tuple[int, int], dense: DenseBlock) -> Tensor:
    """What a block of transformers' CLIP makes of its input (B, 1 + h * w, C): (B, 1 + h * w, C), the class token
    first. grid: (h, w)."""
    attention, h = block.self_attn, block.layer_norm1(x)
    value = attention.v_proj(h)
    if dense.kind == "identity":
        return attention.out_proj(value)
    same, bias = attention.q_proj(h), None
    if dense.kind == "naclip":
        same, bias = attention.k_proj(h), gaussian_bias(*grid, dense.sigma, dense.scale, device=x.device).to(x.dtype)
    same, value = (t.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for t in (same, value))
    mixed = F.scaled_dot_product_attention(same, same, value, attn_mask=bias, scale=attention.scale)
    return attention.out_proj(mixed.transpose(1, 2).flatten(2))


def gaussian_bias(
    height: int, width: int, sigma: float, scale: float = 1.0, prefix: int = 1, device: torch.device | None = None
) -> Tensor:
    """NACLIP's additive attention bias: (prefix + h * w, same) float32, 0 for the tokens in front."""
    y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    points = torch.stack([y.flatten(), x.flatten()], dim=1).float()
    near = scale * torch.exp(-(points[:, None] - points[None]).square().sum(-1) / (2 * sigma**2))
    return F.pad(near, (prefix, 0, prefix, 0))


__all__ = ["DenseBlock", "dense_tokens", "gaussian_bias"]
