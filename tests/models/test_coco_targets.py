"""COCO annotations to masks: what does not describe a mask of the image is refused."""

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from uplvp_hf.models.coco_targets import decode_segmentation, unpacked_runs
from uplvp_hf.models.image_processing_uplvp import UplvpImageProcessor

HEIGHT, WIDTH = 20, 30


def encoded(height, width, seed=0):
    mask = np.random.default_rng(seed).random((height, width)) > 0.5
    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))


@pytest.mark.parametrize("seed", range(5))
def test_unpacked_runs_are_those_of_the_mask(seed):
    rle = encoded(40, 50, seed)
    flat = coco_mask.decode(rle).ravel(order="F")
    runs = unpacked_runs(rle["counts"])
    assert sum(runs) == flat.size
    np.testing.assert_array_equal(np.repeat(np.arange(len(runs)) % 2, runs), flat)
    assert unpacked_runs(rle["counts"].decode()) == runs


def short():
    rle = coco_mask.frPyObjects({"size": [HEIGHT, WIDTH], "counts": [100, 50]}, HEIGHT, WIDTH)
    return {"size": [HEIGHT, WIDTH], "counts": rle["counts"]}


@pytest.mark.parametrize(
    "segmentation, reason",
    [
        ([[1.0, 2.0, float("nan"), 3.0, 5.0, 9.0]], r"coordinate 2 \(x\) is nan"),
        ([[1.0, 2.0, 9.0, float("inf"), 5.0, 9.0]], r"coordinate 3 \(y\) is inf"),
        ([[1.0, 2.0, 9.0, -8.0, 5.0, 9.0]], r"coordinate 3 \(y\) is -8.0, outside the image of 20 x 30"),
        ([[1.0, 2.0, 1e12, 3.0, 5.0, 9.0]], r"coordinate 2 \(x\) is 1000000000000.0"),
        ([[1.0, 2.0, 9.0, 3.0]], "at least three points"),
        ([[1.0, 2.0, 9.0, 3.0, 4.0, 5.0, 6.0]], "at least three points"),
        ([1.0, 2.0, 9.0, 3.0, 4.0, 5.0], "A segmentation is a list of polygons"),
        ([], "the segmentation is empty"),
        (encoded(WIDTH, HEIGHT), "a run-length mask of 30 x 20 for an image of 20 x 30"),
        ({"size": [HEIGHT, WIDTH], "counts": [100, 50]}, "run lengths of 150 pixels for an image of 600"),
        ({"size": [HEIGHT, WIDTH], "counts": [700, -100]}, "run lengths of 600 pixels"),
        (short(), "run lengths of 150 pixels for an image of 600"),
        ({"size": [HEIGHT, WIDTH], "counts": "zz99"}, "run lengths of"),
        ({"size": [HEIGHT, WIDTH], "counts": [0.5, 599.5]}, "run lengths are whole numbers"),
        ({"size": [HEIGHT, WIDTH]}, r"has `size` and `counts`, this one \['size'\]"),
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


def test_rounding_at_the_border_is_allowed():
    mask = decode_segmentation(
        [[-0.4, -0.4, WIDTH + 0.4, -0.4, WIDTH + 0.4, HEIGHT + 0.4, -0.4, HEIGHT + 0.4]], HEIGHT, WIDTH
    )
    assert mask.shape == (HEIGHT, WIDTH) and mask.mean() > 0.9
