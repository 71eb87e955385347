"""Exponential moving average of the weights: often better than the last weights, and steadier in low-data training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..models.errors import UserError
from .sharding import local, spread_like, whole_like


class WeightAverage:
    """average <- d * average + (1 - d) * weights after every update, d = min(decay, (1 + n) / (10 + n)) after n others.

    The warm-up of the decay keeps the random start from staying in the average. Only parameters that are trained have
    an average, in float32 whatever their own dtype is; buffers, such as statistics of batch norms, are taken as they
    are. Every process keeps the same average (of its rows, where the weights are spread).
    """

    def __init__(self, model: nn.Module, decay: float):
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.decay, self.updates = decay, 0
        self.names, self._parameters = [name for name, _ in trained], [parameter for _, parameter in trained]
        self._average = [value.float().clone() for value in self._values()]

    def _values(self) -> list[Tensor]:
        return [local(parameter.detach()) for parameter in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Adds the present weights to the average. Call it after every update."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self._average, [value.float() for value in self._values()], 1 - decay)
        self.updates += 1

    def tensors(self) -> dict[str, Tensor]:
        """Whole averages by the name of their parameter, float32. Where weights are spread, all processes call it."""
        named = zip(self.names, self._average, self._parameters, strict=True)
        return {name: whole_like(average, parameter) for name, average, parameter in named}

    def load(self, tensors: dict[str, Tensor], updates: int) -> None:
        """Restores what `tensors` gave. Raises UserError when other parameters are trained now."""
        if sorted(tensors) != sorted(self.names):
            unlike = sorted(set(tensors) ^ set(self.names))
            raise UserError(f"The average was taken over other parameters, for example not both have {unlike[0]}.")
        self.updates = updates
        for name, average, parameter in zip(self.names, self._average, self._parameters, strict=True):
            average.copy_(local(spread_like(tensors[name], parameter)))

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Overwrites the weights with the averages, rounded to their dtype."""
        for value, average in zip(self._values(), self._average, strict=True):
            value.copy_(average)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Puts the averages into the model within the block, and restores the exact weights afterwards."""
        kept = [value.clone() for value in self._values()]
        self.copy_to_model()
        try:
            yield
        finally:
            with torch.no_grad():
                for value, before in zip(self._values(), kept, strict=True):
                    value.copy_(before)
