"""Boxes and regions against recorded tensors and against one sample at a time."""

import math
import re

import pytest
import torch

from uplvp_hf.models.roi import MAX_LOG_SCALE, PyramidPooler, apply_deltas, center_to_corners, crop_masks
from uplvp_hf.models.roi_masks import paste_masks


@pytest.fixture(scope="module")
def recorded(golden):
    return golden("mmdet_primitives")[0]


@pytest.mark.golden
def test_recorded_box_coder(recorded, close):
    deltas = recorded["coder.deltas"]
    # the recording has changes beyond the limit
    assert (deltas[:, 2:].abs() > MAX_LOG_SCALE).any()
    decoded = apply_deltas(recorded["box.a"], deltas, [0.5, 0.5, 1.0, 1.0])
    close(decoded, recorded["coder.decoded"])
    # decoding what was encoded leads back, where nothing is limited
    back = apply_deltas(recorded["box.a"], recorded["coder.encoded"], [0.5, 0.5, 1.0, 1.0])
    close(back, recorded["box.b"])


@pytest.mark.golden
def test_recorded_roi_align(recorded, close):
    names = [re.fullmatch(r"roialign\.out(\d+)_sr(\d+)_scale([\d.]+)", name) for name in recorded]
    cases = [(int(found[1]), int(found[2]), float(found[3]), recorded[found[0]]) for found in names if found]
    cases = [case for case in cases if case[1] > 0]  # 0: as many samples as pixels, which masks alone are cut with
    assert cases
    for case in cases:
        check_roi_align(recorded["roialign.feat"], recorded["roialign.rois"], *case, close)


def check_roi_align(map_, rois, side, ratio, scale, expected, close):
    stride = round(1 / scale)
    pooler = PyramidPooler(side, ratio, finest_stride=stride)
    pooled = pooler([map_], rois[:, 1:], rois[:, 0].long())
    close(pooled, expected)
    # images that fill the canvas, sample by sample
    sizes = torch.tensor([[stride * map_.shape[2], stride * map_.shape[3]]] * len(map_)).float()
    single = pooler([map_], rois[:, 1:], rois[:, 0].long(), sizes)
    close(single, expected)


def only(tensors, beginning):
    """The one tensor of such a name; its end is the size."""
    (name,) = (name for name in tensors if name.startswith(beginning))
    return tensors[name]


@pytest.mark.golden
def test_recorded_mask_targets_and_pasting(recorded, close):
    masks, boxes = recorded["mask_target.masks"].bool(), recorded["mask_target.boxes"]
    height, width = masks.shape[-2:]
    clipped = boxes.clamp(min=0).minimum(torch.tensor([width, height, width, height]))
    wanted = only(recorded, "mask_target.out")
    targets = crop_masks(masks, recorded["mask_target.gt_inds"], clipped, wanted.shape[-1])
    assert torch.equal(targets, wanted)

    expected = only(recorded, "paste.out")
    pasted = paste_masks(recorded["paste.masks"][:, 0], recorded["paste.boxes"], tuple(expected.shape[-2:]))
    close(pasted, expected)


def test_pasting_of_an_even_grid_covers_the_box():
    boxes = torch.tensor([[2.0, 3.0, 10.0, 9.0], [5.0, 5.0, 5.0, 8.0], [-4.0, -4.0, 4.0, 4.0]])
    pasted = paste_masks(torch.ones(3, 28, 28), boxes, (12, 16))
    expected = torch.zeros(3, 12, 16)
    expected[0, 3:9, 2:10] = 1  # pixel centers within; no area: nothing; beyond the border: cut off
    expected[2, :4, :4] = 1
    assert torch.equal((pasted > 0.5).float(), expected)
    assert paste_masks(torch.ones(0, 28, 28), torch.zeros(0, 4), (4, 5)).shape == (0, 4, 5)


def align_slowly(map_, box, side, ratio, stride):
    """RoIAlign of one box from (C, h, w), sample by sample."""
    channels, height, width = map_.shape
    x1, y1, x2, y2 = (value / stride - 0.5 for value in box)
    pooled = torch.zeros(channels, side, side)
    for row in range(side * ratio):
        for column in range(side * ratio):
            y = y1 + (row + 0.5) * (y2 - y1) / (side * ratio)
            x = x1 + (column + 0.5) * (x2 - x1) / (side * ratio)
            if y < -1 or y > height or x < -1 or x > width:
                continue
            y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            value = (
                map_[:, top, left] * (1 - y + top) * (1 - x + left) + map_[:, top, right] * (1 - y + top) * (x - left)
                + map_[:, bottom, left] * (y - top) * (1 - x + left) + map_[:, bottom, right] * (y - top) * (x - left)
            )  # fmt: skip
            pooled[:, row // ratio, column // ratio] += value / ratio**2
    return pooled


@pytest.fixture
def pyramid():
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 3, 64 // 2**level, 96 // 2**level, generator=generator) for level in range(4)]
    center = torch.rand(2, 9, 2, generator=generator) * torch.tensor([384.0, 256.0])
    side = 300 * torch.rand(2, 9, 2, generator=generator) ** 2 + 4
    return maps, torch.cat([center - side / 2, center + side / 2], -1)


@pytest.mark.parametrize("way", ["index", "compiled"])
def test_regions_come_from_the_level_of_their_size(pyramid, way, monkeypatch):
    maps, boxes = pyramid
    pooler = PyramidPooler(3, 2, finest_scale=28)
    image = torch.arange(2).repeat_interleave(9)
    if way == "compiled":  # the branch without a look at the indices
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    pooled = pooler(maps, boxes.flatten(0, 1), image)
    used = set()
    for row, (i, box) in enumerate(zip(image.tolist(), boxes.flatten(0, 1).tolist(), strict=True)):
        scale = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
        level = min(max(math.floor(math.log2(scale / 28 + 1e-6)), 0), 3)
        used.add(level)
        expected = align_slowly(maps[level][i], box, 3, 2, 4 * 2**level)
        torch.testing.assert_close(pooled[row], expected, rtol=1e-5, atol=3e-5)
    assert len(used) >= 3


@pytest.mark.parametrize("way", ["index", "compiled"])
def test_regions_end_where_the_image_ends(pyramid, way, monkeypatch):
    """On a larger canvas, with edges repeated over the padding: as on a canvas of the image's own size."""
    maps, boxes = pyramid
    small = [map_[:, :, : 40 // 2**level, : 56 // 2**level].clone() for level, map_ in enumerate(maps)]
    pooler, image = PyramidPooler(3, 2, finest_scale=28), torch.arange(2).repeat_interleave(9)
    expected = pooler(small, boxes.flatten(0, 1), image)
    large = [
        torch.nn.functional.pad(map_, (0, 24 // 2**level, 0, 8), mode="replicate") for level, map_ in enumerate(small)
    ]
    sizes = torch.tensor([[160.0, 224.0]] * 2)
    if way == "compiled":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    pooled = pooler(large, boxes.flatten(0, 1), image, sizes)
    torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=3e-5)
    assert expected.abs().sum() > 0


def test_mask_targets_are_the_masks_in_their_boxes():
    mask = torch.zeros(2, 32, 48, dtype=torch.bool)
    mask[0, 4:20, 8:40] = True
    boxes = torch.tensor([[8.0, 4.0, 40.0, 20.0], [0.0, 4.0, 16.0, 20.0], [8.0, 4.0, 40.0, 20.0]])
    targets = crop_masks(mask, torch.tensor([0, 0, 1]), boxes, 8)
    assert targets[0].all() and not targets[2].any()
    assert torch.equal(targets[1], torch.tensor([0.0] * 4 + [1.0] * 4).expand(8, 8))
    assert crop_masks(mask, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), 8).shape == (0, 8, 8)


def test_corners():
    assert center_to_corners(torch.tensor([0.5, 0.5, 1.0, 1.0])).tolist() == [0, 0, 1, 1]
