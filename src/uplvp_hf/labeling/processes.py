"""The processes that share one labeling run: this one alone, or those of `accelerate launch` or torchrun."""

from __future__ import annotations

import atexit
import os
from datetime import timedelta
from typing import Any

import torch

# A process that is done waits for the slowest one; the default of some minutes would end a run that only is uneven.
PATIENCE = timedelta(days=7)


class Processes:
    """rank: number of this process, 0 speaks for all. size: how many there are. local_size: on this machine."""

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 or torch.distributed.is_initialized():
            from accelerate import PartialState

            state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
            self.rank, self.size = state.process_index, state.num_processes
            # Without this a process may abort at its very end, when threads of the group are still running.
            atexit.register(_leave)

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every process, by rank, in every process. Waits for all of them."""
        if self.size == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])

    def share(self, value: Any) -> Any:
        """The `value` of process 0, in every process."""
        return self.gather(value if self.rank == 0 else None)[0]


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def decode_workers(processes: Processes) -> int:
    """Threads that a process decodes images with: its share of the cores that it may use, 1 to 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // processes.local_size))
