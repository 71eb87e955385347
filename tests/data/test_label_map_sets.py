"""COCO-Stuff-10k and ADE20K-Full in small, laid out and encoded as published."""

import pickle

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from uplvp_hf.commands import data
from uplvp_hf.data import DataError, ImageError, load_dataset_rows
from uplvp_hf.data.label_map_sets import COCO_STUFF
from uplvp_hf.data.semantic import label_map, semantic_view


def picture(path, size=(12, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "gray").save(path)


@pytest.fixture
def stuff(tmp_path):
    root, rng = tmp_path / "coco_stuff10k", np.random.default_rng(0)
    maps = {f"COCO_train2014_{index:012d}": rng.choice([0, 1, 90, 92, 182], (8, 12)) for index in range(3)}
    (root / "imageLists").mkdir(parents=True)
    (root / "annotations").mkdir()
    for stem, labels in maps.items():
        picture(root / "images" / f"{stem}.jpg")
        savemat(root / "annotations" / f"{stem}.mat", {"S": labels.astype(np.uint8), "names": ["x"]})
    stems = list(maps)
    (root / "imageLists" / "train.txt").write_text("\n".join(stems[:2]) + "\n")
    (root / "imageLists" / "test.txt").write_text(stems[2] + "\n")
    return root, maps


def test_coco_stuff(stuff, capsys):
    root, maps = stuff
    dataset = load_dataset_rows(root, split="train")
    assert len(dataset) == 2 and len(dataset.categories) == len(COCO_STUFF) == 171
    # 80 things with COCO's gaps, 91 kinds of stuff: places in the order of the ids.
    assert [COCO_STUFF[number] for number in (1, 13, 90, 92, 157, 182)] == [
        "person", "stop sign", "toothbrush", "banner", "sky-other", "wood",
    ]  # fmt: skip
    ids = sorted(COCO_STUFF)
    seen, raw = label_map(semantic_view(dataset), 1), maps["COCO_train2014_000000000001"]
    for value in (1, 90, 92, 182):
        assert np.array_equal(seen == ids.index(value), raw == value)
    assert (seen == 255).sum() == (raw == 0).sum()
    assert data.main(["check", str(root), "--split", "test"]) == 0 and "1 image" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"Choose one of test, train"):
        load_dataset_rows(root)
    savemat(root / "annotations" / "COCO_train2014_000000000000.mat", {"S": np.full((8, 12), 12, np.uint8)})
    with pytest.raises(ImageError, match="holds the id 12, which is no class"):
        label_map(semantic_view(dataset), 0)
    (root / "annotations" / "COCO_train2014_000000000000.mat").write_bytes(b"no matlab")
    with pytest.raises(ImageError, match=r"000000000000\.mat.*cannot be decoded"):
        label_map(semantic_view(dataset), 0)


@pytest.fixture
def ade(tmp_path):
    root, rng = tmp_path / "ADE20K_2021_17_01", np.random.default_rng(0)
    maps = {}
    for split, short, count in (("training", "train", 2), ("validation", "val", 1)):
        for index in range(count):
            file = root / "images" / "ADE" / split / "urban" / f"ADE_{short}_{index:08d}.jpg"
            picture(file)
            ids = rng.choice([0, 1, 255, 256, 700], (8, 12))
            maps[split, index] = ids
            colors = np.stack([ids // 256 * 10, ids % 256, rng.integers(0, 9, ids.shape)], -1).astype(np.uint8)
            Image.fromarray(colors).save(str(file)[:-4] + "_seg.png")
    return root, maps


def write_index(root, objects=(), drop=()):
    names = [f"name {index}" for index in range(800)]
    names[0], names[254], names[255], names[699] = "wall", "bag, handbag", "bag, sack", "ear, auricle"
    presence = np.zeros((800, 3), np.int64)
    presence[[0, 254, 255, 699]] = 1
    presence[300, 0] = 1  # in the training images alone
    part = np.zeros_like(presence)
    part[699] = 1  # always a part of something
    folders = [f"ADE20K_2021_17_01/images/ADE/{split}/urban" for split in ("training", "training", "validation")]
    index = {"objectnames": names, "objectPresence": presence, "objectIsPart": part, "folder": folders}
    (root / "index_ade20k.pkl").write_bytes(pickle.dumps({k: v for k, v in index.items() if k not in drop}))


def test_ade20k_full(ade, capsys):
    root, maps = ade
    with pytest.raises(DataError, match=r"neither classes\.txt nor index_ade20k\.pkl"):
        load_dataset_rows(root, split="training")
    write_index(root)
    dataset = load_dataset_rows(root, split="training")
    assert dataset.categories == [
        {"id": 1, "name": "wall"}, {"id": 255, "name": "bag, handbag"}, {"id": 256, "name": "bag, sack"},
    ]  # fmt: skip
    assert [row["file_name"] for row in dataset.rows] == [
        "urban/ADE_train_00000000.jpg",
        "urban/ADE_train_00000001.jpg",
    ]
    seen, raw = label_map(semantic_view(dataset), 1), maps["training", 1]
    for place, value in enumerate((1, 255, 256)):
        assert np.array_equal(seen == place, raw == value)
    assert (seen == 255).sum() == np.isin(raw, [0, 700]).sum()
    assert data.main(["check", str(root), "--split", "validation"]) == 0 and "1 image" in capsys.readouterr().out
    # A list of one's own, with ids beyond 255 and more classes than a byte holds.
    (root / "classes.txt").write_text("".join(f"{number}: name {number}\n" for number in range(1, 701)))
    many = semantic_view(load_dataset_rows(root, split="validation"))
    seen, raw = label_map(many, 0), maps["validation", 0]
    assert np.array_equal(seen, np.where(raw == 0, 65535, raw - 1))


def test_an_index_that_would_run_code_is_refused(ade):
    root, _ = ade
    (root / "index_ade20k.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(DataError, match=r"cannot be read \(it names os\.system\)"):
        load_dataset_rows(root, split="training")
    write_index(root, drop=("objectIsPart",))
    with pytest.raises(DataError, match="is no index of ADE20K"):
        load_dataset_rows(root, split="training")
