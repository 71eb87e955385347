"""DenseCLIP's checkpoints (on mmsegmentation 0.19) -> `IcpcForSemanticSegmentation` with `prompt="post"`.

CLIP's own names, which DenseCLIP keeps, are those of `openai_text` and `openai_vision`.
"""

import math
import os
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..models.errors import UserError
from .naming import count_numbers, load_fitting, renamed

_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_TEXT = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
}
_VISION = {
    "class_embedding": "vision_model.embeddings.class_embedding",
    "positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "ln_post.weight": "vision_model.post_layernorm.weight",
    "ln_post.bias": "vision_model.post_layernorm.bias",
    "proj": "visual_projection.weight",
}
CLIP_TOKENIZER = "openai/clip-vit-base-patch16"
_TRANSPOSED = ("text_projection", "proj")
# Of the whole network: pattern over the original name -> ours.
_RULES = [
    (r"contexts", r"prompts.contexts"),
    (r"gamma", r"gamma"),
    (r"context_decoder\.(memory_proj|text_proj|out_proj|decoder)\.(.+)", r"decoder.\1.\2"),
    (r"neck\.lateral_convs\.(\d+)\.conv\.(.+)", r"neck.lateral.\1.\2"),
    (r"neck\.fpn_convs\.(\d+)\.conv\.(.+)", r"neck.output.\1.\2"),
    (r"decode_head\.conv_seg\.(.+)", r"head.classifier.\1"),
]


def clip_block(name: str, tensor: Tensor, tower: str) -> dict[str, Tensor]:
    """A tensor within one of CLIP's transformers, by transformers' names; nothing where it has no place.

    tower: `text_model` or `vision_model`. The packed projection of queries, keys and values becomes three.
    """
    match = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)\.?(weight|bias)", name)
    if match is None:
        return {}
    ours, part, kind = f"{tower}.encoder.layers.{match[1]}.", match[2].rstrip("._"), match[3]
    if part == "attn.in_proj":
        rows = zip("qkv", tensor.chunk(3), strict=True)
        return {f"{ours}self_attn.{letter}_proj.{kind}": piece for letter, piece in rows}
    return {f"{ours}{_BLOCK[part]}.{kind}": tensor} if part in _BLOCK else {}


def openai_text(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor of OpenAI's text transformer by the names of `CLIPTextModelWithProjection`."""
    if name in _TEXT:
        return {_TEXT[name]: tensor.T if name in _TRANSPOSED else tensor}
    return clip_block(name, tensor, "text_model")


def openai_vision(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor of OpenAI's vision transformer by the names of `CLIPVisionModelWithProjection`."""
    if name in _VISION:
        return {_VISION[name]: tensor.T if name in _TRANSPOSED else tensor}
    return clip_block(name, tensor, "vision_model")


def convert_denseclip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a DenseCLIP -> that of `IcpcForSemanticSegmentation`. No tensor is copied.

    The class embedding is still to be folded, see `fold_class_embedding`. Counters of batch norms are left out. Raises
    UserError naming the tensors that have no place.
    """
    vit = "backbone.class_embedding" in state
    kept = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    return renamed(kept, partial(_convert, vit=vit), "DenseCLIP")


def _convert(name: str, tensor: Tensor, vit: bool) -> dict[str, Tensor]:
    part = name.partition(".")[2]
    if name.startswith("text_encoder."):
        return {f"text.{ours}": value for ours, value in openai_text(part, tensor).items()}
    if name.startswith("backbone."):
        if not vit:
            return {name: tensor}
        if level := re.fullmatch(r"fpn(\d)(?:\.(\d+))?\.(\w+)", part):
            # What is one layer there, a norm, is a sequence of one here.
            return {f"backbone.pyramid.{int(level[1]) - 1}.{level[2] or 0}.{level[3]}": tensor}
        return {f"backbone.tower.{ours}": value for ours, value in openai_vision(part, tensor).items()}
    if scale := re.fullmatch(r"decode_head\.scale_heads\.(\d)\.(\d)\.(.+)", name):
        return {f"head.scales.{scale[1]}.{int(scale[2]) // 2}.{scale[3]}": tensor}  # every second layer only enlarges
    if name == "contexts":
        tensor = tensor[0]
    for pattern, ours in _RULES:
        if match := re.fullmatch(pattern, name):
            return {match.expand(ours): tensor}
    return {}


@torch.no_grad()
def fold_class_embedding(model: Any) -> None:
    """Adds the class embedding to the first row of the position table of a converted DenseCLIP: its code adds it twice.
    Once, and for DenseCLIP's checkpoints only."""
    if hasattr(model.backbone, "tower"):
        embeddings: Any = model.backbone.tower.vision_model.embeddings
        embeddings.position_embedding.weight[0] += embeddings.class_embedding


def build_denseclip(
    source: dict[str, Tensor],
    classes: Sequence[str] | None,
    category_ids: Sequence[int] | None,
    settings: dict[str, Any],
    tokenizer: str | os.PathLike[str] | None,
) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """The model with the weights of a DenseCLIP, and these under our names.

    classes: their names; the checkpoint holds neither names nor tokens. settings: of `IcpcConfig`, those of the towers
    beside what was found; with `class_token_ids` among them no tokenizer is needed.
    """
    from transformers import AutoTokenizer

    from ..models.configuration_icpc import IcpcConfig
    from ..models.icpc_prompts import name_tokens
    from ..models.label_maps import ignored_label
    from ..models.modeling_icpc import IcpcForSemanticSegmentation

    converted = convert_denseclip(source)
    found = denseclip_settings(converted)
    count = found.pop("num_labels")
    if classes is None or len(classes) != count:
        given = "none were given" if classes is None else f"{len(classes)} were given"
        raise UserError(f"it has {count} classes, whose names it does not hold, and {given}: pass them (--classes).")
    for name, value in settings.items():
        found[name] = {**found[name], **value} if isinstance(found.get(name), dict) else value
    if "class_token_ids" not in found:
        found["class_token_ids"] = name_tokens(
            list(classes), AutoTokenizer.from_pretrained(tokenizer or CLIP_TOKENIZER)
        )
    config = IcpcConfig(
        id2label=dict(enumerate(classes)), category_ids=None if category_ids is None else list(category_ids),
        **{"semantic_loss_ignore_index": ignored_label(count), **found},
    )  # fmt: skip
    model = IcpcForSemanticSegmentation(config)
    load_fitting(model, converted)
    fold_class_embedding(model)
    return model, converted


def denseclip_settings(state: dict[str, Tensor]) -> dict[str, Any]:
    """Settings of `IcpcConfig`, and `num_labels`, read off tensors under our names.

    Attention heads leave no trace in the weights: those of `tower_settings`, and of DenseCLIP's code, 4 in the decoder
    and 32 in the attention pool.
    """
    found: dict[str, Any] = {
        **tower_settings(state),
        "prompt": "post",
        "align_strides": [],
        "contrastive": "none",
        "num_labels": state["head.classifier.weight"].shape[0],
        "num_context": state["prompts.contexts"].shape[0],
        "decoder_layers": count_numbers(state, r"decoder\.decoder\.(\d+)\..+"),
        "decoder_width": state["decoder.text_proj.1.weight"].shape[0],
        "fpn_channels": state["neck.lateral.0.weight"].shape[0],
        "head_channels": state["head.classifier.weight"].shape[1],
    }
    if "resnet_config" in found:
        found["resnet_config"]["pool_heads"] = 32
    return found


def tower_settings(state: dict[str, Tensor]) -> dict[str, Any]:
    """Settings of `IcpcConfig` for both towers, read off tensors under our names; without a text tower of one alone.

    Attention heads as OpenAI's towers have them, one for 64 channels.
    """
    found: dict[str, Any] = {}
    if "text.text_projection.weight" in state:
        tokens = state["text.text_model.embeddings.token_embedding.weight"]
        found["text_config"] = {
            **_tower(state, "text.text_model."),
            "vocab_size": len(tokens),
            "max_position_embeddings": len(state["text.text_model.embeddings.position_embedding.weight"]),
            "bos_token_id": len(tokens) - 2,
            "eos_token_id": len(tokens) - 1,
        }
    if "backbone.attnpool.positional_embedding" in state:
        found["projection_dim"] = len(state["backbone.attnpool.c_proj.weight"])
        found["resnet_config"] = {
            "width": state["backbone.conv3.weight"].shape[0],
            "depths": [count_numbers(state, rf"backbone\.layer{stage}\.(\d+)\..+") for stage in range(1, 5)],
            "pool_heads": max(state["backbone.attnpool.q_proj.weight"].shape[0] // 64, 1),
            "pool_size": math.isqrt(len(state["backbone.attnpool.positional_embedding"])),
        }
    else:
        found["projection_dim"] = len(state["backbone.tower.visual_projection.weight"])
        vision = "backbone.tower.vision_model."
        patch = state[f"{vision}embeddings.patch_embedding.weight"].shape[-1]
        rows = len(state[f"{vision}embeddings.position_embedding.weight"])
        found["vision_config"] = {
            **_tower(state, vision), "patch_size": patch, "image_size": patch * math.isqrt(rows),
        }  # fmt: skip
    return found


def _tower(state: dict[str, Tensor], prefix: str) -> dict[str, Any]:
    first = state[f"{prefix}encoder.layers.0.mlp.fc1.weight"]
    return {
        "hidden_size": first.shape[1],
        "intermediate_size": first.shape[0],
        "num_hidden_layers": count_numbers(state, re.escape(prefix) + r"encoder\.layers\.(\d+)\..+"),
        "num_attention_heads": max(first.shape[1] // 64, 1),
        "hidden_act": "quick_gelu",
    }
