"""The language-vision labeler: class names against dense CLIP features, calibrated, cut into instances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..data.dataset import Row
from .dense_clip import ATTENTIONS, Clip, similarity_grids
from .instances import Proposals, connected_components, filter_proposals, mask_nms, top_k, upsample_grid
from .pipeline import LabelerBase
from .text import TEMPLATES, embed_classes, split_synonyms

# Calibration spread below this is a class whose similarity never changes; dividing by it would make noise evidence.
MIN_STD = 1e-4


class DenseClipLabeler(LabelerBase):
    """Masks with classes from a vocabulary, without any training (UPLVP's mask proposal with a training-free CLIP).

    Args:
        clip: see `dense_clip.load_clip`. entries: vocabulary entries, synonyms separated by commas (best one counts).
        templates: prompts, {} for the name.
        attention, sigma, scale: last block (`dense_clip`); the defaults are NACLIP's, sigma in patches above 0.
        image_size: pixels of the picture's `side` ("shorter" or "longer"); None: twice the model's own size.
        window, stride: pixels; None: the model's own size, and half of it. window 0: whole pictures.
        calibration: "zscore" measures each class's mean and deviation over a first pass (`measure`) and takes the
            deviations above the mean as evidence; None uses `background` if given, else the plain cosine.
        background: names of what is no object; evidence is then the softmax probability at `logit_scale`.
        threshold: evidence that a pixel needs; None: 1.0 deviations, probability .5, or cosine .2 (UPLVP's t1).
        peak: evidence that an instance needs somewhere; None: 2.0 deviations, otherwise the threshold. It drops
            wide weak regions: more precision for a little recall.
        min_area, max_area: shares of the picture. max_border: share of the picture's border. nms: IoU per class.
        top: most instances a picture.

    Raises ValueError for an empty vocabulary, an unknown option, a sigma of 0 or less, or background names together
    with calibration.
    """

    name = "clip"

    def __init__(
        self,
        clip: Clip,
        entries: Sequence[str],
        templates: Sequence[str] = TEMPLATES,
        attention: str = "naclip",
        sigma: float = 5.0,
        scale: float = 1.0,
        image_size: int | None = None,
        side: str = "shorter",
        window: int | None = None,
        stride: int | None = None,
        calibration: str | None = "zscore",
        background: Sequence[str] = (),
        logit_scale: float = 50.0,
        threshold: float | None = None,
        peak: float | None = None,
        min_area: float = 0.005,
        max_area: float = 0.9,
        max_border: float = 1.0,
        nms: float = 0.5,
        top: int = 20,
        window_batch: int = 32,
    ) -> None:
        _check_options(attention, sigma, side, calibration, background)
        self.clip, self.encoder_name = clip, clip.name
        self.entries, self.templates, self.background = list(entries), list(templates), list(background)
        self.vocabulary = [split_synonyms(entry)[0] for entry in entries]
        self.text = embed_classes(clip.model, clip.tokenizer, [*self.entries, *self.background], self.templates)
        window = clip.image_size if window is None else window
        self.search = {
            "image_size": image_size or 2 * clip.image_size,
            "side": side,
            "window": window or None,
            "stride": stride or (window // 2 if window else None),
            "attention": attention,
            "sigma": sigma,
            "scale": scale,
        }
        self.window_batch = window_batch
        self.calibration, self.logit_scale = calibration, logit_scale
        default = 1.0 if calibration else 0.5 if background else 0.2
        self.threshold = default if threshold is None else threshold
        self.peak = (2.0 if calibration else self.threshold) if peak is None else peak
        self.filters = {"min_area": min_area, "max_area": max_area, "max_border": max_border}
        self.nms, self.top = nms, top
        self.mean: torch.Tensor | None = None
        self.std: torch.Tensor | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What the labels depend on, for the store's header."""
        own = ("entries", "templates", "background", "calibration", "logit_scale", "threshold", "peak", "nms", "top")
        return {name: getattr(self, name) for name in own} | self.search | self.filters

    def similarities(self, images: Sequence[Image.Image]) -> list[torch.Tensor]:
        """One (K + background, h, w) cosine map a picture, best synonym of each class."""
        grids = similarity_grids(self.clip, images, self.text.vectors, window_batch=self.window_batch, **self.search)
        return [self.text.per_class(grid, dim=0) for grid in grids]

    def measure(self, images: Sequence[Image.Image], rows: Sequence[Row] | None = None) -> list[dict[str, Any]]:
        """Number of cells of each picture, and every class's sum and sum of squares over them; [] uncalibrated."""
        if self.calibration is None:
            return []
        entries = []
        for grid in self.similarities(images):
            cells = grid.flatten(1).double().cpu()
            sums = {"total": cells.sum(dim=1).tolist(), "squares": (cells**2).sum(dim=1).tolist()}
            entries.append({"count": cells.shape[1], **sums})
        return entries

    def calibrate(self, statistics: list[dict[str, Any]]) -> dict[str, Any]:
        """Every class's mean and deviation over all places of the measured pictures; {} without calibration.

        Raises ValueError when there is no picture to calibrate on.
        """
        if self.calibration is None:
            return {}
        if not statistics:
            raise ValueError("no readable picture to calibrate the clip labeler on; use calibration=None")
        count = sum(entry["count"] for entry in statistics)
        total, squares = (
            torch.tensor([entry[name] for entry in statistics], dtype=torch.float64).sum(dim=0)
            for name in ("total", "squares")
        )
        mean = total / count
        std = (squares / count - mean**2).clamp_min(0).sqrt()
        return {"calibration": {"mean": mean.tolist(), "std": std.tolist(), "pictures": len(statistics)}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `calibrate` returned, from this or an earlier run."""
        if self.calibration is not None:
            values = state["calibration"]
            self.mean = torch.tensor(values["mean"], device=self.clip.device)
            self.std = torch.tensor(values["std"], device=self.clip.device).clamp_min(MIN_STD)

    def evidence(self, similarities: torch.Tensor) -> torch.Tensor:
        """(K + background, h, w) cosines -> (K, h, w): deviations above the mean, probabilities, or the cosines."""
        classes = len(self.entries)
        if self.calibration is not None:
            if self.mean is None or self.std is None:
                raise ValueError("the clip labeler is not calibrated: call restore(calibrate(measure(pictures))) first")
            return (similarities - self.mean[:, None, None]) / self.std[:, None, None]
        if self.background:
            return (similarities * self.logit_scale).softmax(dim=0)[:classes]
        return similarities

    def __call__(self, images: Sequence[Image.Image], rows: Sequence[Row] | None = None) -> list[Proposals]:
        """One `Proposals` with labels a picture, masks at the picture's size."""
        maps = self.similarities(images)
        return [self.instances(self.evidence(grid), image.size[::-1]) for grid, image in zip(maps, images)]

    def instances(self, evidence: torch.Tensor, size: tuple[int, int]) -> Proposals:
        """Class map, threshold, components, filters, NMS: (K, h, w) evidence -> proposals of `size` (H, W)."""
        # Enlarging never exceeds the largest cell, so a class below the threshold everywhere cannot own a pixel.
        active = torch.nonzero(evidence.amax(dim=(1, 2)) > self.threshold)[:, 0]
        if not len(active):
            return Proposals.build([], [], size, labels=[])
        best, owner = upsample_grid(evidence[active], size).max(dim=0)
        values, owners = best.cpu().numpy(), owner.cpu().numpy()
        masks, scores, labels = [], [], []
        minimum = max(1, int(self.filters["min_area"] * values.size))
        for position, label in enumerate(active.tolist()):
            for mask in connected_components((owners == position) & (values > self.threshold), minimum):
                if float(values[mask].max()) < self.peak:
                    continue
                masks.append(mask)
                scores.append(self._score(float(values[mask].mean())))
                labels.append(label)
        proposals = filter_proposals(Proposals.build(masks, scores, size, labels), **self.filters)
        return top_k(mask_nms(top_k(proposals, 5 * self.top), self.nms), self.top)

    def _score(self, mean_evidence: float) -> float:
        """Mean evidence as a score in [0, 1]; deviations through a sigmoid, .5 at the threshold."""
        if self.calibration is not None:
            return float(1 / (1 + np.exp(self.threshold - mean_evidence)))
        return float(np.clip(mean_evidence, 0, 1))


def _check_options(attention: str, sigma: float, side: str, calibration: str | None, background: Sequence[str]) -> None:
    if attention not in ATTENTIONS:
        raise ValueError(f"attention {attention!r} is unknown; use one of {', '.join(ATTENTIONS)}")
    if not sigma > 0:
        raise ValueError(f"sigma {sigma} is no width of a gaussian; use patches above 0 (NACLIP's is 5)")
    if side not in ("shorter", "longer"):
        raise ValueError(f"side {side!r} is unknown; use 'shorter' or 'longer'")
    if calibration not in (None, "zscore"):
        raise ValueError(f"calibration {calibration!r} is unknown; use 'zscore' or None")
    if calibration is not None and background:
        raise ValueError("background names and calibration exclude each other; set calibration=None")
