"""Vectors of masks in a store: what labelers and namers keep, what a finished store is given later."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from labeling_helpers import FixedEncoder, blob_image, image_folder, tiny_clip, tiny_encoder

from uplvp_hf.commands import label
from uplvp_hf.data import read_store
from uplvp_hf.data.store_features import feature_file
from uplvp_hf.labeling.cutting.proposals import Proposals
from uplvp_hf.labeling.features import MOST, CropDescriber, MapDescriber, aligned, describe_store, pooled, shortened
from uplvp_hf.labeling.labelers.foreground import ForegroundLabeler
from uplvp_hf.labeling.labelers.maskcut import NcutLabeler
from uplvp_hf.labeling.labelers.saliency import SaliencyLabeler
from uplvp_hf.labeling.naming.agnostic import AgnosticNamer
from uplvp_hf.labeling.naming.zero_shot import ClipZeroShotNamer
from uplvp_hf.labeling.pipeline import label_images
from uplvp_hf.labeling.protocol import Labeler
from uplvp_hf.models.errors import UserError

QUIET = {"progress": False, "shard_size": 3, "batch_size": 2}


def foreground():
    return ForegroundLabeler(tiny_encoder(), norm_sizes=(64,), component_sizes=(64,), grid=48, min_area=0.001)


def vectors_of(store, folder=None):
    rows = read_store(store, features=store if folder is None else folder).rows
    return {row["image_id"]: np.array(row["objects"]["features"]) for row in rows}


class Bands(Labeler):
    """Left and right half of every image; nothing is seen of the masks."""

    name, encoder_name = "bands", "none"

    def __call__(self, images, rows=None):
        found = []
        for image in images:
            masks = np.zeros((2, image.height, image.width), bool)
            masks[0, :, : image.width // 2] = masks[1, :, image.width // 2 :] = True
            found.append(Proposals(masks, np.ones(2, np.float32)))
        return found


def test_a_pooled_vector_is_the_mean_of_the_cells_under_the_mask():
    features = torch.randn(5, 4, 6)
    masks = np.zeros((2, 64, 96), bool)  # cells of 16 x 16 pixels
    masks[0, 16:48, 32:64] = True
    masks[1, 0:16, 8:32] = True  # half of the first cell, all of the second
    found = pooled(Proposals(masks, np.ones(2, np.float32)), features).features
    want = torch.stack([features[:, 1:3, 2:4].mean((1, 2)), (0.5 * features[:, 0, 0] + features[:, 0, 1]) / 1.5])
    np.testing.assert_allclose(found, torch.nn.functional.normalize(want, dim=1), atol=1e-3)
    assert found.dtype == np.float16
    shifted = aligned(masks, (4, 6), 0.5)  # cells lie half a cell to the right and below
    assert (shifted[0, 8:40, 24:56]).all() and shifted[0].sum() == masks[0].sum()


def test_vectors_are_at_most_two_kilobytes_and_keep_their_cosines():
    vectors = torch.randn(40, 3000) + 1.5 * torch.randn(3000)
    short = shortened(vectors)
    assert short.nbytes == 40 * 2 * MOST <= 40 * 2048
    unit = torch.nn.functional.normalize(vectors, dim=1)
    assert np.abs(short.astype(np.float32) @ short.astype(np.float32).T - (unit @ unit.T).numpy()).max() < 0.15
    assert np.array_equal(short, shortened(vectors))
    assert shortened(torch.randn(2, 7)).shape == (2, 7)


@pytest.mark.parametrize("kind", [ForegroundLabeler, SaliencyLabeler, NcutLabeler])
def test_backbone_labelers_keep_their_map_under_the_masks(kind):
    feature = torch.randn(6, 8, 12).abs() * 0.1
    feature[0, 2:6, 3:7] += 3.0  # one object, which points its own way
    options = {
        ForegroundLabeler: {"norm_sizes": (96,), "component_sizes": (96,), "refine": False},
        SaliencyLabeler: {"min_score": 0.0, "min_center": 0.0, "max_width": 1.0, "when_empty": "best"},
        NcutLabeler: {},
    }
    found = kind(FixedEncoder(feature), **options[kind])([blob_image(number) for number in range(2)])
    assert any(len(p) for p in found)
    for p in found:
        if len(p):
            want = pooled(replace(p, features=None), feature).features.astype(np.float32)
            cosines = (want * p.features.astype(np.float32)).sum(1)
            # Saliency averages the cells of its mask on the grid, the others the pixels of the enlarged one.
            assert cosines.min() > (0.95 if kind is SaliencyLabeler else 0.999)


def test_labeling_keeps_what_the_namer_saw_of_the_masks_it_keeps(tmp_path):
    """CLIP's embeddings of the crops, in the order of the masks in the rows, though some masks were dropped."""
    dataset, describe = image_folder(tmp_path / "images", 5), CropDescriber(tiny_clip())
    namer = ClipZeroShotNamer(describe.clip, ["bear", "deer"], templates="bare")
    images = [dataset.load_image(k) for k in range(5)]
    proposals = Bands()(images)
    confidences = np.concatenate([p.confidences for p in namer(images, proposals)])
    floor = float(np.median(confidences))
    label_images(dataset, Bands(), namer, tmp_path / "labels", min_confidence=floor, **QUIET)
    rows = read_store(tmp_path / "labels", features=tmp_path / "labels").rows
    assert 0 < sum(len(row["objects"]["features"]) for row in rows) < 10
    for row in rows:
        k = next(k for k in range(5) if dataset.image_id(k) == row["image_id"])
        (every,) = describe(images[k : k + 1], proposals[k : k + 1])
        for box, vector in zip(row["objects"]["bbox"], row["objects"]["features"], strict=True):
            cosines = every.astype(np.float32) @ vector.astype(np.float32)
            assert cosines.argmax() == (box[0] > 0) and cosines.max() > 0.999
    about = json.loads((tmp_path / "labels" / "features.json").read_text())
    assert about == describe.about and about["network"] == "tiny"


def test_labels_are_the_same_without_features_and_the_store_gets_them_later(tmp_path):
    """By the command's function: the vectors that labeling would have kept, and only those shards that lack them."""
    dataset, clip = image_folder(tmp_path / "images", 7), tiny_clip()
    namer = ClipZeroShotNamer(clip, ["bear", "deer"], templates="bare")
    for name, kept in (("with", True), ("without", False)):
        label_images(dataset, foreground(), namer, tmp_path / name, features=kept, **QUIET)
    one, other = tmp_path / "with", tmp_path / "without"
    assert not list(other.glob("features*"))
    for file in one.glob("rows-*"):
        assert file.read_bytes() == (other / file.name).read_bytes()
    before = vectors_of(one)
    shards = len(list(other.glob("rows-*")))
    result = describe_store(other, CropDescriber(clip), progress=False)
    assert result["shards"] == shards and result["masks"] == sum(map(len, before.values()))
    after = vectors_of(other)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    (other / "features-00000-00001.npy").unlink()
    assert describe_store(other, CropDescriber(clip), progress=False)["shards"] == 1
    assert all(np.array_equal(before[name], vectors_of(other)[name]) for name in before)
    with pytest.raises(UserError, match="features of another kind"):
        describe_store(other, MapDescriber(tiny_encoder()), progress=False)
    folder = tmp_path / "elsewhere"
    describe_store(other, MapDescriber(tiny_encoder()), folder, progress=False)
    assert {len(row.T) for row in vectors_of(other, folder).values() if len(row)} == {16}


def test_masks_that_nothing_looked_at_have_no_file(tmp_path):
    dataset = image_folder(tmp_path / "images", 3)
    label_images(dataset, Bands(), AgnosticNamer(), tmp_path / "labels", **QUIET)
    assert len(read_store(tmp_path / "labels").rows) == 3
    assert not list((tmp_path / "labels").glob("features*"))


def test_a_resumed_run_has_the_vectors_of_an_undisturbed_one(tmp_path):
    dataset = image_folder(tmp_path / "images", 7)
    label_images(dataset, foreground(), None, tmp_path / "whole", **QUIET)
    label_images(dataset, foreground(), None, tmp_path / "parts", limit=4, **QUIET)
    label_images(dataset, foreground(), None, tmp_path / "parts", **QUIET)
    whole, parts = vectors_of(tmp_path / "whole"), vectors_of(tmp_path / "parts")
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)
    file = feature_file(tmp_path / "whole", "rows-00000-00000.jsonl")
    assert np.load(file).dtype == np.float16


def test_taking_proposals_takes_their_vectors():
    proposals = Proposals(np.ones((3, 2, 2), bool), np.arange(3, dtype=np.float32))
    proposals = replace(proposals, features=np.arange(6, dtype=np.float16).reshape(3, 2))
    assert proposals.take([2, 0]).features.tolist() == [[4, 5], [0, 1]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--features"], "--clip or --backbone, one of the two"),
        (["--features", "--clip", "a", "--backbone", "b"], "one of the two"),
        (["--features", "--backbone", "timm:x", "networks.dtype=bf16"], "networks.dtype has no effect"),
        (["--features", "--clip", "a", "--limit", "3"], "--limit has no effect"),
        (["--clip", "a"], "has no effect|--output is needed"),
        (["--features", "--clip", "a", "--output", "o"], "labeling keeps features by itself"),
    ],
)
def test_wrong_words_of_the_command(tmp_path, words, message):
    label_images(image_folder(tmp_path / "images", 2), Bands(), None, tmp_path / "labels", **QUIET)
    with pytest.raises(UserError, match=message):
        label.run(label.parse([str(tmp_path / "labels"), *words]))
