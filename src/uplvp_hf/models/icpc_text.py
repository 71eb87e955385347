"""CLIP's text tower over many prompts that share their beginnings, exactly.

In a causal tower the state of a token depends on the tokens before it alone. So a prompt is cut into segments, each of
which varies over images, over classes, over both or over neither, and every segment is computed once per variant:

    [start, v]           once a batch
    [image token]        once an image
    [name, end]          once an image and class

Keys and values of the segments in front are never copied per class. In the last block only the end token is computed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPTextModelWithProjection, initialization as init

Cache = list[tuple[Tensor, Tensor]]


class PromptEncoder:
    """Runs segments through a text tower. It holds no parameters of its own."""

    def __init__(self, tower: CLIPTextModelWithProjection):
        self.tower = tower
        self.blocks = tower.text_model.encoder.layers

    def embed(self, ids: Tensor) -> Tensor:
        """Token vectors without positions: (...) int64 -> (..., C)."""
        return self.tower.text_model.embeddings.token_embedding(ids)

    def prefix(self, segment: Tensor, past: list[Cache], start: int) -> list[Cache]:
        """Adds a segment that further ones follow: (b, k, T, C), b and k one or all, at positions from `start` on.

        Returns the cache of the segments so far, one entry each.
        """
        return [*past, self._run(segment, past, start, final=False)[1]]

    def features(self, segment: Tensor, past: list[Cache], start: int) -> Tensor:
        """Text features of prompts that end with this segment: (b, k, T, C) -> (b, k, D)."""
        last = self._run(segment, past, start, final=True)[0]
        return self.tower.text_projection(self.tower.text_model.final_layer_norm(last[:, :, 0]))

    def checkpointed(self, segment: Tensor, past: list[Cache], start: int) -> Tensor:
        """The same as `features`, with its activations computed again in the backward pass."""
        flat = [tensor for cache in past for pair in cache for tensor in pair]
        depth = len(self.blocks)

        def run(segment: Tensor, *flat: Tensor) -> Tensor:
            pairs = list(zip(flat[::2], flat[1::2], strict=True))
            return self.features(segment, [pairs[i : i + depth] for i in range(0, len(pairs), depth)], start)

        return checkpoint(run, segment, *flat, use_reentrant=False)

    def _run(self, segment: Tensor, past: list[Cache], start: int, final: bool) -> tuple[Tensor, Cache]:
        positions = self.tower.text_model.embeddings.position_embedding.weight
        x = segment + positions[start : start + segment.shape[2]]
        cache: Cache = []
        for index, block in enumerate(self.blocks):
            last, h = index == len(self.blocks) - 1, block.layer_norm1(x)
            attention = block.self_attn
            key, value = (_heads(part(h), attention.num_heads) for part in (attention.k_proj, attention.v_proj))
            cache.append((key, value))
            if last and not final:
                break  # what follows needs this block's keys and values alone
            if last:
                x, h = x[:, :, -1:], h[:, :, -1:]
            query = _heads(attention.q_proj(h), attention.num_heads) * attention.scale
            before = [layer[index] for layer in past]
            mixed = segment_attention(query, key, value, before)
            x = x + attention.out_proj(mixed.transpose(2, 3).flatten(3))
            x = x + block.mlp(block.layer_norm2(x))
        return x, cache


def segment_attention(query: Tensor, key: Tensor, value: Tensor, past: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Attention of the last tokens of a segment to all before them and to themselves.

    query (b, k, heads, t, d), scaled; key, value (b, k, heads, T, d) with t <= T, the queries being the last t tokens;
    past: keys and values of earlier segments, whose b and k are those of the segment or 1. Returns (b, k, heads, t, d).
    """
    tokens, length = query.shape[3], key.shape[3]
    own = query @ key.transpose(-1, -2)
    if tokens > 1:
        mask = torch.ones(tokens, length, dtype=torch.bool, device=query.device).tril(length - tokens)
        own = own.masked_fill(~mask, float("-inf"))
    scores = [torch.einsum("bkhtd,bkhsd->bkhts", query, earlier) for earlier, _ in past] + [own]
    weights = torch.cat(scores, dim=-1).softmax(-1, dtype=torch.float32).to(value.dtype)
    parts = weights.split([score.shape[-1] for score in scores], dim=-1)
    mixed = parts[-1] @ value
    for weight, (_, earlier) in zip(parts, past, strict=False):
        mixed = mixed + torch.einsum("bkhts,bkhsd->bkhtd", weight, earlier)
    return mixed


def _heads(x: Tensor, heads: int) -> Tensor:
    """(b, k, T, C) -> (b, k, heads, T, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(2, 3)


class NameBuckets(nn.Module):
    """Names of the classes as token ids, grouped by length, so that nothing is padded. Equal names are encoded once."""

    def __init__(self, names: Sequence[Sequence[int]], chunk: int):
        super().__init__()
        unique = sorted({tuple(ids) for ids in names}, key=lambda ids: (len(ids), ids))
        order = {ids: index for index, ids in enumerate(unique)}
        self.lengths: list[tuple[int, int]] = []  # (length, number of names) of every chunk
        for length in sorted({len(ids) for ids in unique}):
            count = sum(len(ids) == length for ids in unique)
            self.lengths += [(length, min(chunk, count - start)) for start in range(0, count, chunk)]
        # The configuration is the one source of the names: a checkpoint never brings others.
        self.constants = {
            "tokens": [token for ids in unique for token in ids],
            "place": [order[tuple(ids)] for ids in names],
        }
        for name, values in self.constants.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.int64), persistent=False)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fills the buffers of a model that was built without storage."""
        for name, values in self.constants.items():
            init.copy_(getattr(self, name), torch.tensor(values, dtype=torch.int64, device="cpu"))

    def chunks(self) -> list[Tensor]:
        """Token ids of every chunk: (names, length)."""
        sizes = [length * count for length, count in self.lengths]
        parts = self.tokens.split(sizes)
        return [part.view(count, length) for part, (length, count) in zip(parts, self.lengths, strict=True)]

    def in_order(self, features: list[Tensor]) -> Tensor:
        """Features of all chunks, (b, names, D) each, -> (b, K, D) in the order of the classes."""
        return torch.cat(features, dim=1)[:, self.place]
