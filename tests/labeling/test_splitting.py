"""Groups are taken apart at necks or where features change; what is one object stays whole."""

import numpy as np
import pytest
import torch
from labeling_helpers import FixedEncoder, blob_image

from uplvp_hf.labeling.cutting.splitting import split_by_features, split_by_shape
from uplvp_hf.labeling.labelers.foreground import ForegroundLabeler

HEIGHT, WIDTH = 80, 120


def discs(*circles):
    """(row, column, radius) each: (N, H, W) bool."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([(y - row) ** 2 + (x - column) ** 2 <= radius**2 for row, column, radius in circles])


def iou(one, other):
    return (one & other).sum() / (one | other).sum()


@pytest.mark.parametrize(
    "circles", [[(40, 30, 18), (40, 60, 18)], [(40, 24, 20), (40, 54, 12)], [(30, 30, 14), (52, 44, 14), (30, 58, 14)]]
)
def test_touching_discs_are_separated(circles):
    apart = discs(*circles)
    parts = split_by_shape(apart.any(0), 4, 0.7)
    assert len(parts) == len(circles)
    assert np.array_equal(np.sum(parts, axis=0), apart.any(0))  # a partition
    assert all(max(iou(part, disc) for part in parts) > 0.85 for disc in apart)
    assert len(split_by_shape(apart.any(0), 4, 0.05)) == 1  # no neck is so narrow
    assert len(split_by_shape(apart.any(0), 2, 0.7)) <= 2


def test_one_object_stays_whole():
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    ellipse = ((y - 40) / 20) ** 2 + ((x - 60) / 45) ** 2 <= 1
    animal = ellipse | ((x > 20) & (x < 30) & (y > 40) & (y < 78))  # with a leg
    for mask in (ellipse, animal, discs((40, 60, 3))[0], np.ones((HEIGHT, WIDTH), dtype=bool)):
        (part,) = split_by_shape(mask, 4, 0.6)
        assert np.array_equal(part, mask)
    assert len(split_by_shape(np.zeros((HEIGHT, WIDTH), dtype=bool), 4, 0.6)) == 1


def features_of(left, right):
    """(8, 10, 15): one direction in the left half, another one in the right half, none outside of the objects."""
    feature = torch.zeros(8, 10, 15)
    feature[0], feature[left, 3:7, 2:7], feature[right, 3:7, 7:12] = 0.5, 4.0, 4.0
    return feature


def test_features_tell_two_objects_of_one_outline_apart():
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[24:56, 16:96] = True
    one, two = split_by_features(mask, features_of(1, 2), 4, 0.2, 0.3)
    assert not (one & two).any() and np.array_equal(one | two, mask)
    left = mask & (np.arange(WIDTH) < 56)
    assert max(iou(one, left), iou(two, left)) > 0.9
    assert len(split_by_features(mask, features_of(1, 1), 4, 0.2, 0.3)) == 1


def test_the_labeler_splits_where_it_is_told_to():
    image = blob_image(0, WIDTH, HEIGHT)
    sizes = {"norm_sizes": (WIDTH,), "component_sizes": (), "refine": False}
    counts = {}
    for split in ("components", "shape", "ncut"):
        (found,) = ForegroundLabeler(FixedEncoder(features_of(1, 2)), **sizes, split=split)([image])
        counts[split] = len(found)
    assert counts == {"components": 1, "shape": 1, "ncut": 2}
