"""Namers: crops, CLIP zero-shot, classifiers with mapped classes."""

import numpy as np
import pytest
import torch
from labeling_helpers import blob_image, tiny_clip, tiny_encoder
from PIL import Image

from uplvp_hf.labeling.cutting.proposals import Proposals
from uplvp_hf.labeling.naming.agnostic import AgnosticNamer
from uplvp_hf.labeling.naming.classifier import ClassifierNamer
from uplvp_hf.labeling.naming.crops import crop_box, mask_crops
from uplvp_hf.labeling.naming.zero_shot import ClipZeroShotNamer

CLASS_MAP = {"bear": [0, 3], "deer": [1], "otter": [5]}


def proposals_of(size, count, seed=0):
    """Random rectangles."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, *size), dtype=bool)
    for mask in masks:
        top, left = rng.integers(0, size[0] - 9), rng.integers(0, size[1] - 9)
        mask[top : top + rng.integers(4, 9), left : left + rng.integers(4, 9)] = True
    return Proposals.build(list(masks), rng.random(count), size)


def test_crop_box_stays_inside():
    assert crop_box((10, 10, 30, 20), 100, 100, 0.0) == (10, 5, 30, 25)
    assert crop_box((0, 0, 30, 20), 40, 25, 0.5) == (0, 0, 40, 25)


def test_surroundings_of_a_crop():
    image = blob_image(0)
    mask = np.zeros((64, 96), dtype=bool)
    mask[20:40, 30:50] = np.eye(20, dtype=bool)[::-1] | np.tri(20, dtype=bool)
    proposals = Proposals.build([mask], [1.0], (64, 96))
    area = crop_box((30, 20, 50, 40), 96, 64, 0.25)
    inside = mask[area[1] : area[3], area[0] : area[2]]
    pixels = np.asarray(image.crop(area))
    seen = {}
    for name in ("none", "blur", "mean"):
        (crop,) = mask_crops(image, proposals, 0.25, name, (10, 20, 30))
        seen[name] = np.asarray(crop)
        assert (seen[name][inside] == pixels[inside]).all()
    assert (seen["none"] == pixels).all()
    assert (seen["mean"][~inside] == [10, 20, 30]).all()
    outside = ~inside[:, 1:] & ~inside[:, :-1]
    rough = {name: np.abs(np.diff(crop.astype(int), axis=1))[outside].mean() for name, crop in seen.items()}
    assert rough["blur"] < 0.2 * rough["none"]


@pytest.mark.parametrize("mode", ["image", "crop"])
@pytest.mark.parametrize("others", ["ignore", "count"])
def test_classifier_namer(mode, others):
    sizes = [(96, 64), (64, 64), (96, 64), (64, 96)]
    images = [blob_image(k, *size) for k, size in enumerate(sizes)]
    proposals = [proposals_of(image.size[::-1], k, seed=k) for k, image in enumerate(images)]
    encoder = tiny_encoder()
    namer = ClassifierNamer(encoder, class_map=CLASS_MAP, mode=mode, image_size=64, others=others, batch_size=2)
    for image, before, after in zip(images, proposals, namer(images, proposals), strict=True):
        assert (after.masks == before.masks).all() and (after.scores == before.scores).all()
        assert len(after.labels) == len(after.confidences) == len(before)
        for k in range(len(after)):
            seen = image
            if mode == "crop":
                y, x = np.nonzero(after.masks[k])
                seen = image.crop(crop_box((x.min(), y.min(), x.max() + 1, y.max() + 1), *image.size, 0.1))
            longest = max(seen.size)
            size = [max(32, round(side * 64 / longest / 32) * 32) for side in (seen.height, seen.width)]
            logits = encoder.classify(encoder.pixels([seen], tuple(size)))[0].double()
            counted = logits[[0, 1, 3, 5]] if others == "ignore" else logits
            shares = logits.exp() / counted.exp().sum()
            want = [shares[0] + shares[3], shares[1], shares[5]]
            assert after.labels[k] == int(np.argmax(want))
            assert after.confidences[k] == pytest.approx(float(max(want)), abs=1e-5)


def test_a_classifier_is_mapped_by_name():
    encoder = tiny_encoder()
    encoder.id2label = dict(enumerate(["brown bear, bruin", "red deer", "tench", "polar bear", "crane", "otter"]))
    by_name = ClassifierNamer(
        encoder, class_map={"bear": ["bruin", "Polar Bear"], "deer": ["red deer"], "otter": ["otter"]}
    )
    assert by_name.settings == ClassifierNamer(encoder, class_map=CLASS_MAP).settings
    with pytest.raises(ValueError, match="'deer': tiny has no class named 'roe deer'; it has red deer"):
        ClassifierNamer(encoder, class_map={"deer": ["roe deer"]})
    encoder.num_classes = 0
    with pytest.raises(ValueError, match="tiny has no classifier head"):
        ClassifierNamer(encoder, class_map=CLASS_MAP)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mode": "mask"}, "`mode` must be one of image, crop, got `mask`"),
        ({"others": "x"}, "`others` must be one of ignore, count"),
        ({"surroundings": "x"}, "`surroundings` must be one of none, blur, mean"),
    ],
)
def test_unknown_options(options, message):
    with pytest.raises(ValueError, match=message):
        ClassifierNamer(tiny_encoder(), class_map=CLASS_MAP, **options)


def test_clip_namer_probabilities():
    clip = tiny_clip()
    namer = ClipZeroShotNamer(clip, ["bear, grizzly", "deer"])
    image = blob_image(0)
    got = namer.probabilities([image])
    pixels = clip.pixels([image], (32, 32))
    with torch.inference_mode():
        features = clip.model.get_image_features(pixel_values=pixels).pooler_output[0]
        cosine = [float(features @ v / features.norm()) for v in namer.text.vectors]
    assert len(cosine) == 3
    logits = clip.model.logit_scale.exp().item() * np.array([max(cosine[:2]), cosine[2]])
    want = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    assert got[0].tolist() == pytest.approx(want.tolist(), abs=1e-4)
    shared = ClipZeroShotNamer(clip, ["bear, grizzly", "deer"], background=["sky"]).probabilities([image])[0]
    assert shared.shape == (2,) and shared.sum() < 1
    assert (shared[0] / shared[1]).item() == pytest.approx(want[0] / want[1], rel=1e-3)
    with pytest.raises(ValueError, match="`temperature` must be above 0, got 0"):
        ClipZeroShotNamer(clip, ["bear"], temperature=0)


def test_clip_names_each_crop():
    clip = tiny_clip()
    namer = ClipZeroShotNamer(clip, ["bear", "deer"], context=0.2, surroundings="mean", batch_size=2)
    images = [blob_image(k) for k in range(3)]
    proposals = [proposals_of((64, 96), count, seed=count) for count in (3, 0, 2)]
    named = namer(images, proposals)
    assert [len(p) for p in named] == [3, 0, 2]
    gray = tuple(round(255 * value) for value in clip.image_mean)
    for image, p in zip(images, named):
        for k, box in enumerate(p.masks):
            y, x = np.nonzero(box)
            area = crop_box((x.min(), y.min(), x.max() + 1, y.max() + 1), *image.size, 0.2)
            crop = Image.new("RGB", image.size, gray)
            crop.paste(image, (0, 0), Image.fromarray(p.masks[k]))
            want = namer.probabilities([crop.crop(area)])[0]
            assert p.labels[k] == int(want.argmax())
            assert p.confidences[k] == pytest.approx(float(want.max()), abs=1e-4)


def test_agnostic_namer_forgets_names():
    named = Proposals(np.ones((2, 4, 4), bool), np.ones(2), np.array([0, 1]), np.ones(2))
    (plain,) = AgnosticNamer()([None], [named])
    assert plain.labels is None and plain.confidences is None and len(plain) == 2
