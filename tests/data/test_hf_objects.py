"""The forms in which datasets of the `datasets` library hold their objects: which masks and classes come out."""

import io

import datasets
import numpy as np
import pytest
from PIL import Image

from uplvp_hf.data import DataError, DataWarning, encode_mask, load_dataset_rows, stream_dataset_rows
from uplvp_hf.data.check import check_dataset

POLYGON = [[5.0, 5.0, 15.0, 5.0, 15.0, 15.0, 5.0, 15.0]]
MASK = np.zeros((30, 40), bool)
MASK[5:15, 5:15] = True
OTHER = np.roll(MASK, 12, axis=1)
POLYGONS = datasets.List(datasets.List(datasets.Value("float32")))
RLES = {"size": datasets.List(datasets.Value("int32")), "counts": datasets.Value("string")}
TEXT, NUMBER = datasets.Value("string"), datasets.Value("int64")


def png():
    stream = io.BytesIO()
    Image.new("RGB", (40, 30)).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


def saved(folder, feature, values):
    features = datasets.Features({"image": datasets.Image(), "objects": feature})
    data = datasets.Dataset.from_dict({"image": [png() for _ in values], "objects": values}, features=features)
    data.save_to_disk(folder / "set")
    return folder / "set"


def masks(dataset, index):
    return [dataset.mask(index, k) for k in range(len(dataset[index]["objects"]["area"]))]


def test_lists_of_polygons_with_class_labels(tmp_path):
    feature = {
        "segmentation": datasets.List(POLYGONS),
        "category": datasets.List(datasets.ClassLabel(names=["cat", "dog"])),
        "bbox": datasets.List(datasets.List(datasets.Value("float32"))),
        "is_crowd": datasets.List(datasets.Value("bool")),
        "id": datasets.List(NUMBER),
    }
    first = {"segmentation": [POLYGON], "category": [1], "bbox": [[5, 5, 15, 15]], "is_crowd": [True], "id": [8]}
    dataset = load_dataset_rows(saved(tmp_path, feature, [first, {key: [] for key in first}]))
    assert dataset.id2label == {0: "cat", 1: "dog"}
    objects = dataset[0]["objects"]
    assert objects["category_id"] == [1] and objects["iscrowd"] == [1] and objects["score"] == [1.0]
    assert objects["bbox"] == [[5, 5, 10, 10]] and objects["area"] == [100], "from the mask; the set has corners"
    np.testing.assert_array_equal(masks(dataset, 0), [MASK])
    assert dataset[1]["objects"]["category_id"] == []
    stream = stream_dataset_rows(tmp_path / "set")
    assert next(iter(stream))["objects"] == objects and stream.categories == dataset.categories


@pytest.mark.parametrize(
    ("kind", "values", "categories", "ids"),
    [
        (TEXT, ["dog", "ant"], [{"id": 0, "name": "ant"}, {"id": 1, "name": "dog"}], [1, 0]),
        (NUMBER, [90, 17], [{"id": 17, "name": "17"}, {"id": 90, "name": "90"}], [90, 17]),
    ],
)
def test_structs_of_rles(tmp_path, kind, values, categories, ids):
    feature = datasets.List({"segmentation": RLES, "label": kind, "score": datasets.Value("float32")})
    codes = [encode_mask(MASK), encode_mask(OTHER)]
    rows = [[{"segmentation": code, "label": value, "score": 0.5} for code, value in zip(codes, values)], []]
    dataset = load_dataset_rows(saved(tmp_path, feature, rows))
    assert dataset.categories == categories
    assert dataset[0]["objects"]["category_id"] == ids and dataset[0]["objects"]["score"] == [0.5, 0.5]
    np.testing.assert_array_equal(masks(dataset, 0), [MASK, OTHER])
    assert dataset[1]["objects"]["score"] == []
    with pytest.raises(DataError, match="have no names"):
        stream_dataset_rows(tmp_path / "set")


def test_what_cannot_be_used_is_left_out_and_said(tmp_path):
    feature = datasets.List({"segmentation": POLYGONS, "category": datasets.ClassLabel(names=["a"])})
    away = [[500.0, 5.0, 510.0, 5.0, 510.0, 9.0]]
    row = [{"segmentation": part, "category": k} for part, k in ((POLYGON, 0), (away, 0), ([[1.0]], 0), (POLYGON, -1))]
    dataset = load_dataset_rows(saved(tmp_path, feature, [row]))
    with pytest.warns(DataWarning) as caught:
        assert dataset[0]["objects"]["category_id"] == [0]
    reasons = [str(w.message.reason) for w in caught]
    assert "object 1 is left out: no pixel" in reasons[0] and "at least 3 points" in reasons[1]
    assert "object 3 is left out: the class -1 is none of the dataset" in reasons[2]
    report = check_dataset(lambda: load_dataset_rows(tmp_path / "set"))
    assert len(report["warnings"]) == 3 and report["instances"] == 1


def test_boxes_are_no_masks(tmp_path):
    feature = datasets.List({"bbox": datasets.List(datasets.Value("float32")), "category": NUMBER})
    folder = saved(tmp_path, feature, [[{"bbox": [1, 2, 3, 4], "category": 1}]])
    with pytest.warns(UserWarning, match=r"no 'segmentation', only \['bbox', 'category'\]; boxes are no masks"):
        dataset = load_dataset_rows(folder)
    assert dataset.categories == [] and dataset[0]["objects"]["bbox"] == []


def test_masks_without_classes_are_refused(tmp_path):
    folder = saved(tmp_path, datasets.List({"segmentation": POLYGONS, "kind": NUMBER}), [[]])
    with pytest.raises(DataError, match=r"have no class, only \['kind', 'segmentation'\]"):
        load_dataset_rows(folder)


def test_lists_that_do_not_fit_together(tmp_path):
    feature = {"segmentation": datasets.List(POLYGONS), "category": datasets.List(NUMBER)}
    feature["score"] = datasets.List(datasets.Value("float64"))
    rows = [
        {"segmentation": [POLYGON, POLYGON], "category": [3], "score": [0.5, 0.5]},
        {"segmentation": [POLYGON, POLYGON], "category": [3, 3], "score": [0.5, None]},
    ]
    dataset = load_dataset_rows(saved(tmp_path, feature, rows))
    with pytest.raises(DataError, match=r"image id 0: the lists .*'segmentation': 2, 'category': 1, 'score': 2"):
        dataset[0]
    assert dataset[1]["objects"]["score"] == [0.5, 1.0]
    broken = check_dataset(lambda: dataset)["broken"]
    assert len(broken) == 1 and broken[0]["row"] == "image id 0"
