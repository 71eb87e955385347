"""A plain mask decoder on the tokens of a ViT, which may stay frozen: the setting of UPLVP in its purest form.

    patch tokens of a ViT -> a linear layer -> blocks of self-attention over queries and tokens -> classes, and masks as
    products of the queries with the tokens upscaled to stride 4

The idea is that of a decoder on frozen encoders (PMT, tue-mps); written anew, with transformers' blocks of EoMT. Masks
are products with maps from before the blocks, as in Mask2Former, so that these are upscaled once.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.models.eomt.modeling_eomt import EomtLayer, EomtMaskHead, EomtPreTrainedModel, EomtScaleLayer

from .backbones import make_backbone
from .configuration_vit_mask_decoder import VitMaskDecoderConfig
from .errors import UserError
from .query_blocks import QueryBlocksSegmenter, TokenFeatures, reread_shares
from .vit_weights import copy_tensors, freeze_mask_token


class Upscaling(nn.Module):
    """Token maps (B, D, h, w) of patches of `patch` pixels to a quarter of the canvas, (B, D, h * patch / 4, ...)."""

    def __init__(self, config: VitMaskDecoderConfig, patch: int):
        super().__init__()
        self.patch = patch
        self.layers = nn.ModuleList(EomtScaleLayer(config) for _ in range(round(math.log2(patch / 4))))

    def forward(self, maps: Tensor) -> Tensor:
        size = [side * self.patch // 4 for side in maps.shape[-2:]]
        for layer in self.layers:
            maps = layer(maps)
        if list(maps.shape[-2:]) != size:  # patches of 14 pixels
            maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
        return maps


class VitMaskDecoder(QueryBlocksSegmenter, EomtPreTrainedModel):
    """Queries and the tokens of a ViT through a few blocks. Prompts are pooled from the ViT's last map."""

    config: VitMaskDecoderConfig
    config_class = VitMaskDecoderConfig
    base_model_prefix = "vit_mask_decoder"
    class_sized = ("class_predictor.weight", "class_predictor.bias")

    def __init__(self, config: VitMaskDecoderConfig):
        super().__init__(config)
        width = config.hidden_size
        self.backbone = make_backbone(config.backbone_config)
        freeze_mask_token(self.backbone)
        self.input_norms = nn.ModuleList(nn.LayerNorm(count) for count in self.backbone.channels)
        self.input_projections = nn.ModuleList(nn.Linear(count, width) for count in self.backbone.channels)
        self.query = nn.Embedding(config.num_queries, width)
        self.layers = nn.ModuleList(EomtLayer(config) for _ in range(config.num_blocks))
        self.layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mask_head = EomtMaskHead(config)
        self.upscale_block = Upscaling(config, self.patch_size)
        self.class_predictor = nn.Linear(width, config.num_labels + 1)
        self.attn_mask_probs = nn.Buffer(torch.ones(config.num_blocks))
        self.register_load_state_dict_post_hook(reread_shares)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            init.ones_(self.attn_mask_probs)

    @property
    def backbone(self) -> nn.Module:
        return self._modules["backbone"]

    @property
    def patch_size(self) -> int:
        """Pixels of a side of a token."""
        size = getattr(self.config.backbone_config, "patch_size", None)
        if size is None:  # timm
            size = self.backbone._backbone.feature_info.reduction()[-1]
        return size if isinstance(size, int) else size[0]

    @property
    def size_divisor(self) -> int:
        return math.lcm(self.patch_size, 4)

    @property
    def prompt_channels(self) -> int:
        return self.backbone.channels[-1]

    def vit_layers(self) -> tuple[nn.Module, list[nn.Module]]:
        """Its blocks are the longest list of modules of the backbone; the rest goes with the first."""
        lists = [module for module in self.backbone.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
        return self.backbone, list(max(lists, key=len)) if lists else []

    def encode(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> TokenFeatures:
        """pixel_values (B, 3, H, W), pixel_mask (B, H, W) with 1 on the image, which only the loss takes notice of."""
        self.check_sides(pixel_values)
        maps = self.backbone(pixel_values.to(self.query.weight.dtype)).feature_maps
        grids = {tuple(one.shape[-2:]) for one in maps}
        if len(grids) != 1:
            raise UserError(f"The maps of a ViT have one size, those of this backbone {sorted(grids)}: take a ViT.")
        tokens = torch.stack(
            [
                projection(norm(one.flatten(2).transpose(1, 2)))
                for one, norm, projection in zip(maps, self.input_norms, self.input_projections, strict=True)
            ]
        ).sum(0)
        grid = tuple(maps[0].shape[-2:])
        tokens = tokens + positions(grid, tokens.shape[2], tokens)
        upscaled = self.upscale_block(tokens.transpose(1, 2).unflatten(2, grid))
        return TokenFeatures(tokens, grid, maps[-1], pixel_mask, mask_maps=upscaled)

    def load_encoder(self, source: nn.Module) -> list[str]:
        """Takes the weights of the same ViT of transformers (`AutoModel`) for the backbone; see `EomtSegmenter`."""
        remedy = "Give its settings as `backbone_config`."
        return copy_tensors(source.state_dict(), self.backbone.state_dict(), source, remedy)


def positions(grid: tuple[int, int], channels: int, like: Tensor) -> Tensor:
    """Sines and cosines of the places of tokens, (1, h * w, D): half for rows, half for columns, as in DETR."""
    frequencies = 10000 ** (-torch.arange(channels // 4, device=like.device) / (channels // 4))
    axes = [torch.arange(side, device=like.device) + 0.5 for side in grid]
    waves = [torch.cat([(axis[:, None] * frequencies).sin(), (axis[:, None] * frequencies).cos()], 1) for axis in axes]
    rows, columns = waves[0][:, None].expand(*grid, -1), waves[1][None].expand(*grid, -1)
    return torch.cat([rows, columns], 2).flatten(0, 1)[None].to(like.dtype)
