"""What `check_dataset` counts, and that every kind of broken row is found, with its place."""

import json
import re
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from uplvp_hf.data import DataError, InstanceDataset, Row, load_dataset_rows, rle_areas
from uplvp_hf.data.check import box_fault, check_dataset, format_report, object_faults
from uplvp_hf.data.layouts import OFFICIAL_COUNTS
from uplvp_hf.data.synthetic import write_scenes

SQUARE = [[5, 5, 15, 5, 15, 15, 5, 15]]
GOOD = {"segmentation": SQUARE, "category_id": 7, "bbox": [5, 5, 10, 10], "area": 100.0, "iscrowd": 0, "score": 1.0}


def report_of(path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return check_dataset(lambda: load_dataset_rows(path, strict=False), **options)


def test_counts(tmp_path):
    """Against counts by hand, of drawn scenes."""
    write_scenes(tmp_path / "scenes", count=6, seed=0, size=160)
    dataset = load_dataset_rows(tmp_path / "scenes")
    report = report_of(tmp_path / "scenes", images=True)
    json.dumps(report)
    assert report["broken"] == [] and report["warnings"] == [] and report["images"] == 6
    areas, names = [], []
    for index, row in enumerate(dataset.rows):
        for k, category_id in enumerate(row["objects"]["category_id"]):
            areas.append(dataset.mask(index, k).sum())
            names.append((index, category_id))
    assert report["instances"] == len(areas) and report["crowds"] == 0
    counts = [sum(a < 1024 for a in areas), sum(1024 <= a < 9216 for a in areas), sum(a >= 9216 for a in areas)]
    assert list(report["object_sizes"].values()) == counts and min(counts[:2]) > 0
    for entry in report["classes"]:
        held = [index for index, category_id in names if category_id == entry["id"]]
        assert (entry["instances"], entry["images"]) == (len(held), len(set(held)))
    assert report["image_sizes"]["median"] == [dataset[3]["width"], dataset[3]["height"]]
    assert report["most_instances"] == max(len(row["objects"]["area"]) for row in dataset.rows)


def test_every_broken_entry_of_a_coco_file_is_listed(make_coco, annotation):
    faults = {
        "category_id": (4, "category id 4 is not in 'categories'"),
        "image_id": (99, "image id 99 is not in 'images'"),
        "segmentation": ({"size": [40, 30], "counts": "0"}, "the RLE has size (height, width) [40, 30], the image"),
        "iscrowd": ("yes", "'iscrowd' must be a whole number"),
    }
    unhashable = annotation(id=23, image_id=[10])
    entries = [annotation(id=k, **{key: value}) for k, (key, (value, _)) in enumerate(faults.items())]
    nan = [[5, 5, float("nan"), 5, 9, 9]]
    entries += [annotation(id=20), annotation(id=21, segmentation=nan), annotation(id=22, iscrowd=1)]
    folder = make_coco([*entries, unhashable], names=("a.png", "b.png", "../c.png"))
    (folder / "images" / "c.png").unlink()  # it would be found by the end of the name
    report = report_of(folder)
    found = {fault["row"]: fault["reason"] for fault in report["broken"]}
    assert found.pop("images[2] (id 12)").startswith("the file name '../c.png' leads out")
    assert "number 2 is nan" in found.pop("annotations[5] (id 21)")
    assert "'image_id' must be" in found.pop("annotations[7] (id 23)")
    for k, (_, reason) in enumerate(faults.values()):
        assert reason in found.pop(f"annotations[{k}] (id {k})")
    assert not found and all(fault["file"].endswith("instances.json") for fault in report["broken"])
    assert (report["images"], report["instances"], report["crowds"], report["empty_images"]) == (2, 1, 1, 1)
    with pytest.raises(DataError, match=r"\.\./c\.png"):
        load_dataset_rows(folder)
    text = format_report(report, shown=3)
    assert "7 broken, 0 warnings" in text and "... and 4 more" in text


def test_warnings_of_a_coco_file(make_coco, annotation):
    out = [[-4, 5, 16, 5, 16, 25, -4, 25]]
    slightly = [[-0.5, 5, 16, 5, 16, 25, -0.5, 25]]
    box = {"bbox": [0, 5, 16, 20]}
    entries = [annotation(id=5), annotation(id=5), annotation(id=6, segmentation=out, **box)]
    report = report_of(make_coco([*entries, annotation(id=7, segmentation=slightly, **box)]))
    assert report["broken"] == []
    assert [(fault["row"], fault["reason"].split(";")[0]) for fault in report["warnings"]] == [
        ("annotations[1] (id 5)", "the id 5 occurs twice"),
        ("annotations[2] (id 6)", "a polygon reaches from x = -4 to 16 in an image of 40 px"),
        ("row 0 (image id 10)", "2 objects are exact doubles of others in their image"),
    ]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"category_id": 8}, "category id 8 is not among the classes"),
        ({"iscrowd": 2}, "iscrowd must be 0 or 1, got 2"),
        ({"score": float("nan")}, "a score lies between 0 and 1, got nan"),
        ({"score": 1.5}, "a score lies between"),
        ({"area": -1.0}, "an area must be"),
        ({"segmentation": {"size": [3, 4], "counts": "0"}}, r"size \(height, width\) \[3, 4\]"),
        ({"segmentation": [[5, 5, 5, 5, 5, 5]]}, "no pixel"),
        ({"bbox": [5, 5, 10]}, None),
    ],
)
def test_objects(change, reason):
    faults, rle = object_faults({**GOOD, **change}, 30, 40, {7})
    if reason is None:
        assert faults == [] and rle_areas([rle]) == 100
    else:
        (fault,) = faults
        assert re.search(reason, fault)


@pytest.mark.parametrize(
    ("bbox", "reason"),
    [
        ([5, 5, 10], "a box must be"),
        ([5, 5, float("inf"), 1], "a box must be"),
        ([5, 5, -1, 1], "negative side"),
        ([-3, 5, 18, 10], "reaches out of the 40x30 image"),
        ([35, 5, 10, 10], "reaches out"),
        ([15, 15, 10, 10], r"is not that of its mask, \[5.0, 5.0, 10.0, 10.0\]"),
        ([4.6, 5.3, 10.2, 9.9], None),
    ],
)
def test_boxes(bbox, reason):
    fault = box_fault(bbox, np.array([5.0, 5.0, 10.0, 10.0]), 30, 40)
    assert fault is None if reason is None else re.search(reason, fault)


@pytest.mark.parametrize("convention", ["corners", "center"])
def test_a_convention_of_boxes_breaks_no_object(make_coco, annotation, convention):
    box = [5, 5, 15, 15] if convention == "corners" else [15, 15, 12, 12]
    low = [[25, 16, 35, 16, 35, 26, 25, 26]]
    corners = [25, 16, 35, 26] if convention == "corners" else [35, 26, 12, 12]
    report = report_of(make_coco([annotation(bbox=box), annotation(id=2, segmentation=low, bbox=corners)]))
    assert report["broken"] == [] and report["instances"] == 2 and report["training"]["objects"] == 2
    reasons = [fault["reason"] for fault in report["warnings"]]
    assert len(reasons) == 1 and "boxes are not those of their masks" in reasons[0], "one message, not one an object"


def test_exact_doubles_are_named(make_coco, annotation):
    other = annotation(id=3, category_id=3)
    folder = make_coco([annotation(), annotation(id=2), other], names=("a.png", "b.png", "c.png"))
    (folder / "images" / "c.png").write_bytes((folder / "images" / "a.png").read_bytes())
    report = report_of(folder)
    assert [(fault["row"], fault["reason"]) for fault in report["warnings"]] == [
        ("row 0 (image id 10)", "1 objects are exact doubles of others in their image; the first: objects 0 and 1"),
        ("row 2 (image id 12)", "1 images are exact doubles of others; the first: c.png and a.png"),
    ]
    assert report["instances"] == 3


def test_what_training_would_use(make_coco, annotation):
    entries = [annotation(iscrowd=1), annotation(id=2), annotation(id=3, image_id=11, iscrowd=1)]
    report = report_of(make_coco(entries, names=("a.png", "b.png", "c.png")))
    used = report["training"]
    assert (used["images"], used["objects"], used["classes"], used["images_without_objects"]) == (3, 1, 1, 2)
    assert used["left_out"] == {"crowds (iscrowd = 1)": 2} and used["classes_without_objects"] == ["y"]
    assert "2 objects: crowds" in format_report(report) and "No object shows 'y'" in format_report(report)


def test_rows_without_a_reader(tmp_path):
    """As a program may hand them over: lengths, ids, names and sizes are looked at as well."""
    rows = []
    for name, image_id in (("a.png", 1), ("a.png", 1), ("../b.png", 2), ("c.png", 3)):
        objects = {key: [value] for key, value in GOOD.items()}
        path = str(tmp_path / name)
        rows.append(Row(image=path, image_id=image_id, file_name=name, width=40, height=30, objects=objects))
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(tmp_path / "a.png")
    rows[0]["objects"]["score"] = []
    rows[3]["width"] = 0
    report = check_dataset(lambda: InstanceDataset(rows, [{"id": 7, "name": "x"}], "rows"))
    assert [(fault["row"], fault["reason"]) for fault in report["broken"]] == [
        ("row 0 (image id 1)", "0 values of 'score' for 1 objects"),
        ("row 1 (image id 1)", "the image id is also that of row 0"),
        ("row 2 (image id 2)", "the file name '../b.png' leads out of the folder of the images"),
        ("row 3 (image id 3)", "the size of the image c.png cannot be read"),
    ]
    assert [fault["reason"] for fault in report["warnings"]] == ["the image a.png is also that of row 0"]
    images = check_dataset(lambda: InstanceDataset(rows[2:3], [{"id": 7, "name": "x"}], "rows"), images=True)
    assert images["broken"][-1]["reason"] == "no such image"


def test_rows_that_are_made_when_asked_for(tmp_path):
    """A broken annotation file is one broken row; the others are counted."""
    names = ("a", "b", "c")
    (tmp_path / "VOC2007/ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "VOC2007/ImageSets/Segmentation/val.txt").write_text("\n".join(names))
    for tree, suffix in (("JPEGImages", "jpg"), ("SegmentationObject", "png"), ("SegmentationClass", "png")):
        (tmp_path / "VOC2007" / tree).mkdir()
        for name in names:
            ids = np.zeros((30, 40), np.uint8)
            ids[3:9, 4:12] = 2
            Image.fromarray(ids).save(tmp_path / "VOC2007" / tree / f"{name}.{suffix}")
    (tmp_path / "VOC2007/SegmentationObject/b.png").write_bytes(b"x")
    report = report_of(tmp_path)
    (fault,) = report["broken"]
    assert fault["file"].endswith("SegmentationObject/b.png") and fault["row"] == "row 1"
    assert report["images"] == 2 and report["instances"] == 2
    assert [fault["reason"] for fault in report["warnings"]] == [
        "has 2 images, the published voc2007 val has 213",
        "1 images are exact doubles of others; the first: JPEGImages/c.jpg and a.jpg",
    ]
    assert OFFICIAL_COUNTS["voc2007 train"] + OFFICIAL_COUNTS["voc2007 val"] == OFFICIAL_COUNTS["voc2007 trainval"]
    assert OFFICIAL_COUNTS["voc2012 train"] + OFFICIAL_COUNTS["voc2012 val"] == OFFICIAL_COUNTS["voc2012 trainval"]


@pytest.mark.parametrize("name", ["instances_val2017.json", "mine.json", "val2017.json"])
def test_a_file_named_as_cocos_is_compared_with_it(make_coco, annotation, name):
    file = make_coco([annotation()]) / "annotations" / "instances.json"
    file = file.rename(file.with_name(name))
    reasons = [fault["reason"] for fault in report_of(file)["warnings"]]
    expected = ["has 2 images, the published coco val2017 has 5000"] if name.startswith("instances") else []
    assert reasons == expected


def test_faulty_rows_of_a_store(tmp_path):
    from uplvp_hf.data.store_reader import HEADER_KEYS, SCHEMA_VERSION

    header = {**dict.fromkeys(HEADER_KEYS), "schema_version": SCHEMA_VERSION, "categories": [{"id": 7, "name": "x"}]}
    (tmp_path / "header.json").write_text(json.dumps(header))
    objects = {key: [value] for key, value in GOOD.items()}
    row = {"image": str(tmp_path / "a.png"), "file_name": "a.png", "width": 40, "height": 30, "objects": objects}
    other = {**row, "image_id": 2, "objects": {**objects, "category_id": [9]}}
    lines = [json.dumps({**row, "image_id": 1}), json.dumps(other), json.dumps({**row, "image_id": 3, "width": -1})]
    (tmp_path / "rows-00000-00000.jsonl").write_text("\n".join(lines))
    report = report_of(tmp_path)
    assert report["images"] == 1
    assert [(fault["row"], fault["reason"]) for fault in report["broken"]] == [
        ("line 2 (image id 2)", "category id 9 is not in the header"),
        ("line 3 (image id 3)", "'width' must be at least 1, got -1"),
    ]
    with pytest.raises(DataError, match="line 2"):
        load_dataset_rows(tmp_path)


def test_label_files_that_were_not_read_are_named(make_coco, annotation):
    folder = make_coco([annotation()])
    shutil.copy(folder / "annotations" / "instances.json", folder / "annotations" / "more.json")
    (folder / "images" / "a.txt").write_text("0 .5 .5 .1 .1")  # YOLO's, named like an image
    (folder / "notes.txt").write_text("nothing of the kind")
    warning = check_dataset(lambda: load_dataset_rows(folder), source=str(folder))["warnings"][-1]
    assert "not read: annotations/more.json, images/a.txt;" in warning["reason"]
    with_split = check_dataset(lambda: load_dataset_rows(folder, split="more"), source=str(folder), split="more")
    assert "not read: images/a.txt;" in with_split["warnings"][-1]["reason"]
    (folder / "images" / "a.txt").unlink()
    shutil.rmtree(folder / "annotations")
    assert check_dataset(lambda: load_dataset_rows(folder), source=str(folder))["warnings"] == []


def test_a_check_starts_without_the_libraries_that_take_seconds(make_coco, annotation):
    folder = make_coco([annotation()])
    code = f"""
import sys
from uplvp_hf.cli import main
assert main(["data", "check", {str(folder)!r}]) == 0
slow = {{"torch", "transformers", "torchvision", "matplotlib", "scipy"}} & set(sys.modules)
assert not slow, slow
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
