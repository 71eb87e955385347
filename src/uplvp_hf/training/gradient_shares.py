"""Which loss terms train the network: the share of each in the norm of the gradient."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from .config import TrainSettings

_LAYER = re.compile(r"_\d+$")


def is_due(done: int, settings: TrainSettings) -> bool:
    """Whether the shares are measured in the step number `done`, counted from 1.

    That is the first step with a line of the log from every `gradients_every` steps on, and the last one.
    """
    every, line = settings.gradients_every, settings.log_every
    if not every:
        return False
    return done == settings.optim.steps or (done % line == 0 and done // every > (done - line) // every)


def gradient_shares(
    losses: Mapping[str, Tensor], parameters: Iterable[nn.Parameter], scaler: torch.amp.GradScaler | None = None
) -> dict[str, float]:
    """The norm of each term's own gradient, as a share of the sum of these norms, 0 to 1.

    The terms of several layers, `mask_0`, `mask_1`, ..., are one term here. Norms do not add up as gradients do: terms
    may pull in different directions. The graph stays for the backward pass that follows, nothing is accumulated, and
    no random number is drawn; every term costs one backward pass of its own.

    Args:
        losses: weighted terms by name, with their graph.
        parameters: the weights that are trained.
        scaler: of float16, or None. It keeps small gradients from vanishing.

    Returns:
        share by `gradient_share_TERM`; nothing when no term has a gradient, or one is not finite.
    """
    scale = 1.0 if scaler is None else scaler.get_scale()
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups: dict[str, list[Tensor]] = {}
    for name, value in losses.items():
        if value.requires_grad:
            groups.setdefault(_LAYER.sub("", name), []).append(value)
    norms = {}
    for name, terms in groups.items():  # one term's gradients are gone before the next one's are there
        norms[name] = _norm(
            torch.autograd.grad(scale * torch.stack(terms).sum(), trained, retain_graph=True, allow_unused=True)
        )
    total = sum(norms.values())
    if not 0 < total < math.inf:
        return {}
    return {f"gradient_share_{name}": round(norm / total, 5) for name, norm in norms.items()}


def _norm(gradients: Iterable[Tensor | None]) -> float:
    return math.hypot(*(float(one.float().norm()) for one in gradients if one is not None))
