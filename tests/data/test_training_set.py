import json

import numpy as np
import pytest
import torch
from PIL import Image

from uplvp_hf.data import DataError, InstanceDataset, TrainingSet, TrainTransform, collate, load_dataset_rows

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


@pytest.fixture
def folder(tmp_path):
    """12 images of 48 x 40 px; image i holds i % 4 squares, of classes 3 and 8, and one crowd."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images").mkdir()
    rng, images, annotations = np.random.default_rng(0), [], []
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{i}.png")
        images.append({"id": 100 + i, "file_name": f"{i}.png", "width": 48, "height": 40})
        for k in range(i % 4 + 1):
            x, y, side = 2 + 11 * k, 5 + k, 10
            square = [[x, y, x + side, y, x + side, y + side, x, y + side]]
            annotations.append({"image_id": 100 + i, "category_id": (3, 8)[k % 2], "segmentation": square})
            annotations[-1] |= {"iscrowd": int(k == i % 4), "score": 0.1 + 0.2 * k}
    categories = [{"id": 3, "name": "a"}, {"id": 8, "name": "b"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "annotations" / "instances.json").write_text(json.dumps(content))
    return tmp_path


def training_set(folder, seed=0, label_map={3: 1, 8: 0}, size=64, **keywords):  # noqa: B006
    dataset = load_dataset_rows(folder) if not isinstance(folder, InstanceDataset) else folder
    return TrainingSet(dataset, TrainTransform(size), label_map, MEAN, STD, seed, **keywords)


def still(folder, label_map=None, **keywords):
    """No jitter: every sample is its image."""
    transform = TrainTransform(64, scale_range=(0.75, 0.75), flip=0, color_jitter=0)
    return TrainingSet(load_dataset_rows(folder), transform, label_map, MEAN, STD, 0, **keywords)


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


def test_values_and_types(folder):
    sample = still(folder, {3: 1, 8: 0})[3]
    pixels = np.asarray(Image.open(folder / "images" / "3.png")).astype(np.float64) / 255
    expected = (pixels - MEAN) / STD
    np.testing.assert_allclose(sample["pixel_values"].permute(1, 2, 0), expected, atol=1e-5)
    assert sample["pixel_values"].dtype == torch.float32 and sample["mask_labels"].dense().dtype == torch.bool
    assert sample["class_labels"].dtype == torch.int64 and sample["class_labels"].tolist() == [1, 0, 1]
    assert sample["prompt_scores"].dtype == torch.float32
    np.testing.assert_allclose(sample["prompt_scores"], [0.1, 0.3, 0.5], rtol=1e-6)
    assert sample["image_id"] == 103 and sample["index"] == 3
    for k, mask in enumerate(sample["mask_labels"].dense()):
        expected = torch.zeros((40, 48), dtype=torch.bool)
        expected[5 + k : 15 + k, 2 + 11 * k : 12 + 11 * k] = True
        assert torch.equal(mask, expected)


def test_crowds_negatives_and_the_best_by_score(folder):
    assert still(folder)[0]["mask_labels"].shape == (0, 40, 48), "only a crowd: a negative"
    assert still(folder)[0]["class_labels"].dtype == torch.int64
    assert len(still(folder, skip_crowd=False)[3]["mask_labels"]) == 4
    np.testing.assert_allclose(still(folder, max_instances=2)[3]["prompt_scores"], [0.3, 0.5], rtol=1e-6)
    assert still(folder)[3]["class_labels"].tolist() == [0, 0, 0], "class-agnostic"


def test_sample_depends_on_seed_epoch_and_index_only(folder):
    first, second = training_set(folder), training_set(folder)
    order = torch.randperm(12).tolist()
    backwards = {i: second[i] for i in order}
    assert all(same(first[i], backwards[i]) for i in range(12))
    other_seed = training_set(folder, seed=1)
    for other in (other_seed.__getitem__, lambda i: first.sample(i, 1)):
        assert sum(same(first[i], other(i)) for i in range(12)) == 0
    assert all(same(first[i], first.sample(i, 0)) for i in range(12))
    assert same(first[-1], first[11])
    with pytest.raises(IndexError):
        first[12]


def test_workers_make_the_same_samples(folder):
    alone, shared = training_set(folder), training_set(folder)
    loader = torch.utils.data.DataLoader(shared, 3, num_workers=2, collate_fn=list)
    samples = [sample for batch in loader for sample in batch]
    assert all(same(alone[i], sample) for i, sample in enumerate(samples)) and len(samples) == 12


def test_bad_image_falls_over_to_the_next(folder):
    (folder / "images" / "4.png").write_bytes((folder / "images" / "4.png").read_bytes()[:900])
    (folder / "images" / "5.png").unlink()
    (folder / "images" / "11.png").write_text("no image")
    samples = training_set(folder)
    indices = [samples[i]["index"] for i in range(12)]
    assert indices == [0, 1, 2, 3, 6, 6, 6, 7, 8, 9, 10, 0]
    assert samples[4]["image_id"] == 106
    assert [f["row"] for f in samples.failures] == ["row 4", "row 5", "row 11"]
    assert samples.failures[1]["file"] == str(folder / "images" / "5.png")
    assert samples.failures[1]["reason"] == "no such image"
    in_workers = training_set(folder)
    for _ in torch.utils.data.DataLoader(in_workers, 4, num_workers=2, collate_fn=list):
        pass
    assert in_workers.failures == samples.failures


def test_many_bad_images_in_a_row_are_an_error(folder):
    for i in range(11):
        (folder / "images" / f"{i}.png").unlink()
    samples = training_set(folder)
    assert samples[1]["index"] == 11, "10 in a row are bridged"
    with pytest.raises(DataError, match=r"rows 0 to 10 .*10\.png"):
        samples[0]


def test_what_cannot_be_trained_on(folder):
    with pytest.raises(DataError, match=r"instances\.json, row 1 \(1\.png\): category id 8 has no class"):
        training_set(folder, label_map={3: 0})
    with pytest.raises(DataError, match="no images"):
        training_set(load_dataset_rows(folder).subset([]))
    for keywords in ({"seed": -1}, {"max_instances": 0}):
        with pytest.raises(ValueError, match=next(iter(keywords))):
            training_set(folder, **keywords)


def test_batches_of_real_images(coco_sample):
    dataset = load_dataset_rows(coco_sample)
    label_map = {category_id: index for index, category_id in enumerate(dataset.category_ids)}
    samples = TrainingSet(dataset, TrainTransform(128), label_map, MEAN, STD, 0)
    batch = collate([samples[i] for i in range(16)])
    for index in range(16):
        row, classes = dataset[index], batch["class_labels"][index]
        present = {label_map[c] for c in row["objects"]["category_id"]}
        assert set(classes.tolist()) <= present and len(classes) == len(batch["mask_labels"][index])
        assert not (batch["mask_labels"][index] & (batch["pixel_mask"][index] == 0)).any()
    assert sum(map(len, batch["class_labels"])) > 30
