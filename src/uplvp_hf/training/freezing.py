"""Decides which parts of a backbone are not trained, and which of its modules stay in evaluation mode."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .config import ConfigError, ModelSettings


def refuse_random_frozen(settings: ModelSettings) -> None:
    """Raises ConfigError for a backbone that would be frozen as it was drawn."""
    frozen = "freeze_backbone" if settings.freeze_backbone else "freeze_stages"
    if getattr(settings, frozen) and not (settings.init or settings.backbone_weights):
        raise ConfigError(
            f"`model.{frozen}` would freeze a randomly initialized backbone: set `model.backbone_weights` (a "
            f"safetensors file) or `model.init` (a checkpoint), or leave `model.{frozen}` out."
        )


def freeze_backbone(backbone: nn.Module, settings: ModelSettings, size: int) -> None:
    """Freezes what `freeze_backbone` and `freeze_stages` name, and whatever no feature map depends on.

    size: side of an image to try it on, pixels. Raises ConfigError when the backbone does not give the map of the last
    stage that is to be frozen.
    """
    if settings.freeze_backbone:
        backbone.requires_grad_(False)
        return
    if isinstance(backbone, nn.ModuleList):  # the embeddings and blocks of a ViT, each of which is used
        backbone[: settings.freeze_stages + 1 if settings.freeze_stages else 0].requires_grad_(False)
        return
    if settings.freeze_stages:
        freeze_stages(backbone, settings.freeze_stages, size)
    freeze_unused(backbone, size)


def freeze_unused(backbone: nn.Module, size: int) -> list[str]:
    """Freezes what no feature map depends on, such as the closing norm of Swin, and returns its names.

    Training on several processes waits for the gradient of every parameter that is not frozen.
    """
    parameters = {name: parameter for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    if not parameters:
        return []
    used = _reached(_maps(backbone, size), parameters)
    for name in parameters.keys() - used:
        parameters[name].requires_grad_(False)
    return [name for name in parameters if name not in used]


def freeze_stages(backbone: nn.Module, stages: int, size: int) -> list[str]:
    """Freezes the stem and the first `stages` stages: all that the map of stage `stages` depends on.

    Returns the names. Raises ConfigError when the backbone gives no such map.
    """
    wanted, given = f"stage{stages}", list(getattr(backbone, "out_features", None) or [])
    indices = list(getattr(backbone, "out_indices", None) or [])
    if wanted in given:
        place = given.index(wanted)
    elif stages in indices:  # timm's stages are called after their blocks; the stem is number 0
        place = indices.index(stages)
    else:
        raise ConfigError(
            f"`model.freeze_stages={stages}`: the backbone gives the maps {', '.join(map(str, given or indices))}, and "
            "only up to one of them can be frozen."
        )
    parameters = {name: parameter for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    frozen = _reached(_maps(backbone, size)[place : place + 1], parameters)
    for name in frozen:
        parameters[name].requires_grad_(False)
    return [name for name in parameters if name in frozen]


def training_mode(model: nn.Module, freeze_norm: bool) -> None:
    """Train mode; frozen parts, and with `freeze_norm` all batch norms of the backbone, stay in evaluation mode."""
    model.train()
    for module in model.segmenter.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()
    for module in model.segmenter.backbone.modules() if freeze_norm else ():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def _maps(backbone: nn.Module, size: int) -> tuple[Tensor, ...]:
    was_training, parameter = backbone.training, next(backbone.parameters())
    with torch.enable_grad():
        pixels = torch.zeros(1, 3, size, size, dtype=parameter.dtype, device=parameter.device)
        maps = backbone.eval()(pixels).feature_maps
    backbone.train(was_training)
    return maps


def _reached(maps: tuple[Tensor, ...], parameters: dict[str, nn.Parameter]) -> set[str]:
    """Names of the parameters that the maps depend on."""
    total = torch.stack([map_.sum() for map_ in maps]).sum()
    gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
