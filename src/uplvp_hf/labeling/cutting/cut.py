"""From class evidence on a grid to one image's instances: refinement, class map, components, splitting, filters,
NMS."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image

from ...models.errors import UserError
from ..settings import Cutting
from .normalized_cut import split_by_ncut
from .proposals import Proposals, apply_nms, filter_proposals, top_k, upsample_grid
from .refine import pamr
from .segments import Segment, area_segments, class_layers, class_map, connected_segments, make_segment
from .splitting import on_grid, owners

MAX_ASPECT = 16  # longer over shorter side up to which `refine_size` is the shorter side
NACLIP_DILATIONS, NACLIP_SIZE = (8, 16), 336  # pixels; the latter of the shorter side


def cut_instances(
    evidence: torch.Tensor,
    size: tuple[int, int],
    cutting: Cutting,
    score: Callable[[float], float],
    image: Image.Image | None = None,
    features: torch.Tensor | None = None,
) -> Proposals:
    """One image's proposals of `size` (H, W), best first.

    evidence: (K, h, w). score: from an instance's mean evidence to [0, 1]. image: read by refine. features: (C, h, w)
    on the evidence's grid, read by split "ncut". `cutting.threshold`, `peak` and `min_score` must be numbers.
    Raises UserError when the image or the features that an option needs are missing.
    """
    # Neither enlarging nor refining exceeds the largest cell: a class below the threshold everywhere cannot win a
    # pixel.
    active = torch.nonzero(evidence.amax(dim=(1, 2)) > cutting.threshold)[:, 0]
    labels = active.tolist()
    if not labels:
        return Proposals.build([], [], size, labels=None if cutting.class_agnostic else [])
    maps = evidence[active]
    if cutting.refine is not None:
        maps = _refine(maps, image, cutting.refine_size)
    segments, values = _segments(maps, size, cutting)
    segments = [segment for segment in segments if segment.peak >= cutting.peak]
    if cutting.split == "ncut" and segments:
        segments = _split(segments, values, features, size, cutting)
        segments = [segment for segment in segments if segment.peak >= cutting.peak]
    if cutting.exclusive and not cutting.fill_holes:
        return _best(segments, labels, size, cutting, score, cutting.top)  # nothing overlaps
    proposals = _best(segments, labels, size, cutting, score, 5 * cutting.top)
    return top_k(apply_nms(proposals, cutting.nms_kind, cutting.nms, cutting.nms_sigma, cutting.min_score), cutting.top)


def _refine(maps: torch.Tensor, image: Image.Image | None, shorter: int) -> torch.Tensor:
    if image is None:
        raise UserError("refine='pamr' needs the image")
    scale = min(shorter / min(image.size), MAX_ASPECT * shorter / max(image.size))
    size = max(1, round(image.height * scale)), max(1, round(image.width * scale))
    resized = np.asarray(image.convert("RGB").resize(size[::-1], Image.Resampling.BILINEAR))
    pixels = torch.from_numpy(resized.copy()).permute(2, 0, 1)[None].to(maps.device).float() / 255
    dilations = [max(1, round(reach * shorter / NACLIP_SIZE)) for reach in NACLIP_DILATIONS]
    return pamr(pixels, upsample_grid(maps, size)[None], dilations=dilations)[0]


def _segments(
    maps: torch.Tensor, size: tuple[int, int], cutting: Cutting
) -> tuple[list[Segment], dict[int | None, np.ndarray]]:
    """Components, and the evidence in pixels they were cut from: by class, or for all (None)."""
    least = max(1, int(cutting.min_area * size[0] * size[1]))
    if cutting.exclusive:
        owners, values = class_map(maps, size, cutting.threshold)
        strong = set(torch.nonzero(maps.amax(dim=(1, 2)) >= cutting.peak)[:, 0].tolist())  # nowhere more when enlarged
        return connected_segments(owners, values, least, cutting.fill_holes, strong), {None: values}
    segments, layers = [], {}
    whole = slice(0, size[0]), slice(0, size[1])
    for label, area, values in class_layers(maps, size, cutting.threshold):
        segments.extend(area_segments(label, area, values, whole, least, cutting.fill_holes))
        if cutting.split == "ncut":
            layers[label] = values
    return segments, layers


def _split(
    segments: Sequence[Segment],
    values: dict[int | None, np.ndarray],
    features: torch.Tensor | None,
    size: tuple[int, int],
    cutting: Cutting,
) -> list[Segment]:
    """Every segment's parts; a pixel goes to the part whose enlarged mask is strongest there."""
    if features is None:
        raise UserError("split='ncut' needs the features of the image")
    cells = on_grid([segment.full(size) for segment in segments], tuple(features.shape[-2:]))
    parts_of = split_by_ncut(
        features,
        cells.to(features.device),
        cutting.max_parts,
        cutting.split_tau,
        max_ncut=cutting.max_ncut,
        center=True,
    )
    result = []
    for segment, parts in zip(segments, parts_of):
        if len(parts) < 2:
            result.append(segment)
            continue
        owner = owners(parts, size)[segment.box]
        evidence = values.get(None, values.get(segment.label))[segment.box]
        for number in range(len(parts)):
            mask = segment.mask & (owner == number)
            if np.isfinite(evidence[mask]).any():
                result.append(make_segment(segment.label, mask, evidence, segment.box))
    return result


def _best(
    segments: Sequence[Segment],
    labels: Sequence[int],
    size: tuple[int, int],
    cutting: Cutting,
    score: Callable[[float], float],
    wanted: int,
) -> Proposals:
    """The best segments that pass the filters, best first, at most `wanted`; full masks of a few at a time."""
    scores = np.asarray([score(segment.mean) for segment in segments], dtype=np.float32)
    order = np.argsort(-scores, kind="stable")
    kept, count = [], 0
    for start in range(0, len(order), wanted):
        chosen = order[start : start + wanted]
        proposals = Proposals.build(
            [segments[k].full(size) for k in chosen],
            scores[chosen],
            size,
            None if cutting.class_agnostic else [labels[segments[k].label] for k in chosen],
        )
        proposals = filter_proposals(
            proposals,
            cutting.min_area,
            cutting.max_area,
            cutting.max_border,
            cutting.min_score,
            np.inf if cutting.max_aspect is None else cutting.max_aspect,
            cutting.min_side,
        )
        kept.append(proposals)
        count += len(proposals)
        if count >= wanted:
            break
    if not kept:
        return Proposals.build([], [], size, labels=None if cutting.class_agnostic else [])
    if len(kept) == 1:
        return kept[0]
    masks, values = (np.concatenate([getattr(part, name) for part in kept]) for name in ("masks", "scores"))
    names = None if cutting.class_agnostic else np.concatenate([part.labels for part in kept])
    return top_k(Proposals(masks, values, names), wanted)
