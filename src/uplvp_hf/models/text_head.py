"""A class head that compares queries with text embeddings of the class names, for pre-training only.

Source: the released "clip" variant of UPLVP (arXiv 2405.13388), which trains such a head beside the ordinary one, with
its own loss and matching cost, and drops it afterwards. There the visual side is rectified and not normalized, and no
temperature or prior bias is applied; here both sides have unit length.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from .class_names import match_names
from .errors import UserError


class TextHead(nn.Module):
    """Logits (B, N, K) of queries (B, N, D), or (B, N, K + 1) with a learned "no object" logit last.

    cos(norm(W q), t_k) / temperature + bias, the temperature and the bias being learned. Text features are an argument:
    all stages share them.
    """

    def __init__(self, channels: int, text_dim: int, temperature: float, no_object: bool, prior: float):
        super().__init__()
        self.temperature, self.prior = temperature, prior
        self.projection = nn.Linear(channels, text_dim, bias=False)
        self.norm = nn.LayerNorm(text_dim)
        self.log_scale = nn.Parameter(torch.empty(()))
        self.bias = None if no_object else nn.Parameter(torch.empty(()))
        self.no_object = nn.Parameter(torch.empty(())) if no_object else None

    @torch.no_grad()
    def init_weights(self) -> None:
        init.xavier_uniform_(self.projection.weight)
        init.ones_(self.norm.weight)
        init.zeros_(self.norm.bias)
        init.constant_(self.log_scale, -math.log(self.temperature))
        if self.bias is not None:  # sigmoid of a cosine of 0 is the prior (focal loss, arXiv 1708.02002)
            init.constant_(self.bias, -math.log((1 - self.prior) / self.prior))
        if self.no_object is not None:
            init.zeros_(self.no_object)

    def forward(self, queries: Tensor, text_features: Tensor) -> Tensor:
        """queries (B, N, D), text_features (K, text_dim) of unit length. Float32."""
        visual = self.norm(self.projection(queries.to(self.norm.weight.dtype))).float()
        with torch.autocast(queries.device.type, enabled=False):
            logits = F.normalize(visual, dim=-1) @ text_features.float().T * self.log_scale.float().exp()
            logits = logits if self.bias is None else logits + self.bias.float()
            if self.no_object is not None:
                logits = torch.cat([logits, self.no_object.float().expand(*logits.shape[:-1], 1)], dim=-1)
        return logits


class TextHeads(nn.Module):
    """One `TextHead` a stage (or one for all, where the segmenter shares its own class head) and the text features.

    `text_features` (K, text_dim) is a buffer, so it is saved with the weights and moves with the model. Zeros mean
    that it was not set.
    """

    def __init__(self, heads: int, num_labels: int, text_dim: int, **settings):
        super().__init__()
        self.heads = nn.ModuleList([TextHead(text_dim=text_dim, **settings) for _ in range(heads)])
        self.register_buffer("text_features", torch.zeros(num_labels, text_dim))

    @torch.no_grad()
    def init_weights(self) -> None:
        init.zeros_(self.text_features)

    def forward(self, queries: list[Tensor]) -> list[Tensor]:
        """Logits of every stage's queries."""
        shared = len(self.heads) == 1
        return [self.heads[0 if shared else stage](one, self.text_features) for stage, one in enumerate(queries)]


def checked_text_features(features: Tensor, class_names: list[str], id2label: dict[int, str]) -> Tensor:
    """Rows of `features` (any number, text_dim) in the order of the model's classes, at unit length.

    class_names: of the rows. Raises UserError for classes without a row, for rows that do not fit the names, and for
    rows that are not finite or zero.
    """
    if features.dim() != 2 or len(features) != len(class_names):
        raise UserError(f"Text features {tuple(features.shape)} do not fit {len(class_names)} class names.")
    wanted = [id2label[index] for index in range(len(id2label))]
    places = match_names(wanted, [str(name) for name in class_names])
    missing = [name for name, place in zip(wanted, places, strict=True) if place is None]
    if missing:
        raise UserError(f"No text feature for the classes: {', '.join(missing)}. Given: {', '.join(class_names)}.")
    chosen = features.float()[[place for place in places if place is not None]]
    length = chosen.norm(dim=1)
    if not (torch.isfinite(length) & (length > 0)).all():
        raise UserError("Text features must be finite and not zero.")
    return chosen / length[:, None]
