"""COCO annotations to masks: what does not describe a mask of the image is refused."""

import warnings

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from uplvp_hf.models.image_processing_uplvp import UplvpImageProcessor
from uplvp_hf.models.masks import decode_segmentation, unpacked_runs

HEIGHT, WIDTH = 20, 30


def encoded(height, width, seed=0):
    mask = np.random.default_rng(seed).random((height, width)) > 0.5
    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))


@pytest.mark.parametrize("seed", range(5))
def test_unpacked_runs_are_those_of_the_mask(seed):
    rle = encoded(40, 50, seed)
    flat = coco_mask.decode(rle).ravel(order="F")
    runs = unpacked_runs(rle["counts"])
    assert runs.sum() == flat.size
    np.testing.assert_array_equal(np.repeat(np.arange(len(runs)) % 2, runs), flat)
    assert unpacked_runs(rle["counts"].decode()).tolist() == runs.tolist()


def short():
    rle = coco_mask.frPyObjects({"size": [HEIGHT, WIDTH], "counts": [100, 50]}, HEIGHT, WIDTH)
    return {"size": [HEIGHT, WIDTH], "counts": rle["counts"]}


@pytest.mark.parametrize(
    "segmentation, reason",
    [
        ([[1.0, 2.0, float("nan"), 3.0, 5.0, 9.0]], "not finite: number 2 is nan"),
        ([[1.0, 2.0, 9.0, float("inf"), 5.0, 9.0]], "not finite: number 3 is inf"),
        ([[1.0, 2.0, 1e12, 3.0, 5.0, 9.0]], "reaches to 1e.12, far outside the 30x20 image"),
        ([[1.0, 2.0, 9.0, 3.0]], "at least 3 points"),
        ([[1.0, 2.0, 9.0, 3.0, 4.0, 5.0, 6.0]], "pairs of numbers"),
        ([1.0, 2.0, 9.0, 3.0, 4.0, 5.0], "must be a list of numbers"),
        ([], "the segmentation is empty"),
        (encoded(WIDTH, HEIGHT), r"size \(height, width\) \[30, 20\], the image \[20, 30\]"),
        ({"size": [HEIGHT, WIDTH], "counts": [100, 50]}, "runs sum to 150, the image has 20x30 = 600 pixels"),
        ({"size": [HEIGHT, WIDTH], "counts": [700, -100]}, "whole numbers >= 0, got -100"),
        (short(), "runs sum to 150, the image has 20x30 = 600 pixels"),
        ({"size": [HEIGHT, WIDTH], "counts": "zz99"}, "malformed or cut off"),
        ({"size": [HEIGHT, WIDTH], "counts": [0.5, 599.5]}, "whole numbers >= 0, got 0.5"),
        ({"size": [HEIGHT, WIDTH]}, r"has no 'counts', only \['size'\]"),
    ],
)
def test_what_does_not_fit_is_refused(segmentation, reason):
    with pytest.raises(ValueError, match=reason):
        decode_segmentation(segmentation, HEIGHT, WIDTH)
    record = {"image_id": 5, "annotations": [{"segmentation": segmentation, "category_id": 0}]}
    with pytest.raises(ValueError, match=f"Image 5, annotation 0: .*{reason}"):
        UplvpImageProcessor()(Image.new("RGB", (WIDTH, HEIGHT)), annotations=record, return_tensors="pt")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"image_id": 5, "objects": []}, r"Image 5: no `annotations`, only \['image_id', 'objects'\]"),
        ({"annotations": [{"category_id": 0}]}, "Image None, annotation 0: no 'segmentation'"),
        ({"annotations": [{"segmentation": [[1, 1, 9, 1, 9, 9]]}]}, "annotation 0: no 'category_id'"),
        ({"annotations": [{"segmentation": [[1, 1, 9, 1, 9, 9]], "category_id": -1}]}, "category_id -1 is no class"),
        ({"annotations": [{"segmentation": [[1, 1, 9, 1, 9, 9]], "category_id": "cat"}]}, "'cat' is no class index"),
    ],
)
def test_incomplete_records_are_refused(record, reason):
    with pytest.raises(ValueError, match=reason):
        UplvpImageProcessor()(Image.new("RGB", (WIDTH, HEIGHT)), annotations=record, return_tensors="pt")


def test_polygons_are_cut_off_at_the_border_as_in_training():
    """More than the rounding of exporters is warned of; both give the mask of what lies inside."""
    polygon = [-8.0, 2.0, 9.0, 2.0, 9.0, 12.0, -8.0, 12.0]
    record = {"image_id": 5, "annotations": [{"segmentation": [polygon], "category_id": 0}]}
    processor, image = UplvpImageProcessor(do_resize=False), Image.new("RGB", (WIDTH, HEIGHT))
    with pytest.warns(UserWarning, match="Image 5, annotation 0: a polygon reaches from x = -8 to 9 .*clipped"):
        found = processor(image, annotations=record, return_tensors="pt")["mask_labels"][0][0]
    inside = np.zeros(found.shape, dtype=bool)
    inside[2:12, :9] = True
    np.testing.assert_array_equal(found.numpy(), inside)
    rounded = [-0.4, -0.4, WIDTH + 0.4, -0.4, WIDTH + 0.4, HEIGHT + 0.4, -0.4, HEIGHT + 0.4]
    record["annotations"][0]["segmentation"] = [rounded]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*clipped")
        found = processor(image, annotations=record, return_tensors="pt")["mask_labels"][0][0]
    np.testing.assert_array_equal(found.numpy()[:HEIGHT, :WIDTH], decode_segmentation([rounded], HEIGHT, WIDTH))
    assert found[:HEIGHT, :WIDTH].float().mean() > 0.9
