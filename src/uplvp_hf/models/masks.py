"""The one home of masks: checks of polygons and run lengths, decoding, encoding, areas, tight boxes, overlaps.

An RLE is `{"size": [height, width], "counts": str}`, the compressed form of the COCO format
(https://github.com/cocodataset/cocoapi, common/maskApi.h), with `counts` as text so that it can be written as JSON.

Copied to the Hub beside the weights: needs numpy and torch, and pycocotools only where RLEs are read or written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import DataError

try:  # plain inference from the Hub does without
    from pycocotools import mask as coco_mask
except ImportError:
    coco_mask = None

if TYPE_CHECKING:  # where a tensor is needed it is imported, as reading and checking annotations does without
    import torch

# A vertex further away than this many image sides is a typing error; rasterizing it takes memory in proportion.
_FAR = 100
# Pixels by which exporters round a polygon over the border.
_ROUNDING = 1.0


def require_pycocotools(purpose: str) -> None:
    """Raises ImportError, with what to install, where pycocotools is missing."""
    if coco_mask is None:
        raise ImportError(f"{purpose} needs pycocotools: pip install pycocotools")


def _as_bool(masks: np.ndarray | torch.Tensor) -> np.ndarray:
    if not isinstance(masks, np.ndarray):
        masks = masks.detach().cpu().numpy()
    if masks.dtype != np.bool_:
        if not np.issubdtype(masks.dtype, np.integer):
            raise DataError(f"masks must be bool, got {masks.dtype}", remedy="Threshold probabilities first.")
        masks = masks != 0
    return masks


def encode_masks(masks: np.ndarray | torch.Tensor) -> list[dict[str, Any]]:
    """Encode (N, H, W) bool masks (array or tensor, any device) into N RLEs.

    Raises DataError for another number of axes or float masks.
    """
    masks = _as_bool(masks)
    if masks.ndim != 3:
        raise DataError(f"masks must be (N, H, W), got shape {tuple(masks.shape)}")
    if len(masks) == 0:
        return []
    # pycocotools wants column-major (H, W, N), which is the memory of a row-major (N, W, H): one copy, then views.
    columns = np.ascontiguousarray(masks.view(np.uint8).transpose(0, 2, 1))
    encoded = coco_mask.encode(columns.transpose(2, 1, 0))
    return [{"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")} for rle in encoded]


def encode_mask(mask: np.ndarray | torch.Tensor) -> dict[str, Any]:
    """Encode one (H, W) bool mask into an RLE. Raises DataError for another number of axes or a float mask."""
    if mask.ndim != 2:
        raise DataError(f"a mask must be (H, W), got shape {tuple(mask.shape)}")
    return encode_masks(mask[None])[0]


def encode_id_map(ids: np.ndarray, wanted: Sequence[int]) -> list[dict[str, Any]]:
    """The RLE of each id in `wanted` in an (H, W) map of whole numbers; an id that is not there gives an empty mask.

    The map is cut into runs once for all ids, so 60 objects cost little more than one.
    """
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise DataError(f"a map of ids must be (H, W) whole numbers, got {ids.dtype} of shape {ids.shape}")
    height, width = ids.shape
    columns = ids.T.ravel()  # RLEs run down the columns
    starts = np.concatenate([[0], np.flatnonzero(columns[1:] != columns[:-1]) + 1])
    ends, values = np.append(starts[1:], len(columns)), columns[starts]
    rles = []
    for wanted_id in wanted:
        own = np.flatnonzero(values == wanted_id)
        borders = np.stack([starts[own], ends[own]], axis=1).ravel()
        rles.append(rle_from_borders(borders, height, width))
    return rles


def rle_from_borders(borders: np.ndarray, height: int, width: int) -> dict[str, Any]:
    """The RLE of a mask that begins and ends, by turns, at `borders` (increasing, column * height + row)."""
    runs = np.diff(borders, prepend=0, append=height * width)  # of 0 and 1 in turn; the first may be empty
    rle = coco_mask.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width)
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}


def _polygons_to_rle(polygons: Sequence[Sequence[float]], height: int, width: int) -> dict[str, Any]:
    if len(polygons) == 0:
        raise DataError("the segmentation is empty")
    for part in polygons:
        reason = polygon_fault(part, height, width)
        if reason is not None:
            raise DataError(reason)
    parts = coco_mask.frPyObjects([[float(value) for value in part] for part in polygons], height, width)
    return coco_mask.merge(parts)


def polygon_fault(part: Any, height: int, width: int) -> str | None:
    """Why one polygon [x0, y0, x1, y1, ...] (pixels) cannot be rasterized, or None where it can."""
    if not isinstance(part, (list, tuple, np.ndarray)):
        return f"a polygon must be a list of numbers, got {part!r:.60}"
    if len(part) < 6:
        return f"a polygon needs at least 3 points (6 numbers), got {len(part)} numbers"
    if len(part) % 2:
        return f"a polygon needs pairs of numbers, got {len(part)} numbers"
    try:
        infinite = next((k for k, value in enumerate(part) if not math.isfinite(value)), None)
    except TypeError:
        return f"a polygon must be a list of numbers, got {part!r:.60}"
    if infinite is not None:
        return f"a polygon has a coordinate that is not finite: number {infinite} is {part[infinite]}"
    limit = _FAR * max(height, width)
    if max(part) > limit or min(part) < -limit:
        return f"a polygon reaches to {max(part, key=abs):g}, far outside the {width}x{height} image"
    return None


def polygon_overhang(part: Sequence[float], height: int, width: int) -> str | None:
    """How far a polygon without fault leaves the image, where that is more than the rounding of exporters (1 px), or
    None. Decoding cuts it off at the border."""
    for name, values, size in (("x", part[0::2], width), ("y", part[1::2], height)):
        if min(values) < -_ROUNDING or max(values) > size + _ROUNDING:
            return f"a polygon reaches from {name} = {min(values):g} to {max(values):g} in an image of {size} px"
    return None


def unpacked_runs(counts: str | bytes) -> np.ndarray:
    """Run lengths (int64) of compressed counts: little-endian groups of 5 bits with a sign and a continuation bit, each
    run from the fourth on as the difference to the one two before (rleFrString in maskApi.c).

    Raises DataError for text that is cut off or holds other characters.
    """
    codes = np.frombuffer(counts.encode("ascii", "replace") if isinstance(counts, str) else bytes(counts), np.uint8)
    if len(codes) == 0 or codes.min() < 48 or codes.max() > 111 or (int(codes[-1]) - 48) & 0x20:
        raise DataError("the compressed RLE counts are malformed or cut off")
    codes = codes.astype(np.int64) - 48
    bits, last = codes & 0x1F, (codes & 0x20) == 0
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    places = np.arange(len(codes)) - np.repeat(starts, ends - starts + 1)
    runs = np.add.reduceat(bits << np.minimum(5 * places, 55), starts)
    runs -= np.where(codes[ends] & 0x10, np.int64(1) << np.minimum(5 * (ends - starts + 1), 55), 0)
    runs[1::2], runs[2::2] = runs[1::2].cumsum(), runs[2::2].cumsum()
    return runs


def _check_counts(counts: Any, height: int, width: int) -> None:
    """pycocotools reads past the end of a malformed code, and returns memory it never wrote for one that is too short,
    so codes are checked before they are handed over."""
    if isinstance(counts, (str, bytes, bytearray)):
        runs = unpacked_runs(counts)
    elif isinstance(counts, (list, tuple, np.ndarray)):
        for run in counts:
            if isinstance(run, bool) or not isinstance(run, (int, np.integer)) or run < 0:
                raise DataError(f"RLE counts must be whole numbers >= 0, got {run!r}")
        runs = np.array(counts, dtype=object)  # whole numbers of any length
    else:
        raise DataError(f"RLE counts must be text or a list of whole numbers, got {type(counts).__name__}")
    total = int(runs.sum())
    if runs.min(initial=0) < 0 or total != height * width:
        raise DataError(
            f"the RLE counts are malformed: {len(runs)} runs sum to {total}, "
            f"the image has {height}x{width} = {height * width} pixels"
        )


def _rle_to_rle(segmentation: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    missing = [key for key in ("size", "counts") if key not in segmentation]
    if missing:
        raise DataError(f"the RLE has no {missing[0]!r}, only {sorted(segmentation)}")
    size, counts = list(segmentation["size"]), segmentation["counts"]
    if size != [height, width]:
        raise DataError(f"the RLE has size (height, width) {size}, the image {[height, width]}")
    _check_counts(counts, height, width)
    if isinstance(counts, (str, bytes, bytearray)):
        counts = counts.encode("ascii") if isinstance(counts, str) else bytes(counts)
        return {"size": [height, width], "counts": counts}
    return coco_mask.frPyObjects({"size": [height, width], "counts": [int(run) for run in counts]}, height, width)


def _to_coco(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """RLE with bytes counts, as pycocotools passes them around."""
    require_pycocotools("A COCO segmentation")
    if isinstance(segmentation, dict):
        return _rle_to_rle(segmentation, height, width)
    if isinstance(segmentation, (list, tuple)):
        return _polygons_to_rle(segmentation, height, width)
    raise DataError(f"a segmentation must be polygons or an RLE, got {type(segmentation).__name__}")


def segmentation_to_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """A COCO segmentation as a compressed RLE.

    Args:
        segmentation: polygons ([[x0, y0, x1, y1, ...], ...], pixels; what lies outside of the image is cut off),
            a compressed RLE (counts text or bytes), or an uncompressed one (counts a list of run lengths).
        height, width: of the image, pixels.

    Raises DataError when polygons have fewer than three points or coordinates that are not finite, and when an RLE is
    malformed or of another size than the image.
    """
    rle = _to_coco(segmentation, height, width)
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}


def decode_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray:
    """A COCO segmentation (see `segmentation_to_rle`, which lists what is raised) as a (height, width) bool mask."""
    return coco_mask.decode(_to_coco(segmentation, height, width)).astype(bool)


def decode_columns(rle: dict[str, Any], left: int, right: int) -> np.ndarray:
    """Columns `left` to `right` (exclusive) of an RLE that `segmentation_to_rle` gave, (height, right - left) bool.

    A narrow object takes a twentieth of the time and memory of decoding the image; a code of very many runs, such as
    that of noise, takes longer.
    """
    height = rle["size"][0]
    runs = unpacked_runs(rle["counts"])
    ends = runs.cumsum().clip(left * height, right * height)
    inside = np.arange(len(runs)) % 2 == 1
    return np.repeat(inside, np.diff(ends, prepend=left * height)).reshape(right - left, height).T


def _bytes_counts(rles: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "size": rle["size"],
            "counts": rle["counts"].encode("ascii") if isinstance(rle["counts"], str) else rle["counts"],
        }
        for rle in rles
    ]


def rle_areas(rles: Sequence[dict[str, Any]]) -> np.ndarray:
    """(N,) int64 numbers of pixels of N RLEs."""
    if len(rles) == 0:
        return np.zeros(0, dtype=np.int64)
    # One at a time: with numpy 2, pycocotools 2.0.11 overflows on a list of more than 255.
    return np.array([int(coco_mask.area(rle)) for rle in _bytes_counts(rles)], dtype=np.int64)


def rle_boxes(rles: Sequence[dict[str, Any]]) -> np.ndarray:
    """(N, 4) float64 boxes x, y, width, height (pixels) of N RLEs; zeros for an empty mask."""
    if len(rles) == 0:
        return np.zeros((0, 4))
    return coco_mask.toBbox(_bytes_counts(rles)).reshape(-1, 4)


def mask_area(masks: np.ndarray) -> np.ndarray:
    """(..., H, W) bool masks -> (...) int64 numbers of pixels."""
    return np.asarray(masks, dtype=bool).sum(axis=(-2, -1), dtype=np.int64)


def tight_boxes(masks: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
    """(..., H, W) bool masks -> (..., 4) int64 boxes x1, y1, x2, y2 in pixels, ends exclusive; zeros for an empty mask.

    Tensors in, tensors out; arrays in, arrays out. `torchvision.ops.masks_to_boxes` has inclusive ends, fails on an
    empty mask, and is not installed everywhere.
    """
    import torch

    if isinstance(masks, np.ndarray):
        return tight_boxes(torch.from_numpy(np.require(masks, np.bool_, ["C", "W"]))).numpy()
    if not masks.numel():
        return masks.new_zeros((*masks.shape[:-2], 4), dtype=torch.int64)
    first, last = [], []
    for line in (masks.any(-2), masks.any(-1)):  # columns (..., W), rows (..., H)
        place = torch.arange(1, line.shape[-1] + 1, device=masks.device)
        last.append((line * place).amax(-1))
        first.append(torch.where(last[-1] > 0, line.shape[-1] - (line * place.flip(0)).amax(-1), 0))
    return torch.stack([*first, *last], -1)


def mask_iou(a_rles: Sequence[dict[str, Any]], b_rles: Sequence[dict[str, Any]]) -> np.ndarray:
    """(N, M) float64 intersection over union of N with M RLEs of one image, 0 to 1; two empty masks give 0.

    Raises DataError when the masks are not all of one size.
    """
    if len(a_rles) == 0 or len(b_rles) == 0:
        return np.zeros((len(a_rles), len(b_rles)))
    overlap = coco_mask.iou(_bytes_counts(a_rles), _bytes_counts(b_rles), [False] * len(b_rles))
    overlap = np.nan_to_num(np.asarray(overlap), nan=0.0)
    if (overlap < 0).any():  # pycocotools' mark for masks of different sizes
        raise DataError("masks of different sizes have no overlap")
    return overlap


def mask_iou_matrix(masks: torch.Tensor, chunk: int = 1 << 16) -> torch.Tensor:
    """Pairwise IoU of (..., N, H, W) bool masks -> (..., N, N) float32. Two empty masks have IoU 0.

    Works through `chunk` pixels at a time: a float copy of all masks of a large image is never made.
    """
    import torch

    flat = masks.flatten(-2)
    inter = torch.zeros(*flat.shape[:-1], flat.shape[-2], device=masks.device)
    for part in flat.split(chunk, dim=-1):
        values = part.float()
        inter += values @ values.transpose(-1, -2)
    area = inter.diagonal(dim1=-2, dim2=-1)
    return inter / (area[..., :, None] + area[..., None, :] - inter).clamp_min(1)
