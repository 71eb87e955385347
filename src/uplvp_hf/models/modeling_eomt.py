"""EoMT (arXiv 2503.19108) as a three-step query segmenter: a ViT whose last blocks see the queries beside the patches.

transformers' own classes with their parameters, so checkpoints go both ways; on the same weights the predictions are
those of `EomtForUniversalSegmentation` and `EomtDinov3ForUniversalSegmentation`, also of the earlier blocks. Unlike
there, a block whose attention mask has been annealed never takes the mask of an earlier block.
"""

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EomtConfig, EomtDinov3Config, EomtDinov3ForUniversalSegmentation, EomtForUniversalSegmentation

from .errors import UserError
from .query_blocks import QueryBlocksSegmenter, TokenFeatures, reread_shares
from .vit_weights import encoder_tensors, resized_table


class _Eomt(QueryBlocksSegmenter):
    def __init__(self, config):
        if config.patch_size != 4 * 2**config.num_upscale_blocks:
            raise UserError(
                f"Masks leave at a quarter of the canvas: patch_size {config.patch_size} with num_upscale_blocks "
                f"{config.num_upscale_blocks} gives others. Take 16 with 2, or 8 with 1."
            )
        super().__init__(config)
        self.register_load_state_dict_post_hook(reread_shares)

    @property
    def backbone(self) -> nn.Module:
        """Embeddings and the blocks without queries, one after the other: what can be frozen, stage by stage."""
        return nn.ModuleList([self.embeddings, *self.layers[: -self.config.num_blocks]])

    def vit_layers(self) -> tuple[nn.Module, list[nn.Module]]:
        return self.embeddings, list(self.layers)

    @property
    def size_divisor(self) -> int:
        return self.config.patch_size

    def encode(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> TokenFeatures:
        """pixel_values (B, 3, H, W), pixel_mask (B, H, W) with 1 on the image, which only the loss takes notice of.

        Raises UserError for a canvas that the model cannot take.
        """
        self.check_sides(pixel_values)
        tokens, blocks = self._embed(pixel_values)
        for layer in self.layers[: -self.config.num_blocks]:
            tokens = layer(tokens, None, **blocks)
        height, width = (side // self.config.patch_size for side in pixel_values.shape[-2:])
        # Normalized, since single channels of a ViT's raw tokens may outweigh all others, in a cosine too.
        patches = self.layernorm(tokens[:, self.embeddings.num_prefix_tokens :])
        prompts = patches.transpose(1, 2).unflatten(2, (height, width))
        return TokenFeatures(tokens, (height, width), prompts, pixel_mask, blocks)

    def _embed(self, pixel_values: Tensor) -> tuple[Tensor, dict]:
        """Tokens of the image, and the further arguments of every block."""
        raise NotImplementedError

    def fit_canvas(self, size: int) -> None:
        super().fit_canvas(size)
        self.config.image_size, side = size, size // self.config.patch_size
        self.grid_size = (side, side)

    @torch.no_grad()
    def load_encoder(self, source: nn.Module) -> list[str]:
        """Takes the weights of a DINOv2 or DINOv3 of transformers (`AutoModel`) for embeddings, blocks and last norm.

        Patches of another size and tables of another length are resized. Returns what was not taken. Raises UserError
        for another architecture, naming a tensor that is missing or has another shape.
        """
        own = {
            name: value for name, value in self.state_dict().items() if re.match(r"embeddings|layers|layernorm", name)
        }
        return encoder_tensors(source, own)


class EomtSegmenter(_Eomt, EomtForUniversalSegmentation):
    """EoMT on a DINOv2. Its positions are a table, so there is one canvas, `config.image_size`: see `fit_canvas`."""

    config: EomtConfig

    def _embed(self, pixel_values: Tensor) -> tuple[Tensor, dict]:
        return self.embeddings(pixel_values), {}

    def check_sides(self, pixel_values: Tensor) -> None:
        height, width = pixel_values.shape[-2:]
        if (height, width) != (self.config.image_size,) * 2:
            raise UserError(
                f"This EoMT takes images of {self.config.image_size} x {self.config.image_size} pixels, not {height} x "
                f"{width}: its positions are a table. Pad images to that canvas, or resize the table by `fit_canvas`."
            )

    @torch.no_grad()
    def fit_canvas(self, size: int) -> None:
        """Resizes the table of positions (bicubic, as DINOv2 does) for a canvas of size x size pixels."""
        before = self.grid_size
        super().fit_canvas(size)
        embeddings = self.embeddings
        if before == self.grid_size:
            return
        table = embeddings.position_embeddings
        resized = resized_table(table.weight, before, self.grid_size)
        fresh = nn.Embedding(*resized.shape, device=resized.device, dtype=resized.dtype)
        fresh.weight.copy_(resized).requires_grad_(table.weight.requires_grad)
        embeddings.position_embeddings = fresh
        embeddings.position_ids = torch.arange(len(resized), device=resized.device)[None]
        embeddings.patch_embeddings.image_size = (size, size)
        embeddings.patch_embeddings.num_patches = len(resized)


class EomtDinov3Segmenter(_Eomt, EomtDinov3ForUniversalSegmentation):
    """EoMT on a DINOv3, whose positions are rotary: any canvas of whole patches."""

    config: EomtDinov3Config

    def _embed(self, pixel_values: Tensor) -> tuple[Tensor, dict]:
        tokens = self.dropout(self.embeddings(pixel_values))
        return tokens, {"position_embeddings": self.rope_embeddings(pixel_values.to(tokens.dtype))}

    @classmethod
    def from_pretrained(cls, name_or_dir, *args, output_loading_info: bool = False, **kwargs):
        """As of transformers. Raises UserError for a checkpoint that holds differences to DINOv3's weights."""
        loaded: Any = super().from_pretrained(name_or_dir, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        norms = [layer.norm1.weight.detach().abs().mean() for layer in model.layers]
        unread = any(name.startswith("network.encoder") for name in info["unexpected_keys"])
        if unread or torch.stack(norms).mean() < 0.02:
            raise UserError(
                f"{name_or_dir} holds differences to the weights of a DINOv3 (a delta checkpoint), and its base is "
                "missing. Accept the license of facebook/dinov3-vitl16-pretrain-lvd1689m, add the two with "
                "transformers' `convert_eomt_dinov3_to_hf.py`, and give the folder that it writes."
            )
        return (model, info) if output_loading_info else model
