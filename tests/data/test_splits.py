import itertools

import numpy as np
import pytest

from uplvp_hf.data import DataError, InstanceDataset, Row, empty_objects, load_dataset_rows
from uplvp_hf.data.splits import Contents, SplitSpec, draw


def sample_labels_per_class(dataset, per_class, seed, allow_fewer=False):
    return list(draw(Contents.of(dataset), SplitSpec("images", per_class, seed, allow_fewer=allow_fewer)))


def dataset_of(classes_per_image, crowd=()):
    rows = []
    for index, classes in enumerate(classes_per_image):
        crowds = [int(index in crowd)] * len(classes)
        objects = {**empty_objects(), "category_id": list(classes), "iscrowd": crowds}
        rows.append(Row(image="", image_id=index, file_name=f"{index}.jpg", width=1, height=1, objects=objects))
    return InstanceDataset(rows, [{"id": i, "name": f"class {i}"} for i in (2, 4, 9)])


def counts(dataset, indices):
    return {i: sum(i in dataset[k]["objects"]["category_id"] for k in indices) for i in dataset.category_ids}


def test_one_class_an_image_gives_the_exact_number():
    dataset = dataset_of([[2], [2, 2], [4], [9], []] * 8)
    for seed in range(5):
        indices = sample_labels_per_class(dataset, 3, seed)
        assert len(set(indices)) == len(indices) == 9 and indices == sorted(indices)
        assert counts(dataset, indices) == {2: 3, 4: 3, 9: 3}
        assert indices == sample_labels_per_class(dataset, 3, seed)
    assert len({tuple(sample_labels_per_class(dataset, 3, seed)) for seed in range(5)}) == 5


def test_every_image_is_drawn_about_equally_often():
    dataset = dataset_of([[2], [4], [9]] * 10)
    drawn = np.zeros(30)
    for seed in range(600):
        drawn[sample_labels_per_class(dataset, 2, seed)] += 1
    assert drawn.sum() == 3600 and np.abs(drawn - 120).max() < 5 * np.sqrt(120 * 0.8)


def test_shared_images_count_for_all_their_classes():
    rng = np.random.default_rng(0)
    dataset = dataset_of([rng.choice([2, 4, 9], size=rng.integers(0, 4), replace=False).tolist() for _ in range(60)])
    for seed in range(10):
        splits = [sample_labels_per_class(dataset, per_class, seed) for per_class in (1, 2, 5, 10)]
        for per_class, indices in zip((1, 2, 5, 10), splits):
            assert min(counts(dataset, indices).values()) >= per_class and len(indices) <= 3 * per_class
        for smaller, larger in itertools.pairwise(splits):
            assert set(smaller) <= set(larger)
    shared = dataset_of([[2, 4, 9]] * 4)
    assert len(sample_labels_per_class(shared, 3, 0)) == 3


def test_classes_with_too_few_images_are_named():
    dataset = dataset_of([[2], [4], [9], [2], [9], [4]], crowd=(5,))
    with pytest.raises(DataError, match=r"'class 4' is in 1 images, 2 were asked for"):
        sample_labels_per_class(dataset, 2, 0)
    assert sample_labels_per_class(dataset, 2, 0, allow_fewer=True) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="images a class must be a whole number >= 1"):
        sample_labels_per_class(dataset, 0, 0)


def test_on_real_labels(coco_sample):
    dataset = load_dataset_rows(coco_sample)
    indices = sample_labels_per_class(dataset, 1, 0, allow_fewer=True)
    present = {
        c
        for row in dataset.rows
        for c, crowd in zip(row["objects"]["category_id"], row["objects"]["iscrowd"])
        if not crowd
    }
    assert present == {c for k in indices for c in dataset[k]["objects"]["category_id"]} and len(indices) <= len(
        present
    )


def test_a_class_without_images_is_named_with_what_can_be_done():
    contents = Contents([[1], [1]], {1: "cat", 2: "dog"}, "set")
    with pytest.raises(DataError, match=r"set: class 'dog' is in 0 images, .* Remove the class .*--allow-fewer"):
        draw(contents, SplitSpec("images", 1))
    with pytest.raises(DataError, match=r"class 'cat' has 2 instances, 3 were asked for\. Ask for at most 2, or"):
        draw(contents, SplitSpec("shot", 3))
