"""Splits by every rule, checked against their definitions, and manifests that prove them."""

import itertools
import json
import math
import os
from pathlib import Path

import numpy as np
import processes
import pytest

from uplvp_hf.data import DataError, InstanceDataset, Row, empty_objects
from uplvp_hf.data.dataset import LazyRows
from uplvp_hf.data.manifest import (
    apply_manifest,
    draw_split,
    read_manifest,
    record_manifest,
    row_digest,
    take_split,
    write_manifest,
)
from uplvp_hf.data.splits import Contents, SplitSpec, draw, parse_split

IDS = (2, 4, 9)


def dataset_of(classes_per_image, crowds=(), categories=IDS, name="some/where/data.json"):
    rows = []
    for index, classes in enumerate(classes_per_image):
        square = [[index % 5, 0, 9, 0, 9, 9, 0, 9]]
        objects = {
            "segmentation": [square for _ in classes],
            "category_id": list(classes),
            "bbox": [[0, 0, 9, 9]] * len(classes),
            "area": [81.0] * len(classes),
            "iscrowd": [int((index, k) in crowds) for k in range(len(classes))],
            "score": [1.0] * len(classes),
        }
        rows.append(Row(image="", image_id=1000 - index, file_name="x", width=20, height=20, objects=objects))
    return InstanceDataset(rows, [{"id": i, "name": f"class {i}"} for i in categories], name)


@pytest.fixture(scope="module")
def varied():
    """60 images with 0 to 6 instances of three classes, of which the first is rare; some are crowds."""
    rng = np.random.default_rng(0)
    images = [rng.choice(IDS, size=rng.integers(0, 7), p=(0.1, 0.3, 0.6)).tolist() for _ in range(60)]
    return dataset_of(images, crowds={(k, 0) for k in range(0, 60, 7)})


def instances(dataset, image_ids=None):
    """{category id: instances} without crowds, counted by hand."""
    counts = dict.fromkeys(dataset.category_ids, 0)
    for row in dataset.rows:
        if image_ids is None or row["image_id"] in image_ids:
            for k, crowd in zip(row["objects"]["category_id"], row["objects"]["iscrowd"]):
                counts[k] += not crowd
    return counts


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("1@10", SplitSpec("percent", 10, 1)),
        ("3@0.5", SplitSpec("percent", 0.5, 3)),
        ("1@10.0", SplitSpec("percent", 10, 1)),
        ("10%", SplitSpec("percent", 10, 7)),
        ("2@10%strat", SplitSpec("percent", 10, 2, True)),
        ("5shot", SplitSpec("shot", 5, 7)),
        ("1@5images", SplitSpec("images", 5, 1)),
        ("30instances", SplitSpec("instances", 30, 7)),
    ],
)
def test_names(name, spec):
    assert parse_split(name, seed=7) == spec and parse_split(spec.name) == spec


@pytest.mark.parametrize("name", ["10", "", "x@10", "1@", "1@0", "101%", "2.5shot", "0images", "5shotstrat", "-1@10"])
def test_names_that_are_none(name):
    with pytest.raises(DataError):
        parse_split(name)
    with pytest.raises(DataError):
        SplitSpec("percent", 10, seed=-1)
    with pytest.raises(DataError, match="no split 'each'"):
        SplitSpec("each", 10)


def test_percent_is_a_prefix_of_one_permutation(varied):
    drawn = {p: draw_split(varied, SplitSpec("percent", p, 1)) for p in (0.1, 5, 10, 33.3, 100)}
    assert [len(m["image_ids"]) for m in drawn.values()] == [1, 3, 6, 19, 60]
    for smaller, larger in itertools.pairwise(drawn.values()):
        assert set(smaller["image_ids"]) < set(larger["image_ids"])
    assert draw_split(varied, SplitSpec("percent", 10, 2))["image_ids"] != drawn[10]["image_ids"]
    order = np.random.default_rng(1).permutation(60)[:6]
    assert set(drawn[10]["image_ids"]) == {1000 - i for i in order.tolist()}
    assert math.floor(118287 / 10) == 11828, "as many as Soft-Teacher's 10 % of COCO"


@pytest.mark.parametrize("amount", [1, 2, 5])
def test_instances_a_class_keep_whole_images(varied, amount):
    for seed in range(5):
        manifest = draw_split(varied, SplitSpec("instances", amount, seed))
        found = instances(varied, manifest["image_ids"])
        assert min(found.values()) >= amount and manifest["kept"] is None
        assert {entry["id"]: entry["instances"] for entry in manifest["per_class"]} == found
        subset = take_split(varied, SplitSpec("instances", amount, seed))
        assert all(row in varied.rows for row in subset.rows) and len(subset) == len(manifest["image_ids"])
        smaller = set(draw_split(varied, SplitSpec("instances", max(1, amount - 1), seed))["image_ids"])
        assert smaller <= set(manifest["image_ids"])


def test_images_a_class_are_those_of_labels_per_class(varied):
    for amount, seed in ((1, 0), (3, 4)):
        manifest = draw_split(varied, SplitSpec("images", amount, seed))
        indices = draw(Contents.of(varied), SplitSpec("images", amount, seed))
        assert manifest["image_ids"] == [varied[i]["image_id"] for i in indices]


@pytest.mark.parametrize("amount", [1, 3, 5])
def test_shots_are_exactly_k_instances_a_class(varied, amount):
    for seed in range(5):
        subset = take_split(varied, f"{seed}@{amount}shot")
        assert instances(subset) == dict.fromkeys(IDS, amount)
        assert not any(1 in row["objects"]["iscrowd"] or not row["objects"]["area"] for row in subset.rows)
        more = draw_split(varied, SplitSpec("shot", amount + 1, seed))
        kept = {(i, k) for i, ks in zip(subset.manifest["image_ids"], subset.manifest["kept"]) for k in ks}
        assert kept < {(i, k) for i, ks in zip(more["image_ids"], more["kept"]) for k in ks}


def test_every_instance_is_a_shot_about_equally_often():
    dataset = dataset_of([[2, 2, 2, 2], [2], [4], [4], [9], [9]])
    hits = np.zeros(5)
    for seed in range(400):
        manifest = draw_split(dataset, SplitSpec("shot", 1, seed))
        for image_id, kept in zip(manifest["image_ids"], manifest["kept"]):
            if image_id >= 999:
                hits[kept[0] if image_id == 1000 else 4] += 1
    assert hits.sum() == 400 and np.abs(hits - 80).max() < 5 * np.sqrt(80 * 0.8)


def test_too_few_are_named(varied):
    dataset = dataset_of([[2, 2], [4], [9]])
    for kind, there in (
        ("shot", "has 1 instances"),
        ("instances", "has 1 instances"),
        ("images", "is in 1 images"),
    ):
        with pytest.raises(DataError, match=f"'class {2 if kind == 'images' else 4}' {there}, 2 were asked for"):
            draw_split(dataset, SplitSpec(kind, 2))
        fewer = draw_split(dataset, SplitSpec(kind, 2, allow_fewer=True))
        assert fewer["counts"] == {"images": 3, "instances": 4}
    with pytest.raises(DataError, match="no classes"):
        draw_split(dataset_of([[], []], categories=()), SplitSpec("shot", 1))
    with pytest.raises(DataError, match="no images"):
        draw_split(dataset_of([]), SplitSpec("percent", 10))


def distance(dataset, image_ids):
    """Between the shares of the classes in a subset and in the whole (sum of absolute differences)."""
    whole, part = (np.array(list(instances(dataset, ids).values()), float) for ids in (None, image_ids))
    return np.abs(part / max(1, part.sum()) - whole / whole.sum()).sum()


def test_stratified_keeps_the_shares_of_the_classes():
    rng = np.random.default_rng(1)
    classes = tuple(range(1, 9))
    weights = np.array([0.4, 0.2, 0.15, 0.1, 0.06, 0.04, 0.03, 0.02])
    images = [rng.choice(classes, size=rng.integers(0, 7), p=weights).tolist() for _ in range(400)]
    dataset = dataset_of(images, categories=classes)
    errors = {True: [], False: []}
    for seed, stratified in itertools.product(range(8), (True, False)):
        manifests = [draw_split(dataset, SplitSpec("percent", p, seed, stratified)) for p in (5, 10, 20)]
        assert [len(m["image_ids"]) for m in manifests] == [20, 40, 80]
        for smaller, larger in itertools.pairwise(manifests):
            assert set(smaller["image_ids"]) < set(larger["image_ids"])
        errors[stratified].append([distance(dataset, m["image_ids"]) for m in manifests])
        if stratified:
            for manifest, share in zip(manifests, (0.05, 0.1, 0.2)):
                assert min(entry["instances"] for entry in manifest["per_class"]) >= 1, "no class is lost"
                total = sum(map(len, images))
                assert abs(manifest["counts"]["instances"] - share * total) < 0.1 * share * total + 6
    assert (np.mean(errors[True], axis=0) < np.mean(errors[False], axis=0) / 3).all()
    assert len({tuple(draw_split(dataset, SplitSpec("percent", 5, s, True))["image_ids"]) for s in range(8)}) == 8


def test_stratified_is_the_rule_that_its_docstring_states(varied):
    """Spelled out in sets and sums: neediest class, its first 8 images that are left, smallest chi-square."""
    held = []
    for row in varied.rows:
        classes = [c for c, crowd in zip(row["objects"]["category_id"], row["objects"]["iscrowd"]) if not crowd]
        held.append({k: classes.count(k) for k in classes} or {"empty": 1})
    keys = [*IDS, "empty"]
    totals = {k: sum(h.get(k, 0) for h in held) for k in keys}
    for seed in range(3):
        left, chosen = np.random.default_rng(seed).permutation(60).tolist(), []
        while len(chosen) < 30:
            taken = {k: sum(held[i].get(k, 0) for i in chosen) for k in keys}
            neediest = min((k for k in keys if any(k in held[i] for i in left)), key=lambda k: taken[k] / totals[k])
            share = (len(chosen) + 1) / 60

            def error(i, taken=taken, share=share):
                return sum((taken[k] + held[i].get(k, 0) - totals[k] * share) ** 2 / totals[k] for k in keys)

            best = min([i for i in left if neediest in held[i]][:8], key=error)
            left.remove(best)
            chosen.append(best)
        manifest = draw_split(varied, SplitSpec("percent", 50, seed, True))
        assert manifest["image_ids"] == [varied[i]["image_id"] for i in sorted(chosen)]


def test_stratified_can_take_everything(varied):
    manifest = draw_split(varied, SplitSpec("percent", 100, 0, True))
    assert len(manifest["image_ids"]) == 60


@pytest.mark.parametrize("name", ["1@20", "1@20strat", "2images", "2instances", "2shot"])
def test_written_and_applied(varied, tmp_path, name):
    manifest = draw_split(varied, parse_split(name))
    write_manifest(manifest, tmp_path / "split.json")
    again = take_split(varied, str(tmp_path / "split.json"))
    drawn = take_split(varied, name)
    assert again.rows == drawn.rows and again.manifest == drawn.manifest == manifest
    assert [row["image_id"] for row in again.rows] == manifest["image_ids"] and len(again) < len(varied)
    lazy = InstanceDataset(LazyRows(varied.rows.__getitem__, varied.image_id, range(60)), varied.categories)
    assert list(take_split(lazy, str(tmp_path / "split.json")).rows) == again.rows
    assert manifest["source"]["name"] == "data.json", "no folders of the machine"
    shuffled = varied.subset(np.random.default_rng(0).permutation(60).tolist())
    assert take_split(shuffled, str(tmp_path / "split.json")).rows == again.rows, "whatever the order of the source"


def changed(dataset, change):
    rows = json.loads(json.dumps(dataset.rows))
    change(rows)
    return InstanceDataset(rows, dataset.categories, "other.json")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda rows: rows.pop(), "drawn from 60 images, other.json has 59"),
        (lambda rows: rows[0].update(image_id=-5), r"it lacks 1 of the chosen ones, such as 1000"),
        (lambda rows: rows[1]["objects"]["category_id"].__setitem__(0, 2), "annotations or image ids of other.json"),
        (lambda rows: rows[1]["objects"]["segmentation"][0][0].__setitem__(0, 4), "sha256 .*, the manifest says"),
        (lambda rows: rows[1]["objects"]["iscrowd"].__setitem__(0, 1), "annotations or image ids"),
    ],
)
def test_another_source_is_refused(varied, tmp_path, change, reason):
    manifest = draw_split(varied, SplitSpec("percent", 100))
    assert varied[1]["objects"]["category_id"][0] != 2
    with pytest.raises(DataError, match=reason) as caught:
        apply_manifest(changed(varied, change), manifest, "few.json")
    assert str(caught.value).startswith("few.json") and "uplvp data split" in str(caught.value)
    apply_manifest(changed(varied, lambda rows: rows.reverse()), manifest)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m["image_ids"].pop(), "are not those of its hash"),
        (lambda m: m["kept"][0].append(7), "are not those of its hash"),
        (lambda m: m["kept"][0].append(-7), "are not those of its hash"),
        (lambda m: m.update(schema_version=9), "schema version 9"),
        (lambda m: m.pop("hash"), "has no 'hash'"),
        (lambda m: m.update(image_ids=[[1]]), "are not those of its hash"),
        (lambda m: m.update(source={}), "has no 'name'"),
    ],
)
def test_manifests_that_were_changed_are_refused(varied, tmp_path, change, reason):
    manifest = draw_split(varied, SplitSpec("shot", 1))
    change(manifest)
    write_manifest(manifest, tmp_path / "few.json")
    with pytest.raises(DataError, match=reason) as caught:
        read_manifest(tmp_path / "few.json")
    assert str(tmp_path / "few.json") in str(caught.value)


def test_digest_takes_whole_numbers_and_floats_for_the_same(varied):
    row = next(row for row in varied.rows if row["objects"]["category_id"])
    floats = json.loads(json.dumps(row))
    floats["objects"]["segmentation"][0] = [[float(v) for v in part] for part in row["objects"]["segmentation"][0]]
    assert row_digest(floats) == row_digest(row)
    empty = Row(image="", image_id=1, file_name="", width=1, height=1, objects=empty_objects())
    assert row_digest(empty) != row_digest({**empty, "image_id": "1"})


def test_a_run_keeps_its_split(varied, tmp_path):
    first, second = (draw_split(varied, parse_split(name)) for name in ("1@20", "2@20"))
    record_manifest(None, tmp_path)
    assert not list(tmp_path.iterdir())
    record_manifest(first, tmp_path)
    record_manifest(first, tmp_path)
    assert read_manifest(tmp_path / "split.json") == first
    with pytest.raises(DataError, match=r"split\.json: this run was started on another split"):
        record_manifest(second, tmp_path)


@pytest.mark.slow
def test_another_process_draws_the_same(tmp_path):
    script = """
import sys
sys.path[:0] = sys.argv[1:]
from test_manifest import dataset_of
from uplvp_hf.data.manifest import draw_split
from uplvp_hf.data.splits import parse_split
data = dataset_of([[2, 4], [9], [4, 4], [2], [9, 2]] * 8)
print([draw_split(data, parse_split(name))["hash"] for name in ("1@20", "1@20strat", "2images", "2shot")])
"""
    seed = "1" if os.environ.get("PYTHONHASHSEED") == "2" else "2"  # another order of sets and hashes
    folder = Path(__file__).parent
    done = processes.anew(script, str(folder), str(folder.parent), environment={"PYTHONHASHSEED": seed})
    data = dataset_of([[2, 4], [9], [4, 4], [2], [9, 2]] * 8)
    here = [draw_split(data, parse_split(name))["hash"] for name in ("1@20", "1@20strat", "2images", "2shot")]
    assert done.stdout == f"{here}\n" and len(set(here)) == 4, done.stderr
