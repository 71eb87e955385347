"""Masks named after annotated examples."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from labeling_helpers import FixedEncoder, image_folder, tiny_clip, tiny_encoder, tiny_siglip
from PIL import Image

from uplvp_hf.data import load_dataset_rows
from uplvp_hf.data.dataset import InstanceDataset
from uplvp_hf.data.synthetic import CLASSES, write_scenes
from uplvp_hf.demo.pipeline import synthetic_clip_path
from uplvp_hf.labeling import Proposals, label_images, load_clip
from uplvp_hf.labeling.labelers.baselines import CenterBoxLabeler
from uplvp_hf.labeling.naming.examples import (
    ExamplesNamer,
    ground_masks,
    read_examples,
    resolve_overlaps,
    shared_images,
)
from uplvp_hf.labeling.naming.mask_features import MaskFeatures
from uplvp_hf.labeling.naming.prototypes import Prototypes
from uplvp_hf.models.errors import UserError
from uplvp_hf.models.masks import encode_masks


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    return [load_dataset_rows(write_scenes(folder / str(seed), 40, seed)) for seed in (0, 1)]


@pytest.fixture(scope="module")
def clip():
    return load_clip(synthetic_clip_path())


def one_example_a_class(dataset, seed, names=None):
    """Rows with one object of each class; `names` renames the categories."""
    rng, rows, done = np.random.default_rng(seed), [], set()
    for index in rng.permutation(len(dataset)):
        objects = dataset[index]["objects"]
        for k in rng.permutation(len(objects["category_id"])):
            if objects["category_id"][k] not in done:
                done.add(objects["category_id"][k])
                kept = {key: [values[k]] for key, values in objects.items()}
                rows.append({**dataset[index], "objects": kept})
    categories = dataset.categories if names is None else [
        {"id": category["id"], "name": name} for category, name in zip(dataset.categories, names)
    ]  # fmt: skip
    return InstanceDataset(rows, categories, "few")


def true_masks(dataset, count):
    images, proposals, names = [], [], []
    for index in range(count):
        objects = dataset[index]["objects"]
        masks = np.stack([dataset.mask(index, k) for k in range(len(objects["category_id"]))])
        images.append(dataset.load_image(index))
        proposals.append(Proposals(masks, np.ones(len(masks), np.float32)))
        names.append([dataset.id2label[dataset.category_ids.index(c)] for c in objects["category_id"]])
    return images, proposals, names


def share_right(namer, images, proposals, names):
    named = namer(images, proposals)
    pairs = [(namer.names[a] if a >= 0 else None, b) for p, known in zip(named, names) for a, b in zip(p.labels, known)]
    return np.mean([a == b for a, b in pairs])


def test_one_example_a_class_names_true_masks_of_scenes(scenes, clip):
    truth = true_masks(scenes[1], 40)
    right = [
        share_right(ExamplesNamer(clip, one_example_a_class(scenes[0], seed), nms=None), *truth) for seed in (0, 1, 2)
    ]
    assert np.mean(right) >= 0.93


def test_examples_with_wrong_names_name_wrongly(scenes, clip):
    names = [*CLASSES[1:], CLASSES[0]]
    by_id = {category["id"]: category["name"] for category in scenes[0].categories}
    turned = [names[CLASSES.index(by_id[category["id"]])] for category in scenes[0].categories]
    namer = ExamplesNamer(clip, one_example_a_class(scenes[0], 0, turned), nms=None)
    assert share_right(namer, *true_masks(scenes[1], 20)) <= 0.05


def grid_example(tmp_path, boxes, size=(64, 64), name="a.png", crowd=()):
    """A row with one rectangle for each (category, x1, y1, x2, y2); the image has one color in each."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (*size, 3), dtype=np.uint8)
    masks = np.zeros((len(boxes), *size), dtype=bool)
    for k, (category, x1, y1, x2, y2) in enumerate(boxes):
        masks[k, y1:y2, x1:x2] = True
        pixels[masks[k]] = (30 * category, 200, 255 - 40 * category)
    Image.fromarray(pixels).save(tmp_path / name)
    objects = {
        "segmentation": encode_masks(masks) if boxes else [],
        "category_id": [box[0] for box in boxes],
        "bbox": [[x1, y1, x2 - x1, y2 - y1] for _, x1, y1, x2, y2 in boxes],
        "area": [int(mask.sum()) for mask in masks],
        "iscrowd": [int(k in crowd) for k in range(len(boxes))],
        "score": [1.0] * len(boxes),
    }
    row = {"image": str(tmp_path / name), "image_id": name, "file_name": name}
    return row | {"width": size[1], "height": size[0], "objects": objects}


CATEGORIES = [{"id": 1, "name": "bear"}, {"id": 2, "name": "deer"}, {"id": 5, "name": "otter"}]


def test_classes_without_a_usable_object_are_left_out_and_said(tmp_path):
    rows = [grid_example(tmp_path, [(1, 2, 2, 20, 20), (5, 30, 30, 60, 60)], crowd=(1,))]
    examples = read_examples(InstanceDataset(rows, CATEGORIES, "few.json"))
    assert examples.names == ["bear"]
    assert [note for note in examples.notes if "'deer' has no example (no object of it)" in note]
    assert [note for note in examples.notes if "'otter' has no example (only crowd regions of it)" in note]
    assert "examples a class: bear 1" in ExamplesNamer(tiny_encoder(), examples).notes


def test_an_example_that_covers_no_pixel_is_said(tmp_path):
    row = grid_example(tmp_path, [(1, 2, 2, 20, 20), (1, 30, 30, 60, 60)])
    row["objects"]["segmentation"][1] = encode_masks(np.zeros((1, 64, 64), dtype=bool))[0]
    namer = ExamplesNamer(tiny_encoder(), InstanceDataset([row], CATEGORIES, "few"))
    assert "an example cannot be used: a.png, object 1 covers no pixel" in namer.notes
    assert "examples a class: bear 1" in namer.notes


@pytest.mark.parametrize("view", ["crop", "image"])
def test_an_example_of_one_pixel_is_an_example(tmp_path, view):
    row = grid_example(tmp_path, [(1, 33, 41, 34, 42), (2, 2, 2, 20, 20)])
    namer = ExamplesNamer(tiny_encoder(), InstanceDataset([row], CATEGORIES, "few"), view=view, image_size=64)
    assert "examples a class: bear 1, deer 1" in namer.notes
    assert torch.allclose(namer.prototypes.vectors.norm(dim=1), torch.ones(2), atol=1e-5)


@pytest.mark.parametrize(
    ("wanted", "why"), [("deer", "no object of it"), ("otter", "only crowd regions"), ("cat", "no")]
)
def test_a_wanted_class_without_an_example_is_an_error(tmp_path, wanted, why):
    rows = [grid_example(tmp_path, [(1, 2, 2, 20, 20), (5, 30, 30, 60, 60)], crowd=(1,))]
    with pytest.raises(UserError, match=f"few.json: class '{wanted}' has no example \\({why}"):
        ExamplesNamer(tiny_encoder(), InstanceDataset(rows, CATEGORIES, "few.json"), classes=["bear", wanted])


def test_no_example_at_all_is_an_error(tmp_path):
    rows = [grid_example(tmp_path, [])]
    with pytest.raises(UserError, match="no class has an outlined object"):
        read_examples(InstanceDataset(rows, CATEGORIES, "few.json"))


def test_unreadable_example_images_are_said_and_an_error_where_nothing_else_is_left(tmp_path):
    good = grid_example(tmp_path, [(1, 2, 2, 20, 20)])
    bad = grid_example(tmp_path, [(1, 2, 2, 20, 20)], name="b.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    namer = ExamplesNamer(tiny_encoder(), InstanceDataset([good, bad], CATEGORIES, "few"))
    assert [note for note in namer.notes if "b.png cannot be read" in note]
    assert len(namer.prototypes.labels) == 1
    with pytest.raises(UserError, match=r"no example of class 'bear' can be read; .*b\.png"):
        ExamplesNamer(tiny_encoder(), InstanceDataset([bad], CATEGORIES, "few"))


def test_examples_among_the_images_are_counted(tmp_path):
    rows = [grid_example(tmp_path, [(1, 2, 2, 20, 20)], name=name) for name in ("a.png", "b.png")]
    few = InstanceDataset(rows[:1], CATEGORIES, "few")
    assert shared_images(few, load_dataset_rows(tmp_path)) == 1
    assert shared_images(few, InstanceDataset(rows[1:], CATEGORIES)) == 0


@pytest.mark.parametrize("network", [tiny_encoder, tiny_clip, tiny_siglip, lambda: tiny_siglip(naflex=True)])
@pytest.mark.parametrize("view", ["crop", "image"])
def test_batches_and_single_masks_have_equal_unit_vectors(network, view):
    features = MaskFeatures(network(), view=view, image_size=64, batch_size=3)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (50 + 20 * k, 80, 3), dtype=np.uint8)) for k in range(2)]
    proposals = []
    for image in images:
        masks = np.zeros((2, image.height, image.width), dtype=bool)
        masks[0, 5:30, 10:40], masks[1, 20:45, 50:75] = True, True
        proposals.append(Proposals(masks, np.ones(2, np.float32)))
    together = features(images, proposals)
    alone = torch.cat([features([i], [p.take([k])]) for i, p in zip(images, proposals) for k in range(2)])
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(together.norm(dim=1), torch.ones(4), atol=1e-5)
    assert features(images, [p.take([]) for p in proposals]).shape[0] == 0


def test_an_object_smaller_than_a_cell_takes_the_cell_that_it_lies_in():
    grid = torch.nn.functional.normalize(torch.randn(6, 4, 4, generator=torch.Generator().manual_seed(0)), dim=0)
    features = MaskFeatures(FixedEncoder(grid), view="image")
    mask = np.zeros((1, 128, 128), dtype=bool)
    mask[0, 70:73, 33:35] = True  # within the cell of row 2, column 1
    vector = features([Image.new("RGB", (128, 128))], [Proposals(mask, np.ones(1, np.float32))])
    assert torch.allclose(vector[0], grid[:, 2, 1], atol=1e-6)


def test_cells_that_lie_to_the_right_of_their_place_are_matched_to_the_mask():
    grid = torch.nn.functional.normalize(torch.randn(6, 4, 4, generator=torch.Generator().manual_seed(0)), dim=0)
    features = MaskFeatures(FixedEncoder(grid, shift=0.5), view="image", image_size=128)
    mask = np.zeros((1, 128, 128), dtype=bool)
    mask[0, 80:96, 48:64] = True  # the cell of row 2, column 1 looks at rows 80 to 111 and columns 48 to 79
    vector = features([Image.new("RGB", (128, 128))], [Proposals(mask, np.ones(1, np.float32))])
    assert torch.allclose(vector[0], grid[:, 2, 1], atol=1e-6)


def clusters(count=6, classes=3, seed=0, spread=0.3):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.nn.functional.normalize(torch.randn(classes + 1, 32, generator=generator), dim=1)
    labels = torch.arange(classes + 1).repeat_interleave(count)
    noise = spread * torch.nn.functional.normalize(torch.randn(len(labels), 32, generator=generator), dim=1)
    vectors = torch.nn.functional.normalize(centers[labels] + noise, dim=1)
    groups = torch.arange(len(labels)) % count
    known = labels < classes
    return vectors[known], labels[known], groups[known], vectors[~known], groups[~known]


def test_leaving_one_out_equals_building_without_it():
    vectors, labels, groups, *_ = clusters()
    prototypes = Prototypes(vectors, labels, groups)
    scores = prototypes.leave_one_out()
    for k in range(len(vectors)):
        others = groups != groups[k]
        for c in range(3):
            expected = (prototypes.vectors[others & (labels == c)] @ prototypes.vectors[k]).mean()
            assert scores[k, c] == pytest.approx(float(expected), abs=1e-6)


def test_examples_of_one_image_are_left_out_alone_and_a_single_one_has_no_score():
    vectors, labels, *_ = clusters(count=2, classes=2)
    keep = torch.tensor([0, 1, 2])  # two of class 0 in one image, one of class 1
    prototypes = Prototypes(vectors[keep], labels[keep], torch.tensor([0, 0, 1]))
    scores = prototypes.leave_one_out()
    assert scores[0, 0] == pytest.approx(float(prototypes.vectors[0] @ prototypes.vectors[1]), abs=1e-6)
    assert scores.isnan().tolist() == [[False, False], [False, False], [False, True]]


def test_confidences_tell_objects_from_ground_and_what_is_like_nothing_stays_unnamed():
    *known, ground, ground_groups = clusters()
    prototypes = Prototypes(*known, ground, ground_groups)
    calibration = prototypes.calibrate()
    fresh, labels, _, fresh_ground, _ = clusters(seed=0, spread=0.25)
    named, confidences = prototypes.name(fresh, calibration)
    assert named.tolist() == labels.tolist()
    assert confidences.min() > 0.5
    assert prototypes.name(fresh_ground, calibration)[1].max() < 0.5
    assert prototypes.name(fresh_ground, calibration)[0].tolist() == [-1] * len(fresh_ground)
    assert prototypes.name(fresh_ground, replace(calibration, most_ground=1.0, floor=-1.0))[0].min() >= 0
    assert prototypes.name(-fresh, calibration)[0].tolist() == [-1] * len(fresh)


def test_ground_that_shows_an_object_nobody_outlined_is_left_out():
    vectors, labels, groups, ground, ground_groups = clusters()
    alike = torch.nn.functional.normalize(vectors[labels == 0].mean(dim=0), dim=0)[None]
    rest = torch.cat([ground, alike]), torch.cat([ground_groups, groups[:1]])
    assert len(Prototypes(vectors, labels, groups, *rest).ground) == len(ground)


def test_ground_is_not_compared_with_the_examples_of_its_own_image():
    vectors, labels, groups, ground, ground_groups = clusters()
    prototypes = Prototypes(vectors, labels, groups, ground, ground_groups)
    assert len(prototypes.ground) == len(ground)
    for k, c in ((0, 0), (3, 2)):
        others = prototypes.vectors[(labels == c) & (groups != ground_groups[k])]
        expected = float((others @ prototypes.ground[k]).mean())
        assert prototypes._ground_to_classes()[k, c] == pytest.approx(expected, abs=1e-6)


def test_order_of_examples_and_of_classes_does_not_matter():
    vectors, labels, groups, ground, ground_groups = clusters()
    order = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(1))
    renamed = torch.tensor([2, 0, 1])
    first = Prototypes(vectors, labels, groups, ground, ground_groups)
    second = Prototypes(vectors[order], renamed[labels[order]], groups[order], ground, ground_groups)
    query = clusters(seed=3)[0]
    assert torch.allclose(first.similarities(query)[0], second.similarities(query)[0][:, renamed], atol=1e-6)
    assert first.calibrate().temperature == pytest.approx(second.calibrate().temperature)


def test_one_class_needs_no_other_class():
    vectors, labels, groups, ground, ground_groups = clusters(classes=1)
    prototypes = Prototypes(vectors, labels, groups, ground, ground_groups)
    calibration = prototypes.calibrate()
    assert prototypes.name(vectors, calibration)[1].min() > 0.5
    assert prototypes.name(ground, calibration)[1].max() < 0.5
    assert Prototypes(vectors, labels, groups).similarities(vectors)[0].min() > 0.5  # nor ground


def test_neighbors_average_the_best_alone():
    vectors, labels, groups, *_ = clusters()
    prototypes = Prototypes(vectors, labels, groups, neighbors=2)
    query = clusters(seed=5)[0]
    cosines = torch.nn.functional.normalize(query - prototypes.center, dim=1) @ prototypes.vectors.T
    expected = cosines[:, labels == 1].sort(dim=1, descending=True).values[:, :2].mean(dim=1)
    assert torch.allclose(prototypes.similarities(query)[0][:, 1], expected, atol=1e-6)


def test_ground_has_the_objects_shapes_and_touches_none_of_them():
    masks = np.zeros((2, 64, 96), dtype=bool)
    masks[0, 5:25, 5:35], masks[1, 40:60, 60:90] = True, True
    covered = masks.any(axis=0)
    found = ground_masks(masks, covered, 5, seed=0)
    assert len(found) == 5
    assert not (found & covered).any()
    assert (found.sum(axis=(1, 2)) >= 0.9 * 20 * 30).all()
    assert np.array_equal(found, ground_masks(masks, covered, 5, seed=0))
    assert len(ground_masks(masks, np.ones_like(covered), 5, seed=0)) == 0


def test_overlaps_are_resolved_by_score_times_confidence():
    masks = np.zeros((4, 40, 40), dtype=bool)
    masks[0, :20, :20], masks[1, :20, 2:22], masks[2, 5:10, 5:10], masks[3, 30:, 30:] = True, True, True, True
    proposals = Proposals(
        masks,
        np.array([0.5, 0.9, 0.9, 0.1], np.float32),
        np.array([0, 1, 1, 0]),
        np.array([1, 0.9, 0.5, 1], np.float32),
    )
    kept = resolve_overlaps(proposals, iou=0.5)
    assert [int(np.flatnonzero((masks == mask).all(axis=(1, 2)))[0]) for mask in kept.masks] == [1, 3]
    other = Proposals(masks, proposals.scores, np.array([0, 1, 0, 0]), proposals.confidences)
    assert len(resolve_overlaps(other, iou=0.5)) == 3  # within a mask of another class is no repetition


def run_over(folder, few, output, limit=None):
    namer = ExamplesNamer(tiny_encoder(), few, image_size=64)
    label_images(
        load_dataset_rows(folder),
        CenterBoxLabeler(),
        namer,
        output,
        batch_size=3,
        progress=False,
        limit=limit,
        shard_size=3,
    )
    rows = [line for file in sorted(output.glob("rows-*.jsonl")) for line in file.read_text().splitlines()]
    return rows, json.loads((output / "header.json").read_text())


def test_runs_are_resumed_to_the_byte_and_other_examples_refused(tmp_path):
    (tmp_path / "few").mkdir()
    few = InstanceDataset([grid_example(tmp_path / "few", [(1, 2, 2, 30, 30), (2, 34, 34, 60, 60)])], CATEGORIES, "few")
    image_folder(tmp_path / "images", 9)
    whole, header = run_over(tmp_path / "images", few, tmp_path / "whole")
    run_over(tmp_path / "images", few, tmp_path / "parts", limit=3)
    parts, _ = run_over(tmp_path / "images", few, tmp_path / "parts")
    assert parts == whole
    assert len(whole) == 9
    assert header["vocabulary"] == ["bear", "deer"]
    assert header["settings"]["namer"]["classes"] == ["bear", "deer"]
    other = InstanceDataset(
        [grid_example(tmp_path / "few", [(1, 2, 2, 30, 30), (2, 34, 34, 50, 60)])], CATEGORIES, "few"
    )
    with pytest.raises(UserError, match=r"settings\.namer\.examples"):
        run_over(tmp_path / "images", other, tmp_path / "parts")
