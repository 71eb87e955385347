"""Opening images: whatever the file holds, an 8-bit RGB image in the frame of its annotations, or an ImageError."""

from __future__ import annotations

import io
import os
import warnings

import numpy as np
from PIL import Image

from .errors import ImageError

# What a folder of images is searched for; case does not matter.
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm", ".jp2"})

_ORIENTATION = 0x0112  # EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image, file: str) -> int:
    """EXIF orientation, 1 to 8; 1 where there is none. Does not decode the image."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # Pillow would decode the whole image to look for EXIF behind the pixels
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception as error:  # Pillow lets struct, syntax, key and type errors of broken EXIF blocks through
        warnings.warn(f"{file}: unreadable EXIF, taken as not rotated ({type(error).__name__}: {error})", stacklevel=3)
        return 1
    return orientation if orientation in _TURNS else 1


def _from_deep(image: Image.Image, file: str) -> Image.Image:
    """Images of 16 bits (all of 0..65535 onto 0..255) or of floats in 0..1, as 8-bit gray."""
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if image.mode == "F":
        if not (low >= 0 and high <= 1):
            raise ImageError(f"float pixels from {low:g} to {high:g}", file=file, remedy="Convert it to 8 or 16 bits.")
        return Image.fromarray(np.rint(values * 255).astype(np.uint8))
    if low < 0 or high > 65535:
        raise ImageError(f"pixels from {low:g} to {high:g}", file=file, remedy="Convert it to 8 or 16 bits.")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def to_rgb(image: Image.Image, file: str = "image in memory") -> Image.Image:
    """Any PIL image as 8-bit RGB.

    16-bit gray is scaled by 1/257; transparent pixels show white; palettes, CMYK, gray and two-level images are
    converted. Raises ImageError for 32-bit values outside of 0..65535 and for floats outside of 0..1.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return _from_deep(image, file).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")


def _turn(image: Image.Image, orientation: int, size: tuple[int, int] | None, file: str) -> Image.Image:
    """Turn upright, unless the annotations (`size`) can only mean the image as it is stored."""
    stored, swaps = image.size, orientation >= 5
    upright = stored[::-1] if swaps else stored
    if size is not None and tuple(size) not in (upright, stored):
        raise ImageError(
            f"the image is {upright[0]}x{upright[1]} (width x height), its row says {size[0]}x{size[1]}",
            file=file,
            remedy="Correct the row, or restore the image that was annotated.",
        )
    if orientation == 1 or (size is not None and tuple(size) != upright):
        return image
    return image.transpose(_TURNS[orientation])


def as_rgb(
    image: Image.Image, size: tuple[int, int] | None = None, file: str = "image in memory", exif: bool = True
) -> Image.Image:
    """A PIL image as `open_image` would give it; see there for `size`, `exif` and what is raised."""
    orientation = _orientation(image, file) if exif else 1
    try:
        image.load()
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise ImageError(f"cannot be decoded ({type(error).__name__}: {error})", file=file) from error
    result = _turn(to_rgb(image, file), orientation, size, file)
    if result is image:
        result = image.copy()
    result.info = {}  # with its EXIF left in, the next reader would turn the image once more
    return result


def _open(source: str | io.BytesIO, file: str) -> Image.Image:
    if isinstance(source, str) and not os.path.isfile(source):
        raise ImageError("no such image", file=file)
    try:
        return Image.open(source)
    except Exception as error:  # as above; DecompressionBombError too
        raise ImageError(f"is not an image ({type(error).__name__}: {error})", file=file) from error


def _size(image: Image.Image, file: str, exif: bool = True) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if exif and _orientation(image, file) >= 5 else (width, height)


def open_image(path: str | os.PathLike[str], size: tuple[int, int] | None = None, exif: bool = True) -> Image.Image:
    """Open an image file as 8-bit RGB, upright.

    Args:
        path: the file.
        size: (width, height) in pixels that annotations give, or None. An image with an EXIF rotation is turned
            upright, unless only its stored, unturned frame has this size: annotations win, and it stays as stored.
            Where both frames have the same size (half turns, mirrors, squares) it is turned upright.
        exif: False leaves the image as it is stored, whatever its EXIF says.

    Raises ImageError, naming the file, when it is missing, empty, cut off, no image, deeper than 16 bits, or when it
    has `size` in neither frame.
    """
    path = os.fspath(path)
    with _open(path, path) as image:
        return as_rgb(image, size, path, exif)


def open_bytes(
    content: bytes, size: tuple[int, int] | None = None, file: str = "image in memory", exif: bool = True
) -> Image.Image:
    """The content of an image file as `open_image` would give it; `file` names it in errors."""
    with _open(io.BytesIO(content), file) as image:
        return as_rgb(image, size, file, exif)


def bytes_size(content: bytes, file: str = "image in memory") -> tuple[int, int]:
    """(width, height) in pixels of the upright image in the content of a file. Raises ImageError."""
    with _open(io.BytesIO(content), file) as image:
        return _size(image, file)


def image_size(path: str | os.PathLike[str], exif: bool = True) -> tuple[int, int]:
    """(width, height) in pixels of the upright image, or without `exif` of the stored one, read from the head of the
    file. Raises ImageError."""
    path = os.fspath(path)
    with _open(path, path) as image:
        return _size(image, path, exif)
