"""Parts of K-Net (arXiv 2106.14855): localisation and semantic maps, kernel head, and the stages that update kernels.

Letters: B images, N kernels, D channels, K classes, (h, w) the grid of stride 8.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.mask2former.modeling_mask2former import Mask2FormerSinePositionEmbedding

from .backbones import ConvNormAct
from .configuration_knet import KNetConfig
from .padding import is_padded, upsample, valid_cells
from .precision import in_float32


class SemanticPyramid(nn.Module):
    """Brings P2..P5 to stride 8, adds them up, and makes a localisation and a semantic map of the sum.

    P5 gets a sine position encoding first. Levels above stride 8 are doubled between 3 x 3 convolutions.
    """

    def __init__(self, config: KNetConfig):
        super().__init__()
        channels, groups = config.hidden_size, config.norm_groups
        # 3 x 3 convolutions a level: one, and one more after every doubling; the finest level is halved by its own
        self.levels = nn.ModuleList(
            nn.ModuleList(ConvNormAct(channels, channels, 3, 2 if level == 0 else 1, groups) for _ in range(count))
            for level, count in enumerate((1, 1, 2, 3))
        )
        self.localization = ConvNormAct(channels, channels, 1, groups=groups)
        self.semantic = ConvNormAct(channels, channels, 1, groups=groups)
        self.position = Mask2FormerSinePositionEmbedding(channels // 2, normalize=True)

    def forward(self, pyramid: list[Tensor], pixel_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Four maps (B, D, H / 4, W / 4) to (B, D, H / 32, W / 32) -> two maps (B, D, h, w)."""
        top = pyramid[-1]
        valid = valid_cells(pixel_mask, top.shape[-2:]).to(top.device) if is_padded(pixel_mask) else None
        shape = top.shape if valid is not None else (1, *top.shape[1:])  # one encoding for all images
        position = self.position(shape, top.device, torch.float32, valid)
        maps = [*pyramid[:-1], top + position.to(top.dtype)]
        total = None
        for level, (convs, x) in enumerate(zip(self.levels, maps, strict=True)):
            x = convs[0](x)
            for step, conv in enumerate(convs[1:], start=1):
                x = conv(upsample(x, pyramid[level - step].shape[-2:], pixel_mask))
            total = x if total is None else total + x
        return self.localization(total), self.semantic(total)

    @torch.no_grad()
    def init_weights(self) -> None:
        _init_convs(self)


class KernelHead(nn.Module):
    """Initial masks from learned kernels, class maps, and kernels that have seen their object."""

    def __init__(self, config: KNetConfig):
        super().__init__()
        channels = config.hidden_size
        self.prior, self.pooling = config.prior_probability, config.object_pooling
        self.localization, self.semantic = (
            nn.ModuleList(ConvNormAct(channels, channels, 1, groups=config.norm_groups) for _ in range(count))
            for count in (config.num_localization_layers, config.num_semantic_layers)
        )
        self.kernels = nn.Embedding(config.num_queries, channels)
        self.classifier = nn.Conv2d(channels, config.num_labels, 1)

    def forward(self, localization: Tensor, semantic: Tensor, valid: Tensor | None) -> tuple[Tensor, ...]:
        """Two maps (B, D, h, w), valid (B, h, w) or None -> the map that masks are made of (B, D, h, w), initial mask
        logits (B, N, h, w), class logits of every cell (B, K, h, w) and kernels (B, N, D)."""
        for block in self.localization:
            localization = block(localization)
        for block in self.semantic:
            semantic = block(semantic)
        kernels = self.kernels.weight[None].expand(localization.shape[0], -1, -1)
        masks = apply_kernels(kernels, localization)
        x = localization + semantic
        return x, masks, self.classifier(semantic), kernels + gather_objects(x, masks, valid, self.pooling)

    @torch.no_grad()
    def init_weights(self) -> None:
        _init_convs(self)
        init.normal_(self.kernels.weight, std=1.0)
        init.constant_(self.classifier.bias, -math.log((1 - self.prior) / self.prior))


def _init_convs(module: nn.Module) -> None:
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d):
            init.normal_(conv.weight, std=0.01)


def apply_kernels(kernels: Tensor, x: Tensor) -> Tensor:
    """1 x 1 filters (B, N, D) on a map (B, D, h, w) -> mask logits (B, N, h, w)."""
    return (kernels @ x.flatten(2)).unflatten(2, x.shape[-2:])


def gather_objects(x: Tensor, mask_logits: Tensor, valid: Tensor | None = None, pooling: str = "sum") -> Tensor:
    """Sum, or with pooling="mean" the mean, of a map (B, D, h, w) over the cells inside each mask (B, N, h, w)
    -> (B, N, D) float32; zeros for a mask without cells. A sum over a large image is beyond the range of float16.

    Inside is a probability above one half, a hard choice: no gradient reaches the masks. valid (B, h, w): cells of
    the images, None for all.
    """
    inside = mask_logits > 0
    if valid is not None:
        inside = inside & valid[:, None]
    inside = inside.flatten(2).float()
    with torch.autocast(x.device.type, enabled=False):  # it would multiply in half precision
        total = inside @ x.float().flatten(2).transpose(1, 2)
    return total if pooling == "sum" else total / inside.sum(-1, keepdim=True).clamp(min=1)


class KernelUpdate(nn.Module):
    """Kernels (B, N, D) and features of their objects (B, N, D) -> new kernels (B, N, D), by two learned gates.

    In float32 up to the norms, whatever the weights are: the features are sums over whole objects.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.feature_projection = nn.Linear(channels, 2 * channels)
        self.kernel_projection = nn.Linear(channels, 2 * channels)
        self.feature_gate, self.kernel_gate = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.feature_gate_norm, self.kernel_gate_norm = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.feature_norm, self.kernel_norm = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.output, self.output_norm = nn.Linear(channels, channels), nn.LayerNorm(channels)

    def forward(self, features: Tensor, kernels: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            feature_in, feature_out = in_float32(self.feature_projection, features).chunk(2, -1)
            kernel_in, kernel_out = in_float32(self.kernel_projection, kernels).chunk(2, -1)
            both = kernel_in * feature_in
            feature_gate = in_float32(self.feature_gate_norm, in_float32(self.feature_gate, both)).sigmoid()
            kernel_gate = in_float32(self.kernel_gate_norm, in_float32(self.kernel_gate, both)).sigmoid()
            mixed = feature_gate * in_float32(self.feature_norm, feature_out)
            mixed = mixed + kernel_gate * in_float32(self.kernel_norm, kernel_out)
        return F.relu(self.output_norm(self.output(mixed.to(self.output_norm.weight.dtype))))


class KernelAttention(nn.Module):
    """Self-attention over the kernels, without the residual: (B, N, D) -> (B, N, D) and the weights where asked for."""

    def __init__(self, config: KNetConfig):
        super().__init__()
        channels = config.hidden_size
        self.config, self.heads, self.dropout = config, config.num_attention_heads, config.dropout
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, kernels: Tensor, output_attentions: bool = False) -> tuple[Tensor, Tensor | None]:
        query, key, value = (
            projection(kernels).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # (B, heads, N, D / heads)
        dropout, weights = self.dropout if self.training else 0.0, None
        # In training too: where large prompts saturate the weights, the fused backward pass, which recomputes them from
        # rounded sums, loses digits.
        if output_attentions or self.training or self.config._attn_implementation == "eager":
            weights = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).float().softmax(-1)  # (B, heads, N, N)
            mixed = F.dropout(weights, dropout).to(value.dtype) @ value
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), weights if output_attentions else None


class KNetStage(GradientCheckpointingLayer):
    """One update of the kernels, with the class of every kernel and a new mask from it."""

    def __init__(self, config: KNetConfig):
        super().__init__()
        channels = config.hidden_size
        self.prior, self.dropout, self.pooling = config.prior_probability, config.dropout, config.object_pooling
        self.feature_transform = nn.Conv2d(channels, channels, 1)
        self.update = KernelUpdate(channels)
        self.self_attn, self.self_attn_norm = KernelAttention(config), nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, channels)
        self.feedforward_norm = nn.LayerNorm(channels)
        self.class_layers = _linear_stack(channels, config.num_class_layers)
        self.classifier = nn.Linear(channels, config.num_labels)
        self.mask_layers = _linear_stack(channels, config.num_mask_layers)
        self.mask_kernel = nn.Linear(channels, channels)

    def forward(
        self, x: Tensor, mask_logits: Tensor, kernels: Tensor, valid: Tensor | None, output_attentions: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """x (B, D, h, w), mask_logits (B, N, h, w) and kernels (B, N, D) of the previous stage -> class logits
        (B, N, K), mask logits (B, N, h, w), kernels (B, N, D), attention weights (B, heads, N, N) or None."""
        x = self.feature_transform(x)
        kernels = self.update(gather_objects(x, mask_logits, valid, self.pooling), kernels)
        attended, weights = self.self_attn(kernels, output_attentions)
        kernels = self.self_attn_norm(kernels + F.dropout(attended, self.dropout, self.training))
        hidden = F.dropout(F.relu(self.fc1(kernels)), self.dropout, self.training)
        kernels = self.feedforward_norm(kernels + F.dropout(self.fc2(hidden), self.dropout, self.training))
        masks = apply_kernels(self.mask_kernel(self.mask_layers(kernels)), x)
        return self.classifier(self.class_layers(kernels)), masks, kernels, weights

    @torch.no_grad()
    def init_weights(self) -> None:
        """Xavier-uniform matrices, torch's own rule for biases, prior class probability."""
        attention = self.self_attn
        for module in self.modules():
            if not isinstance(module, nn.Linear | nn.Conv2d):
                continue
            packed = module in (attention.q_proj, attention.k_proj, attention.v_proj)
            # The original draws the three projections as one matrix, three times as high.
            init.xavier_uniform_(module.weight, gain=0.5**0.5 if packed else 1.0)
            if module.bias is None:
                continue
            if packed or module in (attention.out_proj, self.feature_transform):
                init.zeros_(module.bias)
            else:
                bound = module.weight.shape[1] ** -0.5
                init.uniform_(module.bias, -bound, bound)
        init.constant_(self.classifier.bias, -math.log((1 - self.prior) / self.prior))


def _linear_stack(channels: int, count: int) -> nn.Sequential:
    """`count` times linear without bias, layer norm, ReLU."""
    layers = [(nn.Linear(channels, channels, bias=False), nn.LayerNorm(channels), nn.ReLU()) for _ in range(count)]
    return nn.Sequential(*(part for layer in layers for part in layer))
