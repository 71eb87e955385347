"""labelme, CVAT and YOLO against masks that are drawn here; formats that are not read are called by their name."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from uplvp_hf.data import DataError, DataWarning, load_dataset_rows

SQUARE = [(5, 5), (15, 5), (15, 15), (5, 15)]
BAR = [(20, 2), (36, 2), (36, 12), (20, 12)]


def paint(*boxes):
    """(30, 40) bool with boxes x0, y0, x1, y1 filled."""
    mask = np.zeros((30, 40), dtype=bool)
    for x0, y0, x1, y1 in boxes:
        mask[y0:y1, x0:x1] = True
    return mask


def image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30)).save(path)


def png(mask):
    stream = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def labelme(path, shapes, **changes):
    content = {"version": "5.4.1", "flags": {}, "shapes": shapes, "imagePath": path.with_suffix(".png").name}
    content |= {"imageData": None, "imageHeight": 30, "imageWidth": 40, **changes}
    path.write_text(json.dumps(content))


def shape(label, points, kind="polygon", **more):
    return {"label": label, "points": points, "group_id": None, "shape_type": kind, "flags": {}, **more}


def test_labelme(tmp_path):
    for name in ("a", "b", "c"):
        image(tmp_path / f"{name}.png")
    labelme(
        tmp_path / "a.json",
        [
            shape("cat", SQUARE, group_id=3),
            shape("cat", BAR, group_id=3),
            shape("ant", BAR),
            shape("__ignore__", SQUARE),
        ],
    )
    disc = [shape("cat", [[20, 15], [28, 15]], "circle"), shape("cat", [[1, 1], [9, 9]], "line")]
    inner = paint((0, 0, 6, 4))[:4, :8]
    disc.append(shape("dog", [[10, 20], [17, 23]], "mask", mask=png(inner)))
    labelme(tmp_path / "b.json", disc, imagePath="..\\elsewhere\\b.png", imageHeight=None, imageWidth=None)
    with pytest.warns(DataWarning):
        dataset = load_dataset_rows(tmp_path)
    assert dataset.id2label == {0: "ant", 1: "cat", 2: "dog"} and [row["image_id"] for row in dataset.rows] == [
        "a",
        "b",
    ]
    first, second = dataset.rows
    assert first["objects"]["category_id"] == [2, 1], "two parts of one group are one object"
    np.testing.assert_array_equal(dataset.mask(0, 0), paint((5, 5, 15, 15), (20, 2, 36, 12)))
    np.testing.assert_array_equal(dataset.mask(0, 1), paint((20, 2, 36, 12)))
    assert abs(dataset.mask(1, 0).sum() - np.pi * 64) < 10 and second["width"] == 40
    np.testing.assert_array_equal(dataset.mask(1, 1), paint((10, 20, 16, 24)))
    assert dataset.load_image(1).size == (40, 30)
    assert [(f["row"], f["reason"]) for f in dataset.failures] == [("b.json, shapes[1]", "a line outlines no object")]
    assert len(load_dataset_rows(tmp_path / "a.json")) == 1


def test_labelme_in_folders_and_with_rectangles(tmp_path):
    for name in ("x/1", "y/1"):
        image(tmp_path / f"{name}.png")
        labelme(tmp_path / f"{name}.json", [shape("cat", [[15, 15], [5, 5]], "rectangle")])
    with pytest.raises(DataError, match=r"all are boxes\. Make masks of the boxes with `uplvp label --labeler boxes`"):
        load_dataset_rows(tmp_path, format="labelme")
    labelme(tmp_path / "x/1.json", [shape("cat", SQUARE)])
    with pytest.warns(DataWarning, match="1 of 2 annotations have a box and no mask"):
        dataset = load_dataset_rows(tmp_path, format="labelme")
    assert [row["file_name"] for row in dataset.rows] == ["x/1.png", "y/1.png"]
    with pytest.raises(DataError, match="labelme has no splits"):
        load_dataset_rows(tmp_path, format="labelme", split="train")
    labelme(tmp_path / "x/1.json", [shape("cat", [["x", 5], [1, 1], [2, 2]])])
    with pytest.raises(DataError, match=r"1\.json, shapes\[0\]"):
        load_dataset_rows(tmp_path, format="labelme")


CVAT = """<?xml version="1.0" encoding="utf-8"?>
<annotations><version>1.1</version>
<meta><job><labels><label><name>dog</name></label><label><name>cat</name></label></labels></job></meta>
<image id="0" name="sub/a.png" subset="train" width="40" height="30">
  <polygon label="cat" points="5,5;15,5;15,15;5,15" occluded="0" z_order="0" group_id="1"/>
  <polygon label="cat" points="20,2;36,2;36,12;20,12" group_id="1"/>
  <mask label="dog" rle="2, 4, 4, 4, 2" left="10" top="20" width="8" height="2"/>
  <polyline label="cat" points="1,1;9,9"/>
  <tag label="cat"/>
</image>
<image id="1" name="sub/b.png" subset="val" width="40" height="30">
  <ellipse label="cat" cx="20" cy="15" rx="10" ry="6"/>
  <box label="dog" xtl="1" ytl="2" xbr="5" ybr="6"/>
</image></annotations>"""


def test_cvat(tmp_path):
    for name in ("a", "b"):
        image(tmp_path / "images" / "sub" / f"{name}.png")
    (tmp_path / "annotations.xml").write_text(CVAT)
    with pytest.warns(DataWarning, match="1 of 4 annotations have a box and no mask"):
        dataset = load_dataset_rows(tmp_path)
    assert dataset.id2label == {0: "dog", 1: "cat"} and dataset[0]["objects"]["category_id"] == [2, 1]
    np.testing.assert_array_equal(dataset.mask(0, 0), paint((5, 5, 15, 15), (20, 2, 36, 12)))
    np.testing.assert_array_equal(dataset.mask(0, 1), paint((12, 20, 16, 21), (12, 21, 16, 22)))
    assert abs(dataset.mask(1, 0).sum() - np.pi * 60) < 10
    assert dataset.load_image(1).size == (40, 30)
    reasons = sorted(failure["reason"] for failure in dataset.failures)
    assert len(reasons) == 2 and reasons[0] == "a polyline outlines no object" and "a box without a mask" in reasons[1]
    train = load_dataset_rows(tmp_path / "annotations.xml", split="train")
    assert [row["image_id"] for row in train.rows] == [0]
    with pytest.raises(DataError, match=r"has no subset 'test', only \['train', 'val'\]"):
        load_dataset_rows(tmp_path, split="test")
    (tmp_path / "annotations.xml").write_text("<annotations><track id='0'/></annotations>")
    with pytest.raises(DataError, match="CVAT for video"):
        load_dataset_rows(tmp_path)
    (tmp_path / "annotations.xml").write_text(CVAT.replace("12;20,12", "x"))
    with pytest.raises(DataError, match=r"image\[0\].*the polygon cannot be read"):
        load_dataset_rows(tmp_path)


def test_utf_16_and_broken_class_files(tmp_path):
    """Tools of Windows write UTF-16; a file of class names that cannot be read is named, not replaced by numbers."""
    for name in ("labelme/a", "cvat/images/sub/a", "cvat/images/sub/b", "yolo/images/train/a"):
        image(tmp_path / f"{name}.png")
    labelme(tmp_path / "labelme/a.json", [shape("caf\u00e9", SQUARE)])
    text = (tmp_path / "labelme/a.json").read_text()
    (tmp_path / "labelme/a.json").write_text(text, encoding="utf-16")
    assert load_dataset_rows(tmp_path / "labelme").mask(0, 0).sum() == 100
    (tmp_path / "cvat/annotations.xml").write_text(
        "<?xml version='1.0' encoding='utf-16'?>" + CVAT[CVAT.index("<annotations") :], encoding="utf-16"
    )
    with pytest.warns(DataWarning):
        assert len(load_dataset_rows(tmp_path / "cvat")) == 2
    (tmp_path / "yolo/labels/train").mkdir(parents=True)
    (tmp_path / "yolo/labels/train/a.txt").write_text(line(0, SQUARE))
    (tmp_path / "yolo/data.yaml").write_text("names: [dog, cat\ntrain: images/train")
    with pytest.raises(DataError, match=r"data\.yaml: cannot be read"):
        load_dataset_rows(tmp_path / "yolo", split="train")


def line(label, outline):
    return " ".join(
        [str(label), *(f"{side / (30 if k else 40):.6f}" for point in outline for k, side in enumerate(point))]
    )


@pytest.mark.parametrize("layout", ["images/{split}", "{split}/images"])
@pytest.mark.parametrize("names", ["names: [dog, cat]", "names: {0: dog, 1: cat}", None])
def test_yolo(tmp_path, layout, names):
    for split, name in (("train", "a"), ("train", "b"), ("val", "c")):
        image(tmp_path / layout.format(split=split) / f"{name}.png")
    labels = tmp_path / layout.format(split="train").replace("images", "labels")
    labels.mkdir(parents=True)
    (labels / "a.txt").write_text(f"{line(1, SQUARE)}\n{line(0, BAR)}\n")
    if names is not None:
        places = "".join(f"{split}: {layout.format(split=split)}\n" for split in ("train", "val"))
        (tmp_path / "data.yaml").write_text(f"{places}nc: 2\n{names}\n")
    dataset = load_dataset_rows(tmp_path, split="train")
    wanted = ["cat", "dog"] if names else ["1", "0"]
    found = {category["id"]: category["name"] for category in dataset.categories}
    assert [found[k] for k in dataset[0]["objects"]["category_id"]] == wanted
    np.testing.assert_array_equal(dataset.mask(0, 0), paint((5, 5, 15, 15)))
    np.testing.assert_array_equal(dataset.mask(0, 1), paint((20, 2, 36, 12)))
    assert len(dataset) == 2 and dataset[1]["objects"]["area"] == [], "no text file: no objects"
    with pytest.raises(DataError, match="Choose one by `split`"):
        load_dataset_rows(tmp_path)
    (labels / "a.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    with pytest.raises(DataError, match="all are boxes"):
        load_dataset_rows(tmp_path, split="train")
    for text, reason in (("x 0.1", "must be numbers"), ("7 0 0 1 0 1 1", "class 7 is none of the 2")):
        if names or "7" not in text:
            (labels / "a.txt").write_text(text)
            with pytest.raises(DataError, match=rf"a\.txt, line 1: {reason}"):
                load_dataset_rows(tmp_path, split="train")


def test_yolo_as_roboflow_writes_it_and_with_a_broken_image(tmp_path):
    image(tmp_path / "valid/images/a.png")
    (tmp_path / "valid/images/b.png").write_bytes(b"no image")
    (tmp_path / "valid/labels").mkdir()
    (tmp_path / "valid/labels/a.txt").write_text(line(0, SQUARE))
    (tmp_path / "data.yaml").write_text("train: ../train/images\nval: ../valid/images\nnames: ['cat']\n")
    dataset = load_dataset_rows(tmp_path)
    assert len(dataset) == 1 and dataset.mask(0, 0).sum() == 100
    assert [failure["file"].endswith("b.png") for failure in dataset.failures] == [True]
    assert len(load_dataset_rows(tmp_path, split="valid")) == 1


FOREIGN = {
    "VGG Image Annotator": {"a.png1": {"filename": "a.png", "regions": [], "size": 1}},
    "Label Studio": [{"id": 1, "data": {"image": "a.png"}, "annotations": []}],
    "CreateML": [{"image": "a.png", "annotations": []}],
    "COCO results": [{"image_id": 1, "category_id": 2, "segmentation": []}],
    "Datumaro": {"info": {}, "categories": {}, "items": []},
    "Supervisely": {"description": "", "size": {"height": 1, "width": 1}, "objects": []},
    "Labelbox": [{"data_row": {"id": 1}}],
    "GeoJSON": {"type": "FeatureCollection", "features": []},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_formats_are_named_with_a_way_on(tmp_path, name):
    (tmp_path / "a.json").write_text(json.dumps(FOREIGN[name]))
    with pytest.raises(DataError, match=rf"a\.json: is a file of {name}.*, not COCO JSON\. \w+"):
        load_dataset_rows(tmp_path / "a.json")


def test_other_files_and_folders(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match=r"is neither .*: it is a table\. COCO JSON"):
        load_dataset_rows(tmp_path / "a.csv")
    (tmp_path / "voc").mkdir()
    box = "<bndbox><xmin>1</xmin></bndbox>"
    (tmp_path / "voc" / "a.xml").write_text(f"<annotation><object>{box}</object></annotation>")
    with pytest.raises(DataError, match=r"1 \.xml \(Pascal VOC annotations\. It has boxes and no masks"):
        load_dataset_rows(tmp_path / "voc")


def test_suffixes_that_are_skipped_are_counted(tmp_path):
    image(tmp_path / "a.png")
    for name in ("b.heic", "c.HEIC", "d.mp4", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.warns(DataWarning, match=r"are skipped: 2 \.heic, 1 \.mp4$"):
        assert len(load_dataset_rows(tmp_path)) == 1
