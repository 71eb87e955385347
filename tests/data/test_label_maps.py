"""Label maps in folders, and what semantic training sees of rows."""

import numpy as np
import pytest
import torch
from PIL import Image

from uplvp_hf.data import DataError, ImageError, InstanceDataset, Row, load_dataset_rows
from uplvp_hf.data.check import check_dataset
from uplvp_hf.data.semantic import (
    SemanticTrainingSet,
    SemanticTransform,
    collate_semantic,
    label_map,
    semantic_view,
)
from uplvp_hf.data.synthetic import write_scenes
from uplvp_hf.models.label_maps import ignored_label, label_array, reduced_labels
from uplvp_hf.models.masks import encode_masks


def write(folder, maps, classes, suffix=".png", split=""):
    (folder / "images" / split).mkdir(parents=True)
    (folder / "annotations" / split).mkdir(parents=True)
    (folder / "classes.txt").write_text(classes, encoding="utf-8")
    rng = np.random.default_rng(0)
    for index, labels in enumerate(maps):
        pixels = rng.integers(0, 256, (*labels.shape, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / split / f"{index}.jpg")
        Image.fromarray(labels).save(folder / "annotations" / split / f"{index}{suffix}")
    return folder


@pytest.fixture
def maps():
    rng = np.random.default_rng(1)
    return [rng.integers(0, 4, (20, 30)).astype(np.uint8) for _ in range(3)]


def test_names_of_notepad_and_a_coco_folder_with_a_list_of_names(tmp_path, maps):
    """A mark of the byte order is no part of the first line; JSON annotations make a folder COCO's."""
    folder = write(tmp_path / "maps", maps, "\ufeff1 wall\n2 sky\n3 tree\n")
    assert load_dataset_rows(folder).categories[0] == {"id": 1, "name": "wall"}
    write_scenes(tmp_path / "scenes", 2, seed=0)
    categories = load_dataset_rows(tmp_path / "scenes").categories
    (tmp_path / "scenes" / "classes.txt").write_text("wall\n")
    assert load_dataset_rows(tmp_path / "scenes").categories == categories


def test_ids_of_the_files_are_reduced_once(tmp_path, maps):
    """Ids 1 to 3, where 0 is nothing, become 0 to 2."""
    dataset = load_dataset_rows(write(tmp_path / "ade", maps, "1: wall\n2: sky\n3: tree\n"))
    assert dataset.categories == [{"id": 1, "name": "wall"}, {"id": 2, "name": "sky"}, {"id": 3, "name": "tree"}]
    seen = label_map(semantic_view(dataset), 1)
    assert np.array_equal(seen, reduced_labels(maps[1].astype(int), 255))
    # The same pixels as objects.
    objects = dataset[1]["objects"]
    for k, category in enumerate(objects["category_id"]):
        assert np.array_equal(dataset.mask(1, k), maps[1] == category)
    report = check_dataset(lambda: dataset)
    assert report["images"] == 3 and not report["broken"]


def test_names_alone_are_numbered_from_zero(tmp_path, maps):
    dataset = load_dataset_rows(write(tmp_path, maps, "wall\nsky\ntree\ncar\n", split="training"), split="training")
    assert np.array_equal(label_map(semantic_view(dataset), 0), maps[0])
    with pytest.raises(DataError, match="has the splits training"):
        load_dataset_rows(tmp_path)


def test_many_classes_in_16_bits(tmp_path):
    labels = np.array([[0, 254, 255, 846, 65535, 3]] * 4, dtype=np.uint16)
    names = "".join(f"class {index}\n" for index in range(847))
    dataset = semantic_view(load_dataset_rows(write(tmp_path, [labels], names, ".tif")))
    assert np.array_equal(label_map(dataset, 0), labels) and ignored_label(847) == 65535


def test_palettes_are_indices(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [2, 255]], dtype=np.uint8)).convert("L")
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    assert image.mode == "P" and label_array(image).tolist() == [[0, 1], [2, 255]]
    with pytest.raises(ImageError, match="mode RGB"):
        label_array(image.convert("RGB"))


def test_faults_name_file_and_value(tmp_path, maps):
    maps[0][0, 0] = 77
    dataset = semantic_view(load_dataset_rows(write(tmp_path / "a", maps, "1 wall\n2 sky\n3 tree\n")))
    with pytest.raises(ImageError, match=r"0\.png.*id 77"):
        label_map(dataset, 0)
    Image.fromarray(maps[1][:10]).save(tmp_path / "a" / "annotations" / "1.png")
    with pytest.raises(ImageError, match=r"1\.png.*30x10.*30x20"):
        label_map(dataset, 1)
    (tmp_path / "a" / "annotations" / "2.png").unlink()
    with pytest.raises(DataError, match=r"2\.png.*no label map"):
        load_dataset_rows(tmp_path / "a")


def test_ade20k_names(tmp_path, maps):
    folder = write(tmp_path, maps, "")
    (folder / "classes.txt").unlink()
    lines = ["Idx\tRatio\tTrain\tVal\tName", "1\t.1\t5\t5\twall", "2\t.1\t5\t5\tbuilding, edifice", "3\t.1\t5\t5\tsky"]
    (folder / "objectInfo150.txt").write_text("\n".join(lines))
    assert load_dataset_rows(folder).id2label == {0: "wall", 1: "building", 2: "sky"}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return load_dataset_rows(write_scenes(tmp_path_factory.mktemp("scenes") / "s", 4, seed=3, size=64))


def test_objects_are_painted_over_background(scenes):
    view = semantic_view(scenes)
    assert view.id2label[0] == "background" and len(view.categories) == len(scenes.categories) + 1
    for index in range(len(view)):
        labels = label_map(view, index)
        objects = scenes[index]["objects"]
        masks = [scenes.mask(index, k) for k in range(len(objects["category_id"]))]
        assert np.array_equal(labels == 0, ~np.any(masks, axis=0))
        for mask, category in zip(masks, objects["category_id"], strict=True):
            assert (labels[mask] == view.category_ids.index(category)).all()


def test_samples_follow_seed_and_epoch_and_keep_pixels_with_labels(scenes):
    view = semantic_view(scenes)
    samples = SemanticTrainingSet(view, SemanticTransform(64), [0.5] * 3, [0.5] * 3, seed=0)
    one, again, other = samples.sample(1, 0), samples.sample(1, 0), samples.sample(1, 1)
    assert torch.equal(one["pixel_values"], again["pixel_values"]) and torch.equal(one["labels"], again["labels"])
    assert not torch.equal(one["pixel_values"], other["pixel_values"])
    plain = SemanticTransform(64, (1.0, 1.0), flip=1.0, color_jitter=0.0)
    mirrored = SemanticTrainingSet(view, plain, [0.0] * 3, [1.0] * 3, seed=0).sample(2, 0)
    image = np.asarray(view.load_image(2))[:, ::-1].transpose(2, 0, 1) / 255
    assert np.allclose(mirrored["pixel_values"].numpy(), image, atol=1e-6)
    assert np.array_equal(mirrored["labels"].numpy(), label_map(view, 2)[:, ::-1])
    batch = collate_semantic([one, mirrored], 96, 255)
    assert batch["labels"].shape == (2, 96, 96) and (batch["labels"][:, 64:] == 255).all()
    assert (batch["pixel_values"][:, :, 64:] == 0).all()


def test_crops_avoid_a_single_class():
    labels = np.zeros((64, 256), dtype=np.int32)
    labels[:, 192:] = 1
    transform = SemanticTransform(64, (1.0, 1.0), flip=0.0, color_jitter=0.0)
    image, generator = Image.new("RGB", (256, 64)), torch.Generator().manual_seed(0)
    seen = [transform(image, labels, 255, generator)[1] for _ in range(20)]
    mixed = sum(len(one.unique()) == 2 for one in seen)
    assert mixed > 14  # a third of all crops shows both


def test_background_has_an_id_of_its_own_and_void_is_no_background(scenes):
    rows = [Row(**{**row, "objects": {**row["objects"]}}) for row in scenes.rows[:1]]
    ids = [category["id"] for category in scenes.categories]
    moved = [{**category, "id": category["id"] - min(ids)} for category in scenes.categories]
    view = semantic_view(InstanceDataset(rows, moved))
    assert {"id": max(ids) - min(ids) + 1, "name": "background"} in view.categories
    assert len(set(view.category_ids)) == len(ids) + 1 and min(view.category_ids) == 0
    height, width = rows[0]["height"], rows[0]["width"]
    corner = np.zeros((1, height, width), dtype=bool)
    corner[:, :5, :7] = True
    rows[0]["void"] = encode_masks(corner)
    labels = label_map(semantic_view(InstanceDataset(rows, scenes.categories)), 0)
    assert (labels[:5, :7] == ignored_label(len(ids) + 1)).all() and (labels != ignored_label(len(ids) + 1)).any()
