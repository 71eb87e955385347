"""The image processor: geometry in, instances out."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig, pipeline

from uplvp_hf.models.image_processing_uplvp import UplvpImageProcessor

SIZES = [(60, 100), (100, 60), (75, 75), (33, 97)]  # (height, width)


def random_image(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def outputs_for(pixel_values: torch.Tensor, masks: list[list[torch.Tensor]], classes: list[list[int]], num_classes=3):
    """What a perfect model says: masks (H, W) on the padded input, averaged to stride 4; unused queries say nothing."""
    batch, _, height, width = pixel_values.shape
    queries = max(len(row) for row in masks) + 2
    mask_logits = torch.full((batch, queries, height // 4, width // 4), -10.0)
    class_logits = torch.full((batch, queries, num_classes + 1), -10.0)
    class_logits[..., -1] = 10.0
    for b, (row, labels) in enumerate(zip(masks, classes)):
        for q, (mask, label) in enumerate(zip(row, labels)):
            mask_logits[b, q] = torch.nn.functional.avg_pool2d(mask.float()[None] * 20 - 10, 4)[0]
            class_logits[b, q, -1], class_logits[b, q, label] = -10.0, -2.0 - q
    return SimpleNamespace(class_queries_logits=class_logits, masks_queries_logits=mask_logits)


def iou(a, b) -> float:
    a, b = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    return (a & b).sum() / max(1, (a | b).sum())


@pytest.mark.parametrize("with_pixel_mask", [True, False])
@pytest.mark.parametrize("longest", [128, 150])
def test_rectangle_returns_where_it_was(longest, with_pixel_mask):
    processor = UplvpImageProcessor(size={"longest_edge": longest})
    batch = processor([random_image(*size) for size in SIZES], return_tensors="pt")
    assert batch["pixel_values"].shape[-1] % 32 == 0 and batch["pixel_values"].shape[-2] % 32 == 0
    truth, painted = [], []
    for index, (height, width) in enumerate(SIZES):
        box = (round(0.5 * width), round(0.3 * height), width, height)  # touches the far corner, next to the padding
        mask = torch.zeros(height, width, dtype=torch.bool)
        mask[box[1] : box[3], box[0] : box[2]] = True
        truth.append((mask, box))
        h, w = processor.get_input_sizes(batch["pixel_mask"])[index]
        canvas = torch.zeros(batch["pixel_values"].shape[-2:], dtype=torch.bool)
        canvas[round(box[1] * h / height) : h, round(box[0] * w / width) : w] = True
        painted.append([canvas])
    outputs = outputs_for(batch["pixel_values"], painted, [[0]] * len(SIZES))
    sizes = processor.get_input_sizes(batch["pixel_mask"]) if with_pixel_mask else None
    results = processor.post_process_instance_segmentation(outputs, target_sizes=SIZES, input_sizes=sizes)
    for result, (mask, box), size in zip(results, truth, SIZES):
        assert result["masks"].shape == (1, *size) and result["labels"].tolist() == [0]
        assert iou(result["masks"][0], mask) > 0.93
        assert np.abs(result["boxes"][0].numpy() - np.array(box)).max() <= 2
        assert result["scores"][0] > 0.8


def test_overlapping_instances_both_survive():
    processor = UplvpImageProcessor(size={"longest_edge": 64})
    pixels = processor(random_image(64, 64), return_tensors="pt")["pixel_values"]
    low, high = torch.zeros(64, 64), torch.zeros(64, 64)
    low[8:40, 8:40], high[16:56, 16:56] = 1, 1
    outputs = outputs_for(pixels, [[high, low, low]], [[0, 1, 2]])
    result = processor.post_process_instance_segmentation(outputs, target_sizes=[(64, 64)])[0]
    assert len(result["masks"]) == 3
    assert iou(result["masks"][0], high) > 0.99 and iou(result["masks"][1], low) > 0.99  # bilinear rounds the corners
    # the flat map gives each pixel to the better score, and drops what is mostly hidden
    assert [info["id"] for info in result["segments_info"]] == [0]
    lenient = processor.post_process_instance_segmentation(
        outputs, target_sizes=[(64, 64)], overlap_mask_area_threshold=0.3
    )[0]
    assert [info["id"] for info in lenient["segments_info"]] == [0, 1]
    assert [info["label_id"] for info in lenient["segments_info"]] == [0, 1]
    assert iou(lenient["segmentation"] == 1, low.bool() & ~high.bool()) > 0.98
    assert lenient["segmentation"].dtype == torch.int32 and (lenient["segmentation"] == -1).any()


def random_outputs(pixel_values, seed=0, queries=20, num_classes=4):
    generator = torch.Generator().manual_seed(seed)
    batch, _, height, width = pixel_values.shape
    coarse = torch.randn((batch, queries, 4, 4), generator=generator) * 4
    masks = torch.nn.functional.interpolate(coarse, (height // 4, width // 4), mode="bicubic")
    classes = torch.randn((batch, queries, num_classes + 1), generator=generator) * 2
    return SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)


def test_single_equals_batched():
    processor = UplvpImageProcessor(size={"longest_edge": 128})
    images = [random_image(*size, seed=index) for index, size in enumerate(SIZES)]
    batch = processor(images, return_tensors="pt")
    outputs = random_outputs(batch["pixel_values"])
    together = processor.post_process_instance_segmentation(outputs, threshold=0.1, target_sizes=SIZES)
    for index, size in enumerate(SIZES):
        single = processor(images[index], return_tensors="pt")
        height, width = single["pixel_values"].shape[-2:]
        assert torch.equal(single["pixel_values"][0], batch["pixel_values"][index, :, :height, :width])
        assert torch.equal(single["pixel_mask"][0], batch["pixel_mask"][index, :height, :width])
        alone = SimpleNamespace(
            class_queries_logits=outputs.class_queries_logits[index : index + 1],
            masks_queries_logits=outputs.masks_queries_logits[index : index + 1, :, : height // 4, : width // 4],
        )
        result = processor.post_process_instance_segmentation(alone, threshold=0.1, target_sizes=[size])[0]
        assert len(result["scores"]) > 0
        for key in ("scores", "labels", "boxes", "masks", "segmentation"):
            assert torch.equal(result[key], together[index][key]), key
        assert result["segments_info"] == together[index]["segments_info"]


def test_scores_follow_the_rule_and_top_k():
    """Against Mask2Former's rule written out as loops, on an image without padding."""
    processor = UplvpImageProcessor(size={"longest_edge": 128})
    pixels = processor(random_image(128, 128), return_tensors="pt")["pixel_values"]
    outputs = random_outputs(pixels, seed=3)
    expected = []
    for query, (classes, mask) in enumerate(zip(outputs.class_queries_logits[0], outputs.masks_queries_logits[0])):
        probability = mask.sigmoid()
        inside = probability > 0.5
        quality = float(probability[inside].mean()) if inside.any() else 0.0
        expected += [(float(p), float(p) * quality, label, query) for label, p in enumerate(classes.softmax(-1)[:-1])]
    expected = sorted(sorted(expected, reverse=True)[:15], key=lambda entry: -entry[1])
    result = processor.post_process_instance_segmentation(
        outputs, threshold=0.0, target_sizes=[(128, 128)], top_k=15, return_segmentation=False
    )[0]
    assert "segmentation" not in result and "segments_info" not in result
    assert result["labels"].tolist() == [label for _, _, label, _ in expected]
    np.testing.assert_allclose(result["scores"].numpy(), [score for _, score, _, _ in expected], rtol=1e-5)
    full = torch.nn.functional.interpolate(outputs.masks_queries_logits, (128, 128), mode="bilinear")[0] > 0
    for mask, (*_, query) in zip(result["masks"], expected):
        assert (mask != full[query]).float().mean() < 1e-3


def test_mask_threshold_is_honored():
    processor = UplvpImageProcessor(size={"longest_edge": 128})
    outputs = random_outputs(processor(random_image(128, 128), return_tensors="pt")["pixel_values"])
    areas = [
        processor.post_process_instance_segmentation(
            outputs, threshold=0.0, mask_threshold=level, target_sizes=[(128, 128)]
        )[0]["masks"].sum()
        for level in (0.2, 0.5, 0.9)
    ]
    assert areas[0] > areas[1] > areas[2] > 0


def test_empty_result():
    processor = UplvpImageProcessor(size={"longest_edge": 64})
    outputs = outputs_for(torch.zeros(1, 3, 64, 64), [[]], [[]])
    result = processor.post_process_instance_segmentation(outputs, target_sizes=[(50, 40)])[0]
    assert result["scores"].shape == (0,) and result["labels"].dtype == torch.int64
    assert result["boxes"].shape == (0, 4) and result["masks"].shape == (0, 50, 40)
    assert (result["segmentation"] == -1).all() and result["segmentation"].shape == (50, 40)
    assert result["segments_info"] == []
    assert (
        processor.post_process_instance_segmentation(outputs, target_sizes=[(50, 40)], return_rle=True)[0]["rle"] == []
    )


def test_rle_equals_masks_and_boxes():
    processor = UplvpImageProcessor(size={"longest_edge": 128})
    batch = processor([random_image(*size) for size in SIZES], return_tensors="pt")
    outputs = random_outputs(batch["pixel_values"], queries=40)
    sizes = processor.get_input_sizes(batch["pixel_mask"])
    arguments = {"threshold": 0.0, "target_sizes": SIZES, "input_sizes": sizes}
    dense = processor.post_process_instance_segmentation(outputs, **arguments)
    coded = processor.post_process_instance_segmentation(outputs, return_rle=True, **arguments)
    for a, b, size in zip(dense, coded, SIZES):
        assert len(b["rle"]) == len(a["masks"]) > 16 and "masks" not in b
        assert all(isinstance(rle["counts"], str) and rle["size"] == list(size) for rle in b["rle"])
        np.testing.assert_array_equal(coco_mask.decode(b["rle"]).transpose(2, 0, 1).astype(bool), a["masks"].numpy())
        x, y, w, h = coco_mask.toBbox(b["rle"]).T
        np.testing.assert_array_equal(np.stack([x, y, x + w, y + h], 1), a["boxes"].numpy())


def test_result_size_without_targets():
    processor = UplvpImageProcessor(size={"longest_edge": 100})
    batch = processor(random_image(50, 80), return_tensors="pt")
    outputs = random_outputs(batch["pixel_values"])
    sizes = processor.get_input_sizes(batch["pixel_mask"])
    assert sizes == [(62, 100)]  # round(62.5) goes to the even number
    result = processor.post_process_instance_segmentation(outputs, threshold=0.1, input_sizes=sizes)[0]
    assert result["segmentation"].shape == (62, 100)
    result = processor.post_process_instance_segmentation(outputs, threshold=0.1)[0]
    assert result["segmentation"].shape == batch["pixel_values"].shape[-2:]


def test_wrong_sizes_raise():
    processor = UplvpImageProcessor(size={"longest_edge": 512})
    outputs = random_outputs(torch.zeros(2, 3, 64, 64))
    with pytest.raises(ValueError, match="target_sizes has 1 entries for a batch of 2"):
        processor.post_process_instance_segmentation(outputs, target_sizes=[(64, 64)])
    with pytest.raises(ValueError, match="get_input_sizes"):
        processor.post_process_instance_segmentation(outputs, target_sizes=[(64, 64)] * 2)


def test_save_load_round_trip(tmp_path):
    processor = UplvpImageProcessor(size={"longest_edge": 96}, size_divisor=64, image_mean=[0.1, 0.2, 0.3])
    processor.save_pretrained(tmp_path)
    loaded = UplvpImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    image = random_image(40, 70)
    first, second = processor(image, return_tensors="pt"), loaded(image, return_tensors="pt")
    assert torch.equal(first["pixel_values"], second["pixel_values"])
    assert first["pixel_values"].shape == (1, 3, 64, 128)
    assert UplvpImageProcessor.from_pretrained(tmp_path, size={"longest_edge": 32}).size.longest_edge == 32


@pytest.mark.parametrize(
    "size, expected",
    [
        ({"longest_edge": 64}, (32, 64)),
        ({"shortest_edge": 64}, (64, 128)),
        ({"shortest_edge": 64, "longest_edge": 96}, (48, 96)),
        ({"height": 30, "width": 50}, (30, 50)),
    ],
)
def test_size_rules(size, expected):
    processor = UplvpImageProcessor(size=size)
    assert processor.get_input_sizes(processor(random_image(40, 80), return_tensors="pt")["pixel_mask"]) == [expected]


def test_input_kinds_agree():
    processor = UplvpImageProcessor(size={"longest_edge": 64})
    image = random_image(40, 70)
    array = np.array(image)
    reference = processor(image, return_tensors="pt")["pixel_values"]
    kinds = [[image], array, [array], torch.from_numpy(array).permute(2, 0, 1), image.convert("RGBA")]
    for other in kinds:
        assert torch.equal(processor(other, return_tensors="pt")["pixel_values"], reference)
    assert processor(image.convert("L"), return_tensors="pt")["pixel_values"].shape == reference.shape
    height, width = 37, 64
    np.testing.assert_array_equal(reference[0, :, height:, :], 0)
    np.testing.assert_array_equal(reference[0, :, :, width:], 0)


def test_annotations_become_targets():
    processor = UplvpImageProcessor(size={"longest_edge": 64})
    mask = np.zeros((50, 100), dtype=np.uint8)
    mask[10:30, 20:80] = 1
    compressed = coco_mask.encode(np.asfortranarray(mask))
    plain = {"size": [50, 100], "counts": [20 * 50 + 10] + [20, 30] * 59 + [20, 20 * 50 + 20]}
    polygon = [[20, 10, 80, 10, 80, 30, 20, 30]]
    segmentations = [compressed, plain, polygon, {**compressed, "counts": compressed["counts"].decode()}]
    annotations = [{"segmentation": s, "category_id": 17, "iscrowd": 0} for s in segmentations]
    annotations += [
        {"segmentation": polygon, "category_id": 3, "iscrowd": 1},
        {"segmentation": [[5, 5, 5, 5, 5, 5]], "category_id": 3},
    ]
    records = [{"image_id": 5, "annotations": annotations}, {"image_id": 6, "annotations": []}]
    batch = processor(
        [random_image(50, 100), random_image(100, 50)],
        annotations=records,
        label_map={3: 0, 17: 1},
        return_tensors="pt",
    )
    assert batch["class_labels"][0].tolist() == [1] * 4 and batch["class_labels"][1].shape == (0,)
    assert batch["mask_labels"][0].dtype == torch.bool and batch["mask_labels"][0].shape == (4, 64, 64)
    assert batch["mask_labels"][1].shape == (0, 64, 64)
    expected = torch.zeros(64, 64, dtype=torch.bool)
    expected[round(6.4) : round(19.2), round(12.8) : round(51.2)] = True
    assert all(iou(found, expected) > 0.9 for found in batch["mask_labels"][0])
    single = processor(random_image(50, 100), annotations=records[0], label_map={3: 0, 17: 1}, return_tensors="pt")
    assert torch.equal(single["mask_labels"][0], batch["mask_labels"][0][:, :32])
    with pytest.raises(ValueError, match="Image 5, annotation 0: category_id 17"):
        processor(random_image(50, 100), annotations=records[0], label_map={3: 0}, return_tensors="pt")
    with pytest.raises(ValueError, match="2 annotation records for 1 images"):
        processor(random_image(50, 100), annotations=records, return_tensors="pt")


def test_no_panoptic_method():
    """The stock pipeline would prefer it and then find nothing in a low-data model's output."""
    assert not hasattr(UplvpImageProcessor, "post_process_panoptic_segmentation")


def test_stock_pipeline():
    """transformers' own pipeline with a random Mask2Former: the four keywords it passes, ids it compares."""
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(
            image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16, dim_feedforward=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=12,
        id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1},
    )  # fmt: skip
    torch.manual_seed(0)
    model = Mask2FormerForUniversalSegmentation(config).eval()
    processor = UplvpImageProcessor(size={"longest_edge": 64})
    segmenter = pipeline("image-segmentation", model=model, image_processor=processor)
    found = segmenter(random_image(50, 90), threshold=0.0, overlap_mask_area_threshold=0.0)
    assert found and {entry["label"] for entry in found} <= {"cat", "dog"}
    for entry in found:
        assert entry["mask"].size == (90, 50) and 0 <= entry["score"] <= 1
        assert np.asarray(entry["mask"]).any()


def test_deep_and_float_images_are_not_scaled_twice():
    processor = UplvpImageProcessor(do_resize=False, size_divisor=1)
    eight = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    expected = processor(eight, return_tensors="pt")["pixel_values"]
    unit, deep = eight.astype(np.float32) / 255, eight.astype(np.uint16) * 257
    channels_first = torch.from_numpy(unit).permute(2, 0, 1)
    for given in (unit, unit * 255, deep, channels_first, channels_first * 255):
        torch.testing.assert_close(processor(given, return_tensors="pt")["pixel_values"], expected)
    unscaled = processor(unit, do_rescale=False, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(unscaled, expected)
    gray = processor(Image.fromarray(deep[..., 0]), return_tensors="pt")["pixel_values"]
    again = processor(Image.fromarray(eight[..., 0]), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(gray, again)
