"""What training says that it will use, and that it refuses to learn nothing."""

import pytest

from uplvp_hf.data import DataError, load_dataset_rows
from uplvp_hf.data.usage import crowds_as_objects, training_usage
from uplvp_hf.training.build import build_data
from uplvp_hf.training.config import load_settings

DOT = [[5, 5, 8, 5, 8, 8, 5, 8]]  # 9 px


def settings(folder, *words):
    return load_settings(None, [f"data.train={folder}", *words])


def test_counts_and_reasons(make_coco, annotation):
    entries = [annotation(id=k) for k in range(3)] + [annotation(iscrowd=1), annotation(segmentation=DOT, area=9)]
    entries.append(annotation(segmentation=DOT, area=9, image_id=11))
    usage = training_usage(load_dataset_rows(make_coco(entries, names=("a.png", "b.png", "c.png"))), 40, 2)
    assert (usage.images, usage.objects, usage.empty) == (3, {7: 2}, 2)
    assert dict(usage.left_out) == {
        "crowds (iscrowd = 1)": 1,
        "smaller than 16 px at the training size of 40 px": 2,
        "beyond the 2 best of an image (data.max_instances)": 1,
    }
    assert usage.classes_without_objects == ["y"]
    text = str(usage)
    assert text.startswith("Training uses 3 images, 2 objects of 1 classes. Left out are 1 objects: crowds")
    assert "2 images have no object" in text and "No object shows 'y'" in text


def test_a_wrong_area_in_the_file_leaves_nothing_out(make_coco, annotation):
    usage = training_usage(load_dataset_rows(make_coco([annotation(area=1)])), 40)
    assert usage.objects.total() == 1 and not usage.left_out


def test_small_objects_of_small_images_are_enlarged(make_coco, annotation):
    usage = training_usage(load_dataset_rows(make_coco([annotation(segmentation=DOT, area=9)])), 80)
    assert usage.objects.total() == 1, "9 px at 40 px are 36 px at 80 px"


@pytest.mark.parametrize("words", [[], ["data.labels_per_class=1", "data.allow_fewer=true"], ["data.subset=0@50"]])
def test_crowds_alone_are_refused_with_a_remedy_that_works(make_coco, annotation, words):
    folder = make_coco([annotation(iscrowd=1), annotation(id=2, image_id=11, category_id=3, iscrowd=1)])
    with pytest.raises(DataError, match=r"crowds|holds no"):
        build_data(settings(folder, *words))
    train, _ = build_data(settings(folder, "data.crowds_as_objects=true", *words))
    assert [row["objects"]["iscrowd"] for row in train.rows] == [[0]] * len(train)


def test_no_objects_and_too_small_ones_are_refused(make_coco, annotation):
    with pytest.raises(DataError, match=r"nothing to learn: Training uses 2 images, 0 objects.*Label the images first"):
        build_data(settings(make_coco([])))
    folder = make_coco([annotation(segmentation=DOT, area=9)])
    with pytest.raises(DataError, match=r"nothing to learn: .*smaller than 16 px.*Raise data\.size"):
        build_data(settings(folder, "data.size=32"))


def test_a_split_is_told(make_coco, annotation):
    train, _ = build_data(settings(make_coco([annotation(), annotation(id=2, image_id=11)]), "data.subset=0@50"))
    assert "Training uses 1 of 2 images, 1 objects" in str(training_usage(train))


def test_the_remedy_for_too_few_labels_works_in_training(make_coco, annotation):
    folder = make_coco([annotation()])
    with pytest.raises(DataError, match=r"class 'y' is in 0 images.*data\.allow_fewer=true"):
        build_data(settings(folder, "data.labels_per_class=1"))
    train, _ = build_data(settings(folder, "data.labels_per_class=1", "data.allow_fewer=true"))
    assert len(train) == 1 and "No object shows 'y'" in str(training_usage(train))


def test_masks_and_boxes_of_crowds_stay(make_coco, annotation):
    dataset = load_dataset_rows(make_coco([annotation(iscrowd=1)]))
    changed = crowds_as_objects(dataset)
    assert changed[0]["objects"] == {**dataset[0]["objects"], "iscrowd": [0]}
