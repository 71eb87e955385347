import pickle

import numpy as np
import pytest
import torch

from uplvp_hf.data import InstanceMasks
from uplvp_hf.data.instance_masks import make_patch


def blobs(count, height, width, seed=0):
    """Overlapping noisy rectangles, one of a single pixel and one of the whole canvas among them."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, height, width), dtype=bool)
    for mask in masks[:-2]:
        y, x = rng.integers(0, height - 5), rng.integers(0, width - 5)
        part = mask[y : y + rng.integers(2, height), x : x + rng.integers(2, width)]
        part[...] = rng.random(part.shape) < 0.7
        mask[y, x] = True
    masks[-2, height - 1, width - 1] = True
    masks[-1] = True
    return masks


@pytest.mark.parametrize(("height", "width"), [(37, 61), (64, 64), (6, 200)])
def test_dense_masks_come_back(height, width):
    dense = blobs(9, height, width)
    masks = InstanceMasks.from_dense(dense)
    back = masks.dense()
    assert back.dtype == torch.bool and masks.shape == back.shape == (9, height, width) and len(masks) == 9
    np.testing.assert_array_equal(back, dense)
    np.testing.assert_array_equal(masks.union(), dense.any(axis=0))
    for mask, (x1, y1, x2, y2) in zip(dense, masks.boxes.tolist(), strict=True):
        y, x = np.nonzero(mask)
        assert (x1, y1, x2, y2) == (x.min(), y.min(), x.max() + 1, y.max() + 1)
    np.testing.assert_array_equal(masks.select([7, 0]).dense(), dense[[7, 0]])
    wide = masks.on_canvas(height + 3, width + 5).dense()
    np.testing.assert_array_equal(wide[:, :height, :width], dense)
    assert wide.sum() == dense.sum() and wide.shape == (9, height + 3, width + 5)


def test_values_are_compared_and_survive_pickling():
    masks = InstanceMasks.from_dense(blobs(5, 30, 40))
    again = pickle.loads(pickle.dumps(masks))
    assert again == masks and torch.equal(again.dense(), masks.dense())
    assert masks.select(range(4)) != masks and masks.on_canvas(30, 41) != masks


def test_no_masks_and_masks_without_pixels():
    none = InstanceMasks.from_dense(np.zeros((0, 8, 9), dtype=bool))
    assert len(none) == 0 and none.dense().shape == (0, 8, 9) and none.boxes.shape == (0, 4)
    assert not none.union().any() and none.nbytes == 0
    assert make_patch(np.zeros((4, 5), dtype=bool)) is None
    with pytest.raises(ValueError, match="mask 1 of 2 is empty"):
        InstanceMasks.from_dense(np.stack([np.ones((4, 4), dtype=bool), np.zeros((4, 4), dtype=bool)]))
    with pytest.raises(ValueError, match="8x9 pixels do not fit a canvas of 9x8"):
        none.on_canvas(9, 8)


def test_a_patch_keeps_its_place():
    mask = np.zeros((10, 12), dtype=bool)
    mask[3:5, 7:11] = True
    patch = make_patch(mask, left=100, top=50)
    assert patch[:4] == (107, 53, 4, 2) and patch.mask().all()
