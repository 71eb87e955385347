"""Images of results: instances drawn over an image, and sheets of images to look through."""

from __future__ import annotations

import base64
import colorsys
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

FILL = 0.42  # opacity of an instance: the texture below stays visible
MIN_SIDE = 480  # pixels; smaller images are enlarged, so that captions are legible and leave room


def instance_color(index: int) -> tuple[int, int, int]:
    """RGB of the `index`-th instance: neighbors in the list are far apart on the color circle (golden angle)."""
    saturation, value = ((0.85, 1.0), (0.65, 0.95), (1.0, 0.8))[index // 8 % 3]
    red, green, blue = colorsys.hsv_to_rgb((0.58 + index * 0.618034) % 1, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_instances(
    image: Image.Image,
    masks: Sequence[Any] | np.ndarray,
    labels: Sequence[int],
    scores: Sequence[float] | None = None,
    id2label: Mapping[int, str] | None = None,
) -> Image.Image:
    """The image with every instance tinted, outlined and named.

    Args:
        image: the original image.
        masks: N masks of its size: (N, H, W) bool array or tensor, or a list of COCO segmentations (RLE, polygons).
        labels: N class indices.
        scores: N scores 0 to 1, shown behind the name; None: names only.
        id2label: class index to name; None: the index is shown.

    Returns:
        A new RGB image. Its longer side is at least 480 pixels: smaller ones are enlarged by a whole factor.

    Raises:
        ValueError: if there are not as many labels or scores as masks, or a mask has another size than the image.
    """
    count = len(masks)
    for name, values in (("labels", labels), ("scores", scores)):
        if values is not None and len(values) != count:
            raise ValueError(f"{len(values)} {name} for {count} masks.")
    factor = math.ceil(MIN_SIDE / max(image.size))
    size = (image.width * factor, image.height * factor)
    canvas = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    shapes = [_mask_image(mask, image.size, size) for mask in masks]
    areas = [np.count_nonzero(np.asarray(shape)) for shape in shapes]
    line = max(2, round(max(size) / 260))
    for index in sorted(range(count), key=lambda k: -areas[k]):  # small ones on top
        _paint(canvas, shapes[index], instance_color(index), line)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(max(13, round(max(size) / 44)))
    placed: list[tuple[float, float, float, float]] = []
    for index in range(count):
        box = shapes[index].getbbox()
        if box is None:
            continue
        label = int(labels[index])
        text = str(label) if id2label is None else str(id2label[label])
        text = text if scores is None else f"{text} {float(scores[index]):.2f}"
        placed.append(_caption(draw, font, text, box, instance_color(index), size, placed))
    return canvas


def _mask_image(mask: Any, size: tuple[int, int], enlarged: tuple[int, int]) -> Image.Image:
    """Any mask as a PIL image of 0 and 255, enlarged with smooth borders."""
    if isinstance(mask, (dict, list, tuple)):
        mask = _decoded(mask, size[1], size[0])
    mask = np.asarray(mask.cpu() if hasattr(mask, "cpu") else mask).astype(bool)
    if mask.shape != (size[1], size[0]):
        raise ValueError(f"A mask of {mask.shape} for an image of {(size[1], size[0])} (height, width).")
    image = Image.fromarray(mask.astype(np.uint8) * 255).resize(enlarged, Image.Resampling.BILINEAR)
    return image.point(lambda value: 255 * (value > 127))


def _decoded(segmentation: Any, height: int, width: int) -> np.ndarray:
    """(H, W) mask of a COCO segmentation."""
    from uplvp_hf.data import decode_segmentation  # here, as in a Space this file runs without the library

    return decode_segmentation(segmentation, height, width)


def _paint(canvas: Image.Image, shape: Image.Image, color: tuple[int, int, int], line: int) -> None:
    """Tints the mask and draws its outline: inside in color, and a thin dark rim outside against bright grounds."""
    box = shape.getbbox()
    if box is None:
        return
    canvas.paste(color, box, shape.crop(box).point(lambda value: round(value * FILL)))
    # Only around the instance, or large images take seconds for each. What a crop takes from beyond the image is
    # zero, so that an instance that touches the border gets its outline there too.
    area = (box[0] - line, box[1] - line, box[2] + line, box[3] + line)
    inner = framed = shape.crop(area)
    outer = framed.filter(ImageFilter.MaxFilter(3))
    for _ in range(line):
        inner = inner.filter(ImageFilter.MinFilter(3))
    mask = np.asarray(framed) > 0
    rim, edge = (np.asarray(outer) > 0) & ~mask, mask & ~(np.asarray(inner) > 0)
    canvas.paste((20, 20, 20), area, Image.fromarray(rim.astype(np.uint8) * 150))
    canvas.paste(color, area, Image.fromarray(edge.astype(np.uint8) * 255))


def _caption(
    draw: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont,
    text: str,
    box: tuple[int, int, int, int],
    color: tuple[int, int, int],
    size: tuple[int, int],
    placed: list[tuple[float, float, float, float]],
) -> tuple[float, float, float, float]:
    """Writes `text` on a plate at the top left of the instance's box, moved down past captions in the way."""
    ascent, descent = font.getmetrics()
    width, height = font.getlength(text) + 8, ascent + descent + 3
    x = max(0, min(box[0], size[0] - width))
    wanted = max(0, min(box[1] - height if box[1] >= height else box[1], size[1] - height))
    tried = [wanted + step * (height + 1) for step in (0, 1, 2, 3, -1, -2, 4, 5, -3)]
    free = [y for y in tried if 0 <= y <= size[1] - height and not any(_meets(x, y, width, height, p) for p in placed)]
    y = free[0] if free else wanted
    plate = (x, y, x + width, y + height)
    draw.rounded_rectangle(plate, radius=3, fill=color, outline=(20, 20, 20))
    bright = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 140
    draw.text((x + 4, y + 1), text, font=font, fill=(0, 0, 0) if bright else (255, 255, 255))
    return plate


def _meets(x: float, y: float, width: float, height: float, other: tuple[float, float, float, float]) -> bool:
    return x < other[2] and other[0] < x + width and y < other[3] and other[1] < y + height


def overlay_uri(
    image: Image.Image,
    segmentations: Sequence[Any],
    labels: Sequence[int],
    scores: Sequence[float] | None,
    id2label: Mapping[int, str],
    side: int,
) -> str:
    """An image with its instances, at most `side` pixels long, as a JPEG data URI for a page.

    segmentations: N COCO segmentations; their masks are decoded one at a time. The rest is as for `draw_instances`.
    """
    scale = min(1.0, side / max(image.size))
    small = tuple(max(1, round(length * scale)) for length in image.size)
    masks = []
    for segmentation in segmentations:
        mask = Image.fromarray(_decoded(segmentation, image.height, image.width))
        masks.append(np.asarray(mask if scale == 1 else mask.resize(small, Image.Resampling.NEAREST)))
    resized = image if scale == 1 else image.resize(small, Image.Resampling.BILINEAR)
    return _jpeg_uri(draw_instances(resized, masks, labels, scores, id2label))


def _jpeg_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def class_colors(count: int) -> np.ndarray:
    """RGB (count, 3) of 0 to 255: neighboring numbers get hues far apart, by steps of the golden ratio."""
    hues = [(index * 0.618034) % 1 for index in range(count)]
    return np.array([colorsys.hsv_to_rgb(hue, 0.75, 0.95) for hue in hues]).reshape(-1, 3) * 255


def draw_label_map(image: Image.Image, labels: np.ndarray, count: int) -> Image.Image:
    """The image under the colors of its classes. labels (H, W): 0 to count - 1; pixels of other numbers stay bare."""
    pixels, known = np.asarray(image.convert("RGB"), dtype=np.float32), labels < count
    pixels = np.where(known[..., None], 0.5 * pixels + 0.5 * class_colors(count)[np.where(known, labels, 0)], pixels)
    return Image.fromarray(pixels.round().astype(np.uint8))


def label_map_uri(image: Image.Image, labels: np.ndarray, count: int, side: int) -> str:
    """`draw_label_map`, at most `side` pixels long, as a JPEG data URI for a page."""
    scale = min(1.0, side / max(image.size))
    small = [max(1, round(length * scale)) for length in image.size]
    resized = Image.fromarray(labels.astype(np.int32)).resize(small, Image.Resampling.NEAREST)
    return _jpeg_uri(draw_label_map(image.resize(small, Image.Resampling.BILINEAR), np.asarray(resized), count))


def contact_sheet(
    images: Sequence[Image.Image], columns: int = 4, captions: Sequence[str] | None = None, cell: int = 256
) -> Image.Image:
    """Images side by side on white, each scaled to fit a square of `cell` pixels, captions underneath.

    Raises:
        ValueError: without images, with fewer than one column, or with another number of captions than images.
    """
    if not images or columns < 1:
        raise ValueError(f"{len(images)} images in {columns} columns make no sheet.")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"{len(captions)} captions for {len(images)} images.")
    columns = min(columns, len(images))
    gap, font = max(6, cell // 32), ImageFont.load_default(max(11, cell // 21))
    line = 0 if captions is None else sum(font.getmetrics()) + 4
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (cell + gap) + gap, rows * (cell + line + gap) + gap), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for index, image in enumerate(images):
        left, top = gap + index % columns * (cell + gap), gap + index // columns * (cell + line + gap)
        scale = cell / max(image.size)
        small = image.convert("RGB").resize([max(1, round(side * scale)) for side in image.size])
        sheet.paste(small, (left + (cell - small.width) // 2, top + (cell - small.height) // 2))
        if captions is not None:
            text = _shortened(str(captions[index]), font, cell)
            draw.text((left + cell / 2, top + cell + 2), text, font=font, fill=(40, 40, 40), anchor="ma")
    return sheet


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
