"""What one image did to a run of predictions: it is listed, and the others are predicted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ..data.errors import DataError
from ..models.errors import UserError

T = TypeVar("T")


def lacks_memory(error: Exception) -> bool:
    """Whether an error says that memory does not suffice, on a GPU or not."""
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return True
    text = str(error)
    return isinstance(error, MemoryError) or "can't allocate memory" in text or "not enough memory" in text


def failure_of(error: Exception, file: str, index: int) -> dict[str, Any]:
    """The entry of `failures` for the row at `index`. Raises the error itself where it is no image's own."""
    if isinstance(error, DataError):
        return {"file": error.file or file, "row": f"row {index}", "reason": error.reason}
    if not (isinstance(error, UserError) or lacks_memory(error)):
        raise error
    reason = str(error) if isinstance(error, UserError) else "there was not enough memory to predict it; shrink it"
    return {"file": file, "row": f"row {index}", "reason": reason}


def together_or_alone(
    indices: list[int], predict: Callable[[list[int]], list[T]], fail: Callable[[Exception, int], None]
) -> dict[int, T]:
    """{index: result} of the rows at `indices`, all at once; where memory does not suffice, one by one, with `fail`
    called for those that fail even so. `predict` takes places in `indices`."""
    try:
        return dict(zip(indices, predict(list(range(len(indices)))), strict=True))
    except Exception as error:
        if not lacks_memory(error):
            raise
        if len(indices) == 1:
            fail(error, indices[0])
            return {}
    found: dict[int, T] = {}
    for place, index in enumerate(indices):
        found |= together_or_alone([index], lambda _, place=place: predict([place]), fail)
    return found
