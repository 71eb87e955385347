"""What one image did to a run: it is listed and the run goes on, unless the error concerns all images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..data.errors import DataError
from ..models.errors import UserError

logger = logging.getLogger(__name__)


class UnexpectedFailure(DataError):
    """An error that nobody foresaw, or too little memory, while one image was looked at."""


def as_failure(error: Exception) -> DataError:
    """The failure that is listed for an image.

    Raises the error itself where it concerns all images: a wrong setting (UserError), or the disk (OSError).
    """
    if isinstance(error, DataError):
        return error
    if isinstance(error, (UserError, OSError)):
        raise error
    logger.debug("an image failed", exc_info=error)
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
        return UnexpectedFailure("there was not enough memory to label it", remedy="Shrink the image.")
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return UnexpectedFailure(f"labeling it failed ({text[:300].rstrip(': ')})")


def each(function: Callable[..., list], images: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """`function(images, others)` for all images together; where that fails, image by image, with a DataError in place
    of each result that cannot be had. Raises what concerns all images (`as_failure`)."""
    try:
        return function(images, others)
    except Exception as error:
        as_failure(error)
    return one_by_one(function, images, others)


def one_by_one(function: Callable[..., list], images: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """As `each`, without a first attempt at all of them."""
    results: list[Any] = []
    for image, other in zip(images, others):
        try:
            results += function([image], [other])
        except Exception as error:
            results.append(as_failure(error))
    return results
