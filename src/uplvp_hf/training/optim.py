"""Optimiser groups and learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from .config import OptimSettings

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


def parameter_groups(model: nn.Module, settings: OptimSettings) -> list[dict]:
    """Four groups at most: {backbone, rest} x {decay, no decay}. Norms, embeddings and biases are not decayed.

    The released Mask2Former recipes do so.
    """
    undecayed = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, (*_NORMS, nn.Embedding))
        for parameter in module.parameters(recurse=False)
    }
    backbone = {id(parameter) for parameter in model.segmenter.backbone.parameters()}
    groups: dict[tuple[bool, bool], list] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decayed = id(parameter) not in undecayed and parameter.dim() > 1
            groups.setdefault((id(parameter) in backbone, decayed), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": settings.lr * (settings.backbone_multiplier if in_backbone else 1.0),
            "weight_decay": settings.weight_decay if decayed else 0.0,
        }
        for (in_backbone, decayed), parameters in groups.items()
    ]


def learning_rate_factor(step: int, settings: OptimSettings) -> float:
    """Factor on the base rate at update `step` (0-based): linear warm-up, then the schedule."""
    if step < settings.warmup:
        return (step + 1) / (settings.warmup + 1)
    progress = (step - settings.warmup) / max(settings.steps - settings.warmup, 1)
    if settings.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if settings.schedule == "linear":
        return 1 - progress
    if settings.schedule == "step":
        return 0.1 ** sum(step >= milestone * settings.steps for milestone in settings.milestones)
    return 1.0


def make_optimizer(model: nn.Module, settings: OptimSettings) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`. Each group's base rate is kept under `base_lr` for the schedule."""
    groups = parameter_groups(model, settings)
    if not groups:
        raise ValueError("The model has no parameter to train: everything is frozen.")
    for group in groups:
        group["base_lr"] = group["lr"]
    return torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay)
