"""Layers of QueryInst: dynamic convolution, a refinement stage with its predictors, the mask head."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_queryinst import QueryInstConfig
from .roi import PyramidPooler, apply_deltas


class DynamicConv(nn.Module):
    """Two pointwise convolutions of a region whose kernels a query makes: (M, C), (M, C, s, s) -> (M, s * s, C)."""

    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.inner = inner
        self.kernels = nn.Linear(channels, 2 * channels * inner)
        self.norm_in = nn.LayerNorm(inner)
        self.norm_out = nn.LayerNorm(channels)

    def forward(self, queries: Tensor, regions: Tensor) -> Tensor:
        channels = regions.shape[1]
        first, second = self.kernels(queries).chunk(2, dim=-1)
        x = regions.flatten(2).transpose(1, 2)  # (M, s * s, C)
        x = F.relu(self.norm_in(torch.bmm(x, first.reshape(-1, channels, self.inner))))
        return F.relu(self.norm_out(torch.bmm(x, second.reshape(-1, self.inner, channels))))


class SelfAttention(nn.Module):
    """Multi-head self-attention over the queries of an image, (B, N, D) -> (B, N, D)."""

    def __init__(self, config: QueryInstConfig):
        super().__init__()
        self.config = config
        self.heads = config.num_attention_heads
        # One packed projection, whose init rule the original applies to the whole of it.
        self.in_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, output_attentions: bool = False) -> tuple[Tensor, Tensor | None]:
        batch, count, channels = x.shape
        query, key, value = (
            part.reshape(batch, count, self.heads, -1).transpose(1, 2) for part in self.in_proj(x).chunk(3, dim=-1)
        )
        weights = None
        # In training too: where large prompts saturate the weights, the fused backward pass, which recomputes them from
        # rounded sums, was off by a tenth in the recorded runs.
        if output_attentions or self.training or self.config._attn_implementation == "eager":
            scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
            weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
            mixed = weights @ value
        else:
            mixed = F.scaled_dot_product_attention(query, key, value)
        output = self.out_proj(mixed.transpose(1, 2).reshape(batch, count, channels))
        return output, weights if output_attentions else None


class QueryInstStage(GradientCheckpointingLayer):
    """One refinement of queries, classes and boxes."""

    def __init__(self, config: QueryInstConfig):
        super().__init__()
        channels = config.hidden_size
        self.deviations = list(config.box_deviations)
        self.pooler = PyramidPooler(config.box_pool_size, config.pool_sampling_ratio, config.finest_scale)
        self.attention = SelfAttention(config)
        self.attention_norm = nn.LayerNorm(channels)
        self.dynamic_conv = DynamicConv(channels, config.dynamic_channels)
        self.dynamic_projection = nn.Linear(config.box_pool_size**2 * channels, channels)
        self.dynamic_projection_norm = nn.LayerNorm(channels)
        self.dynamic_norm = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, channels)
        self.ffn_norm = nn.LayerNorm(channels)
        self.class_layers = nn.Sequential(*(_LinearNormAct(channels) for _ in range(config.num_class_layers)))
        self.box_layers = nn.Sequential(*(_LinearNormAct(channels) for _ in range(config.num_box_layers)))
        self.class_predictor = nn.Linear(channels, config.num_labels)
        self.box_predictor = nn.Linear(channels, 4)

    def forward(
        self, queries: Tensor, boxes: Tensor, sizes: Tensor | None, output_attentions: bool, *maps: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """queries (B, N, D), boxes (B, N, 4); maps and sizes as for `PyramidPooler`. Returns class logits (B, N, K),
        box changes (B, N, 4), boxes, queries, queries after self-attention, attention weights or None."""
        batch, count, channels = queries.shape
        image = torch.arange(batch, device=boxes.device).repeat_interleave(count)
        regions = self.pooler(list(maps), boxes.flatten(0, 1), image, sizes).to(queries.dtype)
        mixed, attentions = self.attention(queries, output_attentions)
        attended = self.attention_norm(queries + mixed)
        flat = attended.flatten(0, 1)
        interaction = self.dynamic_conv(flat, regions).flatten(1)
        interaction = F.relu(self.dynamic_projection_norm(self.dynamic_projection(interaction)))
        x = self.dynamic_norm(flat + interaction)
        x = self.ffn_norm(x + self.fc2(F.relu(self.fc1(x)))).view(batch, count, channels)
        class_logits = self.class_predictor(self.class_layers(x))
        deltas = self.box_predictor(self.box_layers(x))
        return class_logits, deltas, apply_deltas(boxes, deltas.float(), self.deviations), x, attended, attentions


class DynamicMaskHead(nn.Module):
    """Masks of every class in the boxes of queries: (M, C, s, s), (M, C) -> logits (M, K, 2s, 2s).

    In training mode the batch norms take their statistics over the matched regions of this process, as in the
    original; `torch.nn.SyncBatchNorm.convert_sync_batchnorm` takes them over all processes on GPUs.
    """

    def __init__(self, config: QueryInstConfig):
        super().__init__()
        channels = config.hidden_size
        self.pooler = PyramidPooler(config.mask_pool_size, config.pool_sampling_ratio, config.finest_scale)
        self.dynamic_conv = DynamicConv(channels, config.dynamic_channels)
        self.convs = nn.Sequential(*(_ConvNormAct(channels) for _ in range(config.num_mask_layers)))
        self.upsample = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.class_masks = nn.Conv2d(channels, config.num_labels, 1)

    def forward(self, regions: Tensor, attended: Tensor) -> Tensor:
        x = self.dynamic_conv(attended, regions.to(attended.dtype))
        x = x.transpose(1, 2).reshape(regions.shape)
        return self.class_masks(F.relu(self.upsample(self.convs(x))))


class _LinearNormAct(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.linear = nn.Linear(channels, channels, bias=False)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.linear(x)))


class _ConvNormAct(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


@torch.no_grad()
def init_queryinst_weights(module: nn.Module, prior_probability: float) -> None:
    """The original's rule: Xavier-uniform for every weight of more than one dimension, biases as torch has them (zero
    in the attention and for the mask predictor), class bias such that every probability is the prior."""
    if not isinstance(module, QueryInstStage | DynamicMaskHead):
        return
    for layer in module.modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            continue
        init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            bound = 1 / math.sqrt(layer.weight[0].numel())
            init.uniform_(layer.bias, -bound, bound)
    if isinstance(module, DynamicMaskHead):
        init.zeros_(module.class_masks.bias)
    else:
        init.zeros_(module.attention.in_proj.bias)
        init.zeros_(module.attention.out_proj.bias)
        init.constant_(module.class_predictor.bias, -math.log((1 - prior_probability) / prior_probability))
