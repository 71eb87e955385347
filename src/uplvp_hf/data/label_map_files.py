"""The numbers in a label map, whatever kind of file it is."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ..models.errors import ImageError
from ..models.label_maps import open_label_map

ADE_MAP, MAT = "_seg.png", ".mat"


def load_ids(path: str) -> np.ndarray:
    """The numbers in a label map, (H, W) int32: of an image, .npy, .mat of COCO-Stuff-10k v1.1, or *_seg.png of
    ADE20K-Full. Raises ImageError naming the file."""
    try:
        if path.endswith(MAT):
            return _mat(path)
        if path.endswith(ADE_MAP):
            with Image.open(path) as image:
                if image.mode == "RGB":
                    red, green, _ = np.moveaxis(np.asarray(image, dtype=np.int32), -1, 0)
                    return red // 10 * 256 + green
    except ImageError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, MatReadError and more
        raise ImageError(f"cannot be decoded ({type(error).__name__}: {error})", file=path) from error
    return open_label_map(path)


def _mat(path: str) -> np.ndarray:
    from scipy.io import loadmat

    try:
        found = loadmat(path, variable_names=["S"])
    except NotImplementedError as error:  # MATLAB 7.3 is HDF5
        raise ImageError(
            "is a file of COCO-Stuff-10k v1.0", file=path, remedy="Take version 1.1, whose ids are COCO's."
        ) from error
    labels = found.get("S")
    if labels is None or labels.ndim != 2 or not np.issubdtype(labels.dtype, np.integer):
        raise ImageError("holds no label map `S` of integers", file=path)
    return labels.astype(np.int32)


__all__ = ["ADE_MAP", "MAT", "load_ids"]
