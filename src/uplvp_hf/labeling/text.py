"""Class names: vocabularies from files or the command line, and their CLIP text embeddings."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

# Seven of CLIP's ImageNet templates that its authors report to do about as well as all eighty.
TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)


@dataclass(frozen=True)
class TextEmbeddings:
    """vectors: (T, D), unit length, one a synonym. owners: (T,) int64, the class of each. count: number of classes."""

    vectors: torch.Tensor
    owners: torch.Tensor
    count: int

    def per_class(self, values: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Best synonym of every class: reduces axis `dim` from T to `count`."""
        if len(self.owners) == self.count:
            return values
        parts = [values.index_select(dim, torch.nonzero(self.owners == k)[:, 0]).amax(dim) for k in range(self.count)]
        return torch.stack(parts, dim=dim)


def split_synonyms(entry: str) -> list[str]:
    """Names in one vocabulary entry, separated by commas; the first is the class's name."""
    return [name.strip() for name in entry.split(",") if name.strip()]


def read_vocabulary(text: str | os.PathLike[str]) -> list[str]:
    """Class entries from a text file (one class a line, synonyms separated by commas, # comments) or from a list such
    as "bear,deer,otter" (each name a class). Raises ValueError when it is empty, or names a class twice."""
    text = os.fspath(text)
    if os.path.isfile(text):
        with open(text, encoding="utf-8") as stream:
            lines = [line.split("#", 1)[0] for line in stream]
        entries = [", ".join(names) for line in lines if (names := split_synonyms(line))]
    elif text.endswith((".txt", ".csv")) or os.sep in text:
        raise ValueError(f"vocabulary {text}: no such file")
    else:
        entries = split_synonyms(text)
    if not entries:
        raise ValueError(f"vocabulary {text!r} names no class; give a file with one class a line, or bear,deer,otter")
    names = [split_synonyms(entry)[0] for entry in entries]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ValueError(f"vocabulary {text}: class {doubled[0]!r} occurs twice")
    return entries


@torch.inference_mode()
def embed_classes(
    model: torch.nn.Module,
    tokenizer,
    entries: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
    batch_size: int = 256,
) -> TextEmbeddings:
    """CLIP text embeddings of vocabulary entries.

    Each synonym: the normalised embeddings of all templates, averaged, normalised (Radford et al. 2021, 3.1.4).
    Raises ValueError for no entries or for a template without {}.
    """
    if not entries:
        raise ValueError("the vocabulary is empty: give at least one class name")
    wrong = [template for template in templates if "{}" not in template]
    if wrong or not templates:
        raise ValueError(f"prompt templates need a {{}} for the class name, got {wrong or 'no template'}")
    names = [split_synonyms(entry) for entry in entries]
    flat = [name for synonyms in names for name in synonyms]
    prompts = [template.format(name) for name in flat for template in templates]
    device = next(model.parameters()).device
    parts = []
    for start in range(0, len(prompts), batch_size):
        tokens = tokenizer(prompts[start : start + batch_size], padding=True, truncation=True, return_tensors="pt")
        tokens = {key: tokens[key].to(device) for key in ("input_ids", "attention_mask")}
        parts.append(model.get_text_features(**tokens).pooler_output.float())
    vectors = F.normalize(torch.cat(parts), dim=-1).view(len(flat), len(templates), -1)
    owners = torch.tensor([k for k, synonyms in enumerate(names) for _ in synonyms], device=device)
    return TextEmbeddings(F.normalize(vectors.mean(dim=1), dim=-1), owners, len(entries))
