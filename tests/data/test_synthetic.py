"""Scenes are reproducible, their masks agree with their pixels, and the shipped CLIP reads them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from scipy import ndimage
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from uplvp_hf.data.synthetic import (
    BACKGROUND,
    CLASSES,
    MIN_VISIBLE_AREA,
    make_object_crop,
    make_scene,
    write_scenes,
)
from uplvp_hf.models.errors import UserError

ASSET = Path(__file__).parents[2] / "src" / "uplvp_hf" / "assets" / "synthetic_clip"
SEEDS = range(40)


def hues(image: Image.Image) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hue in degrees, saturation and value in [0, 1], each (H, W), by Pillow's conversion."""
    hsv = np.asarray(image.convert("HSV"), float)
    return hsv[..., 0] * 360 / 255, hsv[..., 1] / 255, hsv[..., 2] / 255


def test_equal_seeds_give_equal_scenes_and_different_seeds_do_not():
    first, again, other = make_scene(7), make_scene(7), make_scene(8)
    assert first["image"].tobytes() == again["image"].tobytes()
    assert first["labels"] == again["labels"] and first["caption"] == again["caption"]
    np.testing.assert_array_equal(first["masks"], again["masks"])
    assert first["image"].tobytes() != other["image"].tobytes()
    assert make_object_crop(7)["image"].tobytes() == make_object_crop(7)["image"].tobytes()


def test_scenes_do_not_depend_on_the_global_generator():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    first = make_scene(3)["image"].tobytes()
    np.testing.assert_array_equal(before, np.random.get_state()[1])
    np.random.seed(1)
    assert make_scene(3)["image"].tobytes() == first


@pytest.mark.parametrize("size", [96, 128, 200])
def test_masks_are_disjoint_and_large_enough(size):
    for seed in SEEDS:
        scene = make_scene(seed, size=size)
        masks = scene["masks"]
        assert scene["image"].size == (size, size) and scene["image"].mode == "RGB"
        assert masks.shape == (len(scene["labels"]), size, size) and masks.dtype == bool
        assert 1 <= len(masks) <= 5
        assert masks.sum(axis=0).max() <= 1
        assert masks.sum(axis=(1, 2)).min() >= MIN_VISIBLE_AREA


def test_colored_light_changes_colors_alone():
    """The same scene under a light whose color differs from seed to seed; one light for the whole image."""
    ratios = []
    for seed in range(4):
        plain, cast = make_scene(seed), make_scene(seed, cast=0.5)
        assert np.array_equal(plain["masks"], cast["masks"]) and plain["labels"] == cast["labels"]
        white, lit = (np.asarray(scene["image"], float) for scene in (plain, cast))
        inside = (white > 60) & (lit > 5) & (lit < 250) & (white < 250)
        ratio = [lit[..., k][inside[..., k]] / white[..., k][inside[..., k]] for k in range(3)]
        assert max(one.std() for one in ratio) < 0.12  # the grain is not lit
        ratios.append([one.mean() for one in ratio])
    assert 0.45 < np.min(ratios) < 0.8 and 1.2 < np.max(ratios) < 1.55
    assert np.ptp(ratios, axis=0).min() > 0.1
    with pytest.raises(UserError, match="cast must be from 0 to below 1"):
        make_scene(0, cast=1.0)


def test_crowded_scenes_hold_touching_objects_of_one_class():
    """Most objects touch one of their class, in plain scenes few; masks stay disjoint and large enough."""
    shares = {}
    for crowded in (False, True):
        touching = []
        for seed in SEEDS:
            scene = make_scene(seed, min_objects=2, max_objects=8, crowded=crowded)
            masks, labels = scene["masks"], scene["labels"]
            assert len(masks) >= 2 and masks.sum(axis=0).max() <= 1
            assert masks.sum(axis=(1, 2)).min() >= MIN_VISIBLE_AREA
            for k, mask in enumerate(masks):
                near = ndimage.binary_dilation(mask, iterations=2)
                touching.append(
                    any((near & masks[j]).any() for j in range(len(masks)) if j != k and labels[j] == labels[k])
                )
        shares[crowded] = np.mean(touching)
    assert shares[True] > 0.75 and shares[False] < 0.25


def test_masks_match_pixels():
    """Pixels under a plain object have its hue; vivid pixels of a class hue lie under some mask."""
    expected = {"red": 0, "orange": 30, "yellow": 56, "green": 122}
    expected |= {"teal": 177, "blue": 222, "purple": 270, "pink": 324}
    inside, outside = [], []
    for seed in SEEDS:
        scene = make_scene(seed)
        hue, saturation, value = hues(scene["image"])
        near = {name: np.abs((hue - center + 180) % 360 - 180) < 20 for name, center in expected.items()}
        for mask, label in zip(scene["masks"], scene["labels"]):
            if "striped" not in CLASSES[label]:
                inside.append(near[CLASSES[label].split()[0]][mask].mean())
        vivid = (saturation > 0.6) & (value > 0.5) & np.logical_or.reduce(list(near.values()))
        outside.append((vivid & ~scene["masks"].any(axis=0)).sum() / max(1, vivid.sum()))
    assert len(inside) > len(SEEDS) and np.quantile(inside, 0.1) > 0.9
    assert np.mean(outside) < 0.05


def test_objects_hide_one_another_in_some_scenes():
    """Modal masks: most discs fill pi / 4 of the box of their pixels, some that are partly hidden clearly less."""
    fills = []
    for seed in range(150):
        scene = make_scene(seed)
        for mask, label in zip(scene["masks"], scene["labels"]):
            if CLASSES[label] == "orange disc":
                rows, columns = np.nonzero(mask)
                fills.append(len(rows) / (np.ptp(rows) + 1) / (np.ptp(columns) + 1))
    assert np.median(fills) > 0.7
    assert min(fills) < 0.6


@pytest.mark.parametrize("low, high", [(0, 0), (3, 3), (5, 8)])
def test_number_of_objects(low, high):
    for seed in range(10):
        scene = make_scene(seed, min_objects=low, max_objects=high)
        assert low <= len(scene["labels"]) <= high
        if not high:
            assert scene["caption"] == BACKGROUND and scene["masks"].shape == (0, 128, 128)


def test_every_class_appears():
    labels = {label for seed in SEEDS for label in make_scene(seed)["labels"]}
    assert labels == set(range(len(CLASSES)))


def test_caption_names_every_object():
    for seed in SEEDS:
        scene = make_scene(seed)
        numbers = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4, "five": 5}
        parts = [part.split(" ", 1) for part in scene["caption"].split(" and ")]
        assert sum(numbers[number] for number, _ in parts) == len(scene["labels"])
        for number, noun in parts:
            singular = noun if number in ("a", "an") else noun.removesuffix("es" if noun.endswith("crosses") else "s")
            assert scene["labels"].count(CLASSES.index(singular)) == numbers[number]


@pytest.mark.parametrize("arguments", [{"size": 47}, {"min_objects": 3, "max_objects": 2}, {"max_objects": 13}])
def test_impossible_scenes_are_refused(arguments):
    with pytest.raises(ValueError, match=r"size|min_objects"):
        make_scene(0, **arguments)


def test_crops_show_their_object_or_none():
    labels = []
    for seed in range(300):
        crop = make_object_crop(seed, size=48)
        labels.append(crop["label"])
        assert crop["image"].size == (48, 48) and crop["mask"].shape == (48, 48)
        assert crop["mask"].any() == (crop["label"] >= 0)
        assert crop["caption"] == (BACKGROUND if crop["label"] < 0 else CLASSES[crop["label"]])
    assert 0.1 < np.mean(np.array(labels) < 0) < 0.3
    assert set(labels) == set(range(-1, len(CLASSES)))


def test_folder_is_valid_coco(tmp_path):
    folder = write_scenes(tmp_path / "scenes", count=6, seed=5, size=96)
    coco = COCO(str(folder / "annotations" / "instances.json"))
    assert coco.getImgIds() == [1, 2, 3, 4, 5, 6]
    assert sorted(coco.getAnnIds()) == list(range(1, len(coco.anns) + 1))
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    assert len(list((folder / "images").iterdir())) == 6 and not list(folder.rglob("*.tmp"))
    for image in coco.loadImgs(coco.getImgIds()):
        annotations = coco.loadAnns(coco.getAnnIds(image["id"]))
        masks = [coco.annToMask(annotation).astype(bool) for annotation in annotations]
        with Image.open(folder / "images" / image["file_name"]) as opened:
            assert opened.size == (image["width"], image["height"]) == (96, 96)
        assert np.sum(masks, axis=0).max() == 1
        for mask, annotation in zip(masks, annotations):
            rows, columns = np.nonzero(mask)
            assert annotation["area"] == mask.sum()
            assert annotation["bbox"] == [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]


def test_folder_is_reproducible_and_never_overwritten(tmp_path):
    first, again = (write_scenes(tmp_path / name, count=2, seed=1) for name in ("a", "b"))
    other = write_scenes(tmp_path / "c", count=2, seed=2)
    for name in ("images/000001.png", "images/000002.png", "annotations/instances.json"):
        assert (first / name).read_bytes() == (again / name).read_bytes()
        assert (first / name).read_bytes() != (other / name).read_bytes()
    with pytest.raises(FileExistsError, match="already holds"):
        write_scenes(first, count=1, seed=1)
    with pytest.raises(ValueError, match="count"):
        write_scenes(tmp_path / "d", count=0, seed=1)


@pytest.fixture(scope="module")
def clip():
    arguments = {"local_files_only": True}
    return (
        CLIPModel.from_pretrained(ASSET, **arguments).eval(),
        AutoTokenizer.from_pretrained(ASSET, **arguments),
        CLIPImageProcessor.from_pretrained(ASSET, **arguments),
    )


def test_clip_is_small():
    assert sum(file.stat().st_size for file in ASSET.iterdir()) < 6e6
    assert sum(parameter.numel() for parameter in CLIPModel.from_pretrained(ASSET).parameters()) <= 1_000_000


def test_clip_tokenizer_matches_its_text_tower(clip):
    model, tokenizer, _ = clip
    config = model.config.text_config
    ids = tokenizer([f"A picture of a {name}" for name in (*CLASSES, BACKGROUND)], padding=True)["input_ids"]
    assert all(row[0] == tokenizer.bos_token_id == config.bos_token_id for row in ids)
    assert all(row.count(config.eos_token_id) == 1 for row in ids)
    assert tokenizer.eos_token_id == config.eos_token_id != 2
    assert tokenizer.pad_token_id == config.pad_token_id
    assert not any(tokenizer.unk_token_id in row for row in ids)
    assert len({tuple(row) for row in ids}) == len(ids)
    assert len(tokenizer) == config.vocab_size and tokenizer.model_max_length == config.max_position_embeddings
    assert tokenizer("an unheard-of thing " * 9, truncation=True)["input_ids"][-1] == config.eos_token_id


def test_clip_names_fresh_objects(clip):
    model, tokenizer, image_processor = clip
    crops = [crop for crop in map(make_object_crop, range(3_000_000_000, 3_000_000_140)) if crop["label"] >= 0][:100]
    texts = tokenizer([f"a photo of a {name}" for name in CLASSES], padding=True, return_tensors="pt")
    pixels = image_processor([crop["image"] for crop in crops], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        predictions = model(**texts, pixel_values=pixels).logits_per_image.argmax(dim=1).tolist()
    assert len(crops) == 100
    assert np.mean([p == crop["label"] for p, crop in zip(predictions, crops)]) > 0.9


def test_clip_card_reports_the_recorded_accuracy():
    record = json.loads((ASSET / "training.json").read_text())
    card = (ASSET / "README.md").read_text()
    assert record["command"] in card and (ASSET.parents[3] / record["script"]).is_file()
    assert record["accuracy"]["objects"] >= 0.97
    for value in record["accuracy"].values():
        assert f"{value:.1%}" in card
