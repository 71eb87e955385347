"""Class names: vocabularies from files or the command line, and their CLIP text embeddings."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from ...data.text_embeddings import read_text_matrix, write_text_matrix
from ...models.errors import UserError
from .prompt_templates import TEMPLATES, lines_of, read_templates


@dataclass(frozen=True)
class TextEmbeddings:
    """vectors: (T, D), unit length, one a name. owners: (T,) int64, the class of each. count: number of classes.
    names: (T,) what each vector stands for."""

    vectors: torch.Tensor
    owners: torch.Tensor
    count: int
    names: tuple[str, ...] = ()

    def per_class(self, values: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Best synonym of every class: reduces axis `dim` from T to `count`."""
        if len(self.owners) == self.count:
            return values
        parts = [values.index_select(dim, torch.nonzero(self.owners == k)[:, 0]).amax(dim) for k in range(self.count)]
        return torch.stack(parts, dim=dim)

    def to(self, device: torch.device | str) -> TextEmbeddings:
        """The same on another device."""
        return replace(self, vectors=self.vectors.to(device), owners=self.owners.to(device))


def split_synonyms(entry: str) -> list[str]:
    """Names in one vocabulary entry, separated by commas; the first is the class's name."""
    return [name.strip() for name in entry.split(",") if name.strip()]


def read_vocabulary(text: str | os.PathLike[str]) -> list[str]:
    """Class entries from a text file (one class a line, synonyms separated by commas, # comments) or from a list such
    as "bear,deer,otter" (each name a class). Raises UserError when it is empty, or names a class twice."""
    text = os.fspath(text)
    if os.path.isfile(text):
        entries = [", ".join(names) for line in lines_of(text) if (names := split_synonyms(line))]
    elif text.endswith((".txt", ".csv")) or os.sep in text:
        raise UserError(f"vocabulary {text}: no such file")
    else:
        entries = split_synonyms(text)
    if not entries:
        raise UserError(f"vocabulary {text!r} names no class; give a file with one class a line, or bear,deer,otter")
    names = [split_synonyms(entry)[0] for entry in entries]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise UserError(f"vocabulary {text}: class {doubled[0]!r} occurs twice")
    return entries


@torch.inference_mode()
def encode_texts(model: torch.nn.Module, tokenizer: Any, prompts: Sequence[str], batch_size: int = 256) -> torch.Tensor:
    """Embeddings of prompts by the text tower of a CLIP or SigLIP model, not normalized: (N, D) float32.

    SigLIP was trained on prompts padded to full length without a mask and reads its last token; CLIP's are padded to
    the longest of the batch and masked.
    """
    siglip = model.config.model_type != "clip"
    padding, keys = ("max_length", ("input_ids",)) if siglip else (True, ("input_ids", "attention_mask"))
    device = next(model.parameters()).device
    parts = []
    for start in range(0, len(prompts), batch_size):
        tokens = tokenizer(
            list(prompts[start : start + batch_size]),
            padding=padding,
            truncation=True,
            max_length=model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        parts.append(model.get_text_features(**{key: tokens[key].to(device) for key in keys}).pooler_output.float())
    return torch.cat(parts)


def embed_classes(
    model: torch.nn.Module,
    tokenizer: Any,
    entries: Sequence[str],
    templates: str | Sequence[str] = TEMPLATES,
    batch_size: int = 256,
) -> TextEmbeddings:
    """Text embeddings of vocabulary entries, by the text tower of a CLIP or SigLIP model.

    Each synonym: the normalized embeddings of all templates (`read_templates`), averaged, normalized (Radford et al.
    2021, 3.1.4). Raises UserError for no entries, a template without {}, or a model without text tower.
    """
    if not entries:
        raise UserError("the vocabulary is empty: give at least one class name")
    if tokenizer is None or not hasattr(model, "get_text_features"):
        raise UserError("the model was loaded without its text tower: give precomputed text embeddings")
    templates = read_templates(templates)
    names = [split_synonyms(entry) for entry in entries]
    flat = [name for synonyms in names for name in synonyms]
    prompts = [template.format(name) for name in flat for template in templates]
    vectors = F.normalize(encode_texts(model, tokenizer, prompts, batch_size), dim=-1)
    vectors = vectors.view(len(flat), len(templates), -1).mean(dim=1)
    owners = torch.tensor([k for k, synonyms in enumerate(names) for _ in synonyms], device=vectors.device)
    return TextEmbeddings(F.normalize(vectors, dim=-1), owners, len(entries), tuple(flat))


def texts_of(
    encoder: Any,
    entries: Sequence[str],
    background: Sequence[str],
    templates: Sequence[str],
    text: TextEmbeddings | None = None,
) -> TextEmbeddings:
    """The embeddings of vocabulary entries, then of background names, on the encoder's device.

    encoder: a `Clip`, or `PrecomputedFeatures`, which need `text`. text: precomputed embeddings; None: by the encoder's
    text tower. Raises UserError for embeddings of other names or of another length, and as `embed_classes` does.
    """
    wanted = [*entries, *background]
    if text is None:
        if not hasattr(encoder, "model"):
            raise UserError(f"features {encoder.name}: precomputed features need `text`, embeddings of the same space")
        return embed_classes(encoder.model, encoder.tokenizer, wanted, templates)
    if text.count != len(wanted):
        raise UserError(
            f"text embeddings of {text.count} classes for {len(entries)} entries and {len(background)} background names"
        )
    flat = tuple(name for entry in wanted for name in split_synonyms(entry))
    if text.names and text.names != flat:
        wrong = next((a, b) for a, b in zip([*text.names, None], [*flat, None]) if a != b)
        raise UserError(f"text embeddings are of {wrong[0]!r} where the vocabulary has {wrong[1]!r}")
    dimension = getattr(encoder, "dimension", None)
    if dimension is not None and text.vectors.shape[1] != dimension:
        raise UserError(f"text embeddings of {text.vectors.shape[1]} numbers, {encoder.name} has {dimension}")
    return text.to(encoder.device)


def save_text_embeddings(path: str | os.PathLike[str], text: TextEmbeddings, **metadata: str) -> None:
    """Write embeddings as safetensors: `text_embeds` (T, D) float32, and `names`, a JSON list of T names, in the
    metadata beside further words such as the encoder's name. Raises UserError for embeddings without names."""
    write_text_matrix(path, text.vectors, text.names, **metadata)


def load_text_embeddings(
    path: str | os.PathLike[str],
    entries: Sequence[str] | None = None,
    names: Sequence[str] | str | os.PathLike[str] | None = None,
) -> TextEmbeddings:
    """Text embeddings from a safetensors file, normalized, in the order of `entries`.

    Args:
        path: a file with one matrix, (T, D) or (D, T), or one matrix called `text_embeds` among others.
        entries: vocabulary entries; every name, synonyms included, must be in the file. None: all names, each a class.
        names: the T names, or a JSON file with a list of them. None: the metadata's `names` (a JSON list), else the
            file NAME.json beside NAME.safetensors.

    Raises UserError naming the file and what is wrong: no names, no or several matrices, sizes that do not fit, names
    that occur twice, or vocabulary names that are not in the file.
    """
    matrix, known = read_text_matrix(path, names)
    vectors = F.normalize(matrix.float(), dim=-1)
    place = {name: row for row, name in enumerate(known)}
    wanted = [split_synonyms(entry) for entry in entries] if entries is not None else [[name] for name in known]
    missing = [name for synonyms in wanted for name in synonyms if name not in place]
    if missing:
        raise UserError(
            f"text embeddings {path}: no vector for {len(missing)} names, such as {', '.join(map(repr, missing[:3]))}; "
            f"its {len(known)} names begin with {', '.join(map(repr, known[:5]))}"
        )
    flat = tuple(name for synonyms in wanted for name in synonyms)
    useless = [name for name in flat if not abs(float(vectors[place[name]].norm()) - 1) < 0.01]  # nan compares false
    if useless:
        raise UserError(f"text embeddings {path}: the vector of {useless[0]!r} is zero or not finite; compute it again")
    owners = torch.tensor([k for k, synonyms in enumerate(wanted) for _ in synonyms])
    return TextEmbeddings(vectors[[place[name] for name in flat]], owners, len(wanted), flat)
