"""A store in other forms: what pycocotools and `datasets` read out of them is what the store holds."""

import hashlib
import json
import os

import datasets
import numpy as np
import processes
import pytest
from labeling_helpers import image_folder
from pycocotools.coco import COCO

from uplvp_hf.data import DataError, load_dataset_rows, read_store
from uplvp_hf.files import replacing
from uplvp_hf.labeling.cutting.proposals import Proposals
from uplvp_hf.labeling.pipeline import Labeler, label_images
from uplvp_hf.labeling.store_export import export_coco, export_parquet, store_to_dataset


class Rectangles(Labeler):
    """None, one, two, ... overlapping rectangles an image, of classes in turn."""

    name, encoder_name, vocabulary, settings = "rectangles", "none", ("bear", "otter"), {}

    def __call__(self, images, rows=None):
        results = []
        for image, row in zip(images, rows):
            count = int(row["image_id"][:3]) % 4
            masks = np.zeros((count, image.height, image.width), dtype=bool)
            for k in range(count):
                masks[k, 3 * k : 20 + 7 * k, 5 * k : 9 + 11 * k] = True
            results.append(Proposals(masks, np.linspace(0.9, 0.5, count, dtype=np.float32), np.arange(count) % 2))
        return results


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    dataset = image_folder(folder / "images", 7)
    dataset.categories = [{"id": 7, "name": "otter"}, {"id": 30, "name": "bear"}]  # sparse, not the labeler's order
    label_images(dataset, Rectangles(), None, folder / "labels", progress=False, shard_size=2, batch_size=2)
    assert [len(row["objects"]["score"]) for row in read_store(folder / "labels").rows] == [0, 1, 2, 3, 0, 1, 2]
    return folder / "labels"


def test_coco(store, tmp_path):
    export_coco(store, tmp_path / "labels.json")
    stored = read_store(store)
    coco = COCO(tmp_path / "labels.json")
    assert coco.getImgIds() == [row["image_id"] for row in stored.rows]
    assert {c["id"]: c["name"] for c in coco.loadCats(coco.getCatIds())} == {7: "otter", 30: "bear"}
    for index, row in enumerate(stored.rows):
        found = coco.loadAnns(coco.getAnnIds([row["image_id"]]))
        assert len(found) == len(row["objects"]["score"])
        for k, annotation in enumerate(found):
            np.testing.assert_array_equal(coco.annToMask(annotation).astype(bool), stored.mask(index, k))
            for key in ("category_id", "bbox", "area", "score"):
                assert annotation[key] == row["objects"][key][k]
    images = stored.rows[0]["image"].rpartition("/")[0]
    again = load_dataset_rows(tmp_path / "labels.json", images=images)
    assert again.rows == stored.rows and again.categories == stored.categories


READ_AGAIN = """
import hashlib, json, sys
from datasets import load_dataset
rows = load_dataset("parquet", data_files=sys.argv[1], split="train", cache_dir=sys.argv[2])
names = rows.features["objects"]["category"].feature.names
digest = lambda row: hashlib.sha256(row["image"].convert("RGB").tobytes()).hexdigest()
print(json.dumps([names, [{**row, "image": digest(row)} for row in rows]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("embed", [False, True])
def test_parquet_in_a_second_process(store, tmp_path, embed):
    export_parquet(store, tmp_path / "labels.parquet", embed_images=embed)
    done = processes.run(READ_AGAIN, tmp_path / "labels.parquet", tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    names, rows = json.loads(done.stdout)
    stored = read_store(store)
    assert names == ["otter", "bear"] and len(rows) == len(stored)
    for index, (row, want) in enumerate(zip(rows, stored.rows)):
        pixels = stored.load_image(index).tobytes()
        assert row["image"] == hashlib.sha256(pixels).hexdigest()
        assert [names[k] for k in row["objects"].pop("category")] == [
            {7: "otter", 30: "bear"}[k] for k in want["objects"]["category_id"]
        ]
        assert {**row, "image": want["image"]} == {"as_stored": False, **want}
    again = load_dataset_rows(tmp_path / "labels.parquet")
    assert again.categories == stored.categories
    assert [row["objects"] for row in again.rows] == [row["objects"] for row in stored.rows]
    assert isinstance(again[0]["image"], bytes if embed else str)
    assert again.load_image(3).tobytes() == stored.load_image(3).tobytes()


def test_dataset_opens_no_image_and_decodes_no_mask(store, tmp_path, monkeypatch):
    from uplvp_hf.models import masks

    monkeypatch.setattr(masks.coco_mask, "decode", None)
    monkeypatch.setattr(masks.coco_mask, "frPyObjects", None)
    monkeypatch.setattr("PIL.Image.open", None)
    rows = store_to_dataset(store)
    stored = read_store(store)
    assert rows.features["image"] == datasets.Image()
    assert [entry["segmentation"] for entry in rows["objects"]] == [r["objects"]["segmentation"] for r in stored.rows]
    monkeypatch.undo()
    assert rows[2]["image"].size == (96, 64)
    rows.save_to_disk(tmp_path / "saved")
    again = load_dataset_rows(tmp_path / "saved")  # without the original ids: numbers of the classes
    assert again.id2label == {0: "otter", 1: "bear"} and again.category_ids == [0, 1]
    want = [[stored.category_ids.index(k) for k in row["objects"]["category_id"]] for row in stored.rows]
    assert [row["objects"]["category_id"] for row in again.rows] == want


def test_an_export_that_fails_leaves_what_was_there(store, tmp_path):
    for file in store.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    last = sorted(tmp_path.glob("rows-*"))[-1]
    last.write_bytes(last.read_bytes()[:-20])
    for export, name in ((export_coco, "out.json"), (export_parquet, "out.parquet")):
        (tmp_path / name).write_text("before")
        with pytest.raises(DataError, match="is not valid JSON"):
            export(tmp_path, tmp_path / name)
        assert (tmp_path / name).read_text() == "before"
    with pytest.raises(RuntimeError), replacing(tmp_path / "new.json") as stream:
        stream.write("half")
        raise RuntimeError
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp") or name == "new.json"]
