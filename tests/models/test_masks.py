import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from uplvp_hf.data import (
    DataError,
    decode_segmentation,
    encode_mask,
    encode_masks,
    mask_area,
    mask_iou,
    rle_areas,
    rle_boxes,
    segmentation_to_rle,
    tight_boxes,
)
from uplvp_hf.models.masks import decode_columns


@pytest.fixture
def masks():
    masks = np.random.default_rng(0).random((6, 23, 31)) > 0.6
    masks[1], masks[2] = False, True
    masks[3] = False
    masks[3, 4:9, 7:20] = True
    return masks


def run_lengths(mask):
    """Uncompressed RLE, written out: runs of zeros and ones down the columns, zeros first."""
    counts, value = [0], False
    for pixel in mask.T.flatten().tolist():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return counts


def test_codes_equal_those_of_pycocotools(masks):
    for mask, rle in zip(masks, encode_masks(masks)):
        reference = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert rle == {"size": [23, 31], "counts": reference["counts"].decode()}
        assert rle == encode_mask(mask)


@pytest.mark.parametrize("form", ["compressed", "bytes", "uncompressed"])
def test_round_trip(masks, form):
    for mask in masks:
        rle = encode_mask(torch.from_numpy(mask))
        if form == "bytes":
            rle["counts"] = rle["counts"].encode()
        if form == "uncompressed":
            rle = {"size": [23, 31], "counts": run_lengths(mask)}
            assert segmentation_to_rle(rle, 23, 31) == encode_mask(mask)
        decoded = decode_segmentation(rle, 23, 31)
        assert decoded.dtype == np.bool_
        np.testing.assert_array_equal(decoded, mask)


def test_views_and_integers_encode_like_bool(masks):
    assert encode_masks(masks[:, ::-1, ::2]) == encode_masks(masks[:, ::-1, ::2].copy())
    assert encode_masks(masks.astype(np.uint8) * 255) == encode_masks(masks)
    assert encode_masks(np.zeros((0, 5, 5), dtype=bool)) == []
    with pytest.raises(DataError, match="Threshold"):
        encode_masks(masks.astype(np.float32))


def test_polygons_of_several_parts_are_united():
    parts = [[2, 2, 10, 2, 10, 8, 2, 8], [20.5, 10, 28, 12.25, 22, 18]]
    expected = coco_mask.decode(coco_mask.frPyObjects(parts, 23, 31)).any(axis=2)
    np.testing.assert_array_equal(decode_segmentation(parts, 23, 31), expected)
    assert expected[2:8, 2:10].all() and expected.sum() > 48


@pytest.mark.parametrize("shift", [(-15, 0), (15, 0), (0, -12), (0, 12), (-15, 12), (16, -13)])
def test_polygon_that_leaves_the_image_is_clipped(shift):
    """A rectangle on whole pixels, so that the clipped mask can be written down."""
    x, y = 8 + shift[0], 6 + shift[1]
    polygon = [x, y, x + 16, y, x + 16, y + 12, x, y + 12]
    expected = np.zeros((23, 31), dtype=bool)
    expected[max(y, 0) : y + 12, max(x, 0) : x + 16] = True
    np.testing.assert_array_equal(decode_segmentation([polygon], 23, 31), expected)


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ([], "empty"),
        ([[1, 1, 5, 5]], "at least 3 points"),
        ([[1, 1, 5, 5, 3, 9, 7]], "pairs"),
        ([[1, 1, 5, float("nan"), 3, 9]], "not finite"),
        ([[1, 1, 5, float("inf"), 3, 9]], "not finite"),
        ([[1, 1, 5, 1e9, 3, 9]], "far outside"),
        ([[1, 1, 5, "3", 3, 9]], "list of numbers"),
        ([1, 1, 5, 5, 3, 9], "list of numbers"),
        ({"size": [31, 23], "counts": "0"}, "size"),
        ({"size": [23, 31]}, "counts"),
        ({"size": [23, 31], "counts": [700, 14]}, "sum to 714"),
        ({"size": [23, 31], "counts": [-1, 714]}, ">= 0"),
        ({"size": [23, 31], "counts": ""}, "malformed"),
        ({"size": [23, 31], "counts": "0~~~"}, "malformed"),
        ({"size": [23, 31], "counts": "n"}, "malformed"),
        ({"size": [23, 31], "counts": "1é"}, "malformed"),
        ({"size": [23, 31], "counts": "123"}, "sum to 6"),
        ({"size": [23, 31], "counts": 4}, "list of whole numbers"),
        ("polygon", "polygons or an RLE"),
    ],
)
def test_malformed_segmentations_are_named(segmentation, reason):
    with pytest.raises(DataError, match=reason):
        decode_segmentation(segmentation, 23, 31)


def test_boxes_and_areas_by_brute_force(masks):
    boxes, areas = tight_boxes(masks), mask_area(masks)
    codes = encode_masks(masks)
    for mask, box, area, rle_box, rle_area in zip(masks, boxes, areas, rle_boxes(codes), rle_areas(codes)):
        ys, xs = np.nonzero(mask)
        expected = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] if len(xs) else [0, 0, 0, 0]
        assert box.tolist() == expected
        assert area == rle_area == len(xs)
        assert rle_box.tolist() == [*expected[:2], expected[2] - expected[0], expected[3] - expected[1]]
    assert tight_boxes(np.zeros((0, 4, 4), bool)).shape == rle_boxes([]).shape == (0, 4)
    assert tight_boxes(np.zeros((2, 0, 4), bool)).tolist() == [[0, 0, 0, 0]] * 2
    stacked = tight_boxes(torch.from_numpy(masks).reshape(2, 3, *masks.shape[1:]))
    assert stacked.dtype == torch.int64 and stacked.reshape(-1, 4).tolist() == boxes.tolist()
    np.testing.assert_array_equal(tight_boxes(masks[:, ::-1, ::2]), tight_boxes(masks[:, ::-1, ::2].copy()))


def test_columns_of_a_mask(masks):
    for mask, rle in zip(masks, encode_masks(masks)):
        for left, right in ((0, 31), (0, 1), (30, 31), (7, 20), (5, 5)):
            np.testing.assert_array_equal(decode_columns(rle, left, right), mask[:, left:right])


def test_iou_by_brute_force(masks):
    overlap = mask_iou(encode_masks(masks[:4]), encode_masks(masks))
    for i in range(4):
        for j in range(6):
            union = (masks[i] | masks[j]).sum()
            expected = (masks[i] & masks[j]).sum() / union if union else 0
            assert overlap[i, j] == pytest.approx(expected)
    assert mask_iou([], encode_masks(masks)).shape == (0, 6)
    with pytest.raises(DataError, match="sizes"):
        mask_iou(encode_masks(masks), encode_masks(masks[:, :-1]))
