"""Where the objects of synthetic scenes stand: anywhere, or in groups of one class that touch or hide one another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

if TYPE_CHECKING:
    from .synthetic import _Canvas


def fill(canvas: _Canvas, wanted: int, least: int, labels: Sequence[int], crowded: bool) -> None:
    """Paints `wanted` objects, or at least `least` where no more fit, of random `labels`, one by one or in groups."""
    rng, size = canvas.rng, canvas.size
    groups = _Groups(canvas, labels) if crowded else None
    for trial in range(20 * wanted):
        if len(canvas.labels) == wanted or (len(canvas.labels) >= least and trial >= 4 * wanted):
            break
        radius = max(rng.uniform(0.085, 0.24) * size * max(0.5, 1 - trial / (10 * wanted)), 8.0)
        if groups is not None:
            groups.add(radius)
        else:
            label = labels[int(rng.integers(len(labels)))]
            canvas.add_object(label, rng.uniform(0.08, 0.92, 2) * size, radius)


class _Groups:
    """Adds the objects of a crowded scene: two to four of one class side by side, then those of the next group."""

    def __init__(self, canvas: _Canvas, labels: Sequence[int]) -> None:
        self.canvas, self.labels, self.label, self.wanted = canvas, labels, 0, 0
        self.members: list[tuple[np.ndarray, float, int]] = []  # center, radius, place on the canvas

    def add(self, radius: float) -> None:
        """An object of about this radius, unless it would not touch its neighbor or hide something too much."""
        canvas, rng = self.canvas, self.canvas.rng
        if len(self.members) == self.wanted:  # a group is complete
            self.members, self.wanted = [], int(rng.integers(2, 5))
            self.label = self.labels[int(rng.integers(len(self.labels)))]
        if not self.members:
            center, beside = rng.uniform(0.15, 0.85, 2) * canvas.size, None
        else:
            near, its_radius, beside = self.members[int(rng.integers(len(self.members)))]
            radius = its_radius * rng.uniform(0.8, 1.2)
            angle = rng.uniform(0, 2 * math.pi)
            apart = (its_radius + radius) * rng.uniform(0.55, 0.95)
            center = near + apart * np.array([math.cos(angle), math.sin(angle)])

        def touches(mask: np.ndarray) -> bool:
            return beside is None or bool((ndimage.binary_dilation(mask) & (canvas.owner == beside)).any())

        if canvas.add_object(self.label, center, radius, accept=touches):
            self.members.append((center, radius, len(canvas.labels)))
