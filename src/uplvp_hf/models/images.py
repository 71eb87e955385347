"""The one way to see an image: whatever a file or an array holds becomes 8-bit RGB, or an ImageError.

Copied to the Hub beside the weights: no other module of the library is imported but siblings.
Pixels deeper than 8 bits are scaled by their full range; where a file does not say what that is, it is guessed from the
largest value, and a warning names the guess (see `to_rgb`). Transparent pixels show white.
"""

from __future__ import annotations

import io
import os
import warnings
from typing import Any

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
_BACK = {**_TURNS, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}


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


def _full_range(values: np.ndarray, stated: int | None, file: str) -> int:
    """The value that stands for white in integers deeper than 8 bits: what the file states, or a guess."""
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ImageError(f"pixels from {low} to {high}", file=file, remedy="Convert it to 8 or 16 bits.")
    if stated is not None and high <= stated <= 65535:
        return stated
    for bits in (8, 10, 12, 14):
        if 0 < high < 2**bits:
            warnings.warn(
                f"{file}: its 16-bit pixels end at {high}, so it is taken as an image of {bits} bits and brightened. "
                "If it is only dark, convert it to 8 bits.",
                stacklevel=5,
            )
            return 2**bits - 1
    return 65535


def _to_8_bits(values: np.ndarray, file: str, stated: int | None = None) -> np.ndarray:
    """Pixels of any number type as uint8: see `to_rgb` for the rule."""
    if values.dtype == np.uint8 or not values.size:
        return values.astype(np.uint8)
    if values.dtype == bool:
        return values.astype(np.uint8) * np.uint8(255)
    if np.issubdtype(values.dtype, np.integer):
        white = _full_range(values, stated, file)
        return ((values.astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 255):  # written so that NaN is refused too
        raise ImageError(
            f"float pixels from {low:g} to {high:g}", file=file, remedy="Scale them to 0..1, or convert them to 8 bits."
        )
    if high > 1:
        warnings.warn(f"{file}: its float pixels end at {high:g}, so they are taken as 0..255, not 0..1", stacklevel=4)
        return np.rint(values).astype(np.uint8)
    return np.rint(values * 255).astype(np.uint8)


def _stated_white(image: Image.Image) -> int | None:
    """The TIFF tag MaxSampleValue."""
    value = getattr(image, "tag_v2", {}).get(281)
    value = value[0] if isinstance(value, tuple) and value else value
    return value if isinstance(value, int) and value > 0 else None


def _decoded(image: Image.Image, file: str) -> Image.Image:
    """The image with its pixels. Pillow keeps the upper 8 bits of colors of 16, so that those of 10, 12 or 14 used bits
    would be black: they are scaled by the bits that are left, with a warning."""
    args = image.tile[0][3] if getattr(image, "tile", None) else None
    deep = image.mode in ("RGB", "RGBA") and ";16" in str(args[0] if isinstance(args, tuple) else args)
    try:
        image.load()
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise ImageError(f"cannot be decoded ({type(error).__name__}: {error})", file=file) from error
    if not deep:
        return image
    values = np.array(image)
    high = int(values[..., :3].max())
    bits = next((bits for bits in (10, 12, 14) if 0 < high < 2 ** (bits - 8)), None)
    if bits is None:
        return image
    warnings.warn(
        f"{file}: its 16-bit colors end below {2**bits}, so it is taken as an image of {bits} bits and brightened, "
        f"with the {bits - 8} bits that Pillow leaves of them. Convert it to 8 bits.",
        stacklevel=5,
    )
    values[..., :3] = values[..., :3].astype(np.uint16) * 255 // (2 ** (bits - 8) - 1)
    bright = Image.fromarray(values)
    bright.info = image.info
    return bright


def to_rgb(image: Image.Image, file: str = "image in memory") -> Image.Image:
    """Any PIL image as 8-bit RGB.

    Transparent pixels show white; palettes, CMYK, gray and two-level images are converted. Gray of 16 bits is scaled
    from 0..65535, or from 0 to what the TIFF tag MaxSampleValue states. Without that tag an image whose pixels all fit
    8, 10, 12 or 14 bits is taken to have that depth, with a warning. Floats are 0..1; if any is larger all are taken
    as 0..255, with a warning. Raises ImageError for integers outside of 0..65535 and floats outside of 0..255.
    """
    image = _decoded(image, file)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return Image.fromarray(_to_8_bits(np.asarray(image), file, _stated_white(image))).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")


def array_to_rgb(array: np.ndarray, name: str = "image in memory") -> Image.Image:
    """An array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of any number type as 8-bit RGB, by the rules of `to_rgb`.

    Raises ImageError for other shapes and ranges.
    """
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))) or not array.size:
        raise ImageError(
            f"an array of shape {array.shape}", file=name, remedy="An image is (H, W), (H, W, 3) or (H, W, 4)."
        )
    return to_rgb(Image.fromarray(_to_8_bits(array, name)), name)


def scaled_array(pixels: Any) -> Any:
    """A numpy or torch image in which 255 is white: deep integers become uint8, floats of 0..1 are multiplied by 255.

    Shape and kind stay; uint8 and floats of 0..255 come back as they are.
    """
    if isinstance(pixels, np.ndarray):
        floating, eight = np.issubdtype(pixels.dtype, np.floating), pixels.dtype == np.uint8
    else:
        floating, eight = pixels.is_floating_point(), str(pixels.dtype) == "torch.uint8"
    if eight or 0 in pixels.shape:
        return pixels
    if floating:
        return pixels * 255 if pixels.min() >= 0 and pixels.max() <= 1 else pixels
    if isinstance(pixels, np.ndarray):
        return _to_8_bits(pixels, "image in memory")
    return pixels.new_tensor(_to_8_bits(pixels.cpu().numpy(), "image in memory")).byte()


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
    image = _decoded(image, file)
    return _plain(image, _orientation(image, file) if exif else 1, size, file)


def _plain(image: Image.Image, orientation: int, size: tuple[int, int] | None, file: str) -> Image.Image:
    result = _turn(to_rgb(image, file), orientation, size, file)
    if result is image:
        result = image.copy()
    result.info = {}  # with its EXIF left in, the next reader would turn the image once more
    return result


def _file_as_rgb(image: Image.Image, size: tuple[int, int] | None, file: str, exif: bool) -> Image.Image:
    """`as_rgb` of a file that was just opened, whose stored frame counts whatever Pillow does with it."""
    orientation = _orientation(image, file)
    image = _decoded(image, file)
    if orientation != 1 and image.format == "TIFF" and _orientation(image, file) == 1:  # Pillow has turned it
        image = image.transpose(_BACK[orientation])
    return _plain(image, orientation if exif else 1, size, file)


def _open(source: str | io.BytesIO, file: str) -> Image.Image:
    if isinstance(source, str) and not os.path.isfile(source):
        raise ImageError("no such image", file=file)
    try:
        return Image.open(source)
    except Exception as error:  # as above; DecompressionBombError too
        raise ImageError(f"is not an image ({type(error).__name__}: {error})", file=file) from error


def _size(image: Image.Image, file: str, exif: bool = True) -> tuple[int, int]:
    width, height = image.size
    if image.format == "TIFF":  # whose size Pillow gives as it will turn it
        width, height = image.tag_v2.get(256, width), image.tag_v2.get(257, height)
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
        return _file_as_rgb(image, size, path, exif)


def open_bytes(
    content: bytes, size: tuple[int, int] | None = None, file: str = "image in memory", exif: bool = True
) -> Image.Image:
    """The content of an image file as `open_image` would give it; `file` names it in errors."""
    with _open(io.BytesIO(content), file) as image:
        return _file_as_rgb(image, size, file, exif)


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
