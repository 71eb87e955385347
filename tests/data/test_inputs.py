"""Text files of paths, and datasets of the `datasets` library: which images and ids come out, what is refused."""

import io
import json
import os

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from uplvp_hf.data import DataError, ImageError, InstanceDataset, load_dataset_rows, stream_dataset_rows
from uplvp_hf.data.dataset import RowStream


def seeded_image(seed, size=(40, 30)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def encoded(seed, kind="PNG"):
    stream = io.BytesIO()
    seeded_image(seed).save(stream, kind)
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a" / "deep").mkdir(parents=True)
    for k, name in enumerate(("a/x.png", "a/deep/y.png", "z.png")):
        seeded_image(k).save(tmp_path / name)
    return tmp_path


def table(count=4, **columns):
    features = datasets.Features({"image": datasets.Image(), **{name: kind for name, (kind, _) in columns.items()}})
    values = {name: values for name, (_, values) in columns.items()}
    images = [{"bytes": encoded(k), "path": None} for k in range(count)]
    return datasets.Dataset.from_dict({"image": images, **values}, features=features)


def same(image, seed):
    return np.array_equal(np.asarray(image), np.asarray(seeded_image(seed)))


def test_a_list_of_paths(folder):
    (folder / "lists").mkdir()
    file = folder / "lists" / "some.txt"
    file.write_text(f"../a/x.png\n\n  {folder}/z.png  \n../missing.png\n../a/deep/y.png\n")
    dataset = load_dataset_rows(file)
    assert [row["image_id"] for row in dataset.rows] == ["../a/x.png", f"{folder}/z.png", "../a/deep/y.png"]
    assert [same(dataset.load_image(k), seed) for k, seed in enumerate((0, 2, 1))] == [True] * 3
    assert dataset.failures == [{"file": f"{folder}/missing.png", "row": "line 4", "reason": "no such image"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"some\.txt: names no images.*one path a line"),
        (b"b.png\nc.png\n", r"some\.txt, line 1: none of the 2 images .*b\.png: no such image"),
        (b"z.png\n./a/../z.png\n", r"some\.txt, line 2: the image './a/../z\.png' is also in line 1"),
        (b"\xff\xfe", r"some\.txt: is no UTF-8"),
    ],
)
def test_lists_that_name_nothing(folder, content, message):
    (folder / "some.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_dataset_rows(folder / "some.txt")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["saved", "parquet", "folder of parquet"])
def test_saved_datasets(tmp_path, kind, streaming):
    data = table(4, image_id=(datasets.Value("string"), ["p", "q", "r", "s"]))
    if kind == "saved":
        data.save_to_disk(tmp_path / "data")
    elif kind == "parquet":
        data.to_parquet(tmp_path / "data.parquet")
    else:
        (tmp_path / "data").mkdir()
        data.select(range(2)).to_parquet(tmp_path / "data" / "0.parquet")
        data.select(range(2, 4)).to_parquet(tmp_path / "data" / "1.parquet")
    path = tmp_path / ("data.parquet" if kind == "parquet" else "data")
    dataset = stream_dataset_rows(path) if streaming else load_dataset_rows(path)
    assert isinstance(dataset, RowStream if streaming else InstanceDataset)
    for _ in range(2):  # a stream starts anew
        rows = list(dataset)
        assert [row["image_id"] for row in rows] == ["p", "q", "r", "s"]
        assert all((row["width"], row["height"]) == (40, 30) and row["objects"]["score"] == [] for row in rows)
    held = InstanceDataset(rows, [])
    assert all(same(held.load_image(k), k) for k in range(4))
    if not streaming:
        assert dataset.image_id(2) == "r" and [row["image_id"] for row in dataset.subset([3, 0]).rows] == ["s", "p"]
        assert [row["image_id"] for row in dataset.rows[1:3]] == ["q", "r"]


def test_ids_columns_and_splits(tmp_path):
    data = table(3, number=(datasets.Value("int64"), [5, 7, 9]), twice=(datasets.Value("int64"), [5, 7, 5]))
    datasets.DatasetDict(train=data, test=data.select([1])).save_to_disk(tmp_path / "data")
    with pytest.raises(DataError, match=r"has 2 splits.*train, test"):
        load_dataset_rows(tmp_path / "data")
    with pytest.raises(DataError, match=r"has no split 'val'\. It has: train, test"):
        load_dataset_rows(tmp_path / "data", split="val")
    train = load_dataset_rows(tmp_path / "data", split="train")
    assert [row["image_id"] for row in train.rows] == [0, 1, 2] and train[1]["file_name"] == "1"
    numbered = load_dataset_rows(tmp_path / "data", split="train", id_column="number")
    assert [row["image_id"] for row in numbered.rows] == [5, 7, 9]
    with pytest.raises(DataError, match="row 2: image id 5 is also in row 0"):
        load_dataset_rows(tmp_path / "data", split="train", id_column="twice")
    with pytest.raises(DataError, match=r"has no column 'name', only \['image', 'number', 'twice'\]"):
        load_dataset_rows(tmp_path / "data", split="train", id_column="name")
    data.rename_column("image", "left").add_column("right", data["number"]).save_to_disk(tmp_path / "left")
    assert len(load_dataset_rows(tmp_path / "left")) == 3
    data.remove_columns("image").save_to_disk(tmp_path / "none")
    with pytest.raises(DataError, match="has 0 columns of images"):
        load_dataset_rows(tmp_path / "none")


def test_images_stay_in_their_files_where_they_have_one(folder):
    features = datasets.Features({"image": datasets.Image(), "where": datasets.Value("string")})
    paths = [str(folder / "a" / "x.png"), str(folder / "missing.png")]
    data = datasets.Dataset.from_dict({"image": paths, "where": ["a/x.png", "z.png"]}, features=features)
    pyarrow.parquet.write_table(data.data.table, folder / "data.parquet")  # its own writer takes the images in
    dataset = load_dataset_rows(folder / "data.parquet")
    assert dataset[0]["image"] == paths[0] and dataset[0]["file_name"] == "x.png"
    with pytest.raises(ImageError, match=r"missing\.png: no such image"):
        dataset.load_image(1)
    named = load_dataset_rows(folder / "data.parquet", image_column="where")
    assert same(named.load_image(0), 0) and same(named.load_image(1), 2)


def test_broken_and_empty_images_are_met_when_they_are_opened(tmp_path):
    features = datasets.Features({"image": datasets.Image()})
    images = [{"bytes": encoded(0), "path": "x.png"}, {"bytes": encoded(1)[:400], "path": None}, None]
    datasets.Dataset.from_dict({"image": images}, features=features).to_parquet(tmp_path / "data.parquet")
    dataset = load_dataset_rows(tmp_path / "data.parquet")
    assert same(dataset.load_image(0), 0) and dataset[0]["file_name"] == "x.png"
    with pytest.raises(ImageError, match="1: cannot be decoded"):
        dataset.load_image(1)
    with pytest.raises(ImageError, match="2: is not an image"):
        dataset.load_image(2)


def test_names_and_options_that_lead_nowhere(folder):
    with pytest.raises(DataError, match=r"owner/nothing: no such file or folder, and no dataset of this name"):
        load_dataset_rows("owner/nothing")
    with pytest.raises(DataError, match=r"typo: no such file or folder"):
        load_dataset_rows(folder / "a" / "typo")
    with pytest.raises(DataError, match="only datasets of the `datasets` library are read as a stream"):
        stream_dataset_rows(folder)


def test_a_store_that_was_exported_into_its_own_folder_is_still_a_store(folder):
    (folder / "header.json").write_text(json.dumps({"schema_version": 1}))
    table(1).to_parquet(folder / "export.parquet")
    with pytest.raises(DataError, match=r"header\.json: has no 'labeler'"):
        load_dataset_rows(folder)


def test_a_byte_order_mark_is_no_part_of_a_path(folder):
    names = ["z.png", "a/x.png"]
    (folder / "windows.txt").write_bytes("\r\n".join(names).encode("utf-8-sig"))
    dataset = load_dataset_rows(folder / "windows.txt")
    assert [row["file_name"] for row in dataset.rows] == names and not dataset.failures


def test_columns_and_configurations_that_cannot_be_meant(tmp_path):
    table(2, label=(datasets.Value("int64"), [3, 4])).to_parquet(tmp_path / "some.parquet")
    with pytest.raises(DataError, match=r"an image or a path, got 3.*image_column"):
        load_dataset_rows(tmp_path / "some.parquet", image_column="label")[0]
    with pytest.raises(DataError, match="no configurations, 'large' was asked for"):
        load_dataset_rows(tmp_path / "some.parquet", config="large")


def test_names_that_are_no_text_are_listed(folder):
    file = os.path.join(os.fsencode(folder), b"bad\xff.png")
    with open(file, "wb") as stream:
        stream.write(encoded(0))
    dataset = load_dataset_rows(folder)
    assert len(dataset) == 3
    assert dataset.failures[0]["reason"] == "its name is no UTF-8 text; rename it"
    assert dataset.failures[0]["file"].encode().endswith(b"bad\\udcff.png")


def test_a_format_that_the_path_does_not_have(folder):
    (folder / "x.json").write_text("{}")
    for path in (folder, folder / "x.json"):
        with pytest.raises(DataError, match=r"is no Parquet file.*Choose another `format`"):
            load_dataset_rows(path, format="datasets")


def test_the_frame_of_an_image_survives_saving(tmp_path):
    """Outlines of the stored image must not come back on the one that EXIF turns upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", exif=exif)
    image = {"id": 1, "file_name": "a.jpg", "width": 40, "height": 30, "as_stored": True}
    outline = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[20, 2, 36, 2, 36, 12, 20, 12]]}
    content = {"images": [image], "annotations": [outline], "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    dataset = load_dataset_rows(tmp_path / "a.json")
    dataset.to_hf_dataset().save_to_disk(tmp_path / "saved")
    for rows in (dataset, load_dataset_rows(tmp_path / "saved")):
        assert rows[0]["as_stored"] is True and rows.load_image(0).size == (40, 30)
        assert rows.mask(0, 0)[2:12, 20:36].all() and rows.mask(0, 0).sum() == 160
