import pytest
import torch

from uplvp_hf.data import InstanceMasks, collate


def sample(height, width, count, image_id):
    draws = torch.Generator().manual_seed(image_id)
    return {
        "pixel_values": torch.randn(3, height, width, generator=draws) + 5,
        "mask_labels": InstanceMasks.from_dense(torch.rand(count, height, width, generator=draws) > 0.5),
        "class_labels": torch.arange(count),
        "prompt_scores": torch.rand(count, generator=draws),
        "image_id": image_id,
        "index": image_id,
    }


@pytest.mark.parametrize(
    ("keywords", "shape"),
    [({}, (64, 96)), ({"pad_to": 128}, (128, 128)), ({"size_divisor": 8}, (48, 72)), ({"size_divisor": 1}, (41, 70))],
)
def test_padding(keywords, shape):
    samples = [sample(41, 33, 2, 1), sample(30, 70, 0, 2), sample(32, 64, 3, 3)]
    batch = collate(samples, **keywords)
    assert batch["pixel_values"].shape == (3, 3, *shape) and batch["pixel_mask"].shape == (3, *shape)
    assert batch["pixel_values"].dtype == torch.float32 and batch["pixel_mask"].dtype == torch.int64
    assert batch["image_ids"] == [1, 2, 3]
    for index, given in enumerate(samples):
        h, w = given["pixel_values"].shape[1:]
        real = batch["pixel_mask"][index].bool()
        assert real[:h, :w].all() and real.sum() == h * w
        assert torch.equal(batch["pixel_values"][index, :, :h, :w], given["pixel_values"])
        assert (batch["pixel_values"][index][:, ~real] == 0).all()
        masks = batch["mask_labels"][index]
        assert masks.dtype == torch.bool and masks.shape == (len(given["mask_labels"]), *shape)
        assert torch.equal(masks[:, :h, :w], given["mask_labels"].dense()) and not masks[:, ~real].any()
        assert torch.equal(batch["class_labels"][index], given["class_labels"])
        assert batch["class_labels"][index].dtype == torch.int64
        assert torch.equal(batch["prompt_scores"][index], given["prompt_scores"])
    compact = collate(samples, **keywords, dense=False)
    for masks, code in zip(batch["mask_labels"], compact["mask_labels"], strict=True):
        assert code.shape == masks.shape and torch.equal(code.dense(), masks)


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="empty batch"):
        collate([])
    with pytest.raises(ValueError, match="41x33"):
        collate([sample(41, 33, 2, 1)], pad_to=32)
    with pytest.raises(ValueError, match="multiple"):
        collate([sample(41, 33, 2, 1)], pad_to=50)
