"""Features of masks beside the rows of a store, and on their way into a batch."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from uplvp_hf.data import DataError, InstanceDataset, TrainingSet, TrainTransform, collate, encode_mask, read_store
from uplvp_hf.data.store_features import feature_file, feature_width

COLORS = np.array([[r, g, b] for r in (0, 255) for g in (0, 255) for b in (0, 255)][1:])  # 7, none black


def painted(numbers, size=96):
    """A black image with a square of each color, and their masks."""
    pixels, masks = np.zeros((size, size, 3), np.uint8), []
    for place, number in enumerate(numbers):
        mask = np.zeros((size, size), bool)
        top, left = 4 + 46 * (place // 2), 4 + 46 * (place % 2)
        mask[top : top + 36, left : left + 36] = True
        pixels[mask] = COLORS[number]
        masks.append(mask)
    return Image.fromarray(pixels), masks


def entry(folder, number, numbers):
    """A line of a store whose image is saved in `folder`."""
    image, masks = painted(numbers)
    file = folder / f"{number}.png"
    image.save(file)
    objects = {
        "segmentation": [encode_mask(mask) for mask in masks],
        "category_id": [1] * len(masks),
        "bbox": [[0, 0, 1, 1]] * len(masks),
        "area": [int(mask.sum()) for mask in masks],
        "iscrowd": [0] * len(masks),
        "score": [0.5 + 0.05 * one for one in numbers],
    }
    return {
        "image": str(file),
        "image_id": number,
        "file_name": file.name,
        "width": 96,
        "height": 96,
        "objects": objects,
    }


PAINTED = [[[0, 1, 2], [3], []], [[4, 5, 6, 0], [2, 1]]]  # by shard and image


@pytest.fixture
def store(tmp_path):
    """A store of two shards, in which the feature of a mask is the color that its object is painted in."""
    header = {"schema_version": 1, "labeler": "l", "settings": {}, "settings_hash": "", "categories": []}
    header["categories"] = [{"id": 1, "name": "square"}]
    (tmp_path / "header.json").write_text(json.dumps(header))
    number = 0
    for index, shard in enumerate(PAINTED):
        name, lines = f"rows-00000-{index:05d}.jsonl", []
        for numbers in shard:
            lines.append(json.dumps(entry(tmp_path, number, numbers)))
            number += 1
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        vectors = np.array([COLORS[one] for numbers in shard for one in numbers], np.float16)
        np.save(feature_file(tmp_path, name), vectors)
    return tmp_path


def test_rows_have_the_vectors_of_their_masks_only_where_asked_for(store):
    dataset = read_store(store, features=store)
    found = [[tuple(vector) for vector in row["objects"]["features"]] for row in dataset.rows]
    assert found == [[tuple(COLORS[one]) for one in numbers] for shard in PAINTED for numbers in shard]
    assert feature_width(dataset) == 3
    assert all("features" not in row["objects"] for row in read_store(store).rows)  # as every store before


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: file.unlink(), "no features of these masks.*uplvp label STORE --features"),
        (
            lambda file: np.save(file, np.zeros((5, 3), np.float16)),
            r"shape \(5, 3\), rows-00000-00001.jsonl has 6 masks",
        ),
        (lambda file: np.save(file, np.zeros((6, 3), np.float64)), "holds float64"),
        (lambda file: file.write_bytes(file.read_bytes()[:100]), "is no file of features"),
        (lambda file: np.save(file, np.full((6, 3), np.nan, np.float16)), "not finite"),
    ],
)
def test_features_that_do_not_fit_the_rows_are_refused(store, spoil, message):
    file = store / "features-00000-00001.npy"
    spoil(file)
    with pytest.raises(DataError, match=message) as error:
        read_store(store, features=store)
    assert str(file) in str(error.value)
    assert len(read_store(store).rows) == 5


def test_vectors_of_two_widths_are_refused(store):
    np.save(store / "features-00000-00000.npy", np.zeros((4, 2), np.float16))
    with pytest.raises(DataError, match="have 2 and 3 channels"):
        feature_width(read_store(store, features=store))


def colors_under(sample):
    """The mean color of the pixels under each mask, 0 to 255."""
    masks = sample["mask_labels"].dense()
    return torch.stack([255 * sample["pixel_values"][:, mask].mean(1) for mask in masks]) if len(masks) else None


@pytest.mark.parametrize("copy_paste", [0.0, 1.0])
def test_vectors_follow_their_masks_through_augmentation(store, copy_paste):
    """Crops that lose objects, flips, rotation, pasted objects, a limit on the objects: the vector of each mask is the
    color that lies under it."""
    dataset = read_store(store, features=store)
    transform = TrainTransform(64, (1.0, 2.5), flip=0.5, color_jitter=0.0, rotate=10.0)
    samples = TrainingSet(
        dataset, transform, {1: 0}, (0, 0, 0), (1, 1, 1), 0, max_instances=3, copy_paste=copy_paste, features=True
    )
    counts = set()
    for epoch in range(12):
        for index in range(len(samples)):
            sample = samples.sample(index, epoch)
            vectors, under = sample["kernel_targets"], colors_under(sample)
            counts.add((index, len(vectors)))
            assert vectors.dtype == torch.float32 and vectors.shape == (len(sample["mask_labels"]), 3)
            if under is not None:
                assert (under - vectors).abs().max() < 80  # borders are blurred; colors differ by 255
    assert len({count for index, count in counts if index == 0}) >= 3 - bool(copy_paste)  # objects were lost
    assert copy_paste == 0 or any(count > 0 for index, count in counts if index == 2)


def test_batches_have_targets_an_image_and_only_where_asked_for(store):
    dataset, transform = read_store(store, features=store), TrainTransform(64, (1.0, 1.0), flip=0.0, color_jitter=0.0)
    arguments = (dataset, transform, {1: 0}, (0, 0, 0), (1, 1, 1), 0)
    samples = TrainingSet(*arguments, features=True)
    batch = collate([samples[0], samples[2]])
    assert [tuple(vectors.shape) for vectors in batch["kernel_targets"]] == [(3, 3), (0, 3)]
    assert "kernel_targets" not in collate([TrainingSet(*arguments)[0]])


def test_low_data_splits_and_changed_rows_keep_the_vectors(store):
    dataset = read_store(store, features=store).subset([3, 1])
    assert isinstance(dataset, InstanceDataset)
    assert [len(row["objects"]["features"]) for row in dataset.rows] == [4, 1]
    assert tuple(dataset.rows[1]["objects"]["features"][0]) == tuple(COLORS[3])
