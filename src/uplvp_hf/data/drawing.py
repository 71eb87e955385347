"""Shapes, textures and colors of the synthetic scenes. Angles in radians, lengths in px, colors RGB in [0, 1]."""

from __future__ import annotations

import colorsys
import math

import numpy as np
from PIL import Image, ImageDraw

_SUPERSAMPLE = 4  # coverage of a pixel in steps of 1/16


def background(rng: np.random.Generator, size: int, flat: bool) -> np.ndarray:
    """(size, size, 3) float32: two muted colors mixed by a pattern of one of five families, plus a weak second one."""
    first, second = muted(rng), muted(rng)
    if flat:
        return np.broadcast_to(first.astype(np.float32), (size, size, 3)).copy()
    families = (_noise_pattern, gradient, _checker, _stripes, _blobs)
    pattern = families[rng.integers(len(families))](rng, size)
    pixels = first + rng.uniform(0.4, 1.0) * pattern[..., None] * (second - first)
    relief = smooth_noise(rng, size, rng.uniform(3, 30)) - 0.5
    return (pixels + rng.uniform(0, 0.25) * relief[..., None]).clip(0, 1).astype(np.float32)


def _noise_pattern(rng: np.random.Generator, size: int) -> np.ndarray:
    octaves = [smooth_noise(rng, size, cell) for cell in (24.0, 12.0, 6.0, 3.0)]
    return np.average(octaves, axis=0, weights=(0.4, 0.3, 0.2, 0.1))


def gradient(rng: np.random.Generator, size: int) -> np.ndarray:
    along = ramp(rng, size)
    return (along - along.min()) / (along.max() - along.min())


def _checker(rng: np.random.Generator, size: int) -> np.ndarray:
    u, v = ramp(rng, size, both=True) / rng.uniform(5, 24)
    return ((np.floor(u) + np.floor(v)) % 2).astype(np.float32)


def _stripes(rng: np.random.Generator, size: int) -> np.ndarray:
    wave = np.sin(2 * np.pi * ramp(rng, size) / rng.uniform(6, 30))
    return (0.5 + rng.uniform(0.5, 2.0) * wave).clip(0, 1)


def _blobs(rng: np.random.Generator, size: int) -> np.ndarray:
    noise = smooth_noise(rng, size, rng.uniform(10, 30))
    return (0.5 + rng.uniform(4, 12) * (noise - np.median(noise))).clip(0, 1)


def smooth_noise(rng: np.random.Generator, size: int, cell: float) -> np.ndarray:
    """(size, size) float32 in [0, 1], random values every `cell` px, interpolated."""
    cells = max(2, round(size / cell) + 1)
    grid = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
    return np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC)).clip(0, 1)


def ramp(rng: np.random.Generator, size: int, both: bool = False) -> np.ndarray:
    """(size, size) float32, the position in px along a random direction; with `both` (2, size, size), across it too."""
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.ogrid[:size, :size]
    along = x * np.float32(math.cos(angle)) + y * np.float32(math.sin(angle))
    return np.stack([along, y * np.float32(math.cos(angle)) - x * np.float32(math.sin(angle))]) if both else along


def outlines(shape: str, rng: np.random.Generator) -> list[np.ndarray]:
    """Outline polygons (P, 2) of a shape of radius about 1: the outer one, then its holes."""
    if shape == "disc":
        return [circle(40)]
    if shape == "ring":
        return [circle(40), circle(40) * rng.uniform(0.4, 0.58)]
    if shape == "star":
        radii = np.where(np.arange(10) % 2, rng.uniform(0.4, 0.5), 1.1)
        return [circle(10) * radii[:, None]]
    if shape == "cross":
        w = rng.uniform(0.28, 0.4)
        arm = np.array([[w, w], [w, 1], [-w, 1], [-w, w]])
        turns = [np.array([[c, -s], [s, c]]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
        return [np.concatenate([arm[1:] @ turn.T for turn in turns])]
    if shape == "heart":
        t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return [np.stack([16 * np.sin(t) ** 3, -y], axis=1) / 16]
    corners = {"triangle": 3, "square": 4, "hexagon": 6}[shape]
    return [circle(corners) * (1.15 if corners < 5 else 1.0)]


def circle(points: int) -> np.ndarray:
    angles = np.arange(points) * (2 * np.pi / points)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def placed(points: np.ndarray, center: np.ndarray, radius: float, aspect: float, angle: float) -> np.ndarray:
    """Points in px: stretched by `aspect` (area kept), scaled, turned and moved."""
    c, s = math.cos(angle), math.sin(angle)
    stretched = points * [radius * math.sqrt(aspect), radius / math.sqrt(aspect)]
    return stretched @ np.array([[c, s], [-s, c]]) + center


def coverage(size: int, outlines: list[np.ndarray]) -> np.ndarray:
    """(size, size) float32 in [0, 1]: the share of each pixel inside the first outline and outside the others."""
    fine = Image.new("L", (size * _SUPERSAMPLE,) * 2)
    draw = ImageDraw.Draw(fine)
    for index, outline in enumerate(outlines):
        draw.polygon([tuple(point) for point in (outline * _SUPERSAMPLE).tolist()], fill=0 if index else 255)
    return np.asarray(fine.reduce(_SUPERSAMPLE), np.float32) / 255


def polygon_area(points: np.ndarray) -> float:
    x, y = points.T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    return np.array(colorsys.hsv_to_rgb((hue / 360) % 1.0, saturation, value))


def muted(rng: np.random.Generator) -> np.ndarray:
    return rgb(rng.uniform(0, 360), rng.uniform(0.0, 0.4), rng.uniform(0.15, 0.95))


def light(seed: int, cast: float) -> np.ndarray:
    """Factors (3,) of red, green and blue under colored light, from 1 - cast to 1 + cast."""
    return 1 + cast * np.random.default_rng([seed, 2]).uniform(-1, 1, 3)  # apart from everything else of a scene
