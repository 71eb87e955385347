"""COCO as exporters write it: every variation gives the rows of the plain file, with one warning a kind."""

import copy
import json
import warnings

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from uplvp_hf.data import DataError, DataWarning, load_dataset_rows

SQUARE = [5, 5, 15, 5, 15, 15, 5, 15]
BAR = [20, 2, 36, 2, 36, 12, 20, 12]
AREAS = [100, 160]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images" / "deep").mkdir(parents=True)
    for name in ("a.png", "deep/b c.png"):
        Image.new("RGB", (40, 30)).save(tmp_path / "images" / name)
    return tmp_path


def plain():
    annotations = []
    for image_id in (1, 2):
        for category_id, outline in ((1, SQUARE), (2, BAR)):
            number = len(annotations) + 1
            entry = {"id": number, "image_id": image_id, "category_id": category_id, "segmentation": [outline]}
            annotations.append({**entry, "bbox": [outline[0], outline[1], 1, 1], "area": 1, "iscrowd": 0})
    images = [
        {"id": k, "file_name": name, "width": 40, "height": 30} for k, name in ((1, "a.png"), (2, "deep/b c.png"))
    ]
    categories = [{"id": k, "name": name, "supercategory": ""} for k, name in ((1, "x"), (2, "y"))]
    return {"images": images, "annotations": annotations, "categories": categories}


def read(folder, content):
    """The dataset, and the texts of what was warned of."""
    file = folder / "result.json"
    file.write_text(json.dumps(content))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dataset = load_dataset_rows(file)
    return dataset, [str(entry.message) for entry in caught if issubclass(entry.category, DataWarning)]


def check(dataset):
    for index, name in enumerate(("a.png", "b c.png")):
        areas = [int(dataset.mask(index, k).sum()) for k in range(len(dataset[index]["objects"]["area"]))]
        assert areas == AREAS and dataset[index]["image"].endswith(name)
        assert dataset.load_image(index).size == (40, 30)
    assert dataset.failures == []


def changed(section, **fields):
    content = plain()
    for entry in content[section]:
        for key, change in fields.items():
            entry[key] = change(entry.get(key))
    return content


def pairs(outline):
    return [list(point) for point in zip(outline[0::2], outline[1::2])]


def runs(outline):
    return coco_mask.merge(coco_mask.frPyObjects([[float(side) for side in outline]], 30, 40))


def uncompressed(outline, kind=int):
    flat = np.asarray(coco_mask.decode(runs(outline))).T.ravel().astype(int)
    borders = np.flatnonzero(np.diff(np.concatenate([[0], flat, [-1]])))
    return {"size": [30, 40], "counts": [kind(run) for run in np.diff(np.concatenate([[0], borders]))]}


MASKS = {
    "flat": lambda parts: parts[0],
    "nested": lambda parts: [parts],
    "nested deeper": lambda parts: [[parts]],
    "pairs": lambda parts: [pairs(parts[0])],
    "pairs without a list": lambda parts: pairs(parts[0]),
    "points": lambda parts: [{"x": x, "y": y} for x, y in pairs(parts[0])],
    "points of OpenCV": lambda parts: [[[point] for point in pairs(parts[0])]],
    "numbers in one text": lambda parts: [", ".join(map(str, parts[0]))],
    "run lengths in one text": lambda parts: {
        "size": [30, 40],
        "counts": " ".join(map(str, uncompressed(parts[0])["counts"])),
    },
    "numbers as text": lambda parts: [[str(side) for side in parts[0]]],
    "JSON in a text": lambda parts: json.dumps(parts),
    "run lengths in a list": lambda parts: [uncompressed(parts[0])],
    "float run lengths": lambda parts: uncompressed(parts[0], float),
    "run lengths as text": lambda parts: uncompressed(parts[0], str),
    "text of bytes": lambda parts: {"size": [30, 40], "counts": str(runs(parts[0])["counts"])},
    "JSON in the counts": lambda parts: {"size": ["30", 40.0], "counts": json.dumps(uncompressed(parts[0])["counts"])},
}
VALUES = {
    "crowd false": ("annotations", {"iscrowd": lambda _: False}),
    "crowd null": ("annotations", {"iscrowd": lambda _: None}),
    "crowd text": ("annotations", {"iscrowd": lambda _: "0"}),
    "crowd text of a float": ("annotations", {"iscrowd": lambda _: "0.0"}),
    "crowd word": ("annotations", {"iscrowd": lambda _: "False"}),
    "box empty": ("annotations", {"bbox": lambda _: []}),
    "box null": ("annotations", {"bbox": lambda _: None}),
    "box with nan": ("annotations", {"bbox": lambda box: [*box[:3], float("nan")]}),
    "box text": ("annotations", {"bbox": lambda box: [str(side) for side in box]}),
    "box JSON in a text": ("annotations", {"bbox": json.dumps}),
    "box of numbers in a text": ("annotations", {"bbox": lambda box: ",".join(map(str, box))}),
    "box of three": ("annotations", {"bbox": lambda box: box[:3]}),
    "box of names": ("annotations", {"bbox": lambda box: dict(zip("xywh", box))}),
    "box with a negative side": ("annotations", {"bbox": lambda box: [*box[:3], -1]}),
    "area a word": ("annotations", {"area": lambda _: "large"}),
    "area negative": ("annotations", {"area": lambda _: -1}),
    "area in a list": ("annotations", {"area": lambda area: [area]}),
    "area empty": ("annotations", {"area": lambda _: ""}),
    "area text": ("annotations", {"area": str}),
    "area nan": ("annotations", {"area": lambda _: float("nan")}),
    "area infinite": ("annotations", {"area": lambda _: float("inf")}),
    "area null": ("annotations", {"area": lambda _: None}),
    "category ids text": ("annotations", {"category_id": str}),
    "image ids text": ("annotations", {"image_id": str}),
    "image ids as floats in a text": ("annotations", {"image_id": lambda image_id: f" {image_id}.0 "}),
    "image ids with zeros in front": ("images", {"id": lambda image_id: f"{image_id:06d}"}),
    "image ids text in images": ("images", {"id": str}),
    "category ids text in categories": ("categories", {"id": str}),
    "sizes null": ("images", {"width": lambda _: None, "height": lambda _: None}),
    "sizes 0": ("images", {"width": lambda _: 0, "height": lambda _: 0}),
    "sizes text": ("images", {"width": str, "height": lambda side: f"{side}.0"}),
    "sizes empty": ("images", {"width": lambda _: "", "height": lambda _: ""}),
    "sizes words": ("images", {"width": lambda _: "wide", "height": lambda _: float("nan")}),
    "sizes negative": ("images", {"width": lambda _: -1, "height": lambda _: -1}),
    "height alone": ("images", {"width": lambda _: 0}),
}
NAMES = {
    "backslashes": lambda name: "images\\" + name.replace("/", "\\"),
    "drive": lambda name: "C:\\data\\" + name.replace("/", "\\"),
    "upload": lambda name: "/data/upload/1/" + name,
    "climbing": lambda name: "../../media/upload/4/" + name,
    "slash": lambda name: "/" + name,
    "escapes": lambda name: name.replace(" ", "%20").replace("a", "%61"),
    "local files": lambda name: "/data/local-files/?d=set/" + name,
    "signed address": lambda name: f"https://host/bucket/{name}?X-Signature=a%2Fb&b=1",
    "spaces": lambda name: f" {name} ",
    "last part": lambda name: "elsewhere/" + name.rpartition("/")[2],
    "beside": lambda name: "images/" + name,
    "case": lambda name: "/" + name.upper(),
}


def test_the_plain_file_needs_no_repair(folder):
    dataset, said = read(folder, plain())
    check(dataset)
    assert said == [] and dataset[0]["objects"]["bbox"][0] == [5, 5, 1, 1]


@pytest.mark.parametrize("form", MASKS)
def test_masks(folder, form):
    dataset, said = read(folder, changed("annotations", segmentation=MASKS[form]))
    check(dataset)
    assert len(said) == 1 and "'segmentation'" in said[0] and "(4 times)" in said[0]


@pytest.mark.parametrize("form", VALUES)
def test_values(folder, form):
    section, fields = VALUES[form]
    dataset, said = read(folder, changed(section, **fields))
    check(dataset)
    assert len(said) == 1 and " times)" in said[0]
    objects = dataset[0]["objects"]
    assert objects["iscrowd"] == [0, 0] and dataset.category_ids == [1, 2]
    if form in ("box empty", "box null", "box with nan", "box of three", "box of names", "box with a negative side"):
        assert objects["bbox"] == [[5, 5, 10, 10], [20, 2, 16, 10]], "of the mask"
    if form.startswith("area") and form != "area text":
        assert objects["area"] == AREAS


@pytest.mark.parametrize("section", ["images", "annotations", "categories"])
def test_sections_that_are_objects_by_id(folder, section):
    content = plain()
    content[section] = {str(entry["id"]): entry for entry in content[section]}
    dataset, said = read(folder, content)
    check(dataset)
    assert len(said) == 1 and f"'{section}' is an object in place of a list" in said[0]


def test_names_of_classes_by_id_and_numbers_as_names(folder):
    dataset, _ = read(folder, {**plain(), "categories": {"1": "x", "2": "y"}})
    check(dataset)
    assert dataset.id2label == {0: "x", 1: "y"}
    dataset, said = read(folder, {**plain(), "categories": [{"id": 1, "name": 0}, {"id": 2, "name": 1.0}]})
    assert dataset.id2label == {0: "0", 1: "1"} and len(said) == 1


def test_doubles_of_images_and_null_entries(folder):
    content = plain()
    content["images"].append(copy.deepcopy(content["images"][0]))
    for section in ("images", "annotations"):
        content[section].insert(1, None)
    dataset, said = read(folder, content)
    check(dataset)
    assert len(dataset) == 2 and len(said) == 3
    content["images"][-1]["file_name"] = "deep/b c.png"  # another image under the same id
    with pytest.raises(DataError, match="image id 1 occurs twice"):
        read(folder, content)


def test_run_lengths_without_a_size_are_those_of_the_image(folder):
    content = plain()
    for entry, outline in zip(content["annotations"], (SQUARE, BAR, SQUARE, BAR)):
        entry["segmentation"] = {"counts": uncompressed(outline)["counts"]}
    check(read(folder, content)[0])
    content["annotations"][0]["segmentation"]["counts"][-1] += 1
    assert "runs sum to 1201" in read(folder, content)[0].failures[0]["reason"]


@pytest.mark.parametrize("nothing", [[[]], {}, ""])
def test_empty_masks_are_no_masks(folder, nothing):
    with pytest.raises(DataError, match=r"all are boxes"):
        read(folder, changed("annotations", segmentation=lambda _: nothing))


def test_crowds_are_still_crowds(folder):
    for crowd in (True, "1", "true", 1.0):
        dataset, _ = read(folder, changed("annotations", iscrowd=lambda _, crowd=crowd: crowd))
        assert dataset[0]["objects"]["iscrowd"] == [1, 1]


@pytest.mark.parametrize("form", NAMES)
def test_file_names(folder, form):
    dataset, said = read(folder, changed("images", file_name=NAMES[form]))
    check(dataset)
    assert len(said) == (form != "beside")


@pytest.mark.parametrize("key", ["path", "filename", "fileName", "coco_url", "file", "img_path", "file_path"])
def test_file_names_under_another_key(folder, key):
    content = plain()
    for entry in content["images"]:
        entry[key] = entry.pop("file_name")
    check(read(folder, content)[0])


def test_accents_may_be_written_in_two_ways(folder):
    """macOS takes letters and accents apart, other systems do not."""
    (folder / "images" / "a.png").rename(folder / "images" / "cafe\u0301.png")
    content = plain()
    content["images"][0]["file_name"] = "caf\u00e9.png"
    dataset, said = read(folder, content)
    assert dataset.load_image(0).size == (40, 30) and len(said) == 1


def test_images_one_folder_above_their_annotations(tmp_path):
    for name in ("a.png", "deep/b c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 30)).save(tmp_path / name)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_default.json").write_text(json.dumps(plain()))
    check(load_dataset_rows(tmp_path))


def test_names_that_could_mean_two_images_are_left_alone(folder):
    """Never the wrong image: two files of one name, or two names of one file."""
    Image.new("RGB", (40, 30)).save(folder / "images" / "deep" / "a.png")
    with pytest.raises(DataError, match=r"'/upload/a\.png' leads out of the image folder"):
        read(folder, changed("images", file_name=lambda name: "/upload/" + name))
    (folder / "images" / "deep" / "a.png").unlink()
    content = plain()
    content["images"][0]["file_name"], content["images"][1]["file_name"] = "/1/a.png", "/2/a.png"
    with pytest.raises(DataError, match="leads out"):
        read(folder, content)


def test_a_category_that_is_listed_twice(folder):
    content = plain()
    content["categories"].append(copy.deepcopy(content["categories"][0]))
    dataset, said = read(folder, content)
    check(dataset)
    assert dataset.id2label == {0: "x", 1: "y"} and "listed twice ('x')" in said[0]


def test_category_ids_that_are_words(folder):
    content = plain()
    for entry in (*content["categories"], *content["annotations"]):
        key = "id" if "name" in entry else "category_id"
        entry[key] = {1: "first", 2: "second"}[entry[key]]
    dataset, _ = read(folder, content)
    check(dataset)
    assert dataset.id2label == {0: "x", 1: "y"} and dataset[0]["objects"]["category_id"] == dataset.category_ids


@pytest.mark.parametrize(
    "group",
    [
        {"id": 0, "name": "things", "supercategory": "none"},
        {"id": 0, "name": "x", "supercategory": "none"},  # group and class of one name
        {"id": 9, "name": "_background_", "supercategory": None},
    ],
)
def test_groups_without_objects_are_no_classes(folder, group):
    content = plain()
    for entry in content["categories"]:
        entry["supercategory"] = group["name"] if group["id"] == 0 else ""
    content["categories"].insert(0, group)
    dataset, said = read(folder, content)
    assert dataset.id2label == {0: "x", 1: "y"} and len(said) == 1 and "is no class" in said[0]
    content["annotations"][0]["category_id"] = group["id"]  # with an object it is one
    assert len(read(folder, content)[0].categories) == 3


def test_a_class_without_objects_is_still_a_class(folder):
    """As in a small validation part; a class that is its own supercategory (COCO's person) is no group."""
    content = plain()
    content["categories"].append({"id": 7, "name": "person", "supercategory": "person"})
    dataset, said = read(folder, content)
    assert dataset.id2label[2] == "person" and said == []


def test_boxes_alone_are_named_once_with_a_way_on(folder):
    content = plain()
    for entry in content["annotations"]:
        del entry["segmentation"]
    with pytest.raises(DataError, match=r"all are boxes\. Make masks of the boxes with `uplvp label --labeler boxes`"):
        read(folder, content)
    content["annotations"][0]["segmentation"] = [SQUARE]
    dataset, said = read(folder, content)
    assert len(said) == 1 and "3 of 4 annotations have a box and no mask" in said[0] and len(dataset.failures) == 3


def turned(folder, orientation, size, outline, file_size=(40, 30), more=()):
    """A file with one image of an EXIF orientation, the size that the file says, and an outline."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = {"categories": [{"id": 1, "name": "x"}], "images": [], "annotations": []}
    for k, (stored, said, polygon) in enumerate([(file_size, size, outline), *more]):
        Image.new("RGB", stored, "white").save(folder / "images" / f"{k}.jpg", exif=exif)
        content["images"].append({"id": k, "file_name": f"{k}.jpg", "width": said[0], "height": said[1]})
        content["annotations"].append({"id": k, "image_id": k, "category_id": 1, "segmentation": [polygon]})
    return read(folder, content)


LOW = [2, 32, 12, 32, 12, 39, 2, 39]  # fits 30 x 40 only
WIDE = [32, 2, 39, 2, 39, 12, 32, 12]  # fits 40 x 30 only


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize(("said", "outline", "frame"), [((40, 30), LOW, (30, 40)), ((30, 40), WIDE, (40, 30))])
def test_outlines_decide_between_frames(folder, orientation, said, outline, frame):
    dataset, messages = turned(folder, orientation, said, outline)
    assert (dataset[0]["width"], dataset[0]["height"]) == frame and dataset.load_image(0).size == frame
    assert dataset.mask(0, 0).sum() == 70 and dataset.failures == []
    assert len(messages) == 1 and "the outlines decide" in messages[0]


def test_one_image_decides_for_those_that_fit_both_frames(folder):
    small = [2, 2, 9, 2, 9, 9, 2, 9]
    dataset, _ = turned(folder, 6, (40, 30), LOW, more=[((40, 30), (40, 30), small), ((40, 30), (40, 30), WIDE)])
    assert [(row["width"], row["height"]) for row in dataset.rows] == [(30, 40), (30, 40), (40, 30)]


def test_outlines_that_reach_out_of_an_image_that_is_not_turned_are_clipped(folder):
    dataset, messages = turned(folder, 1, (40, 30), [2, 20, 12, 20, 12, 39, 2, 39])
    assert (dataset[0]["width"], dataset[0]["height"]) == (40, 30) and dataset.mask(0, 0).sum() == 100
    assert len(messages) == 1 and "clipped" in messages[0]


def test_sizes_that_were_exchanged(folder):
    dataset, _ = turned(folder, 1, (30, 40), WIDE)
    assert dataset.load_image(0).size == (40, 30) and dataset.mask(0, 0).sum() == 70


def test_folders_of_exporters(folder):
    """COCO beside images/, beside the images, and in train/ and valid/."""
    read(folder, plain())
    check(load_dataset_rows(folder))
    assert len(load_dataset_rows(folder, unlabeled=True)[0]["objects"]["area"]) == 0
    (folder / "result.json").rename(folder / "images" / "_annotations.coco.json")
    check(load_dataset_rows(folder / "images"))
    (folder / "images").rename(folder / "train")
    check(load_dataset_rows(folder))
    (folder / "valid").mkdir()
    Image.new("RGB", (40, 30)).save(folder / "valid" / "a.png")
    content = {**plain(), "images": plain()["images"][:1], "annotations": plain()["annotations"][:2]}
    (folder / "valid" / "_annotations.coco.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="Choose one by `split`: train, valid"):
        load_dataset_rows(folder)
    assert len(load_dataset_rows(folder, split="train")) == 2 and len(load_dataset_rows(folder, split="valid")) == 1
