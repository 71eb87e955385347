"""Boxes and the regions in them: box changes, pooling from a pyramid, mask targets.

Boxes are x1, y1, x2, y2 in pixels of the padded input, float32. RoIAlign (arXiv 1703.06870) with the half-pixel shift.
"""

import math

import torch
from torch import Tensor, nn

from .torchvision_ops import roi_align

# Largest change of a box's side in one step, as in Fast R-CNN's descendants: a factor of 1000 / 16.
MAX_LOG_SCALE = abs(math.log(16 / 1000))


def apply_deltas(boxes: Tensor, deltas: Tensor, deviations: Tensor | list[float]) -> Tensor:
    """Moves and scales boxes (..., 4) by predicted changes (..., 4): shift of the center in box sides, log of scale.

    `deviations` (4) multiply the changes; the logs are then limited to +-4.135. Results may leave the image.
    """
    deltas = deltas * torch.as_tensor(deviations, dtype=deltas.dtype, device=deltas.device)
    start, end = boxes[..., :2], boxes[..., 2:]
    side = end - start
    center = (start + end) * 0.5 + side * deltas[..., :2]
    side = side * deltas[..., 2:].clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE).exp()
    return torch.cat([center - side * 0.5, center + side * 0.5], dim=-1)


def center_to_corners(boxes: Tensor) -> Tensor:
    """Center x, center y, width, height -> x1, y1, x2, y2: (..., 4) -> (..., 4)."""
    center, side = boxes[..., :2], boxes[..., 2:]
    return torch.cat([center - 0.5 * side, center + 0.5 * side], dim=-1)


def crop_masks(masks: Tensor, ids: Tensor, boxes: Tensor, side: int) -> Tensor:
    """Mask targets: the parts of bool masks (G, H, W) in boxes, resampled to a grid and thresholded at 0.5.

    ids (M,): the mask of every box; boxes (M, 4). Returns (M, side, side) float32 of zeros and ones. RoIAlign with as
    many samples as pixels, as mmdetection's `mask_target`; the caller clips boxes that reach beyond the masks.
    """
    if len(ids) == 0:
        return boxes.new_zeros((0, side, side), dtype=torch.float32)
    rois = torch.cat([ids[:, None].to(boxes.dtype), boxes], dim=1).float()
    with torch.autocast(masks.device.type, enabled=False):
        soft = roi_align(masks[:, None].float(), rois, side, spatial_scale=1.0, sampling_ratio=0, aligned=True)
    return (soft[:, 0] >= 0.5).float()


class PyramidPooler(nn.Module):
    """RoIAlign of boxes from the levels of a feature pyramid that suit their sizes.

    A box of scale s (root of its area, in pixels) is pooled from level floor(log2(s / finest_scale)), kept within the
    levels there are; level 0 has stride 4, each further one twice that.
    """

    def __init__(self, side: int, sampling_ratio: int = 2, finest_scale: int = 56, finest_stride: int = 4):
        super().__init__()
        self.side = side
        self.sampling_ratio = sampling_ratio
        self.finest_scale = finest_scale
        self.finest_stride = finest_stride

    def levels_of(self, boxes: Tensor, count: int) -> Tensor:
        """Level of every box: (M, 4) -> (M,) int64 in 0..count - 1. Boxes turned inside out go to level 0."""
        scale = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).clamp(min=0).sqrt()
        return (scale / self.finest_scale + 1e-6).log2().floor().clamp(0, count - 1).long()

    def forward(self, maps: list[Tensor], boxes: Tensor, images: Tensor, sizes: Tensor | None = None) -> Tensor:
        """Pooled regions (M, C, side, side).

        maps: level by level (B, C, h, w) float32; boxes (M, 4), which get no gradient; images (M,) int64, the
        image of every box. sizes (B, 2), height and width of the images in pixels: given, samples beyond a
        image's own end count as those beyond the end of a map do; the maps must have their edges repeated over
        the padding (`extend_edges`).
        """
        boxes = boxes.detach().to(maps[0].dtype)
        level = self.levels_of(boxes, len(maps))
        rois = torch.cat([images[:, None].to(boxes.dtype), boxes], dim=1)
        if sizes is None:
            return self._align(maps, rois, level, self.side, self.sampling_ratio)
        # Every sample by itself, so that those beyond the image can be left out of the means.
        samples = self._align(maps, rois, level, self.side * self.sampling_ratio, 1)
        stride = self.finest_stride * 2.0 ** level[:, None]
        end = (sizes[images] / stride).ceil()  # (M, 2) rows, columns
        rows = self._places(boxes[:, 1::2], stride) <= end[:, :1]
        columns = self._places(boxes[:, ::2], stride) <= end[:, 1:]
        samples = samples.masked_fill(~(rows[:, None, :, None] & columns[:, None, None, :]), 0.0)
        return self._means(samples)

    def _align(self, maps: list[Tensor], rois: Tensor, level: Tensor, side: int, ratio: int) -> Tensor:
        """RoIAlign of rois (M, 5), image and box, each from the map of its level (M,): (M, C, side, side)."""
        strides = [self.finest_stride * 2**index for index in range(len(maps))]
        if rois.device.type == "cpu" and not torch.compiler.is_compiling():
            # Every box from its own level only; the look at the indices costs nothing here.
            places = [(level == index).nonzero()[:, 0] for index in range(len(maps))]
            parts = [
                roi_align(map_, rois[place], side, 1 / stride, ratio, aligned=True)
                for map_, place, stride in zip(maps, places, strides, strict=True)
            ]
            return torch.cat(parts)[torch.cat(places).argsort()]
        # Without a look at the indices: all boxes from all levels, those of other levels moved to where samples are
        # zero. Kernels for accelerators skip such samples.
        nowhere = rois.new_tensor([0.0, -9e3, -9e3, -8e3, -8e3])
        return sum(
            roi_align(
                map_, torch.where((level == index)[:, None], rois, nowhere), side, 1 / stride, ratio, aligned=True
            )
            for index, (map_, stride) in enumerate(zip(maps, strides, strict=True))
        )

    def _means(self, samples: Tensor) -> Tensor:
        """Mean of the samples of every cell: (M, C, side * ratio, side * ratio) -> (M, C, side, side)."""
        shape = (*samples.shape[:2], self.side, self.sampling_ratio, self.side, self.sampling_ratio)
        return samples.reshape(shape).mean((3, 5))  # unlike pooling, it keeps no samples for the gradient

    def _places(self, ends: Tensor, stride: int | Tensor) -> Tensor:
        """Where samples lie between two ends in pixels, (..., 2) -> (..., side * ratio), in cells from the first."""
        count = self.side * self.sampling_ratio
        step = (torch.arange(count, device=ends.device, dtype=ends.dtype) + 0.5) / count
        return (ends[..., :1] + (ends[..., 1:] - ends[..., :1]) * step) / stride - 0.5
