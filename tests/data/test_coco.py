import copy
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from uplvp_hf.data import (
    DataError,
    DataWarning,
    ImageError,
    InstanceDataset,
    encode_mask,
    load_dataset_rows,
    read_coco,
    write_coco,
)
from uplvp_hf.data.check import check_dataset

HOLES = {"size": [30, 40], "counts": [35, 5, 25, 5, 1130]}  # uncompressed: two runs of 5 px in columns 1 and 2


@pytest.fixture
def load(make_coco):
    return lambda annotations, **keys: load_dataset_rows(make_coco(annotations, **keys))


def test_ids_names_and_images(load, annotation):
    dataset = load([annotation()])
    assert dataset.categories == [{"id": 3, "name": "y"}, {"id": 7, "name": "x"}]
    assert dataset.id2label == {0: "y", 1: "x"} and dataset.category_ids == [3, 7]
    assert len(dataset) == 2 and dataset[0]["image_id"] == 10
    assert dataset[0]["objects"]["category_id"] == [7] and dataset[0]["objects"]["score"] == [1.0]
    assert dataset[1]["objects"]["category_id"] == [], "images without instances stay"
    expected = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(dataset.load_image(0)), expected)
    mask = dataset.mask(0, 0)
    assert mask.dtype == np.bool_ and mask[5:15, 5:15].all() and mask.sum() == 100
    bare = dataset.unlabeled()
    assert bare[0]["objects"]["segmentation"] == [] and dataset[0]["objects"]["segmentation"], "a copy, not a change"
    assert [row["image_id"] for row in dataset.subset([1]).rows] == [11]


@pytest.mark.slow
def test_real_annotations_give_the_masks_of_pycocotools(coco_sample):
    dataset = load_dataset_rows(coco_sample)
    reference = COCO(str(coco_sample / "annotations" / "instances.json"))
    assert len(dataset) == 84 and len(dataset.categories) == 80 and dataset.failures == []
    seen = {"crowd": 0, "parts": 0, "objects": 0, "empty images": 0}
    for index, row in enumerate(dataset.rows):
        annotations = reference.imgToAnns[row["image_id"]]
        assert len(annotations) == len(row["objects"]["area"])
        seen["empty images"] += not annotations
        for k, entry in enumerate(annotations):
            np.testing.assert_array_equal(dataset.mask(index, k), reference.annToMask(entry).astype(bool))
            for key in ("category_id", "bbox", "area", "iscrowd"):
                assert row["objects"][key][k] == entry[key]
            seen["objects"] += 1
            seen["crowd"] += entry["iscrowd"]
            seen["parts"] += isinstance(entry["segmentation"], list) and len(entry["segmentation"]) > 1
        assert dataset.load_image(index).size == (row["width"], row["height"])
    assert seen["objects"] == 792 and seen["crowd"] == 10 and seen["parts"] > 0 and seen["empty images"] > 0


def test_round_trip(coco_sample, tmp_path):
    dataset = load_dataset_rows(coco_sample)
    write_coco(dataset, tmp_path / "deep" / "again.json")
    again = read_coco(tmp_path / "deep" / "again.json", coco_sample / "images")
    assert again.rows == dataset.rows and again.categories == dataset.categories
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["again.json"], "no temporary file is left"
    assert len(COCO(str(tmp_path / "deep" / "again.json")).anns) == 792


def test_failed_write_leaves_the_old_file(load, annotation, tmp_path):
    dataset = load([annotation()])
    target = tmp_path / "out.json"
    write_coco(dataset, target)
    before = target.read_text()
    broken = InstanceDataset(copy.deepcopy(dataset.rows), dataset.categories)
    broken[0]["objects"]["area"][0] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        write_coco(broken, target)
    with pytest.raises(DataError, match="occurs twice"):
        write_coco(dataset.subset([0, 0]), target)
    assert target.read_text() == before


def test_uncompressed_crowd(load, annotation):
    dataset = load([annotation(segmentation=HOLES, iscrowd=1)])
    mask = np.zeros(1200, dtype=bool)
    mask[35:40] = mask[65:70] = True
    np.testing.assert_array_equal(dataset.mask(0, 0), mask.reshape(40, 30).T)
    assert dataset[0]["objects"]["iscrowd"] == [1]
    assert isinstance(dataset[0]["objects"]["segmentation"][0]["counts"], str)


def test_box_and_area_come_from_the_mask_where_missing(load, annotation):
    entry = {key: value for key, value in annotation().items() if key not in ("bbox", "area", "iscrowd", "id")}
    objects = load([entry])[0]["objects"]
    assert objects["bbox"] == [[5, 5, 10, 10]] and objects["area"] == [100] and objects["iscrowd"] == [0]


@pytest.mark.parametrize(
    ("x", "y", "clipped"),
    [(-4, 5, [0, 5, 16, 20]), (35, 5, [35, 5, 5, 20]), (5, -6, [5, 0, 20, 14]), (5, 22, [5, 22, 20, 8])],
)
def test_polygon_reaching_out_is_clipped(load, annotation, x, y, clipped):
    square = [[x, y, x + 20, y, x + 20, y + 20, x, y + 20]]
    with pytest.warns(DataWarning, match="the outlines of 1 objects reach out of their images"):
        dataset = load([annotation(segmentation=square, bbox=[x, y, 20, 20], area=400)])
    objects = dataset[0]["objects"]
    left, top, width, height = clipped
    assert objects["bbox"] == [clipped] and objects["area"] == [width * height]
    mask = np.zeros((30, 40), dtype=bool)
    mask[top : top + height, left : left + width] = True
    assert objects["segmentation"] == [encode_mask(mask)]


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ([[50, 5, 60, 5, 60, 15]], "no pixel"),
        ([[5, 5, 5, 5, 5, 5]], "no pixel"),
        ([[5, 5, 9, 9]], "at least 3 points"),
        ([[5, 5, 9, float("nan"), 9, 9]], "not finite"),
        ([], "empty"),
        ({"size": [40, 30], "counts": "0"}, "size"),
        ({"size": [30, 40], "counts": [3, 4]}, "sum to 7"),
        ({"size": [30, 40], "counts": "34"}, "sum to 7"),
    ],
)
def test_unusable_masks_are_left_out_and_listed(make_coco, annotation, segmentation, reason):
    folder = make_coco([annotation(), annotation(id=22, segmentation=segmentation)])
    with pytest.warns(UserWarning, match="1 of 2 annotations"):
        dataset = load_dataset_rows(folder)
    assert len(dataset[0]["objects"]["area"]) == 1
    (failure,) = dataset.failures
    assert failure["file"].endswith("instances.json") and failure["row"] == "annotations[1] (id 22)"
    assert reason in failure["reason"]
    with pytest.raises(DataError, match="none of the 1 annotations"):
        load_dataset_rows(make_coco([annotation(segmentation=segmentation)]))


def test_bad_part_goes_good_part_stays(load, annotation):
    square = annotation()["segmentation"][0]
    dataset = load([annotation(segmentation=[square, [1, 1, 2, 2]])])
    assert dataset[0]["objects"]["segmentation"] == [[square]] and len(dataset.failures) == 1


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_missing_section(make_coco, annotation, key):
    file = make_coco([annotation()]) / "annotations" / "instances.json"
    content = json.loads(file.read_text())
    del content[key]
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"instances\.json: has no '{key}'"):
        load_dataset_rows(file)


@pytest.mark.parametrize("key", ["image_id", "category_id", "segmentation"])
def test_missing_key_of_an_annotation(load, annotation, key):
    entry = annotation()
    del entry[key], entry["bbox"]  # an object with a box alone is another matter
    with pytest.raises(DataError, match=rf"instances\.json, annotations\[1\]: has no '{key}'"):
        load([annotation(), entry])


@pytest.mark.parametrize("key", ["id", "file_name"])
def test_missing_key_of_an_image(make_coco, annotation, key):
    file = make_coco([annotation()]) / "annotations" / "instances.json"
    content = json.loads(file.read_text())
    del content["images"][1][key]
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"instances\.json, images\[1\].*has no '{key}'"):
        load_dataset_rows(file)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"category_id": 4}, "category id 4 is not in 'categories'"),
        ({"category_id": "seven"}, "'category_id' must be a whole number, got 'seven'"),
        ({"image_id": 99}, "image id 99 is not in 'images'"),
        ({"image_id": "100"}, "image id '100' is not in 'images'"),
        ({"image_id": None}, "'image_id' must be"),
        ({"score": float("nan")}, "'score' must be a finite number"),
    ],
)
def test_bad_value_names_the_annotation(load, annotation, changes, reason):
    with pytest.raises(DataError) as caught:
        load([annotation(), annotation(**{"id": 5, **changes})])
    assert "instances.json, annotations[1] (id 5)" in str(caught.value) and reason in str(caught.value)


@pytest.mark.parametrize("name", ["../../secret.png", "/etc/passwd", "sub/../../x.png", "", "a\0b.png", "."])
def test_file_names_do_not_climb_out(make_coco, annotation, name):
    file = make_coco([annotation()]) / "annotations" / "instances.json"
    content = json.loads(file.read_text())
    content["images"][0]["file_name"] = name
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"instances\.json, images\[0\]"):
        load_dataset_rows(file)


def test_categories_are_checked(load, annotation):
    with pytest.raises(DataError, match="empty 'categories'"):
        load([annotation()], categories=())
    assert load([], categories=()).id2label == {}, "an unlabeled file needs no categories"
    with pytest.raises(DataError, match=r"categories\[1\]: category id 7 occurs twice"):
        load([annotation()], categories=({"id": 7, "name": "a"}, {"id": 7, "name": "b"}))
    with pytest.raises(DataError, match=r"categories\[0\]: has no 'name'"):
        load([annotation()], categories=({"id": 7},))


def test_no_images_and_no_json(make_coco, annotation):
    with pytest.raises(DataError, match="lists no images"):
        load_dataset_rows(make_coco([], names=()))
    file = make_coco([annotation()]) / "annotations" / "instances.json"
    file.write_text(file.read_text()[:-20])
    with pytest.raises(DataError, match=r"instances\.json: is not valid JSON"):
        load_dataset_rows(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"instances\.json: its encoding is not UTF-8"):
        load_dataset_rows(file)
    file.write_text("[]")
    with pytest.raises(DataError, match=r"instances\.json: must be a JSON object, got list"):
        load_dataset_rows(file)


def test_missing_image_is_met_when_opened_or_checked(make_coco, annotation):
    folder = make_coco([annotation()])
    (folder / "images" / "b.png").unlink()
    dataset = load_dataset_rows(folder)
    assert dataset.failures == [] and len(dataset) == 2
    with pytest.raises(ImageError, match=r"b\.png: no such image"):
        dataset.load_image(1)
    (broken,) = check_dataset(lambda: load_dataset_rows(folder), images=True)["broken"]
    assert broken["file"] == str(folder / "images" / "b.png") and broken["row"].startswith("row 1 ")


def test_folders_and_splits(make_coco, annotation, tmp_path):
    folder = make_coco([annotation()])
    instances = folder / "annotations" / "instances.json"
    instances.rename(folder / "annotations" / "train.json")
    assert len(load_dataset_rows(folder)) == 2
    write_coco(load_dataset_rows(folder).subset([0]), folder / "annotations" / "val.json")
    assert len(load_dataset_rows(folder, split="val")) == 1 and len(load_dataset_rows(folder, split="train")) == 2
    with pytest.raises(DataError, match="train, val"):
        load_dataset_rows(folder)
    with pytest.raises(DataError, match=r"has no test\.json"):
        load_dataset_rows(folder, split="test")
    dataset = load_dataset_rows(folder / "annotations" / "val.json", images=folder / "images")
    assert dataset.load_image(0).size == (40, 30)
    # COCO's own layout: annotations/instances_val2017.json and val2017/
    (folder / "annotations" / "val.json").rename(folder / "annotations" / "instances_val2017.json")
    (folder / "images").rename(folder / "val2017")
    assert load_dataset_rows(folder / "annotations" / "instances_val2017.json").load_image(0).size == (40, 30)


def test_paths_that_are_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.md").write_text("x")
    for path, reason in (("empty", "holds no images"), ("none", "no such file"), ("note.md", "is neither a folder")):
        with pytest.raises(DataError, match=rf"{path}: {reason}"):
            load_dataset_rows(tmp_path / path)
    with pytest.raises(DataError, match="no such image folder"):
        load_dataset_rows(tmp_path / "empty", images=tmp_path / "none")
    with pytest.raises(DataError, match="split 'train'"):
        load_dataset_rows(tmp_path / "empty", split="train")


def test_hf_dataset(load, annotation):
    dataset = load([annotation(), annotation(segmentation=HOLES, iscrowd=1)])
    rows = dataset.to_hf_dataset()
    assert len(rows) == 2 and isinstance(rows[0]["image"], Image.Image)
    np.testing.assert_array_equal(np.asarray(rows[0]["image"]), np.asarray(dataset.load_image(0)))
    for k in range(2):
        code = rows[0]["objects"]["segmentation"][k]
        np.testing.assert_array_equal(coco_mask.decode(code).astype(bool), dataset.mask(0, k))
    assert rows[1]["objects"]["segmentation"] == [] and rows[0]["image_id"] == 10
    in_memory = InstanceDataset([{**dataset[0], "image": dataset.load_image(0), "image_id": "ten"}], dataset.categories)
    assert in_memory.to_hf_dataset()[0]["image_id"] == "ten"


def test_images_alone_need_no_annotations(tmp_path):
    """As COCO's own image_info_unlabeled2017.json has it, whose images lie in unlabeled2017/."""
    (tmp_path / "unlabeled2017").mkdir()
    (tmp_path / "annotations").mkdir()
    Image.new("RGB", (9, 7)).save(tmp_path / "unlabeled2017" / "a.png")
    entry = {"id": 5, "file_name": "a.png", "width": 9, "height": 7}
    file = tmp_path / "annotations" / "image_info_unlabeled2017.json"
    file.write_text(json.dumps({"images": [entry]}))
    with pytest.raises(DataError, match="has no 'annotations'"):
        load_dataset_rows(file)
    dataset = load_dataset_rows(file, unlabeled=True)
    assert dataset[0]["image_id"] == 5 and dataset.load_image(0).size == (9, 7)


def test_file_names_relative_to_the_file_itself(tmp_path):
    """`images/a.png` in a file beside the folder images/, as Label Studio writes it."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (9, 7)).save(tmp_path / "images" / "a.png")
    entry = {"id": 5, "file_name": "images/a.png", "width": 9, "height": 7}
    (tmp_path / "result.json").write_text(json.dumps({"images": [entry], "annotations": [], "categories": []}))
    assert load_dataset_rows(tmp_path / "result.json").load_image(0).size == (9, 7)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings_that_are_read(make_coco, annotation, encoding):
    file = make_coco([annotation()]) / "annotations" / "instances.json"
    content = json.loads(file.read_text())
    content["categories"][0]["name"] = "é"
    file.write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))
    assert load_dataset_rows(file).id2label == {0: "y", 1: "é"}


def test_a_code_page_is_named_as_such(make_coco, annotation):
    file = make_coco([annotation()]) / "annotations" / "instances.json"
    file.write_bytes(file.read_bytes().replace(b'"x"', '"é"'.encode("cp1252"), 1))
    with pytest.raises(DataError, match=r"encoding is not UTF-8.*Save it as UTF-8"):
        load_dataset_rows(file)


@pytest.mark.parametrize("image_id", [0, 2**63, 10.0, "first"])
def test_ids_of_all_kinds(make_coco, annotation, image_id):
    """Zero, more than 63 bits, whole floats, texts; and annotation ids that repeat."""
    file = make_coco([annotation(image_id=image_id), annotation(image_id=image_id)]) / "annotations" / "instances.json"
    content = json.loads(file.read_text())
    content["images"][0]["id"] = image_id
    file.write_text(json.dumps(content))
    dataset = load_dataset_rows(file)
    assert dataset[0]["image_id"] == image_id and len(dataset[0]["objects"]["area"]) == 2
