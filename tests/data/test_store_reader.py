import json

import numpy as np
import pytest

from uplvp_hf.data import DataError, encode_mask, load_dataset_rows, read_store


@pytest.fixture
def store(tmp_path):
    """A store with two shards of one row each, and what an interrupted writer leaves behind."""
    mask = np.zeros((30, 40), dtype=bool)
    mask[3:9, 4:20] = True

    def row(image_id, image, **changes):
        objects = {"segmentation": [encode_mask(mask)], "category_id": [5], "bbox": [[4, 3, 16, 6]], "area": [96.0]}
        objects |= {"iscrowd": [0], "score": [0.7]}
        return {"image": image, "image_id": image_id, "file_name": image, "width": 40, "height": 30} | {
            "objects": objects | changes
        }

    def make(shards=None, **header):
        content = {"schema_version": 1, "labeler": "clip", "settings": {}, "settings_hash": "0" * 64, "encoder": "e"}
        content |= {"vocabulary": ["bear"], "categories": [{"id": 5, "name": "bear"}], "image_root": "images"}
        content = {key: value for key, value in (content | header).items() if value is not None}
        (tmp_path / "header.json").write_text(json.dumps(content))
        shards = shards or {
            "rows-00000-00000.jsonl": [row("a", "a.jpg")],
            "rows-00001-00000.jsonl": [row(2, "/x/b.jpg")],
        }
        for name, rows in shards.items():
            (tmp_path / name).write_text("".join(json.dumps(entry) + "\n" for entry in rows))
        return tmp_path

    make.row = row
    make.mask = mask
    return make


def test_rows_and_categories(store):
    folder = store()
    for name in ("rows-00000-00001.jsonl.tmp", ".rows-00000-00001.jsonl", "rows-0-1.jsonl", "xrows-00000-00002.jsonl"):
        (folder / name).write_text('{"image": "cut o')
    (folder / "failures.jsonl").write_text('{"file": "c.jpg", "row": "2", "reason": "cut off"}\n')
    dataset = load_dataset_rows(folder)
    assert [row["image_id"] for row in dataset.rows] == ["a", 2]
    assert dataset[0]["image"] == str(folder / "images" / "a.jpg") and dataset[1]["image"] == "/x/b.jpg"
    assert dataset.id2label == {0: "bear"} and dataset.category_ids == [5]
    assert dataset.failures == [{"file": "c.jpg", "row": "2", "reason": "cut off"}]
    np.testing.assert_array_equal(dataset.mask(0, 0), store.mask)
    assert read_store(folder, images="/elsewhere")[0]["image"] == "/elsewhere/a.jpg"


def test_one_image_in_two_shards(store):
    shards = {"rows-00000-00000.jsonl": [store.row("a", "a.jpg")], "rows-00001-00000.jsonl": [store.row("a", "b.jpg")]}
    with pytest.raises(DataError, match=r"rows-00001-00000\.jsonl.*'a' is also in rows-00000-00000\.jsonl"):
        read_store(store(shards))


def test_header_is_checked(store, tmp_path):
    with pytest.raises(DataError, match=r"header\.json: schema version 2"):
        read_store(store(schema_version=2))
    with pytest.raises(DataError, match=r"header\.json: has no 'categories'"):
        read_store(store(categories=None))
    with pytest.raises(DataError, match="no 'image_root'"):
        read_store(store(image_root=None))
    with pytest.raises(DataError, match=r"header\.json: cannot be read"):
        read_store(tmp_path / "none")


def test_no_rows(store):
    with pytest.raises(DataError, match="no finished rows"):
        read_store(store({"rows-00000-00000.jsonl.tmp": [store.row("a", "a.jpg")]}))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"category_id": [6]}, "category id 6 is not in the header"),
        ({"score": []}, "0 values of 'score' for 1 objects"),
        ({"score": [None]}, "a score must be a finite number"),
        ({"segmentation": [{"size": [40, 30], "counts": "0"}]}, "size"),
        ({"bbox": None}, "'bbox' must be a list"),
    ],
)
def test_bad_objects_name_file_and_line(store, changes, reason):
    rows = [store.row("a", "a.jpg"), store.row("b", "b.jpg", **changes)]
    with pytest.raises(DataError) as caught:
        read_store(store({"rows-00000-00000.jsonl": rows}))
    assert "rows-00000-00000.jsonl, line 2 (image id 'b')" in str(caught.value) and reason in str(caught.value)


def test_bad_lines_and_paths(store):
    folder = store()
    shard = folder / "rows-00000-00000.jsonl"
    shard.write_text(shard.read_text() + shard.read_text()[:50])
    with pytest.raises(DataError, match=r"rows-00000-00000\.jsonl, line 2: is not valid JSON"):
        read_store(folder)
    shard.write_text(json.dumps(store.row("a", "../../a.jpg")))
    with pytest.raises(DataError, match=r"line 1.*leads out"):
        read_store(folder)
