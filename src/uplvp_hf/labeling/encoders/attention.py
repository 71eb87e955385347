"""Last-block recipes: what happens to CLIP's patch tokens before they are compared with text.

x is the input of the last block, h = LayerNorm1(x), q, k, v its projections in heads, s = head_dim ** -0.5, O the
output projection. Every recipe ends in patch tokens that `Clip.project` takes into the text space.

    vanilla    the block as it is
    maskclip   y = x + O(v); y + MLP(LayerNorm2(y))
    sclip      [softmax(s q q^T) + softmax(s k k^T)] v, residual and FFN as in vanilla; the rows of the sum add to 2
    clearclip  O(softmax(s q q^T) v), no residual, no FFN
    naclip     O(softmax(s k k^T + scale * G) v), G_ij = exp(-|p_i - p_j|^2 / (2 sigma^2)) among patches, p in patches,
               0 for the class token; no residual, no FFN
    gem        over the last `gem_depth` blocks, beside the unchanged path: y <- y + O(mean of three self-self
               attentions), for z in (q, k, v): repeat `gem_iterations` times z <- softmax(t z' z'^T) z' with
               z' = z / |z|, then softmax(t z' z'^T) v. t = `gem_temperature`, or s times the mean norm of h over the
               image's tokens. h always comes from the unchanged path; no FFN beside it
    proxy      O(softmax(gamma (A - beta mean A)) v), A = cosines of another backbone's patches, negative arguments left
               out, v of the patches resized bilinearly to that backbone's grid; no residual, no FFN. The result lies on
               that grid. The mean is over the image's (or window's) own A; a patch always attends to itself, so that
               a uniform image keeps its values
    identity   O(v), no residual, no FFN

Sources: MaskCLIP (arXiv 2112.01071), SCLIP (2312.01597), ClearCLIP (2407.12442), NACLIP (2404.08181), GEM (2312.00878;
depth 7 and 1 iteration are its settings for ViT-B/16), ProxyCLIP (2408.04883; beta 1.2, gamma 3).
Mean mIoU over five datasets with OpenAI's ViT-B/16, as the ClearCLIP paper (table 2) reports: vanilla 12.6, maskclip
28.0, identity 29.5, sclip 35.2, gem 37.2, clearclip 37.5. No CLIP of that size has been measured with this code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from ...models.dense_blocks import gaussian_bias
from ...models.errors import UserError
from ..settings import Recipe


@dataclass(frozen=True)
class Layout:
    """grid: patches (h, w). prefix: tokens in front of them. guide: (B, C, h', w') features for proxy, or None."""

    grid: tuple[int, int]
    prefix: int = 1
    guide: torch.Tensor | None = None


def run_blocks(
    layers: Sequence[nn.Module], x: torch.Tensor, layout: Layout, recipe: Recipe
) -> tuple[torch.Tensor, tuple[int, int]]:
    """Encoder blocks with the last ones edited.

    layers: transformers' CLIP or SigLIP encoder layers. x: (B, prefix + h * w, C), the first one's input.
    Returns patch tokens (B, h' * w', C) and their grid (h', w'), the layout's own but for proxy. The blocks before the
    edited ones run as they are; a recipe that replaces the last block never computes it.
    """
    depth = min(recipe.gem_depth, len(layers)) if recipe.attention == "gem" else 1
    for layer in layers[: len(layers) - depth]:
        x = layer(x, attention_mask=None)
    tokens, grid = RECIPES[recipe.attention](layers[len(layers) - depth :], x, layout, recipe)
    if recipe.key_smoothing:
        tokens = smooth_by_keys(layers[-1], x, tokens, layout.prefix)
    return tokens, grid


def smooth_by_keys(block: nn.Module, x: torch.Tensor, tokens: torch.Tensor, prefix: int) -> torch.Tensor:
    """Mean of all patches' tokens with weights max(0, cos(k_i, k_j)), k the keys of `block` for its input `x`."""
    keys = F.normalize(block.self_attn.k_proj(block.layer_norm1(x))[:, prefix:].float(), dim=-1)
    weights = (keys @ keys.transpose(1, 2)).clamp_min(0)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return (weights @ tokens.float()).to(tokens.dtype)


@lru_cache(maxsize=8)  # windows share one shape
def _cached_bias(grid: tuple[int, int], sigma: float, scale: float, prefix: int, device, dtype) -> torch.Tensor:
    return gaussian_bias(*grid, sigma, scale, prefix).to(device, dtype)


def proxy_weights(guide: torch.Tensor, beta: float = 1.2, gamma: float = 3.0) -> torch.Tensor:
    """ProxyCLIP's attention: (B, C, h, w) of another backbone -> (B, h * w, h * w) float32, rows add to 1."""
    units = F.normalize(guide.float().flatten(2), dim=1)
    affinity = units.transpose(1, 2) @ units
    logits = gamma * (affinity - beta * affinity.mean(dim=(1, 2), keepdim=True))
    own = torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
    return logits.masked_fill((logits < 0) & ~own, -torch.inf).softmax(dim=-1)


def _heads(values: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """(B, T, C) -> (B, heads, T, head_dim)."""
    return values.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)


def _attend(query, key, value, scale: float, bias: torch.Tensor | None = None) -> torch.Tensor:
    """softmax(scale q k^T + bias) v for split heads, heads joined again: (B, T, C)."""
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    return mixed.transpose(1, 2).flatten(2)


def _residual_and_ffn(block: nn.Module, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
    y = x + block.self_attn.out_proj(mixed)
    return y + block.mlp(block.layer_norm2(y))


def vanilla(blocks: Sequence[nn.Module], x: torch.Tensor, layout: Layout, recipe: Recipe):
    """The block as it is."""
    return blocks[-1](x, attention_mask=None)[:, layout.prefix :], layout.grid


def maskclip(blocks: Sequence[nn.Module], x: torch.Tensor, layout: Layout, recipe: Recipe):
    """Every token attends to itself; residual and FFN kept."""
    x = x[:, layout.prefix :]  # nothing mixes the tokens: the class token is not needed
    return _residual_and_ffn(blocks[-1], x, blocks[-1].self_attn.v_proj(blocks[-1].layer_norm1(x))), layout.grid


def sclip(blocks: Sequence[nn.Module], x: torch.Tensor, layout: Layout, recipe: Recipe):
    """Correlative self-attention: q-q plus k-k; residual and FFN kept."""
    layer, h = blocks[-1].self_attn, blocks[-1].layer_norm1(x)
    value = _heads(layer.v_proj(h), layer)
    pair = (_heads(projection(h), layer) for projection in (layer.q_proj, layer.k_proj))
    mixed = sum(_attend(same, same, value, layer.scale) for same in pair)
    return _residual_and_ffn(blocks[-1], x, mixed)[:, layout.prefix :], layout.grid


def clearclip(blocks: Sequence[nn.Module], x: torch.Tensor, layout: Layout, recipe: Recipe):
    """q-q attention alone."""
    layer, h = blocks[-1].self_attn, blocks[-1].layer_norm1(x)
    query, value = _heads(layer.q_proj(h), layer), _heads(layer.v_proj(h), layer)
    mixed = _attend(query[:, :, layout.prefix :], query, value, layer.scale)
    return layer.out_proj(mixed), layout.grid


def naclip(blocks: Sequence[nn.Module], x: torch.Tensor, layout: Layout, recipe: Recipe):
    """k-k attention that favors near patches."""
    layer, h = blocks[-1].self_attn, blocks[-1].layer_norm1(x)
    key, value = _heads(layer.k_proj(h), layer), _heads(layer.v_proj(h), layer)
    bias = _cached_bias(layout.grid, recipe.sigma, recipe.scale, layout.prefix, x.device, x.dtype)
    mixed = _attend(key[:, :, layout.prefix :], key, value, layer.scale, bias[layout.prefix :])
    return layer.out_proj(mixed), layout.grid


def identity(blocks: Sequence[nn.Module], x: torch.Tensor, layout: Layout, recipe: Recipe):
    """Values alone."""
    layer = blocks[-1].self_attn
    return layer.out_proj(layer.v_proj(blocks[-1].layer_norm1(x[:, layout.prefix :]))), layout.grid


def gem(blocks: Sequence[nn.Module], x: torch.Tensor, layout: Layout, recipe: Recipe):
    """Self-self attention in a path beside the unchanged one, over all of `blocks`."""
    path = x
    for number, block in enumerate(blocks):
        layer, h = block.self_attn, block.layer_norm1(x)
        temperature = recipe.gem_temperature
        if temperature is None:
            temperature = layer.scale * h.float().norm(dim=-1).mean(dim=1)[:, None, None, None].to(h.dtype)
        value = _heads(layer.v_proj(h), layer)
        total = torch.zeros_like(h)
        for z in (_heads(layer.q_proj(h), layer), _heads(layer.k_proj(h), layer), value):
            for _ in range(recipe.gem_iterations):
                unit = F.normalize(z, dim=-1)
                z = F.scaled_dot_product_attention(temperature * unit, unit, unit, scale=1.0)
            unit = F.normalize(z, dim=-1)
            total = total + _attend(temperature * unit, unit, value, 1.0)
        path = path + layer.out_proj(total / 3)
        if number + 1 < len(blocks):
            x = block(x, attention_mask=None)
    return path[:, layout.prefix :], layout.grid


def proxy(blocks: Sequence[nn.Module], x: torch.Tensor, layout: Layout, recipe: Recipe):
    """Another backbone says which patches belong together. Raises UserError without its features."""
    if layout.guide is None:
        raise UserError("attention 'proxy' needs the features of another backbone: give a guide encoder")
    layer = blocks[-1].self_attn
    value = layer.v_proj(blocks[-1].layer_norm1(x[:, layout.prefix :])).float()
    size = tuple(layout.guide.shape[-2:])
    value = value.transpose(1, 2).unflatten(2, layout.grid)  # (B, C, h, w)
    if size != layout.grid:
        value = F.interpolate(value, size, mode="bilinear", align_corners=False)
    weights = proxy_weights(layout.guide, recipe.beta, recipe.gamma)
    mixed = weights @ value.flatten(2).transpose(1, 2)
    return layer.out_proj(mixed.to(x.dtype)), size


RECIPES: dict[str, Callable[..., tuple[torch.Tensor, tuple[int, int]]]] = {
    "vanilla": vanilla,
    "maskclip": maskclip,
    "sclip": sclip,
    "clearclip": clearclip,
    "naclip": naclip,
    "gem": gem,
    "proxy": proxy,
    "identity": identity,
}
