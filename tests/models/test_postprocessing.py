"""Post-processing to the pixel: what is painted into the logits of a padded batch comes back where it was."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch.nn import functional as F

from uplvp_hf.models.image_processing_uplvp import UplvpImageProcessor
from uplvp_hf.models.roi_masks import paste_masks

KINDS = ("mask2former", "knet", "queryinst")
TARGETS = [(60, 100), (100, 60), (50, 50), (31, 128)]  # (height, width) of the images


def sure_of(masks, classes=3):
    """Outputs (B, Q) whose query q is sure of class q % classes."""
    queries = masks.shape[1]
    logits = torch.full((len(masks), queries, classes + 1), -9.0)
    logits[:, torch.arange(queries), torch.arange(queries) % classes] = 9.0
    return SimpleNamespace(class_queries_logits=logits, masks_queries_logits=masks)


def some_outputs(kind, batch=2, queries=8, size=(32, 32), classes=4, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn((batch, queries, 6, 6), generator=generator) * 4
    masks = F.interpolate(coarse, size, mode="bicubic")
    logits = torch.randn((batch, queries, classes + 1), generator=generator) * 2
    found = {"class_queries_logits": logits.to(dtype), "masks_queries_logits": masks.to(dtype)}
    if kind != "mask2former":
        found["class_scores"] = logits[..., :-1].sigmoid().to(dtype)
    if kind == "queryinst":
        corners = torch.rand((batch, queries, 2, 2), generator=generator).sort(2).values * 4 * size[0]
        found["boxes"] = corners.flatten(2)
        grids = torch.randn((batch, queries, classes, 7, 7), generator=generator) * 2 + 1
        found["roi_mask_logits"] = grids.to(dtype)
    return SimpleNamespace(**found)


def process(outputs, **settings):
    return UplvpImageProcessor(size={"longest_edge": 128}).post_process_instance_segmentation(outputs, **settings)


def test_a_rectangle_in_a_padded_batch_comes_back_to_the_pixel():
    """Rectangles on the grid of the logits, against `interpolate` of the logits without the padding. The padding is
    full of object, so that whatever of it got in would be seen."""
    processor = UplvpImageProcessor(size={"longest_edge": 128})
    images = [np.zeros((*size, 3), dtype=np.uint8) for size in TARGETS]
    batch = processor(images, return_tensors="pt")
    sizes = processor.get_input_sizes(batch["pixel_mask"])
    assert sizes == [(77, 128), (128, 77), (128, 128), (31, 128)]
    masks = torch.full((len(TARGETS), 2, *(side // 4 for side in batch["pixel_values"].shape[-2:])), 8.0)
    cells = [(-(-height // 4), -(-width // 4)) for height, width in sizes]
    for image, (rows, columns) in enumerate(cells):
        masks[image, :, :rows, :columns] = -8.0
        masks[image, 0, 2 : rows - 3, 3 : columns // 2] = 8.0
        masks[image, 1, rows // 2 :, columns // 2 :] = 8.0  # to the lower right corner of the image
    for inputs in (sizes, None):
        results = process(sure_of(masks), target_sizes=TARGETS, input_sizes=inputs)
        for image, (result, (rows, columns), size, target) in enumerate(
            zip(results, cells, sizes, TARGETS, strict=True)
        ):
            # The cells reach beyond the image where it does not end with one; the rest is cut off.
            factor = [4 * whole / part for whole, part in zip(target, size, strict=True)]
            expected = F.interpolate(
                masks[image : image + 1, :, :rows, :columns], scale_factor=factor, mode="bilinear"
            )[0]
            height, width = min(target[0], expected.shape[1]), min(target[1], expected.shape[2])
            sure = expected[:, :height, :width].abs() > 1e-3
            order = result["labels"].argsort()
            found = result["masks"][order]
            assert result["labels"].tolist() in ([0, 1], [1, 0]) and sure.float().mean() > 0.98
            assert torch.equal(found[:, :height, :width][sure], (expected[:, :height, :width] > 0)[sure])
            top, left = (round(4 * cell * f / 4) for cell, f in zip((2, 3), factor, strict=True))
            assert (result["boxes"][order][0, :2] - torch.tensor([left, top])).abs().max() <= 1
            assert result["boxes"][order][1, 2:].tolist() == [target[1], target[0]]


def test_a_one_column_object_keeps_its_area():
    """800 x 1216, a column of cells: 3200 pixels. A grid of 384 x 384 in between makes 4800 of them."""
    masks = torch.full((1, 1, 200, 304), -8.0)
    masks[..., 150] = 8.0
    settings = {"target_sizes": [(800, 1216)], "input_sizes": [(800, 1216)]}
    dense = process(sure_of(masks), **settings)[0]
    coded = process(sure_of(masks), return_rle=True, **settings)[0]
    assert dense["masks"].sum() == coco_mask.area(coded["rle"]).sum() == 3200
    assert dense["boxes"].tolist() == coded["boxes"].tolist() == [[600, 0, 604, 800]]


def test_a_single_column_of_pixels_survives():
    masks = torch.full((1, 1, 20, 30), -8.0)
    masks[..., 12] = -1.0
    masks[0, 0, :, 13] = 1.0  # wins over its left neighbor only
    result = process(sure_of(masks), target_sizes=[(20, 30)], input_sizes=[(80, 120)])[0]
    assert result["masks"].sum() == 20 and result["boxes"].tolist() == [[13, 0, 14, 20]]


@pytest.mark.parametrize("return_rle", [True, False])
def test_overlapping_instances_both_survive(return_rle):
    masks = torch.full((1, 3, 16, 16), -8.0)
    masks[:, 0, 2:10, 2:10] = masks[:, 1, 2:10, 2:10] = masks[:, 2, 6:14, 6:14] = 8.0
    result = process(sure_of(masks), target_sizes=[(64, 64)], input_sizes=[(64, 64)], return_rle=return_rle)[0]
    found = result["masks"] if not return_rle else torch.from_numpy(coco_mask.decode(result["rle"])).permute(2, 0, 1)
    assert found.flatten(1).sum(1).tolist() == [found[0].sum()] * 3 and len(result["segments_info"]) < 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("return_rle", [True, False])
def test_duplicates_are_left_out_within_a_class(kind, return_rle):
    """Against the plain rule on dense masks: best first, each at most so like one of its class that stayed."""
    outputs, settings = some_outputs(kind, queries=16, classes=2), {"target_sizes": [(50, 60)] * 2, "threshold": 0.0}
    every = process(outputs, **settings)
    fewer = process(outputs, **settings, duplicates=0.3, return_rle=return_rle)
    assert all(
        torch.equal(a["scores"], b["scores"]) for a, b in zip(every, process(outputs, **settings, duplicates=1.0))
    )
    left_out = 0
    for whole, part in zip(every, fewer, strict=True):
        masks, labels, kept = whole["masks"].flatten(1).float(), whole["labels"], []
        for k in range(len(masks)):
            common = [(masks[k] * masks[j]).sum() for j in kept]
            areas = [masks[k].sum() + masks[j].sum() for j in kept]
            like = [labels[j] == labels[k] and c / (a - c) > 0.3 for j, c, a in zip(kept, common, areas)]
            kept += [] if any(like) else [k]
        left_out += len(masks) - len(kept)
        for name in ("scores", "labels", "boxes"):
            assert torch.equal(part[name], whole[name][kept]), name
        assert len(part["rle"] if return_rle else part["masks"]) == len(kept)
    assert left_out > 5


@pytest.mark.parametrize("kind", KINDS)
def test_single_equals_batched(kind):
    """Among larger ones, in padding that says other things. Images that end with a cell and within one."""
    sizes, targets = [(64, 128), (63, 50)], [(90, 180), (126, 100)]
    together = some_outputs(kind, size=(32, 40))
    for index, (size, target) in enumerate(zip(sizes, targets, strict=True)):
        cells = [-(-side // 32) * 8 for side in size]
        alone = SimpleNamespace(**{name: value[index : index + 1] for name, value in vars(together).items()})
        alone.masks_queries_logits = alone.masks_queries_logits[:, :, : cells[0], : cells[1]]
        for return_rle in (True, False):
            settings = {"threshold": 0.05, "return_rle": return_rle}
            one = process(alone, target_sizes=[target], input_sizes=[size], **settings)[0]
            both = process(together, target_sizes=targets, input_sizes=sizes, **settings)[index]
            assert one.keys() == both.keys() and len(one["scores"]) > 3
            for name in ("scores", "labels", "boxes", "segmentation"):
                assert torch.equal(one[name], both[name]), name
            name = "rle" if return_rle else "masks"
            assert one[name] == both[name] if return_rle else torch.equal(one[name], both[name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mask_threshold", [0.3, 0.5, 0.8])
def test_run_lengths_are_those_of_the_masks(kind, dtype, mask_threshold):
    outputs = some_outputs(kind, dtype=dtype)
    settings = {"threshold": 0.1, "mask_threshold": mask_threshold, "target_sizes": [(100, 150), (41, 33)]}
    settings["input_sizes"] = [(85, 128), (128, 103)]
    for dense, coded in zip(process(outputs, **settings), process(outputs, return_rle=True, **settings), strict=True):
        assert len(dense["masks"]) == len(coded["rle"]) > 3
        expected = coco_mask.encode(np.asfortranarray(dense["masks"].permute(1, 2, 0).to(torch.uint8).numpy()))
        assert [rle["counts"] for rle in coded["rle"]] == [rle["counts"].decode() for rle in expected]
        for name in ("scores", "labels", "boxes", "segmentation"):
            assert torch.equal(dense[name], coded[name]), name
        assert dense["scores"].dtype == dense["boxes"].dtype == torch.float32
        assert dense["segments_info"] == coded["segments_info"]


def test_masks_in_boxes_are_pasted_as_on_the_whole_image():
    outputs = some_outputs("queryinst", batch=1)
    outputs.boxes[0, 0] = torch.tensor([-20.0, -9.0, 500.0, 140.0])  # leaves the image
    outputs.boxes[0, 1] = torch.tensor([30.0, 30.0, 30.0, 60.0])  # without area
    result = process(outputs, threshold=0.05, target_sizes=[(90, 120)], input_sizes=[(96, 128)])[0]
    scale = torch.tensor([120 / 128, 90 / 96, 120 / 128, 90 / 96])
    scores, order = outputs.class_scores[0].flatten().sort(descending=True)
    count = 0
    for score, position in zip(scores.tolist(), order.tolist(), strict=True):
        query, label = divmod(position, 4)
        grid = outputs.roi_mask_logits[0, query, label].sigmoid()
        pasted = paste_masks(grid[None], outputs.boxes[0, query][None] * scale, (90, 120))[0]
        if score < 0.05 or not (pasted >= 0.5).any():
            continue
        assert result["labels"][count] == label and abs(result["scores"][count] - score) < 1e-6
        sure = (pasted - 0.5).abs() > 1e-5
        assert torch.equal(result["masks"][count][sure], (pasted >= 0.5)[sure])
        count += 1
    assert count == len(result["scores"]) > 10


@pytest.mark.parametrize("kind", KINDS)
def test_thresholds_at_their_ends(kind):
    outputs = some_outputs(kind)
    everything = process(outputs, threshold=0, target_sizes=[(64, 64)] * 2, top_k=1000)
    assert all(len(result["scores"]) >= 20 and (result["scores"].diff() <= 0).all() for result in everything)
    for result in process(outputs, threshold=1, target_sizes=[(64, 64)] * 2):
        assert result["masks"].shape == (0, 64, 64) and result["boxes"].shape == (0, 4)
        assert result["segments_info"] == [] and (result["segmentation"] == -1).all()
    for result in process(outputs, threshold=1, target_sizes=[(64, 64)] * 2, return_rle=True):
        assert result["rle"] == [] and result["boxes"].shape == (0, 4) and (result["segmentation"] == -1).all()
    assert all(
        len(r["scores"]) == 0 for r in process(outputs, threshold=0, mask_threshold=1, target_sizes=[(64, 64)] * 2)
    )
    filled = process(outputs, threshold=0, mask_threshold=0, target_sizes=[(64, 64)] * 2)[0]["masks"]
    assert len(filled) and (kind == "queryinst" or filled.all())


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"threshold": 1.5}, "threshold=1.5 is out of range"),
        ({"mask_threshold": -0.1}, "mask_threshold=-0.1 is out of range"),
        ({"mask_threshold": float("nan")}, "mask_threshold=nan"),
        ({"overlap_mask_area_threshold": 7}, "overlap_mask_area_threshold=7 is out of range"),
        ({"top_k": 0}, "top_k=0 leaves no instance"),
        ({"target_sizes": [(40, 60), (0, 10)]}, r"target_sizes\[1\] is \(0, 10\); height and width are at least 1"),
        ({"input_sizes": [(-4, 60), (8, 10)]}, r"input_sizes\[0\] is \(-4, 60\)"),
    ],
)
def test_settings_without_sense_are_refused(settings, reason):
    with pytest.raises(ValueError, match=reason):
        process(some_outputs("mask2former"), **settings)


def test_infinite_logits():
    """Of models that rule queries out: neither NaN nor a warning, and nothing of it in the neighbors."""
    masks = torch.full((1, 1, 16, 16), -torch.inf)
    masks[..., 4:8, 4:8] = torch.inf
    result = process(sure_of(masks), target_sizes=[(64, 64)], input_sizes=[(64, 64)])[0]
    assert result["boxes"].tolist() == [[16, 16, 32, 32]] and result["scores"][0] == pytest.approx(1)


def test_flat_map_by_hand():
    """The better score lies above; who keeps too little is left out, and does not cover those below."""
    masks = torch.full((1, 3, 16, 16), -8.0)
    masks[:, 0, :, :8] = 8.0
    masks[:, 1, :, :10] = 8.0  # a fifth is seen
    masks[:, 2, :, 6:] = 8.0  # 8 of 10 columns
    outputs = sure_of(masks)
    outputs.class_queries_logits[0, 1, 1] = 3.0
    outputs.class_queries_logits[0, 2, 2] = 2.0
    settings = {"target_sizes": [(64, 64)], "input_sizes": [(64, 64)], "threshold": 0.1}
    strict = process(outputs, overlap_mask_area_threshold=0.5, **settings)[0]
    assert [(info["id"], info["label_id"]) for info in strict["segments_info"]] == [(0, 0), (2, 2)]
    assert strict["segmentation"][0].tolist() == [0] * 32 + [2] * 32
    lenient = process(outputs, overlap_mask_area_threshold=0.0, **settings)[0]
    assert lenient["segmentation"][0].tolist() == [0] * 32 + [1] * 8 + [2] * 24
