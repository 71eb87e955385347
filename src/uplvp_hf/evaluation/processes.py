"""The processes that share one evaluation: those of the torch.distributed group, or this one alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def place() -> tuple[int, int]:
    """(number of this process, number of processes); (0, 1) without a group."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def gather(value: Any) -> list[Any]:
    """The `value` of every process, by number, in every process. Waits for all of them."""
    processes = place()[1]
    if processes == 1:
        return [value]
    values: list[Any] = [None] * processes
    torch.distributed.all_gather_object(values, value)
    return values


@contextmanager
def gather_errors(processes: int) -> Iterator[None]:
    """Around the own share of the work: an error in one process ends all of them, instead of letting them wait for it.

    Raises the own error, else RuntimeError with the first one of another process.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    told = gather(own and f"{type(own).__name__}: {own}") if processes > 1 else []
    if own is not None:
        raise own
    failed = [(number, text) for number, text in enumerate(told) if text]
    if failed:
        raise RuntimeError("Process {} failed: {}".format(*failed[0]))
