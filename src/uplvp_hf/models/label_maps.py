"""Label maps: one integer a pixel, the class or a value that does not count. From files, arrays and PIL images."""

import os
from typing import Any

import numpy as np
from PIL import Image

from .errors import ImageError, UserError


def ignored_label(num_classes: int) -> int:
    """The usual value of pixels that do not count: 255, or 65535 where 255 is a class."""
    return 255 if num_classes <= 255 else 65535


def label_array(labels: Any, name: str = "label map in memory") -> np.ndarray:
    """A label map as (H, W) int32: a PIL image of one channel (a palette gives its indices), or an integer array.

    Raises ImageError for color images, floats and other shapes.
    """
    if isinstance(labels, Image.Image):
        if labels.mode not in ("L", "P", "1", "I") and not labels.mode.startswith("I;16"):
            raise ImageError(
                f"a label map of mode {labels.mode}", file=name,
                remedy="Write one number a pixel: gray of 8 or 16 bits, or a palette.",
            )  # fmt: skip
        labels = np.asarray(labels)
    elif hasattr(labels, "numpy"):
        labels = labels.cpu().numpy()
    array = np.asarray(labels)
    if array.ndim == 3 and 1 in (array.shape[0], array.shape[2]):
        array = array.reshape(
            [side for axis, side in enumerate(array.shape) if axis != (0 if array.shape[0] == 1 else 2)]
        )
    if array.ndim != 2 or not array.size or not (np.issubdtype(array.dtype, np.integer) or array.dtype == bool):
        raise ImageError(
            f"a label map of shape {array.shape} and type {array.dtype}", file=name,
            remedy="A label map is (H, W) of integers.",
        )  # fmt: skip
    return array.astype(np.int32)


def open_label_map(path: str | os.PathLike[str]) -> np.ndarray:
    """The label map in an image file or in a .npy, (H, W) int32. Raises ImageError naming the file."""
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise ImageError("no such label map", file=path)
    try:
        if path.endswith(".npy"):
            return label_array(np.load(path, allow_pickle=False), path)
        with Image.open(path) as image:
            image.load()
            return label_array(image, path)
    except ImageError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise ImageError(f"cannot be decoded ({type(error).__name__}: {error})", file=path) from error


def reduced_labels(labels: np.ndarray, ignored: int) -> np.ndarray:
    """Labels in which 0 was "other" and classes began at 1: classes begin at 0, and 0 is ignored. Not to be done twice:
    every class would move once more."""
    return np.where((labels == 0) | (labels == ignored), ignored, labels - 1)


def check_label_ids(labels: np.ndarray, num_classes: int, ignored: int, name: str = "label map in memory") -> None:
    """Raises UserError, naming the file, for an id that is no class."""
    wrong = labels[(labels != ignored) & ((labels < 0) | (labels >= num_classes))]
    if wrong.size:
        raise UserError(
            f"{name}: holds the id {int(wrong[0])}, but the classes are 0 to {num_classes - 1} (and {ignored} for "
            'pixels that do not count). If 0 means "other" and the classes begin at 1, set reduce_labels.'
        )


__all__ = ["check_label_ids", "ignored_label", "label_array", "open_label_map", "reduced_labels"]
