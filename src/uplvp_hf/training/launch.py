"""The processes and the device of a run, as `accelerate launch` or `torchrun` started it."""

from __future__ import annotations

import atexit
import gc
import os
import platform
import time

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType

from .config import ConfigError, TrainSettings


def make_accelerator(settings: TrainSettings) -> Accelerator:
    """Accelerate for a run with these settings.

    Raises ConfigError where `accelerate launch` was told to spread the model itself (`fsdp=true` does that here), for
    float16 on the CPU, and for a tracker that is not installed.
    """
    if settings.tracker:
        known = sorted(str(one) for one in get_available_trackers())
        if settings.tracker not in known:
            raise ConfigError(f"`tracker` must be one of {', '.join(known)}, got `{settings.tracker}`.")
    AcceleratorState._reset_state()  # another run of this Python process may have had another precision
    accelerator = Accelerator(
        cpu=several_on_cpu(),
        mixed_precision=settings.mixed_precision,
        log_with=settings.tracker,
        project_dir=settings.output,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if settings.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError("mixed_precision=fp16 needs a GPU (Accelerate would train in float32): set bf16, or no.")
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ConfigError(
            f"`accelerate launch` is set up for {accelerator.distributed_type.value}: launch without it, and set "
            "fsdp=true to spread the weights over the processes."
        )
    if accelerator.num_processes > 1:
        atexit.register(_leave_process_group)
    return accelerator


def several_on_cpu() -> bool:
    """Whether this is one of several processes without an accelerator.

    Accelerate has to be told: else each process of torchrun believes that it is alone, and does the whole run.
    """
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available()


def hardware(accelerator: Accelerator) -> str:
    """Number and kind of the devices, for the summary."""
    device, name = accelerator.device, f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"{accelerator.num_processes} x {name}"


def _leave_process_group() -> None:
    """Leaves the process group; without this a process may abort at its very end.

    A thread of the group that lets go of Python objects while the interpreter ends is stopped in the middle of C++,
    which calls `terminate`. So models that hold the group go first, then the group, and its threads get time to end.
    """
    if torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()
        gc.collect()
        time.sleep(0.5)
