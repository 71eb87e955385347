"""Queries among the patch tokens of a ViT (EoMT, arXiv 2503.19108): plain self-attention blocks update both, and masks
are products of the two. What the segmenters that decode so have in common."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from .errors import UserError
from .losses import LayerOutput
from .mask_classification import MaskClassificationSegmenter
from .query_segmenter import Inject


@dataclass
class TokenFeatures:
    """Everything before the queries.

    tokens (B, P + h * w, D): P prefix tokens (class and registers) and the patch tokens; grid: (h, w); prompt_map
    (B, D, h, w): the patch tokens, normalized as the queries are before they are read; pixel_mask as given; blocks:
    further arguments of the query blocks, such as rotary positions; mask_maps (B, D, H/4, W/4): what masks are products
    with, in place of the tokens that leave the blocks.
    """

    tokens: Tensor
    grid: tuple[int, int]
    prompt_map: Tensor
    pixel_mask: Tensor | None
    blocks: dict[str, Any] = field(default_factory=dict)
    mask_maps: Tensor | None = None


class QueryBlocksSegmenter(MaskClassificationSegmenter):
    """Decodes with the parts that transformers' EoMT has: `query`, `layernorm`, `mask_head`, `upscale_block`,
    `class_predictor`, the buffer `attn_mask_probs`, and in `query_blocks` the blocks that see queries.

    Padding is not masked, and positions depend on the canvas: the prediction for an image is the same with whatever
    batch mates, but only on one canvas. So these segmenters train and predict on a square one.
    """

    square_canvas = True
    annealing: tuple[float, float, list[float]] | None = None
    _shares: list[float] | None = None

    @property
    def query_blocks(self) -> nn.ModuleList:
        return self.layers[-self.config.num_blocks :]

    @property
    def num_stages(self) -> int:
        """Outputs of `decode` in training: before every query block and after the last."""
        return len(self.query_blocks) + 1

    @property
    def query_channels(self) -> int:
        return self.query.weight.shape[1]

    # ---- masked attention, and its end ----

    def anneal_masks(self, start: float, end: float) -> None:
        """Lets `anneal` fade out masked attention between these shares of the steps, one block after the other.

        A block whose mask is gone already, as in a fine-tuned checkpoint, stays without. EoMT's runs on COCO take 1/6
        and 5/6. Raises UserError unless 0 <= start < end <= 1.
        """
        if not 0 <= start < end <= 1:
            raise UserError(f"attn_mask_start and attn_mask_end must be shares, the lower first, got {start}, {end}.")
        self.annealing = (start, end, self.mask_shares())

    def anneal(self, share: float) -> None:
        if self.annealing is None:
            return
        start, end, most = self.annealing
        done = [(share - start) / (end - start) * len(most) - index for index in range(len(most))]
        # The power is that of EoMT's learning rate, which its code takes here too.
        shares = [min(one, (1 - min(max(part, 0.0), 1.0)) ** 0.9) for part, one in zip(done, most, strict=True)]
        self.attn_mask_probs.copy_(torch.tensor(shares))
        self._shares = shares

    def mask_shares(self) -> list[float]:
        """Share of the queries that see only their own mask, for every query block: `attn_mask_probs` on the host."""
        if self._shares is None:
            self._shares = self.attn_mask_probs.tolist()
        return self._shares

    def train(self, mode: bool = True):
        super().train(mode)
        self._shares = None if self.attn_mask_probs.is_meta else self.attn_mask_probs.tolist()
        return self

    # ---- decoding ----

    def initial_queries(self, features: TokenFeatures) -> Tensor:
        return self.query.weight[None].expand(features.tokens.shape[0], -1, -1)

    def decode(
        self,
        features: TokenFeatures,
        queries: Tensor,
        inject: Inject | None = None,
        output_attentions: bool = False,
    ) -> list[LayerOutput]:
        """See `QueryNetwork.decode`. A stage is a query block.

        Before a block there is a prediction in training, with `inject`, and where masked attention needs it. With
        `output_attentions` every output but the first has the weights of its block among all tokens, queries first:
        (B, heads, T, T).
        """
        tokens, outputs, count = torch.cat([queries, features.tokens], 1), [], queries.shape[1]
        everything = self.training or inject is not None or getattr(self.config, "output_auxiliary_logits", False)
        weights = None
        for index, (block, share) in enumerate(zip(self.query_blocks, self.mask_shares(), strict=True)):
            if inject is not None and index > 0:
                tokens = torch.cat([inject(tokens[:, :count], features, index), tokens[:, count:]], 1)
            mask = None
            if everything or share > 0:
                outputs.append(self.predict_masks(tokens, features, count, weights))
                mask = self._attention_mask(outputs[-1].mask_logits, features, tokens, share) if share > 0 else None
            tokens, weights = self._through(block, tokens, mask, features, output_attentions)
        return [*outputs, self.predict_masks(tokens, features, count, weights)]

    def predict_masks(self, tokens: Tensor, features: TokenFeatures, count: int, weights: Tensor | None) -> LayerOutput:
        """What `count` queries in front of the tokens predict: masks at stride 4 of the canvas."""
        normed = self.layernorm(tokens)
        queries, patches = normed[:, :count], normed[:, -features.grid[0] * features.grid[1] :]
        maps = features.mask_maps
        if maps is None:
            maps = self.upscale_block(patches.transpose(1, 2).unflatten(2, features.grid))
        masks = torch.einsum("bqc,bchw->bqhw", self.mask_head(queries), maps)
        return LayerOutput(self.class_predictor(queries), masks, queries, weights)

    def _attention_mask(self, logits: Tensor, features: TokenFeatures, tokens: Tensor, share: float) -> Tensor:
        """(B, 1, T, T) to be added to attention logits: queries do not see patches outside of their masks (B, N, ...),
        but for a random share of the queries. All see the queries and the prefix tokens."""
        batch, count, length = *logits.shape[:2], tokens.shape[1]
        seen = F.interpolate(logits.detach(), size=features.grid, mode="bilinear").flatten(2) > 0
        if share < 1:
            seen = seen | (torch.rand((batch, count, 1), device=seen.device) > share)
        mask = tokens.new_zeros((batch, 1, length, length))
        mask[:, 0, :count, length - seen.shape[2] :].masked_fill_(~seen, torch.finfo(tokens.dtype).min)
        return mask

    def _through(
        self, block: nn.Module, tokens: Tensor, mask: Tensor | None, features: TokenFeatures, attentions: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens after a block, and its attention weights if asked for."""
        if not attentions:
            return block(tokens, mask, **features.blocks), None
        kept: list[Tensor] = []
        hook = block.attention.register_forward_hook(lambda module, arguments, output: kept.append(output[1]))
        try:
            with eager_attention(block.attention.config):
                tokens = block(tokens, mask, **features.blocks)
        finally:
            hook.remove()
        return tokens, kept[-1]


@contextmanager
def eager_attention(config: PreTrainedConfig) -> Iterator[None]:
    """Lets the modules of this configuration return their attention weights, which other implementations do not."""
    chosen, config._attn_implementation = config._attn_implementation, "eager"
    try:
        yield
    finally:
        config._attn_implementation = chosen


def reread_shares(module: QueryBlocksSegmenter, incompatible_keys) -> None:
    """After loading a state dict: takes the shares of masked attention from the buffer."""
    module.train(module.training)
