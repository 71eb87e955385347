"""Protects running statistics of batch norms and kernel targets: a forward pass changes them, even if its step is then
skipped."""

from __future__ import annotations

import torch
from torch import nn

from ..models.kernel_targets import RunningMean


class NormStatistics:
    """A copy of all running means, variances and counts of `model`, to go back to. It shares no memory with them."""

    def __init__(self, model: nn.Module):
        norms = [
            module for module in model.modules() if isinstance(module, (nn.modules.batchnorm._NormBase, RunningMean))
        ]
        self._live = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
        self._kept = [buffer.clone() for buffer in self._live]

    def keep(self) -> None:
        """Copies the present statistics."""
        if self._live:
            torch._foreach_copy_(self._kept, self._live)

    def restore(self) -> None:
        """Puts them back as they were when `keep` was called last."""
        if self._live:
            torch._foreach_copy_(self._live, self._kept)
