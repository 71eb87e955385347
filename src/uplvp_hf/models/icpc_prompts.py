"""Prompts of ICPC: how class names, learned vectors and the image become text features.

    names           [start, name, end]
    static, post    [start, v, name, end]                CoOp (arXiv 2109.01134), DenseCLIP (arXiv 2112.01518)
    dynamic_add     [start, v + e, name, end]            CoCoOp (arXiv 2203.05557)
    dynamic_concat  [start, v, e, name, end]             one reading of ICPC's sentence, the default
    dynamic_last    [start, v, name, e, end]             the same, cheaper
    dynamic_query   [start, v, e_1..e_M, name, end]      several image tokens

v: learned, e: made from the image.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection, PreTrainedTokenizerBase
from transformers.utils import logging

from .configuration_icpc import IcpcConfig
from .errors import UserError
from .icpc_decoder import ContextAttention
from .icpc_text import Cache, NameBuckets, PromptEncoder

logger = logging.get_logger(__name__)


class ImageToken(nn.Module):
    """CoCoOp's bottleneck: the unit image vector (B, D) -> a token (B, 1, C)."""

    def __init__(self, dim: int, hidden: int, width: int):
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, width)

    def forward(self, pooled: Tensor, memory: Tensor | None = None) -> Tensor:
        return self.linear2(F.relu(self.linear1(F.normalize(pooled.float(), dim=-1).to(pooled.dtype))))[:, None]


class ImageQueries(nn.Module):
    """Learned queries attend over the image: memory (B, 1 + H * W, D) -> tokens (B, M, C)."""

    def __init__(self, config: IcpcConfig):
        super().__init__()
        width = config.decoder_width
        self.memory = nn.Sequential(
            nn.LayerNorm(config.projection_dim), nn.Linear(config.projection_dim, width), nn.LayerNorm(width)
        )
        self.queries = nn.Parameter(torch.randn(config.num_image_tokens, width) * 0.02)
        self.attention = ContextAttention(width, config.decoder_heads, 0.0)
        self.linear2 = nn.Linear(width, config.text_config.hidden_size)

    def forward(self, pooled: Tensor, memory: Tensor) -> Tensor:
        memory = self.memory(memory)
        return self.linear2(self.attention(self.queries.expand(memory.shape[0], -1, -1), memory))


class ClassPrompts(nn.Module):
    """Text features of the classes: (B, K, D) where the image takes part, else (1, K, D)."""

    def __init__(self, config: IcpcConfig):
        super().__init__()
        if config.class_token_ids is None:
            raise UserError(
                "The configuration has no class_token_ids: build the model with "
                "`IcpcForSemanticSegmentation.from_clip(clip, id2label)`, or put what `name_tokens` gives there."
            )
        start, end = config.start_token_id, config.end_token_id
        assert start is not None and end is not None  # the configuration fills them in
        text = config.text_config
        self.form = config.prompt
        self.detach_image = config.detach_image
        self.names = NameBuckets(config.class_token_ids, config.text_chunk)
        self.ends = NameBuckets([[start, end]], 1)
        self.contexts = None
        if config.prompt != "names":
            self.contexts = nn.Parameter(torch.empty(config.num_context, text.hidden_size))
        if config.prompt == "dynamic_query":
            self.image = ImageQueries(config)
        elif config.uses_image:
            hidden = config.prompt_hidden or max(1, config.projection_dim // 16)
            self.image = ImageToken(config.projection_dim, hidden, text.hidden_size)

    def forward(
        self, tower: CLIPTextModelWithProjection, pooled: Tensor, memory: Tensor, checkpointing: bool = False
    ) -> Tensor:
        """pooled (B, D), memory (B, 1 + H * W, D), as the backbone gives them -> (1 or B, K, D)."""
        encoder = PromptEncoder(tower)
        finish = encoder.checkpointed if checkpointing else encoder.features
        start, end = encoder.embed(self.ends.tokens)[:, None, None, None]  # (1, 1, 1, C) each
        image = self._image(pooled, memory)
        past, position = self._prefix(encoder, start, image)
        features = []
        for ids in self.names.chunks():
            name = encoder.embed(ids)[None]  # (1, K, T, C)
            if self.form == "dynamic_last":
                assert image is not None  # it stands last
                before = encoder.prefix(name, past, position)
                closing, at = (
                    torch.cat([image, end.expand(image.shape[0], -1, -1, -1)], dim=2),
                    position + name.shape[2],
                )
                closing = closing.expand(-1, len(ids), -1, -1)
            else:
                before, at = past, position
                closing = torch.cat([name, end.expand(-1, len(ids), -1, -1)], dim=2)
                if image is not None:
                    closing = closing.expand(image.shape[0], -1, -1, -1)
            features.append(finish(closing, before, at))
        return self.names.in_order(features)

    def _image(self, pooled: Tensor, memory: Tensor) -> Tensor | None:
        """Tokens of the image (B, 1, M, C), None for forms without."""
        if not self.form.startswith("dynamic"):
            return None
        if self.detach_image:
            pooled, memory = pooled.detach(), memory.detach()
        return self.image(pooled, memory)[:, None]

    def _prefix(self, encoder: PromptEncoder, start: Tensor, image: Tensor | None) -> tuple[list[Cache], int]:
        """Everything in front of the name."""
        contexts = None if self.contexts is None else self.contexts[None, None].to(start.dtype)
        if self.form == "dynamic_add":
            past = encoder.prefix(start, [], 0)
            return encoder.prefix(contexts + image, past, 1), 1 + contexts.shape[2]
        shared = start if contexts is None else torch.cat([start, contexts], dim=2)
        past, position = encoder.prefix(shared, [], 0), shared.shape[2]
        if self.form in ("dynamic_concat", "dynamic_query"):
            past, position = encoder.prefix(image, past, position), position + image.shape[2]
        return past, position


def spoken_names(names: Sequence[str]) -> list[str]:
    """Class names of datasets as words: hyphens and underscores become spaces; COCO-Stuff's endings `-other` and
    `-stuff` go, unless two classes would then have one name."""
    plain = [re.sub(r"[-_\s]+", " ", name).strip() for name in names]
    short = [re.sub(r"(?<=\S) (other|stuff)$", "", name) for name in plain]
    return [whole if short.count(name) > 1 else name for whole, name in zip(plain, short, strict=True)]


def name_tokens(names: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokens of the class names without start and end tokens, for `IcpcConfig.class_token_ids`.

    Raises UserError for a name without a token, or with one that the tokenizer does not know. Warns of classes whose
    names have the same tokens: their text features are equal, and the first of them gets all pixels.
    """
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    unknown = tokenizer.unk_token_id if tokenizer.unk_token_id not in special else None
    found: list[list[int]] = []
    for name, spoken in zip(names, spoken_names(names), strict=True):
        ids = list(tokenizer(spoken.lower(), add_special_tokens=False)["input_ids"])
        if not ids or unknown in ids:
            raise UserError(f"Class {name!r}: the tokenizer of the CLIP does not know all of its words. Rename it.")
        if ids in found:
            logger.warning_once(f"The classes {names[found.index(ids)]!r} and {name!r} have the same tokens.")
        found.append(ids)
    return found
