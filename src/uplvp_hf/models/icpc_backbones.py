"""CLIP's image towers as backbones with four maps, and with patch features in the space of the texts."""

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from .clip_resnet import ClipResNet, resized_positions
from .configuration_icpc import IcpcConfig
from .dense_blocks import DenseBlock, dense_tokens


class ClipVitPyramid(nn.Module):
    """A CLIP vision transformer of transformers, (B, 3, H, W) -> maps with strides 4, 8, 16, 32, the image (B, D) and
    its patches (B, D, H / patch, W / patch). The maps are the residual stream after four blocks, as in DenseCLIP."""

    def __init__(self, config: IcpcConfig):
        super().__init__()
        vision = config.vision_config
        self.tower = CLIPVisionModelWithProjection._from_config(vision)
        self.out_layers, self.interpolation = config.out_layers, config.position_interpolation
        self.dense = DenseBlock(config.dense_block, config.dense_sigma, config.dense_scale)
        self.channels = [vision.hidden_size] * 4
        self.pyramid = _pyramid(vision.hidden_size, vision.patch_size)
        depth = vision.num_hidden_layers
        self.drop_path = [config.drop_path_rate * index / max(depth - 1, 1) for index in range(depth)]

    def to_texts(self) -> list[nn.Module]:
        """The parts that only the space of the texts needs."""
        return [self.tower.vision_model.post_layernorm, self.tower.visual_projection]

    def forward(self, pixel_values: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        vision = self.tower.vision_model
        x = vision.pre_layrnorm(self._embed(pixel_values))
        grid = tuple(side // vision.config.patch_size for side in pixel_values.shape[-2:])
        kept = {}
        for index, block in enumerate(vision.encoder.layers):
            before, x = x, self._run(block, x, self.drop_path[index])
            kept[index] = x
        maps = [
            level(kept[index][:, 1:].transpose(1, 2).unflatten(2, grid))
            for level, index in zip(self.pyramid, self.out_layers, strict=True)
        ]
        dense = x if self.dense.kind == "vanilla" else dense_tokens(vision.encoder.layers[-1], before, grid, self.dense)
        pooled, patches = self._project(x[:, 0]), self._project(dense[:, -(grid[0] * grid[1]) :])
        return maps, pooled, patches.transpose(1, 2).unflatten(2, grid)

    def _embed(self, pixel_values: Tensor) -> Tensor:
        part = self.tower.vision_model.embeddings
        patches = part.patch_embedding(pixel_values.to(part.patch_embedding.weight.dtype))
        table = resized_positions(part.position_embedding.weight, tuple(patches.shape[-2:]), self.interpolation)
        tokens = patches.flatten(2).transpose(1, 2)
        return torch.cat([part.class_embedding.expand(tokens.shape[0], 1, -1), tokens], dim=1) + table.to(tokens.dtype)

    def _run(self, block: nn.Module, x: Tensor, rate: float) -> Tensor:
        if not (self.training and rate):
            return block(x, attention_mask=None)
        if block.gradient_checkpointing:
            return block._gradient_checkpointing_func(_dropped_block, block, x, rate)
        return _dropped_block(block, x, rate)

    def _project(self, tokens: Tensor) -> Tensor:
        return self.tower.visual_projection(self.tower.vision_model.post_layernorm(tokens))


def _pyramid(width: int, patch: int) -> nn.ModuleList:
    """Group norm, then to strides 4, 8, 16 and 32 by transposed convolutions and maximum pools."""

    def norm() -> nn.Module:
        return nn.GroupNorm(1, width, eps=1e-5)

    def double() -> nn.Module:
        return nn.ConvTranspose2d(width, width, 2, 2)

    if patch == 16:
        first = nn.Sequential(norm(), double(), nn.BatchNorm2d(width), nn.GELU(), double())
        levels = [first, nn.Sequential(norm(), double()), nn.Sequential(norm())]
        return nn.ModuleList([*levels, nn.Sequential(norm(), nn.MaxPool2d(2, 2))])
    levels = [nn.Sequential(norm(), double()), nn.Sequential(norm())]
    return nn.ModuleList([*levels, *(nn.Sequential(norm(), nn.MaxPool2d(step, step)) for step in (2, 4))])


def _drop_path(x: Tensor, rate: float) -> Tensor:
    keep = torch.rand(len(x), 1, 1, device=x.device) >= rate
    return x * keep.to(x.dtype) / (1 - rate)


def _dropped_block(block: nn.Module, x: Tensor, rate: float) -> Tensor:
    """A block of the tower with stochastic depth on either branch."""
    x = x + _drop_path(block.self_attn(block.layer_norm1(x))[0], rate)
    return x + _drop_path(block.mlp(block.layer_norm2(x)), rate)


def build_clip_backbone(config: IcpcConfig) -> nn.Module:
    """The image tower that the configuration describes."""
    if config.resnet_config is not None:
        return ClipResNet(**config.resnet_config, output_dim=config.projection_dim)
    return ClipVitPyramid(config)
