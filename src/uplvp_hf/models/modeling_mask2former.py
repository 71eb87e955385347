"""Mask2Former as a three-step query segmenter: encode -> initial_queries -> decode.

Built on transformers' Mask2Former blocks (arXiv 2112.01527), with the same parameter names, so checkpoints go both
ways. What is added: the three steps, padding masked in attention and losses, prompts' feature map, one loss for all
layers, faster deformable attention and losses. Without padding the predictions equal those of
`Mask2FormerForUniversalSegmentation` on the same weights, to rounding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, initialization as init

from .backbones import build_backbone
from .deformable_attention import use_deformable_attention
from .losses import LayerOutput
from .mask_classification import MaskClassificationSegmenter
from .padding import extend_edges, image_extent, is_padded, padding_masked, upsample, valid_cells
from .point_sampling import mask_products
from .positions import PositionChannels
from .query_segmenter import Inject


@dataclass
class SegmenterFeatures:
    """Everything before the queries.

    mask_features (B, C, H/4, W/4); levels: low to high resolution (B, C, h, w); padding: per level (B, h, w) bool,
    True outside the image, or None; prompt_map (B, Cp, H/32, W/32): the map that prompts are pooled from (C5);
    pixel_mask as given.
    """

    mask_features: Tensor
    levels: tuple[Tensor, ...]
    padding: list[Tensor] | None
    prompt_map: Tensor
    pixel_mask: Tensor | None


class MaskedCrossAttention(nn.MultiheadAttention):
    """torch's attention with one mask for all heads, without its average weights: nothing (heads, N, hw) is kept."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, **unused) -> tuple[Tensor, None]:
        """query (N, B, D), key and value (S, B, D), attn_mask True where a query may not look: (B, N, S), or
        (B * heads, N, S) from transformers' own decoder."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        heads = [
            F.linear(x, weight, bias)
            .unflatten(-1, (self.num_heads, -1))
            .permute(1, 2, 0, 3)  # (B, heads, ., D / heads)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        ]
        dropout = self.dropout if self.training else 0.0
        allowed = ~attn_mask.unflatten(0, (query.shape[1], -1))
        attended = F.scaled_dot_product_attention(*heads, attn_mask=allowed, dropout_p=dropout)
        return self.out_proj(attended.permute(2, 0, 1, 3).flatten(2)), None


class Mask2FormerSegmenter(MaskClassificationSegmenter, Mask2FormerForUniversalSegmentation):
    """The Mask2Former query segmenter.

    `config.backbone_config` is any transformers backbone or a `TimmBackboneConfig`; a `timm_kwargs` dict on the latter
    (for example `{"pad_type": "same"}`) is handed to timm. Two settings that transformers' configuration does not have:
    with `position_octaves` above 0 the features carry positions (positions.py); with `hard_points` the mask losses look
    first where the masks are wrong (point_sampling.py).
    """

    config: Mask2FormerConfig
    _no_split_modules = ["Mask2FormerMaskedAttentionDecoderLayer", "DeformableEncoderLayer"]

    def __init__(self, config: Mask2FormerConfig):
        super().__init__(config)
        if config.backbone_config.model_type == "timm_backbone":
            self.model.pixel_level_module.encoder = build_backbone(config.backbone_config)
        use_deformable_attention(self.model.pixel_level_module.decoder.encoder)
        for layer in self.model.transformer_module.decoder.layers:
            layer.cross_attn.__class__ = MaskedCrossAttention
        octaves = getattr(config, "position_octaves", 0)
        widths = {"mask": config.mask_feature_size, "level": config.feature_size}
        self.positions = PositionChannels(octaves, widths) if octaves else None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, PositionChannels):
            for matrix in module.maps.values():
                init.zeros_(matrix)

    @property
    def backbone(self) -> nn.Module:
        return self.model.pixel_level_module.encoder

    @property
    def prompt_channels(self) -> int:
        """Channels of the map that prompts are pooled from."""
        return self.backbone.channels[-1]

    @property
    def query_channels(self) -> int:
        return self.config.hidden_dim

    @property
    def fine_channels(self) -> int:
        return self.config.feature_size

    def fine_map(self, features: SegmenterFeatures) -> Tensor:
        return features.levels[-1]

    @property
    def encoder(self) -> list[nn.Module]:
        return [self.model.pixel_level_module]

    @property
    def num_stages(self) -> int:
        """Outputs of `decode`."""
        return self.config.decoder_layers

    def encode(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> SegmenterFeatures:
        """pixel_values (B, 3, H, W), pixel_mask (B, H, W) with 1 on the image.

        With a convolutional backbone in eval mode (or with fixed batch norms) the features of an image depend neither
        on the canvas nor on its batch mates.
        """
        pixel_values = pixel_values.to(self.model.transformer_module.queries_features.weight.dtype)
        with padding_masked(self.backbone, pixel_mask):
            maps = self.backbone(pixel_values).feature_maps
        decoder = self.model.pixel_level_module.decoder
        with padding_masked(decoder, pixel_mask):
            mask_features, levels, padding = _pixel_decode(decoder, maps, pixel_mask)
        if self.positions is not None:
            extent = image_extent(pixel_mask, len(pixel_values), pixel_values.device)
            mask_features = self.positions("mask", mask_features, extent)
            levels = tuple(self.positions("level", level, extent) for level in levels)
        # Repeated outwards, so that resizing mask logits gives at the border of an image what it gives at the end of
        # a map.
        return SegmenterFeatures(extend_edges(mask_features, pixel_mask), levels, padding, maps[-1], pixel_mask)

    def initial_queries(self, features: SegmenterFeatures) -> Tensor:
        """The learned content queries, (B, N, D). Position embeddings of the queries stay inside `decode`."""
        weight = self.model.transformer_module.queries_features.weight
        return weight[None].expand(features.mask_features.shape[0], -1, -1)

    def decode(
        self,
        features: SegmenterFeatures,
        queries: Tensor,
        inject: Inject | None = None,
        output_attentions: bool = False,
    ) -> list[LayerOutput]:
        """See `QueryNetwork.decode`: predictions before the first decoder layer and after each, so
        `config.decoder_layers` outputs. A stage is a decoder layer."""
        module = self.model.transformer_module
        keys, positions, sizes = self._memory(features)
        query_positions = module.queries_embedder.weight[:, None].expand(-1, queries.shape[0], -1)
        hidden = queries.transpose(0, 1)  # (N, B, D)
        # Mask logits are put into the graph at the end, for all layers together.
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        late = torch.is_grad_enabled() and not traced
        output, embedding, blocked = self._predict(hidden, features, sizes[0], late)
        outputs, embeddings = [output], [embedding]
        for index, layer in enumerate(module.decoder.layers):
            level = index % len(sizes)
            blocked = self._blocked(blocked, features, level)
            if inject is not None and index > 0:
                hidden = inject(hidden.transpose(0, 1), features, index).transpose(0, 1)
            # Tensors, not lists of all levels: reentrant checkpointing follows gradients of tensor arguments only.
            hidden, *weights = layer(
                hidden,
                0,
                None,
                positions[level][None],
                query_positions,
                keys[level][None],
                encoder_attention_mask=blocked,
                output_attentions=output_attentions,
            )
            output, embedding, blocked = self._predict(hidden, features, sizes[(index + 1) % len(sizes)], late)
            output.attentions = weights[0] if weights else None
            outputs.append(output)
            embeddings.append(embedding)
        if late:
            masks = mask_products(features.mask_features, embeddings, [output.mask_logits for output in outputs])
            for output, logits in zip(outputs, masks, strict=True):
                output.mask_logits = logits
        return outputs

    def _predict(
        self, hidden: Tensor, features: SegmenterFeatures, size: torch.Size, late: bool
    ) -> tuple[LayerOutput, Tensor, Tensor]:
        """Classes and masks of queries (N, B, D), the queries' mask embeddings (B, N, C), and where their masks are
        not, (B, N, hw) at `size`. `late`: the masks without gradients."""
        decoder = self.model.transformer_module.decoder
        content = decoder.layernorm(hidden).transpose(0, 1)  # (B, N, D)
        embedding = decoder.mask_predictor.mask_embedder(content)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not late):
            masks = torch.einsum("bqc,bchw->bqhw", embedding, features.mask_features)
        resized = F.interpolate(masks.detach(), size=size, mode="bilinear", align_corners=False)
        blocked = (resized.sigmoid() < 0.5).flatten(2)
        return LayerOutput(self.class_predictor(content), masks, content), embedding, blocked

    def _memory(self, features: SegmenterFeatures) -> tuple[list[Tensor], list[Tensor], list[torch.Size]]:
        """Keys and their positions, (hw, B, D) a level, and the level sizes."""
        module = self.model.transformer_module
        keys, positions, sizes = [], [], []
        for index, level in enumerate(features.levels):
            real = None if features.padding is None else (~features.padding[index])
            position = module.position_embedder(level.shape, level.device, level.dtype, real)
            key = module.input_projections[index](level).flatten(2) + module.level_embed.weight[index][None, :, None]
            keys.append(key.permute(2, 0, 1).contiguous())
            positions.append(position.flatten(2).permute(2, 0, 1))
            sizes.append(level.shape[-2:])
        return keys, positions, sizes

    def _blocked(self, blocked: Tensor, features: SegmenterFeatures, level: int) -> Tensor:
        """Attention mask (B, N, hw), True where a query may not look. A query with nowhere to look, looks everywhere
        on the image."""
        if features.padding is None:
            return blocked & ~blocked.all(-1, keepdim=True)
        outside = features.padding[level].flatten(1)[:, None]
        blocked = blocked | outside
        # As `where(all, outside, blocked)`, which onnxruntime has no kernel for.
        return blocked & (outside | ~blocked.all(-1, keepdim=True))


def _pixel_decode(decoder: nn.Module, maps: tuple[Tensor, ...], pixel_mask: Tensor | None):
    """Multi-scale deformable encoder and FPN of transformers' `Mask2FormerPixelDecoder`, padding masked.

    Returns mask features (B, C, H/4, W/4), and the levels and their padding (or None) from low to high resolution.
    """
    embeds, positions, padding = [], [], None
    coarse = maps[::-1][: decoder.num_feature_levels]
    if is_padded(pixel_mask):
        padding = [~valid_cells(pixel_mask, feature.shape[-2:]) for feature in coarse]
    for level, feature in enumerate(coarse):
        embeds.append(decoder.input_projections[level](feature))
        real = None if padding is None else ~padding[level]
        position = decoder.position_embedding(feature.shape, feature.device, feature.dtype, real)
        positions.append(position.flatten(2).transpose(1, 2) + decoder.level_embed[level].view(1, 1, -1))
    sizes = [tuple(embed.shape[-2:]) for embed in embeds]
    blocked = None if padding is None else torch.cat([mask.flatten(1) for mask in padding], 1)
    # Ones: all levels share the canvas, so a point has the same relative place on each. Valid ratios, which are rounded
    # to whole cells level by level, would shift the levels against each other by up to a cell.
    ratios = maps[-1].new_ones((maps[-1].shape[0], len(embeds), 2))
    reference = decoder.encoder.get_reference_points(sizes, ratios, device=ratios.device)
    hidden, places = torch.cat([embed.flatten(2).transpose(1, 2) for embed in embeds], 1), torch.cat(positions, 1)
    for layer in decoder.encoder.layers:  # by position, which is what reentrant checkpointing needs
        (hidden,) = layer(hidden, blocked, places, reference, sizes)
    pieces = hidden.split([height * width for height, width in sizes], dim=1)
    outputs = [
        piece.transpose(1, 2).reshape(hidden.shape[0], -1, *size) for piece, size in zip(pieces, sizes, strict=True)
    ]
    for index, feature in enumerate(maps[: decoder.num_fpn_levels][::-1]):
        lateral = decoder.lateral_convolutions[index](feature)
        upper = upsample(outputs[-1], lateral.shape[-2:], pixel_mask)
        outputs.append(decoder.output_convolutions[index](lateral + upper))
    return decoder.mask_projection(outputs[-1]), tuple(outputs[: decoder.num_feature_levels]), padding
