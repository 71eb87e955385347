"""Optimizer groups and learning-rate schedule."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import nn

from ..models.errors import UserError
from .config import OptimSettings, TrainSettings
from .teacher_settings import check_burn_in

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


def parameter_groups(model: nn.Module, settings: OptimSettings) -> list[dict]:
    """Four groups at most: {backbone, rest} x {decay, no decay}; with `layer_decay` as many for every block of the ViT.
    Norms, embeddings and biases are not decayed.

    The released Mask2Former recipes do so. Embeddings that are no `nn.Embedding` (of levels and positions, tables of
    relative positions, class tokens) are told by their names: what is decayed is called `weight` in every layer.
    """
    undecayed = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, (*_NORMS, nn.Embedding))
        for parameter in module.parameters(recurse=False)
    }
    backbone = {id(parameter) for parameter in model.segmenter.backbone.parameters()}
    factors = _layer_factors(model.segmenter, settings.layer_decay)
    groups: dict[tuple[bool, bool, float], list] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed = id(parameter) not in undecayed and parameter.dim() > 1 and name.endswith("weight")
            key = (id(parameter) in backbone, decayed, factors.get(id(parameter), 1.0))
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": settings.lr * factor * (settings.backbone_multiplier if in_backbone else 1.0),
            "weight_decay": settings.weight_decay if decayed else 0.0,
        }
        for (in_backbone, decayed, factor), parameters in groups.items()
    ]


def _layer_factors(segmenter: nn.Module, decay: float) -> dict[int, float]:
    """Factor on the rate of every parameter of the ViT's blocks and embeddings, by its id. Raises UserError where there
    is no ViT."""
    if decay == 1:
        return {}
    stem, blocks = segmenter.vit_layers()
    if not blocks:
        raise UserError(
            f"`optim.layer_decay` is for the blocks of a ViT, and this `{segmenter.config.model_type}` has none: leave "
            "it out, or set `optim.backbone_multiplier`."
        )
    depths = [(stem, len(blocks) - 1), *((block, len(blocks) - 1 - index) for index, block in enumerate(blocks))]
    return {id(parameter): decay**depth for module, depth in depths for parameter in module.parameters()}


def learning_rate_factor(step: int, settings: OptimSettings) -> float:
    """Factor on the base rate at update `step` (0-based): linear warm-up, then the schedule.

    Without `warmup_factor` the warm-up takes warmup + 1 equal steps up to the whole rate, none of them zero. With it
    the rate starts at that share (0.001 in the released K-Net and QueryInst recipes, 0 in transformers' schedules).
    Cosine, linear and poly fall over the steps after the warm-up, as transformers' do; milestones count from the first
    step and are rounded to whole steps.
    """
    if step < settings.warmup:
        if settings.warmup_factor is None:
            return (step + 1) / (settings.warmup + 1)
        return settings.warmup_factor + (1 - settings.warmup_factor) * step / settings.warmup
    progress = (step - settings.warmup) / max(settings.steps - settings.warmup, 1)
    if settings.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if settings.schedule == "linear":
        return 1 - progress
    if settings.schedule == "poly":
        return (1 - progress) ** settings.power
    if settings.schedule == "step":
        return 0.1 ** sum(step >= round(milestone * settings.steps) for milestone in settings.milestones)
    return 1.0


def with_steps(settings: TrainSettings, images: int, processes: int) -> TrainSettings:
    """Converts `optim.epochs`, if set, into `optim.steps`: the number of whole steps that show every image so often."""
    optim = settings.optim
    if optim.epochs is None:
        return settings
    steps = math.ceil(optim.epochs * images / images_per_step(optim, processes) - 1e-9)
    check_burn_in(settings, steps)
    return dataclasses.replace(settings, optim=dataclasses.replace(optim, steps=max(steps, 1)))


def images_per_step(settings: OptimSettings, processes: int) -> int:
    """The effective batch."""
    return settings.batch_size * settings.accumulation * processes


def make_optimizer(model: nn.Module, settings: OptimSettings) -> torch.optim.Optimizer:
    """AdamW or SGD over `parameter_groups`. Each group's base rate is kept under `base_lr` for the schedule."""
    groups = parameter_groups(model, settings)
    if not groups:
        raise UserError("The model has no parameter to train: everything is frozen.")
    for group in groups:
        group["base_lr"] = group["lr"]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay)
