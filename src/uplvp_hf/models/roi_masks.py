"""Masks that live in boxes: pasting small grids of values onto an image. Needs torch only."""

import torch
from torch import Tensor


def paste_masks(values: Tensor, boxes: Tensor, size: tuple[int, int], offset: tuple[int, int] = (0, 0)) -> Tensor:
    """Resamples a grid per box onto the pixels of an image.

    values (N, S, S') of any range, the first row and column at the top left corner of the box; boxes (N, 4) x1, y1,
    x2, y2 in pixels of the image; size (height, width) of the image, or of the part of it that begins at `offset`
    (top, left). Returns (N, height, width) float32: bilinear
    between cell centers at every pixel center, zero outside the box, falling to zero within half a cell of its border
    (the outermost cells have zeros as neighbors). A box without area gives zeros.

    Apply a threshold to pasted probabilities, not to pasted logits. Memory is N * height * width * 4 bytes: paste a few
    boxes at a time. Bilinear interpolation in an upright box is separable, so this is two small matrix products a box.
    """
    boxes = boxes.float()
    height, width = size
    with torch.autocast(values.device.type, enabled=False):  # it would multiply in half precision
        rows = _weights(boxes[:, 1], boxes[:, 3], offset[0], height, values.shape[-2])
        columns = _weights(boxes[:, 0], boxes[:, 2], offset[1], width, values.shape[-1])
        return rows @ (values.float() @ columns.transpose(1, 2))


def _weights(start: Tensor, end: Tensor, first: int, pixels: int, cells: int) -> Tensor:
    """Share of every cell in every pixel, (N, pixels, cells), at most two of a row not zero."""
    centers = torch.arange(first, first + pixels, device=start.device, dtype=torch.float32) + 0.5
    extent = (end - start)[:, None]
    place = (centers - start[:, None]) / extent * cells - 0.5  # in cells from the center of the first one
    place = torch.where(extent > 0, place, -2.0)
    distance = (place[..., None] - torch.arange(cells, device=start.device, dtype=torch.float32)).abs()
    return (1 - distance).clamp(min=0)
