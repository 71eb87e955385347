"""The weights of a run in their three forms: as trained (perhaps spread over processes), whole, and as used."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator

from ..models.modeling_uplvp import UplvpForPreTraining, UplvpPreTrainedModel
from .config import TrainSettings
from .ema import WeightAverage
from .sharding import load_whole_state, shard, whole_state


class RunWeights:
    """
    wrapped: what the loop calls; gradients are averaged over the processes. plain: the module within it, which holds
    the parameters that are trained. average: their moving average, or None. spread: whether a process holds only its
    share of every parameter. Then a second, whole model is kept on the host of every process: checkpoints are written
    from it, and it moves to the device to evaluate, where processes need not run in step.
    """

    def __init__(self, settings: TrainSettings, accelerator: Accelerator, model: UplvpPreTrainedModel):
        self.accelerator = accelerator
        self.spread = settings.fsdp and accelerator.num_processes > 1
        self._whole = copy.deepcopy(model) if self.spread else None
        model.to(accelerator.device)
        self.wrapped = shard(model, accelerator.device) if self.spread else _wrapped(model, accelerator)
        self.plain = accelerator.unwrap_model(self.wrapped)
        decay = settings.average_decay
        self.average = WeightAverage(self.plain, decay) if decay else None

    def as_trained(self) -> UplvpPreTrainedModel:
        """A whole model with the weights that are being trained, for saving. All processes call it."""
        if self._whole is None:
            return self.plain
        self._whole.load_state_dict(whole_state(self.plain))
        return self._whole

    def take_from(self, load) -> None:
        """Takes over the weights of a checkpoint: `load(model)` puts them into a whole model."""
        load(self._whole or self.plain)
        if self._whole is not None:
            load_whole_state(self.plain, self._whole.state_dict())

    @contextmanager
    def in_use(self) -> Iterator[UplvpPreTrainedModel]:
        """A whole model on the device with the weights to evaluate: the averages, if there are any.

        It is the same on all processes, which all have to come here; the training goes on from the weights before.
        """
        self._share_buffers()
        if self._whole is None:
            if self.average is None:
                yield _to_use(self.plain)
            else:
                with self.average.applied():
                    yield _to_use(self.plain)
            return
        whole = self._averaged_whole().to(self.accelerator.device)
        try:
            yield _to_use(whole)
        finally:
            whole.to("cpu")

    def finish(self) -> UplvpPreTrainedModel:
        """Returns the whole model with the weights to use, which ends the training. All processes call it."""
        if self._whole is not None:
            return _to_use(self._averaged_whole())
        if self.average is not None:
            self.average.copy_to_model()
        return _to_use(self.plain)

    @torch.no_grad()
    def _averaged_whole(self) -> UplvpPreTrainedModel:
        whole = self.as_trained()
        if self.average is not None:
            averages, parameters = self.average.tensors(), dict(whole.named_parameters())
            for name, value in averages.items():
                parameters[name].copy_(value)
        return whole

    def _share_buffers(self) -> None:
        """Gives all processes the batch-norm statistics of the main one, which are saved; each saw other images."""
        if self.accelerator.num_processes > 1:
            for buffer in self.plain.buffers():
                torch.distributed.broadcast(buffer, 0)


def _to_use(model: UplvpPreTrainedModel) -> UplvpPreTrainedModel:
    """A fine-tuned model is a plain segmenter, whatever helped to train it."""
    return model.plain() if isinstance(model, UplvpForPreTraining) and model.prompts_pseudo_alone else model


def _wrapped(model: UplvpPreTrainedModel, accelerator: Accelerator) -> torch.nn.Module:
    """The model within DistributedDataParallel, or by itself when there is one process."""
    with warnings.catch_warnings():
        # Accelerate knows the option under its old name only, and torch warns of the name.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        return accelerator.prepare_model(model)
