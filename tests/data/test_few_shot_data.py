"""Class splits, supports with hashes, episodes, and the public seeds of TFA."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from uplvp_hf.data import DataError, InstanceDataset, TrainingSet, TrainTransform, encode_mask, load_dataset_rows
from uplvp_hf.data.aliases import VOC_CLASSES, VOC_TO_COCO, find_classes
from uplvp_hf.data.class_splits import class_split
from uplvp_hf.data.coco_classes import COCO_CLASSES
from uplvp_hf.data.dataset import empty_objects
from uplvp_hf.data.episodes import EpisodeSet, collate_episodes
from uplvp_hf.data.supports import (
    apply_supports,
    draw_supports,
    keep_classes,
    object_digest,
    read_supports,
    write_supports,
)
from uplvp_hf.data.synthetic import LOOKS, NOVEL_LOOKS, make_scene, write_scenes
from uplvp_hf.data.tfa_seeds import read_tfa_seed

# ---- names -----------------------------------------------------------------------------------------------------------


def test_the_six_names_that_voc_and_coco_spell_differently():
    assert len(VOC_TO_COCO) == 6 and len(VOC_CLASSES) == 20 and set(VOC_CLASSES) < set(COCO_CLASSES)
    assert find_classes(list(VOC_TO_COCO), COCO_CLASSES) == list(VOC_TO_COCO.values())
    assert find_classes(["couch", "TV", "dining table"], list(VOC_TO_COCO)) == ["sofa", "tvmonitor", "diningtable"]
    assert find_classes(["Cat"], ["cat", "Cat"]) == ["Cat"]  # an equal spelling goes first
    with pytest.raises(DataError, match=r"no class 'motorcicle'. Did you mean 'motorcycle'"):
        find_classes(["motorcicle"], COCO_CLASSES)


def test_named_splits():
    voc = ["sofa", "person", "aeroplane"]
    split = class_split("coco2voc", [*COCO_CLASSES])
    assert (len(split.base), set(split.novel)) == (60, set(VOC_CLASSES))
    assert class_split("coco2voc", voc).novel == tuple(voc) and class_split("coco2voc", voc).base == ()
    folds = [class_split(f"coco20i-{fold}", COCO_CLASSES).novel for fold in range(4)]
    assert folds[1][:2] == ("bicycle", "bus") and Counter(name for fold in folds for name in fold) == Counter(
        COCO_CLASSES
    )
    held = class_split("holdout:3@7", COCO_CLASSES)
    assert len(held.novel) == 3 and set(held.novel) | set(held.base) == set(COCO_CLASSES)
    assert held == class_split("holdout:3@7", COCO_CLASSES) != class_split("holdout:3", COCO_CLASSES)
    with pytest.raises(DataError, match=r"no class 'nut'"):
        class_split("coco2voc", ["person", "nut"])
    with pytest.raises(DataError, match=r"no class split 'coco2'. Choose one of coco2voc"):
        class_split("coco2", COCO_CLASSES)
    with pytest.raises(DataError, match=r"leaves a part empty"):
        class_split("holdout:2", ["a", "b"])


def test_a_split_from_a_file(tmp_path):
    file = tmp_path / "split.yaml"
    file.write_text("novel: [sofa]\n")
    split = class_split(str(file), ["couch", "cat", "dog"])
    assert (split.novel, split.base) == (("couch",), ("cat", "dog"))
    file.write_text("novel: [sofa]\nbase: [couch, cat]\n")
    with pytest.raises(DataError, match=r"class 'couch' is base and novel"):
        class_split(str(file), ["couch", "cat", "dog"])
    file.write_text("new: [sofa]\n")
    with pytest.raises(DataError, match=r"must hold `novel: \[names\]`"):
        class_split(str(file), ["couch"])


def test_the_world_of_24_looks_holds_out_hues():
    names = LOOKS[24]
    assert len(set(names)) == 24 and len(NOVEL_LOOKS) == 6
    hues = {name: name.split()[0] for name in names}
    assert not {hues[name] for name in NOVEL_LOOKS} & {hues[name] for name in names if name not in NOVEL_LOOKS}
    base = [name for name in names if name not in NOVEL_LOOKS]
    seen = {label for seed in range(12) for label in make_scene(seed, looks=24, classes=base)["labels"]}
    assert len(seen) > 10 and not {names[label] for label in seen} & set(NOVEL_LOOKS)


# ---- supports --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def looks(tmp_path_factory):
    folder = write_scenes(tmp_path_factory.mktemp("looks") / "scenes", count=16, seed=3, size=64, looks=8)
    return load_dataset_rows(folder)


@pytest.fixture(scope="module")
def names(looks):
    """Classes with at least four objects."""
    counts = Counter(id_ for row in looks.rows for id_ in row["objects"]["category_id"])
    return [category["name"] for category in looks.categories if counts[category["id"]] >= 4]


def test_draws_are_nested_and_independent_of_other_classes(looks, names):
    assert len(names) >= 3
    one, three = (draw_supports(looks, names, shots, seed=2) for shots in (1, 3))
    assert three.fewer(1) == one and three.hash != one.hash
    assert draw_supports(looks, names[1:2], 3, seed=2).entries[names[1]] == three.entries[names[1]]
    assert draw_supports(looks, names, 3, seed=4).hash != three.hash
    for name, found in three.entries.items():
        assert len(set(found)) == 3
        for row, k in found:
            category = looks[row]["objects"]["category_id"][k]
            assert looks.categories[looks.category_ids.index(category)]["name"] == name
    with pytest.raises(DataError, match=r"objects that can be supports, 999 were asked for"):
        draw_supports(looks, names, 999)


def test_supports_come_from_as_many_images_as_there_are(looks, names):
    every = draw_supports(looks, names, 999, allow_fewer=True)
    for name, found in draw_supports(looks, names, 4).entries.items():
        images = {row for row, _ in every.entries[name]}
        assert len({row for row, _ in found}) == min(4, len(images))


def test_small_objects_are_no_supports(looks, names):
    for row, k in draw_supports(looks, names, 99, least_share=0.02, allow_fewer=True).entries[names[0]]:
        assert looks[row]["objects"]["area"][k] >= 0.02 * 64 * 64


def test_a_manifest_leads_back_to_the_same_objects(looks, names, tmp_path):
    supports = draw_supports(looks, names, 2, seed=1)
    file = tmp_path / "supports.json"
    write_supports(supports, file)
    content = read_supports(file)
    assert content["kind"] == "support" and content["hash"] == supports.hash
    assert apply_supports(looks, content) == supports
    again = load_dataset_rows((tmp_path / content["source"]["path"]).resolve())
    assert apply_supports(again, content).hash == supports.hash

    moved = looks.map(
        lambda row: {**row, "objects": {**row["objects"], "category_id": [1] * len(row["objects"]["area"])}}
    )
    with pytest.raises(DataError, match=r"is not the one that was written down"):
        apply_supports(moved, content)
    with pytest.raises(DataError, match=r"is not there in .*Give the data that the supports were drawn from"):
        apply_supports(looks.subset([0]), content)
    content["supports"][names[0]][0][1] += 1
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"changed after it was written"):
        read_supports(file)


def test_supports_are_not_evaluated_on(looks, names):
    supports = draw_supports(looks, names, 2)
    rows = {row for found in supports.entries.values() for row, _ in found}
    supports.refuse_overlap(looks.subset([index for index in range(len(looks)) if index not in rows]))
    with pytest.raises(DataError, match=r"holds a support and would be evaluated as well"):
        supports.refuse_overlap(looks)


# ---- episodes --------------------------------------------------------------------------------------------------------


@pytest.fixture
def make_episodes(looks, names):
    def make(**options):
        base = keep_classes(looks, names)
        label_map = {id_: label for label, id_ in enumerate(base.category_ids)}
        transform = TrainTransform(64, (0.9, 1.1))
        samples = TrainingSet(base, transform, label_map, [0.5] * 3, [0.25] * 3, seed=0)
        return EpisodeSet(samples, **options)

    return make


def same_episode(one: dict, other: dict) -> bool:
    pixels = torch.equal(one["pixel_values"], other["pixel_values"])
    known = ("asked", "mask_labels", "support_ids")
    supports = all(
        torch.equal(a["pixel_values"], b["pixel_values"]) and a["mask_labels"] == b["mask_labels"]
        for a, b in zip(one["supports"], other["supports"], strict=True)
    )
    return pixels and supports and all(one[key] == other[key] for key in known)


def test_an_episode_asks_for_one_class_with_supports_from_other_images(make_episodes, looks):
    episodes = make_episodes(shots=(1, 3))
    objects, absent, shots = 0, 0, Counter()
    for index in range(len(episodes)):
        for epoch in range(4):
            one = episodes.sample(index, epoch)
            shots[len(one["supports"])] += 1
            assert one["image_id"] not in {image_id for image_id, _ in one["support_ids"]}
            name = episodes.names[one["asked"]]
            for image_id, k in one["support_ids"]:
                row = episodes.dataset[int(image_id) - 1]
                category = {c["id"]: c["name"] for c in looks.categories}[row["objects"]["category_id"][k]]
                assert row["image_id"] == image_id and category == name
            assert all(len(support["mask_labels"]) == 1 for support in one["supports"])
            assert len(one["mask_labels"]) == len(one["class_labels"]) and not one["class_labels"].any()
            objects += len(one["mask_labels"])
            absent += len(one["mask_labels"]) == 0
    assert set(shots) == {1, 2, 3} and objects > 40
    assert 0.1 < absent / (4 * len(episodes)) < 0.6  # a quarter, and images that show no base class


def test_the_labels_are_the_objects_of_the_class_asked_for(make_episodes):
    episodes = make_episodes(negatives=0.0)
    for index in range(6):
        one, all_of_it = episodes.sample(index, 0), episodes.samples.sample(index, 0)
        wanted = [k for k, label in enumerate(all_of_it["class_labels"].tolist()) if label == one["asked"]]
        assert bool(wanted) == (len(all_of_it["class_labels"]) > 0)  # an image without base classes is a negative
        assert one["mask_labels"] == all_of_it["mask_labels"].select(wanted)


def test_an_episode_depends_on_seed_epoch_and_index_alone(make_episodes):
    first, second = make_episodes(), make_episodes()
    second.sample(5, 9)  # other draws in between change nothing
    assert same_episode(first.sample(3, 1), second.sample(3, 1))
    assert not same_episode(first.sample(3, 1), first.sample(3, 2))
    loader = torch.utils.data.DataLoader(
        _Keyed(first), batch_sampler=[[(3, 1)], [(0, 0)]], num_workers=1, collate_fn=lambda batch: batch
    )
    assert same_episode(next(iter(loader))[0], first.sample(3, 1))


class _Keyed(torch.utils.data.Dataset):
    def __init__(self, episodes):
        self.episodes = episodes

    def __getitem__(self, key):
        return self.episodes.sample(*key)


def test_a_batch_knows_whose_supports_are_whose(make_episodes):
    episodes = make_episodes(shots=(2, 2))
    samples = [episodes.sample(index, 0) for index in range(3)]
    batch = collate_episodes(samples, pad_to=64)
    assert batch["support_owner"].tolist() == [0, 0, 1, 1, 2, 2]
    assert batch["support_values"].shape == (6, 3, 64, 64) == (len(batch["support_masks"]), 3, 64, 64)
    own = samples[1]["supports"][1]
    height, width = own["pixel_values"].shape[-2:]
    assert torch.equal(batch["support_values"][3, :, :height, :width], own["pixel_values"])
    assert torch.equal(batch["support_masks"].dense()[3, :height, :width], own["mask_labels"].dense()[0])
    assert batch["support_pixel_mask"][3].sum() == height * width


def test_supports_from_a_bank_are_averaged(make_episodes):
    plain = make_episodes(shots=(2, 2))
    entries = [entry for found in plain.pool.values() for entry in found]
    bank = {entry: torch.tensor([float(place), 1.0]) for place, entry in enumerate(entries)}
    episodes = make_episodes(shots=(2, 2), vectors=bank)
    one = episodes.sample(2, 0)
    positions = {episodes.dataset.image_id(row): row for row in range(len(episodes.dataset))}
    own = [bank[positions[image_id], k] for image_id, k in one["support_ids"]]
    assert len(own) == 2 and torch.equal(one["support_vector"], torch.stack(own).mean(0))
    batch = collate_episodes([one, episodes.sample(3, 0)], pad_to=64)
    assert batch["support_vectors"].shape == (2, 2) and "support_values" not in batch


def test_a_class_of_a_single_image_is_refused(looks, names):
    base = keep_classes(looks, names[:1])
    index = next(i for i, row in enumerate(base.rows) if row["objects"]["area"])
    samples = TrainingSet(base.subset([index]), TrainTransform(64), {base.category_ids[0]: 0}, [0.5] * 3, [0.25] * 3, 0)
    with pytest.raises(DataError, match=r"has supports in fewer than two images"):
        EpisodeSet(samples)


# ---- public seeds ----------------------------------------------------------------------------------------------------


def square(image_id: int, *objects: tuple[int, int]) -> dict:
    """A row of 40 x 40 pixels with a square of 10 pixels at (left, 0) for every (category id, left)."""
    row = {"image": f"{image_id}.png", "image_id": image_id, "file_name": f"{image_id}.png", "width": 40, "height": 40}
    found = empty_objects()
    for category_id, left in objects:
        mask = np.zeros((40, 40), dtype=bool)
        mask[:10, left : left + 10] = True
        values = {
            "segmentation": encode_mask(mask),
            "category_id": category_id,
            "bbox": [left, 0, 10, 10],
            "area": 100.0,
        }
        for key, value in {**values, "iscrowd": 0, "score": 1.0}.items():
            found[key].append(value)
    return {**row, "objects": found}


def test_public_seeds_lead_to_the_objects_of_the_source(tmp_path):
    categories = [{"id": 63, "name": "couch"}, {"id": 64, "name": "potted plant"}]
    source = InstanceDataset([square(7, (63, 0), (63, 20)), square(9, (64, 5), (63, 12))], categories, "coco")

    def write(shots, name, annotations):
        content = {"annotations": [{"id": n, "image_id": i, "bbox": box} for n, (i, box) in enumerate(annotations)]}
        (tmp_path / f"full_box_{shots}shot_{name}_trainval.json").write_text(json.dumps(content))

    write(1, "couch", [(7, [20, 0, 10, 10])])
    write(2, "couch", [(7, [20, 0, 10, 10]), (9, [12.3, 0, 10, 10])])
    write(1, "potted plant", [(9, [5, 0, 10, 10])])
    write(2, "potted plant", [(9, [5, 0, 10, 10])])
    one, two = (read_tfa_seed(tmp_path, shots, source) for shots in (1, 2))
    assert one.entries == {"couch": [(0, 1)], "potted plant": [(1, 0)]}
    assert two.entries["couch"] == [(0, 1), (1, 1)] and two.entries["couch"][:1] == one.entries["couch"]
    assert two.as_lists()["couch"][1] == [9, 1, object_digest(source[1], 1)]
    with pytest.raises(DataError, match=r"no full_box_5shot_CLASS_\*.json: there are 1, 2"):
        read_tfa_seed(tmp_path, 5, source)
    write(1, "couch", [(7, [25, 0, 10, 10])])
    with pytest.raises(DataError, match=r"couch_trainval.json, annotations\[0\]: image 7 of coco has no such object"):
        read_tfa_seed(tmp_path, 1, source)
    write(1, "couch", [(8, [20, 0, 10, 10])])
    with pytest.raises(DataError, match=r"image 8 is not in coco"):
        read_tfa_seed(tmp_path, 1, source)
