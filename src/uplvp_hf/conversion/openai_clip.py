"""Weights of CLIP -> both towers of `IcpcForSemanticSegmentation`, the rest of which is initialized.

Read are OpenAI's own files (`RN50.pt`, `ViT-B-16.pt`: TorchScript archives, or their state dicts), OpenCLIP's files of
these models, which have the same names, folders of transformers' `CLIPModel`, and timm's CLIP ResNets. These have no
text tower, so that `prompt=none` is all that they serve.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import CLIPConfig

from ..models.configuration_icpc import IcpcConfig
from ..models.errors import UserError
from ..models.icpc_prompts import name_tokens
from ..models.modeling_icpc import IcpcForSemanticSegmentation
from .checkpoint_file import CheckpointError, detect_format, open_checkpoint
from .denseclip import CLIP_TOKENIZER, openai_text, openai_vision, tower_settings
from .naming import load_fitting, renamed

TIMM = "timm:"
_LEFT_OUT = {
    r".*num_batches_tracked": "counter that inference does not read",
    r"logit_scale": "temperature of CLIP's own loss",
    r"(input_resolution|context_length|vocab_size)": "a number that follows from the tensors",
    r".*\.position_ids": "numbers from 0 on",
}
_TIMM_RULES = (  # names of timm's ByobNet -> OpenAI's
    (r"stem\.conv(\d)\.conv\.(.+)", r"visual.conv\1.\2"),
    (r"stem\.conv(\d)\.bn\.(.+)", r"visual.bn\1.\2"),
    (r"stages\.(\d)\.(\d+)\.shortcut\.conv\.conv\.(.+)", r"visual.layer\1.\2.downsample.0.\3"),
    (r"stages\.(\d)\.(\d+)\.shortcut\.conv\.bn\.(.+)", r"visual.layer\1.\2.downsample.1.\3"),
    (r"stages\.(\d)\.(\d+)\.conv(\d)_\w+\.conv\.(.+)", r"visual.layer\1.\2.conv\3.\4"),
    (r"stages\.(\d)\.(\d+)\.conv(\d)_\w+\.bn\.(.+)", r"visual.layer\1.\2.bn\3.\4"),
    (r"head\.pos_embed", r"visual.attnpool.positional_embedding"),
    (r"head\.([qkv])\.(.+)", r"visual.attnpool.\1_proj.\2"),
    (r"head\.proj\.(.+)", r"visual.attnpool.c_proj.\1"),
)


def timm_to_openai(name: str) -> str:
    """The name of a tensor of timm's CLIP ResNets in OpenAI's files; stages count from 1 there. Raises UserError."""
    for pattern, theirs in _TIMM_RULES:
        if match := re.fullmatch(pattern, name):
            found = match.expand(theirs)
            return re.sub(r"layer(\d)", lambda stage: f"layer{int(stage[1]) + 1}", found)
    raise UserError(f"the tensor {name} has no place in a CLIP ResNet")


def convert_openai(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors in OpenAI's, transformers' or timm's names under ours, and {name: reason} of those left out. No tensor is
    copied. Raises UserError naming the tensors that have no place."""
    dropped = {name: why for name in state for pattern, why in _LEFT_OUT.items() if re.fullmatch(pattern, name)}
    timm, vit = "head.pos_embed" in state, "visual.class_embedding" in state
    kept = {name: tensor for name, tensor in state.items() if name not in dropped}

    def rule(name: str, tensor: Tensor) -> dict[str, Tensor]:
        return _convert(timm_to_openai(name) if timm else name, tensor, vit)

    return renamed(kept, rule, "CLIP"), dropped


def _convert(name: str, tensor: Tensor, vit: bool) -> dict[str, Tensor]:
    if name.startswith(("text_model.", "text_projection.")):  # transformers
        return {f"text.{name}": tensor}
    if name.startswith(("vision_model.", "visual_projection.")):
        return {f"backbone.tower.{name}": tensor}
    part = name.removeprefix("visual.")
    if part == name:
        return {f"text.{ours}": value for ours, value in openai_text(name, tensor).items()}
    if not vit:
        return {f"backbone.{part}": tensor}
    return {f"backbone.tower.{ours}": value for ours, value in openai_vision(part, tensor).items()}


def build_openai(
    source: dict[str, Tensor],
    id2label: dict[int, str] | None,
    category_ids: Sequence[int] | None,
    settings: dict[str, Any],
    tokenizer: Any = None,
) -> tuple[IcpcForSemanticSegmentation, dict[str, Tensor], dict[str, str]]:
    """The model with the weights of a CLIP, these under our names, and {name: reason} of those left out.

    id2label: the classes to segment. settings: of `IcpcConfig`; those of the towers beside what was found. tokenizer:
    one, or its folder or repository; by default OpenAI's, which all CLIPs of theirs share.
    """
    from transformers import AutoTokenizer

    if not id2label:
        raise UserError("a CLIP has no classes to segment: pass their names (--classes).")
    converted, dropped = convert_openai(source)
    found = {**tower_settings(converted), **({} if _has_text(converted) else {"text_config": None})}
    for name, value in settings.items():
        found[name] = {**found[name], **value} if isinstance(found.get(name), dict) else value
    if not _has_text(converted) and found.setdefault("prompt", "none") != "none":
        raise UserError(
            f"it has no text tower, which prompt={found['prompt']} needs: take OpenAI's own file, or prompt=none."
        )
    if found.get("prompt") != "none" and "class_token_ids" not in found:
        if tokenizer is None or isinstance(tokenizer, str | os.PathLike):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer or CLIP_TOKENIZER)
        found["class_token_ids"] = name_tokens(list(id2label.values()), tokenizer)
    ids = None if category_ids is None else list(category_ids)
    model = IcpcForSemanticSegmentation(IcpcConfig(id2label=id2label, category_ids=ids, **found))
    if model.text is None:
        text = [name for name in source if name not in dropped and _is_text(name)]
        dropped |= dict.fromkeys(text, "of the text tower, which prompt=none leaves out")
        converted = {name: tensor for name, tensor in converted.items() if not name.startswith("text.")}
    lacking = [name for name in model.state_dict() if name.startswith(_TOWERS) and name not in converted]
    lacking = [name for name in lacking if not name.endswith("num_batches_tracked")]
    if lacking:
        raise UserError(f"it lacks {len(lacking)} tensors, for example the one that we call {lacking[0]}.")
    load_fitting(model, converted)
    return model, converted, dropped


_TOWERS = ("text.", "backbone.tower.", "backbone.conv", "backbone.bn", "backbone.layer", "backbone.attnpool.")


def _is_text(name: str) -> bool:
    """Whether a tensor in OpenAI's, transformers' or timm's names belongs to the text tower."""
    return not name.startswith(("visual.", "vision_model.", "visual_projection.", "stem.", "stages.", "head."))


def _has_text(converted: dict[str, Tensor]) -> bool:
    return any(name.startswith("text.") for name in converted)


def folder_settings(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Settings of both towers of transformers' `CLIPModel` in a folder, which say more than its tensors."""
    config = CLIPConfig.from_pretrained(folder).to_dict()
    return {name: config[name] for name in ("vision_config", "text_config", "projection_dim")}


def icpc_from_clip(
    clip: str | os.PathLike[str],
    id2label: dict[int, str],
    tokenizer: Any = None,
    category_ids: list[int] | None = None,
    **settings: Any,
) -> IcpcForSemanticSegmentation:
    """A model on the towers of any CLIP that is read here, the rest initialized.

    clip: a file of OpenAI's or OpenCLIP's, `timm:NAME` for timm's CLIP ResNets, or a folder or repository with a
    `CLIPModel` (`IcpcForSemanticSegmentation.from_clip`); the other arguments as there.

    Raises UserError for a file that holds no CLIP, or one without what the settings need.
    """
    name = os.fspath(clip)
    if name.startswith(TIMM):
        source = _timm_weights(name.removeprefix(TIMM))
    elif os.path.isfile(name):
        source = open_checkpoint(name)[0]
        if detect_format(source) not in ("clip", "timm-clip-resnet"):
            raise CheckpointError(f"{name} holds no CLIP, but a {detect_format(source)}.")
    else:
        return IcpcForSemanticSegmentation.from_clip(name, id2label, tokenizer, category_ids, **settings)
    try:
        return build_openai(source, id2label, category_ids, settings, tokenizer)[0]
    except KeyError as error:
        raise CheckpointError(f"{name}: the tensor {error} (our name) is missing.") from error
    except UserError as error:
        raise CheckpointError(f"{name}: {error}") from error


def _timm_weights(name: str) -> dict[str, Tensor]:
    """Weights of a model of timm, downloaded. Raises UserError for one that is no CLIP ResNet."""
    import timm

    if not re.match(r"resnet\d+(x\d+)?_clip(\.|$)", name):
        raise UserError(f"timm:{name} is no CLIP ResNet with an attention pool, such as resnet50_clip.openai.")
    return timm.create_model(name, pretrained=True).state_dict()


__all__ = ["TIMM", "build_openai", "convert_openai", "folder_settings", "icpc_from_clip", "timm_to_openai"]
