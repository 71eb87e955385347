"""The reader of CTW1500, in both forms in which it was published."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from layouts_on_disk import OUTLINE, SIZE, ctw_xml, image, write_ctw
from PIL import Image
from test_layouts import masks_of

from uplvp_hf.data import DataError, DataWarning, load_dataset_rows, write_coco


def mask_of(polygon):
    """Independently of COCO's rasterizer: pixels whose center is inside, by crossing numbers."""
    x, y = np.meshgrid(np.arange(40) + 0.5, np.arange(30) + 0.5)
    inside = np.zeros((30, 40), bool)
    points = np.reshape(polygon, (-1, 2))
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0)):
        if y0 != y1:
            inside ^= ((y0 > y) != (y1 > y)) & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
    return inside


@pytest.fixture
def ctw(tmp_path):
    return write_ctw(tmp_path / "ctw1500")


def close(mask, polygon):
    """COCO's rasterizer may round the border the other way."""
    expected = mask_of(polygon)
    overlap = (mask & expected).sum() / (mask | expected).sum()
    return overlap > 0.85 and mask[8:12, 15:25].all() == expected[8:12, 15:25].all()


@pytest.mark.parametrize("split", ["train", "training", "test"])
def test_ctw1500(ctw, split):
    root, outline, shifted = ctw
    dataset = load_dataset_rows(root, split=split)
    row = dataset[0]
    assert row["image_id"] == ("1001" if split == "test" else "0001") and dataset.id2label == {0: "text"}
    assert row["objects"]["segmentation"] == [[outline], [shifted]] and row["objects"]["iscrowd"] == [0, 1]
    found = masks_of(dataset, 0)
    assert close(found[1, 0][0], outline) and close(found[1, 1][0], shifted)
    assert dataset.official == f"ctw1500 {'test' if split == 'test' else 'train'}"


def test_ctw1500_older_form(tmp_path):
    root = tmp_path / "ctw1500"
    image(root / "train/text_image/0005.jpg")
    offsets = [value - (4 if k % 2 else 3) for k, value in enumerate(OUTLINE)]
    (root / "train/text_label_curve").mkdir()
    file = root / "train/text_label_curve/0005.txt"
    file.write_text(",".join(map(str, [3, 4, 34, 20, *offsets])))
    dataset = load_dataset_rows(root)
    assert dataset[0]["objects"]["segmentation"] == [[OUTLINE]] and dataset[0]["objects"]["iscrowd"] == [0]
    file.write_text("1,2,3\n")
    with pytest.raises(DataError, match=r"0005\.txt, line 1: holds 3 numbers and no ####"):
        load_dataset_rows(root)[0]


def test_ctw1500_is_told_by_a_name_of_its_own(ctw):
    root, outline, _ = ctw
    (root / "ctw1500_train_labels").rename(root / "train_labels")
    assert load_dataset_rows(root, split="train").official == "ctw1500 train"
    (root / "gt_ctw1500").rename(root / "test_labels")
    root = root.rename(root.with_name("texts"))
    assert load_dataset_rows(root).official == "", "a folder of images"
    dataset = load_dataset_rows(root, split="train", format="ctw1500")
    assert dataset[0]["objects"]["segmentation"][0] == [outline]


def test_ctw1500_takes_images_as_they_are_stored(ctw):
    root, _, _ = ctw
    exif = Image.Exif()
    for orientation, size in ((6, SIZE), (3, SIZE), (6, (30, 30))):
        exif[0x0112] = orientation
        file = image(root / "train_images" / "0001.jpg", size, exif=exif)
        dataset = load_dataset_rows(root, split="train")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DataWarning)
            row = dataset[0]
        assert (row["width"], row["height"]) == size and row["as_stored"]
        with Image.open(file) as stored:
            np.testing.assert_array_equal(np.asarray(dataset.load_image(0)), np.asarray(stored))
        write_coco(dataset, root / "all.json")
        again = load_dataset_rows(root / "all.json", images=root)
        np.testing.assert_array_equal(np.asarray(again.load_image(0)), np.asarray(dataset.load_image(0)))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (ctw_xml([(OUTLINE[:5], "x")]), r"box\[0\]: a polygon needs at least 3 points"),
        (ctw_xml([(OUTLINE, "x"), ([*OUTLINE[:-1], "nan"], "x")]), r"box\[1\]: .* number 27 is nan"),
        (ctw_xml([(["a", "b"], "x")]), "coordinates must be numbers"),
        (ctw_xml([]).replace("<Annotations>", ""), "not valid XML"),
        (ctw_xml([]).replace("</image>", "</image><image/>"), "about one image"),
        (ctw_xml([(OUTLINE, "")]).replace("segs", "sges"), "has no 'segs'"),
    ],
)
def test_ctw1500_faults(ctw, content, reason):
    root, _, _ = ctw
    (root / "ctw1500_train_labels/0001.xml").write_text(content)
    dataset = load_dataset_rows(root, split="train")
    with pytest.raises(DataError, match=reason) as caught:
        dataset[0]
    assert "0001.xml" in str(caught.value)


def test_ctw1500_leaves_out_with_a_warning(ctw):
    root, outline, _ = ctw
    away = [value + 500 for value in outline]
    (root / "ctw1500_train_labels/0001.xml").write_text(ctw_xml([(away, "x"), (outline, "y")], "0002.jpg"))
    dataset = load_dataset_rows(root, split="train")
    with pytest.warns(DataWarning) as caught:
        assert dataset[0]["objects"]["segmentation"] == [[outline]]
    assert [(Path(w.message.file).name, w.message.row) for w in caught] == [
        ("0001.xml", "image"),
        ("0001.xml", "box[0]"),
    ]
