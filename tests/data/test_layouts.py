"""Readers of published layouts: masks compared with what was drawn, files opened only when a row is asked for."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from layouts_on_disk import SIZE, id_map, image, write_ctw
from PIL import Image, ImageDraw

from uplvp_hf.data import DataError, ImageError, load_dataset_rows, write_coco
from uplvp_hf.data.cityscapes import draw_polygons, read_cityscapes
from uplvp_hf.data.manifest import apply_manifest, draw_split, take_split
from uplvp_hf.data.splits import SplitSpec
from uplvp_hf.evaluation.cityscapes_ap import CityscapesAP
from uplvp_hf.evaluation.predictor import as_reference
from uplvp_hf.models.masks import decode_segmentation, encode_id_map, encode_mask


def masks_of(dataset, index):
    """{(category id, crowd): [masks]} of a row, after a check of boxes and areas against the masks."""
    row, found = dataset[index], {}
    objects = row["objects"]
    for k, code in enumerate(objects["segmentation"]):
        mask = decode_segmentation(code, row["height"], row["width"])
        ys, xs = np.nonzero(mask)
        box = [xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1]
        assert objects["bbox"][k] == box and objects["area"][k] == mask.sum() and objects["score"][k] == 1
        found.setdefault((objects["category_id"][k], objects["iscrowd"][k]), []).append(mask)
    return found


def same(found, expected):
    assert found.keys() == expected.keys()
    for key, masks in expected.items():
        assert len(found[key]) == len(masks)
        for mask in masks:
            assert any(np.array_equal(mask, other) for other in found[key])


def test_id_maps_give_the_mask_of_every_id():
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (7, 5), (40, 60)):
        ids = rng.integers(0, 4, shape) * 1000
        for wanted, code in zip((0, 1000, 3000, 77), encode_id_map(ids, (0, 1000, 3000, 77))):
            np.testing.assert_array_equal(decode_segmentation(code, *shape), ids == wanted)
    with pytest.raises(DataError, match="float64"):
        encode_id_map(np.zeros((2, 2)), [0])


# Cityscapes


def polygon_file(path, objects, size=SIZE):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"imgWidth": size[0], "imgHeight": size[1], "objects": objects}))
    return path


def box(label, left, top, right, bottom, **more):
    return {"label": label, "polygon": [[left, top], [right, top], [right, bottom], [left, bottom]], **more}


@pytest.fixture
def cityscapes(tmp_path):
    """Two images in two cities for train, one with each kind of annotation; one for val and test."""
    root = tmp_path / "cityscapes"
    ids = np.zeros((30, 40), int)
    ids[:, :] = 7
    ids[2:10, 2:12], ids[5:15, 8:20], ids[20:25, 3:9], ids[20:25, 30:39], ids[0, 39] = 26000, 26001, 24000, 26, 29000
    names = [("train", "aachen", "aachen_000000_000019"), ("train", "bonn", "bonn_1"), ("val", "ulm", "ulm_1")]
    for split, city, name in [*names, ("test", "berlin", "berlin_1")]:
        image(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png")
        id_map(root / "gtFine" / split / city / f"{name}_gtFine_instanceIds.png", ids)
    (root / "gtFine/train/bonn/bonn_1_gtFine_instanceIds.png").unlink()
    objects = [
        box("road", 0, 0, 39, 29),
        box("car", 2, 2, 11, 9),
        box("car", 8, 5, 19, 14),
        box("license plate", 9, 6, 12, 9),
        box("truck", 0, 0, 39, 29, deleted=1),
        box("cargroup", 30, 20, 38, 24),
        box("person", 3, 20, 8, 24),
        box("sky", 3, 20, 4, 24),
        box("trailer", 39, 0, 39, 0),
    ]
    polygon_file(root / "gtFine/train/bonn/bonn_1_gtFine_polygons.json", objects)
    return root, ids


def test_cityscapes(cityscapes):
    root, ids = cityscapes
    dataset = load_dataset_rows(root, split="train")
    assert [row["image_id"] for row in dataset.rows] == ["aachen_000000_000019", "bonn_1"]
    assert dataset.category_ids == [24, 25, 26, 27, 28, 31, 32, 33] and dataset.official == "cityscapes train"
    first = dataset[0]
    assert first["file_name"] == "leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png"
    assert (first["width"], first["height"]) == SIZE and dataset.load_image(0).size == SIZE
    crowd = [ids == 26]
    same(masks_of(dataset, 0), {(26, 0): [ids == 26000, ids == 26001], (24, 0): [ids == 24000], (26, 1): crowd})
    person = ids == 24000
    person[:, 3:5] = False  # the sky was drawn over it
    same(masks_of(dataset, 1), {(26, 0): [ids == 26000, ids == 26001], (24, 0): [person], (26, 1): crowd})
    with pytest.raises(DataError, match=r"Choose one by `split`: train, val, test"):
        load_dataset_rows(root)
    with pytest.raises(DataError, match="has no split 'none'"):
        load_dataset_rows(root, split="none")


def test_cityscapes_test_set_has_no_labels(cityscapes):
    root, _ = cityscapes
    dataset = load_dataset_rows(root, split="test")
    assert len(dataset) == 1 and dataset[0]["objects"]["segmentation"] == [] and dataset[0]["width"] == 40
    assert load_dataset_rows(root, split="val", unlabeled=True)[0]["objects"]["category_id"] == []
    assert load_dataset_rows(root, split="val").unlabeled()[0]["objects"]["category_id"] == []


def test_cityscapes_counterparts(cityscapes):
    root, _ = cityscapes
    image(root / "leftImg8bit/train/bonn/bonn_2_leftImg8bit.png")
    id_map(root / "gtFine/train/extra/extra_1_gtFine_instanceIds.png", np.zeros((3, 3)))
    with pytest.warns(UserWarning, match="2 files of cityscapes train are left out"):
        dataset = load_dataset_rows(root, split="train")
    assert len(dataset) == 2
    assert [(Path(f["file"]).name, f["reason"].split(" ")[0]) for f in dataset.failures] == [
        ("bonn_2_leftImg8bit.png", "has"),
        ("extra_1_gtFine_instanceIds.png", "its"),
    ]
    with pytest.warns(UserWarning):
        dataset = read_cityscapes(root, "train", source="polygons")
    assert [dataset.image_id(k) for k in range(len(dataset))] == ["bonn_1"]
    (root / "gtFine/val/ulm/ulm_1_gtFine_instanceIds.png").write_text("no png")
    dataset = load_dataset_rows(root, split="val")
    with pytest.raises(DataError, match=r"ulm_1_gtFine_instanceIds\.png: cannot be read as a map of ids"):
        dataset[0]


def test_void_of_cityscapes(cityscapes, tmp_path):
    """Of both kinds of annotation, through COCO JSON, and where it decides about a false positive."""
    root, ids = cityscapes
    ids = ids.copy()
    ids[0, :5], ids[29, :], ids[28, 10:] = 18, 4, 30  # poles, static, a group of trailers; ids[0, 39] is one caravan
    id_map(root / "gtFine/train/aachen/aachen_000000_000019_gtFine_instanceIds.png", ids)
    dataset = load_dataset_rows(root, split="train")
    void = (ids == 18) | (ids == 4) | (ids == 30)
    np.testing.assert_array_equal(decode_segmentation(dataset[0]["void"][0], *SIZE[::-1]), void)
    assert len(dataset[0]["void"]) == 1 and dataset[1]["void"] == []  # all of the second is road, or has an instance
    write_coco(dataset, tmp_path / "all.json")
    again = load_dataset_rows(tmp_path / "all.json", images=root)
    assert [row["void"] for row in again.rows] == [row["void"] for row in dataset.rows]
    assert "void" not in load_dataset_rows(tmp_path / "all.json", images=root, unlabeled=True)[0]
    assert "void" not in dataset.unlabeled()[0] and "void" not in again.unlabeled()[0]
    for row, ap in ((again[0], 1), ({**again[0], "void": []}, 0.25)):
        reference = as_reference(row)
        reference |= {"segmentation": [encode_mask(big := np.pad(np.ones((20, 20), bool), ((0, 10), (0, 20))))]}
        reference |= {"category_id": [26], "iscrowd": [0], "area": [400]}
        found = {"image_id": row["image_id"], "scores": [0.9, 0.5], "labels": [26, 26]}
        metric = CityscapesAP()
        metric.add(prediction={**found, "rle": [encode_mask(ids == 4), encode_mask(big)]}, reference=reference)
        assert metric.compute()["AP"] == pytest.approx(ap)
    content = json.loads((tmp_path / "all.json").read_text())
    content["images"][0]["void"] = [{"size": [1, 1], "counts": "1"}]
    (tmp_path / "all.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"images\[0\] \(id aachen_000000_000019\): 'void': the RLE has size"):
        load_dataset_rows(tmp_path / "all.json", images=root)


def test_polygons_are_drawn_as_pillow_draws_them(tmp_path):
    rng = np.random.default_rng(3)
    shapes = rng.integers(-5, 45, (12, 5, 2)).tolist()
    labels = rng.choice(["car", "person", "persongroup", "road", "polegroup", "trailer"], 12).tolist()
    file = polygon_file(tmp_path / "x.json", [{"label": k, "polygon": p} for k, p in zip(labels, shapes)])
    expected, numbers = np.zeros((30, 40), int), {"car": 26000, "person": 24000, "trailer": 30000}
    for label, shape in zip(labels, shapes):
        one = Image.new("1", SIZE)
        ImageDraw.Draw(one).polygon([tuple(point) for point in shape], fill=1)
        expected[np.asarray(one)] = numbers.get(label, {"persongroup": 24, "road": 7, "polegroup": 18}.get(label))
        if label in numbers:
            numbers[label] += 1
    np.testing.assert_array_equal(draw_polygons(str(file)), expected)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"label": "spaceship", "polygon": [[0, 0], [1, 0], [1, 1]]}, r"objects\[0\]: the label 'spaceship'"),
        ({"label": ["car"], "polygon": [[0, 0], [1, 0], [1, 1]]}, "'label' must be text"),
        ({"label": "car", "polygon": [[0, 0], [1, float("nan")], [1, 1]]}, "not finite: number 3 is nan"),
        ({"label": "car", "polygon": [[0, 0], [1, 1]]}, "at least 3 points"),
        ({"label": "car", "polygon": [[0, 0], [1], [1, 1]]}, r"a point must be \[x, y\], got \[1\]"),
        ({"label": "car", "polygon": [[0, 0], ["1", 2], [1, 1]]}, "a list of numbers"),
        ({"label": "car"}, "has no 'polygon'"),
    ],
)
def test_faulty_polygon_files(tmp_path, entry, reason):
    with pytest.raises(DataError, match=reason) as caught:
        draw_polygons(str(polygon_file(tmp_path / "x.json", [entry])))
    assert str(tmp_path / "x.json") in str(caught.value)


# VOC


@pytest.fixture
def ctw(tmp_path):
    return write_ctw(tmp_path / "ctw1500")


@pytest.fixture
def voc(tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    numbers, classes = np.zeros((30, 40), int), np.zeros((30, 40), int)
    for number, (place, category) in enumerate({(2, 2): 15, (15, 4): 15, (6, 25): 7}.items(), start=1):
        y, x = place
        numbers[y - 1 : y + 9, x - 1 : x + 11] = classes[y - 1 : y + 9, x - 1 : x + 11] = 255
        numbers[y : y + 8, x : x + 10], classes[y : y + 8, x : x + 10] = number, category
    for name in ("2007_000032", "2007_000033"):
        image(root / "JPEGImages" / f"{name}.jpg")
        id_map(root / "SegmentationObject" / f"{name}.png", numbers, palette=True)
        id_map(root / "SegmentationClass" / f"{name}.png", classes, palette=True)
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "ImageSets/Segmentation/train.txt").write_text("2007_000032\n2007_000033\n")
    (root / "Annotations").mkdir()
    objects = "".join(
        f"<object><name>{name}</name><difficult>{flag}</difficult><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin>"
        f"<xmax>{x + 10}</xmax><ymax>{y + 8}</ymax></bndbox></object>"
        for name, flag, x, y in (("car", 1, 25, 6), ("person", 0, 2, 2), ("dog", 1, 4, 15), ("person", 0, 4, 15))
    )
    (root / "Annotations/2007_000032.xml").write_text(f"<annotation>{objects}</annotation>")
    return root, numbers


def test_voc(voc):
    root, numbers = voc
    for folder in (root, root.parent, root.parent.parent):
        dataset = load_dataset_rows(folder)
        assert dataset.official == "voc2012 train" and dataset.id2label[14] == "person" and len(dataset) == 2
    people = [numbers == 1, numbers == 2]
    same(masks_of(dataset, 0), {(15, 0): people, (7, 1): [numbers == 3]})  # the car is difficult
    same(masks_of(dataset, 1), {(15, 0): people, (7, 0): [numbers == 3]})  # no XML
    assert dataset[0]["file_name"] == "JPEGImages/2007_000032.jpg" and dataset.load_image(0).size == SIZE


def test_voc_faults(voc):
    root, numbers = voc
    listing = root / "ImageSets/Segmentation/train.txt"
    listing.write_text("2007_000032\n../../secret\n")
    with pytest.raises(DataError, match=r"train\.txt, line 2: the file name '\.\./\.\./secret' leads out"):
        load_dataset_rows(root)
    listing.write_text("2007_000032\n2007_000032\n")
    with pytest.raises(DataError, match=r"line 2: .* occurs twice"):
        load_dataset_rows(root)
    listing.write_text("2007_000032\n2007_000099\n")
    with pytest.warns(UserWarning, match="1 files of voc2012 train"):
        dataset = load_dataset_rows(root)
    assert dataset.failures[0]["row"] == "line 2" and len(dataset) == 1
    id_map(root / "SegmentationClass/2007_000032.png", np.zeros((30, 40)), palette=True)
    with pytest.raises(DataError, match="object 1 has no class"):
        dataset[0]
    id_map(root / "SegmentationClass/2007_000032.png", numbers[:, :20], palette=True)
    with pytest.raises(DataError, match=r"is 40x30, .* is 20x30"):
        dataset[0]
    Image.new("RGB", SIZE).save(root / "SegmentationObject/2007_000032.png")
    with pytest.raises(DataError, match=r"no map of ids: .* its mode is RGB"):
        dataset[0]
    (root / "JPEGImages/2007_000032.jpg").unlink()
    with pytest.raises(DataError, match="holds no image of voc2012 train"):
        load_dataset_rows(root)


def test_voc_without_masks_is_unlabeled(voc):
    root, _ = voc
    image(root / "JPEGImages/2008_1.jpg")
    (root / "ImageSets/Segmentation/test.txt").write_text("2008_1\n")
    dataset = load_dataset_rows(root, split="test")
    assert dataset[0]["objects"]["segmentation"] == [] and dataset.load_image(0).size == SIZE
    (root / "ImageSets/Segmentation/val.txt").write_text("\n2008_1\n")
    with pytest.raises(DataError, match=r"no image of voc2012 val .* '2008_1' has no file in SegmentationObject"):
        load_dataset_rows(root, split="val")
    (root / "Annotations/2007_000032.xml").write_text("<annotation><object/></annotation>")
    with pytest.raises(DataError, match=r"2007_000032\.xml, object\[0\]: needs a name"):
        load_dataset_rows(root, split="train")[0]


# All


@pytest.fixture(params=["cityscapes", "ctw", "voc"])
def layout(request):
    return request.getfixturevalue(request.param)[0]


def test_nothing_is_opened_before_a_row_is_asked_for(layout):
    """With every image and annotation cut to nothing, the dataset is still there; its rows are not."""
    for file in layout.rglob("*"):
        if file.is_file() and "ImageSets" not in file.parts:
            file.write_bytes(b"")
    dataset = load_dataset_rows(layout, split="train")
    assert len(dataset) and dataset.image_id(0) and len(dataset.subset([0])) == 1
    with pytest.raises(DataError):
        dataset[0]


@pytest.mark.parametrize("layout", ["cityscapes", "voc"], indirect=True)  # CTW1500 has sizes in its images alone
def test_images_are_opened_with_load_image_only(layout):
    for file in [*layout.rglob("*.jpg"), *layout.rglob("*leftImg8bit.png")]:
        file.write_bytes(b"")
    dataset = load_dataset_rows(layout, split="train")
    assert dataset[0]["objects"]["segmentation"]
    with pytest.raises(ImageError):
        dataset.load_image(0)


def test_rows_reach_worker_processes(layout):
    dataset = load_dataset_rows(layout, split="train")
    few = take_split(dataset, SplitSpec("shot", 1, allow_fewer=True))
    for one in (dataset, few, few.unlabeled()):
        assert list(pickle.loads(pickle.dumps(one)).rows) == list(one.rows)


def test_layouts_survive_coco_json(layout, tmp_path):
    dataset = load_dataset_rows(layout, split="train")
    write_coco(dataset, tmp_path / "all.json")
    again = load_dataset_rows(tmp_path / "all.json", images=layout)
    assert list(again.rows) == list(dataset.rows) and again.categories == dataset.categories
    manifest = draw_split(dataset, SplitSpec("shot", 1, allow_fewer=True))
    few = apply_manifest(again, manifest)
    assert [row["image_id"] for row in few.rows] == manifest["image_ids"]


def test_ambiguous_folders_ask(layout, tmp_path):
    dataset = load_dataset_rows(layout, split="train")
    write_coco(dataset.subset([0]), layout / "annotations" / "few.json")
    with pytest.raises(DataError, match=r"may be \w+ or coco\. Choose one by `format`"):
        load_dataset_rows(layout, split="train")
    name = {"ctw1500": "ctw1500", "cityscapes": "cityscapes"}.get(layout.name, "voc")
    assert len(load_dataset_rows(layout, split="train", format=name)) == len(dataset)
    assert len(load_dataset_rows(layout, split="few")) == len(load_dataset_rows(layout, format="coco")) == 1
    with pytest.raises(DataError, match="no format 'vok'"):
        load_dataset_rows(layout, format="vok")
    with pytest.raises(DataError, match="`images` is for COCO files"):
        load_dataset_rows(layout, images=tmp_path, format=name, split="train")
