"""Text embeddings, calibration, and the way from evidence to instances."""

import json
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from labeling_helpers import blob_image, tiny_clip

from uplvp_hf.labeling.encoders.text import embed_classes, read_vocabulary
from uplvp_hf.labeling.labelers import dense_clip
from uplvp_hf.labeling.labelers.dense_clip import DenseClipLabeler, MapCache
from uplvp_hf.labeling.naming.zero_shot import ClipZeroShotNamer
from uplvp_hf.labeling.settings import DenseClipSettings, Recipe
from uplvp_hf.settings import ConfigError

TEMPLATES = ["a photo of a {}", "the {}"]


@pytest.fixture(scope="module")
def clip():
    return tiny_clip()


def make(clip, entries=("bear", "deer"), **options):
    return DenseClipLabeler(clip, list(entries), templates=TEMPLATES, image_size=48, window=32, stride=16, **options)


def test_templates_are_averaged_then_normalized(clip):
    text = embed_classes(clip.model, clip.tokenizer, ["bear, grizzly bear", "deer"], TEMPLATES)
    assert text.owners.tolist() == [0, 0, 1] and text.count == 2
    for vector, name in zip(text.vectors, ["bear", "grizzly bear", "deer"]):
        single = []
        for template in TEMPLATES:  # one by one: no padding
            tokens = clip.tokenizer(template.format(name), return_tensors="pt")
            with torch.inference_mode():
                single.append(clip.model.get_text_features(input_ids=tokens.input_ids).pooler_output[0])
        want = F.normalize(torch.stack([F.normalize(s, dim=0) for s in single]).mean(0), dim=0)
        torch.testing.assert_close(vector, want, atol=1e-5, rtol=1e-4)
    values = torch.tensor([[1.0, 3.0, 2.0], [0.5, -1.0, 4.0]])
    assert text.per_class(values).tolist() == [[3.0, 2.0], [0.5, 4.0]]


def test_zscore_calibration(clip):
    labeler, images = make(clip), [blob_image(k, 96 + 8 * k) for k in range(3)]
    with pytest.raises(ValueError, match="not calibrated"):
        labeler(images)
    state = labeler.calibrate(labeler.measure(images))
    labeler.restore(state)
    cells = torch.cat([grid.flatten(1) for grid in labeler.similarities(images)], dim=1)
    torch.testing.assert_close(torch.tensor(state["calibration"]["mean"]), cells.mean(1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        torch.tensor(state["calibration"]["std"]), cells.std(1, correction=0), atol=1e-5, rtol=1e-3
    )
    scores = torch.cat([labeler.evidence(grid).flatten(1) for grid in labeler.similarities(images)], dim=1)
    torch.testing.assert_close(scores.mean(1), torch.zeros(2), atol=1e-3, rtol=0)
    torch.testing.assert_close(scores.std(1, correction=0), torch.ones(2), atol=1e-3, rtol=0)
    other = make(clip)
    other.restore(state)
    for a, b in zip(labeler(images), other(images)):
        assert (a.masks == b.masks).all() and (a.labels == b.labels).all()


def test_background_names_take_their_share(clip):
    labeler = make(clip, background=["sky"], calibration=None)
    assert labeler.measure([]) == [] and labeler.calibrate([]) == {} and labeler.config.threshold == 0.5
    (grid,) = labeler.similarities([blob_image(0)])
    assert grid.shape[0] == 3
    want = (50 * grid).softmax(0)[:2]
    torch.testing.assert_close(labeler.evidence(grid), want)
    with pytest.raises(ValueError, match="exclude each other"):
        make(clip, background=["sky"])


def test_the_best_name_of_a_class_counts_after_the_softmax(clip):
    labeler = make(clip, entries=["bear, grizzly", "deer"], background="sky", calibration=None)
    (grid,) = labeler.similarities([blob_image(0)])
    names = (50 * grid).softmax(0)
    torch.testing.assert_close(labeler.evidence(grid), torch.stack([names[:2].amax(0), names[2]]))


def test_denoising_drops_classes_that_are_nowhere_probable(clip):
    labeler = make(clip, calibration=None, denoise=0.5, logit_scale=10.0, threshold=0.0, peak=0.0, refine=None)
    similarities = torch.tensor([[0.5, 0.4], [0.45, 0.39]]).view(2, 1, 2)  # class 1: at most .475
    assert labeler.evidence(similarities)[1].isneginf().all()
    torch.testing.assert_close(labeler.evidence(similarities)[0], similarities[0])
    similarities[1, 0, 1] = 0.42
    torch.testing.assert_close(labeler.evidence(similarities), similarities)
    similarities[1] = 0.1  # never probable; with the other class gone from one place, it may not take it over
    similarities[0, 0, 1] = -0.5
    similarities[1, 0, 1] = -0.5
    assert labeler.instances(labeler.evidence(similarities), (8, 16)).labels.tolist() == [0]


def test_calibration_images_are_encoded_once(clip, monkeypatch):
    """Whole batches come from the cache, everything else is encoded; the labels are the same either way."""
    images = [blob_image(k, 96 + 8 * k) for k in range(5)]
    rows = [{"image_id": k, "file_name": f"{k}.png"} for k in range(5)]
    labeler = make(clip)
    statistics = labeler.measure(images[:2], rows[:2]) + labeler.measure(images[2:4], rows[2:4])
    state = labeler.calibrate(statistics)
    assert statistics == json.loads(json.dumps(statistics)) and len(statistics) == 4
    other = make(clip, cache_mb=0)
    assert other.calibrate(other.measure(images[:2]) + other.measure(images[2:4])) == state
    for one in (labeler, other):
        one.restore(state)
    assert (len(labeler.cache), len(other.cache)) == (2, 0) and labeler.cache.held > 0

    encoded = []
    real = dense_clip.dense_grids
    monkeypatch.setattr(dense_clip, "dense_grids", lambda c, i, *a, **k: encoded.append(len(i)) or real(c, i, *a, **k))
    blocks = [slice(0, 2), slice(1, 3), slice(2, 4), slice(4, 5), slice(0, 2)]
    found = [labeler(images[block], rows[block]) for block in blocks]
    assert encoded == [2, 1, 2]  # other batch mates, never measured, and forgotten after its use
    assert len(labeler.cache) == 0 and labeler.cache.held == 0
    for block, cached in zip(blocks, found):
        for a, b in zip(cached, other(images[block], rows[block])):
            assert (a.masks == b.masks).all() and (a.scores == b.scores).all()


def test_the_cache_is_bounded_and_knows_images_by_their_content():
    maps = [(torch.zeros(2, 8, 8), None)]  # 512 bytes
    cache = MapCache(1100)
    for k in range(3):
        cache.put([blob_image(k)], maps)
    assert len(cache) == 2 and cache.held == 1024  # for the last one there was no room
    assert cache.pop([blob_image(2)]) is None
    assert torch.equal(cache.pop([blob_image(1)])[0][0], maps[0][0])
    cache.put([blob_image(2)], [(torch.zeros(2, 80, 80), None)])
    assert len(cache) == 1 and cache.held == 512


def test_settings_hold_every_option(clip):
    """Each option changed on its own must change the header, else a resumed run could mix labels."""
    encoder = SimpleNamespace(name="dino")
    base = {"window": 32, "stride": 16, "image_size": 48, "calibration": None, "attention": "clearclip"}
    changes = {"templates": "bare", "background": ["sky"], "logit_scale": 40.0, "denoise": 0.5, "image_size": 56}
    changes |= {"side": "longer", "window": 40, "stride": 8, "calibration": "zscore", "guide": encoder}
    changes |= {"attention": "gem", "sigma": 2.0, "scale": 2.0, "gem_depth": 3, "gem_iterations": 2}
    changes |= {"gem_temperature": 9.0, "beta": 1.0, "gamma": 2.0, "key_smoothing": True}
    changes |= {"threshold": 0.3, "peak": 0.4, "min_score": 0.3, "exclusive": False, "fill_holes": True}
    changes |= {"split": "ncut", "max_parts": 3, "split_tau": 0.3, "max_ncut": 0.4, "refine": None}
    changes |= {"refine_size": 100, "min_area": 0.1, "max_area": 0.8, "max_border": 0.5, "max_aspect": 4.0}
    changes |= {"min_side": 3, "nms_kind": "matrix", "nms": 0.6, "nms_sigma": 3.0, "class_agnostic": True, "top": 9}
    plain = DenseClipLabeler(clip, ["bear", "deer"], **base).settings
    assert plain == json.loads(json.dumps(plain))
    for name, value in changes.items():
        knob = next((f.metadata.get("only") for f in fields(DenseClipSettings) if f.name == name), None)
        own = base if knob is None else base | dict([knob])  # a knob goes with its own recipe alone
        extra = {"guide": encoder} if own["attention"] == "proxy" else {}
        before = DenseClipLabeler(clip, ["bear", "deer"], **(own | extra)).settings
        assert DenseClipLabeler(clip, ["bear", "deer"], **(own | extra | {name: value})).settings != before, name
    without_influence = {"window_batch", "cache_mb"}
    assert {f.name for f in fields(DenseClipSettings)} - without_influence == set(changes) - {"guide"}
    assert DenseClipLabeler(clip, ["bear", "otter"], **base).settings != plain
    text = embed_classes(clip.model, clip.tokenizer, ["bear", "deer"], "bare")
    other = replace(text, vectors=text.vectors.flip(0))
    texts = [DenseClipLabeler(clip, ["bear", "deer"], text=one, **base).settings for one in (text, other)]
    assert plain != texts[0] != texts[1]


def test_what_an_encoder_recommends_comes_before_the_defaults(clip):
    advised = replace(clip, recommended={"sigma": 2.0, "image_size": 56, "templates": ["the {}"]})
    labeler = DenseClipLabeler(advised, ["bear"])
    assert labeler.recommended == advised.recommended
    settings = labeler.settings
    assert (settings["sigma"], settings["image_size"], settings["templates"]) == (2.0, 56, ["the {}"])
    assert settings["scale"] == Recipe().scale and settings["side"] == "shorter"
    assert settings == DenseClipLabeler(clip, ["bear"], templates=["the {}"], sigma=2.0, image_size=56).settings
    own = DenseClipLabeler(advised, ["bear"], templates="bare", sigma=3.0)
    assert (
        own.recommended == {"image_size": 56} and own.settings["sigma"] == 3.0 and own.settings["templates"] == ["{}"]
    )
    other = DenseClipLabeler(advised, ["bear"], attention="clearclip")  # the knobs were naclip's
    assert "sigma" not in other.recommended and other.settings["sigma"] == Recipe().sigma
    assert ClipZeroShotNamer(advised, ["bear"]).settings["templates"] == ["the {}"]
    with pytest.raises(ValueError, match=r"tiny, labeling\.json: 'refine' is no setting that an encoder decides"):
        DenseClipLabeler(replace(clip, recommended={"refine": None}), ["bear"])


def test_precomputed_text_takes_the_place_of_the_text_tower(clip):
    entries = ["bear, grizzly", "deer"]
    text = embed_classes(clip.model, clip.tokenizer, [*entries, "sky"], TEMPLATES)
    options = {"background": ["sky"], "calibration": None}
    image = blob_image(0)
    want = make(clip, entries, **options)
    got = make(replace(clip, tokenizer=None), entries, text=text, **options)
    assert torch.equal(got.similarities([image])[0], want.similarities([image])[0])
    with pytest.raises(ValueError, match="of 3 classes for 2 entries and 0 background names"):
        make(clip, entries, text=text)
    with pytest.raises(ValueError, match="are of 'bear' where the vocabulary has 'deer'"):
        make(clip, ["deer", "bear, grizzly"], text=text, **options)
    with pytest.raises(ValueError, match="text embeddings of 7 numbers, tiny has 24"):
        make(clip, entries, text=replace(text, vectors=text.vectors[:, :7]), **options)


def test_class_agnostic_labels(clip):
    labeler = make(clip, class_agnostic=True, calibration=None, threshold=-1.0, peak=-1.0, min_score=-1.0)
    assert labeler.vocabulary == []
    (found,) = labeler([blob_image(0)])
    assert found.labels is None


def test_splitting_and_refining_in_the_labeler(clip):
    """The maps are the same whether the features or the similarities are averaged over windows."""
    images = [blob_image(0, 96, 64), blob_image(1, 64, 96)]
    plain, split = make(clip), make(clip, split="ncut", refine="pamr", refine_size=40)
    for a, b in zip(plain.similarities(images), split.similarities(images)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    split.restore(split.calibrate(split.measure(images)))
    for image, found in zip(images, split(images)):
        assert found.masks.shape[1:] == image.size[::-1]
        assert len(found) == 0 or found.masks.sum(axis=0).max() == 1


def test_what_cannot_work_is_refused(clip):
    with pytest.raises(ValueError, match="'proxy' needs a second backbone"):
        make(clip, attention="proxy")
    with pytest.raises(ConfigError, match=r"Unknown setting `treshold`. Did you mean `threshold`\?"):
        make(clip, treshold=0.3)
    with pytest.raises(ConfigError, match="`calibration` must be one of zscore, got `minmax`"):
        make(clip, calibration="minmax")
    with pytest.raises(ValueError, match="no readable image to calibrate"):
        make(clip).calibrate([])


def test_instances_of_a_drawn_evidence_map(clip):
    """Two blobs of class 0, one of class 1 that overlaps none, one too small, on a grid of the image's size."""
    labeler = make(clip, calibration=None, threshold=0.5, min_area=0.02, refine=None)
    evidence = torch.zeros(2, 40, 60)
    evidence[0, 5:15, 5:15] = 0.9
    evidence[0, 25:35, 40:55] = 0.7
    evidence[1, 5:15, 30:40] = 0.8
    evidence[1, 20:22, 2:4] = 1.0
    evidence[1, 5:15, 5:10] = 0.6  # loses against class 0
    found = labeler.instances(evidence, (40, 60))
    assert found.labels.tolist() == [0, 1, 0]
    assert found.scores.tolist() == pytest.approx([0.9, 0.8, 0.7])
    assert found.masks.sum(axis=(1, 2)).tolist() == [100, 100, 150]
    assert found.masks[0, 5:15, 5:15].all()
    assert len(labeler.instances(torch.zeros(2, 40, 60), (40, 60))) == 0
    peaked = make(clip, calibration=None, threshold=0.5, min_area=0.02, peak=0.75, refine=None)
    assert peaked.instances(evidence, (40, 60)).labels.tolist() == [0, 1]


def test_vocabulary(tmp_path):
    assert read_vocabulary("bear, deer") == ["bear", "deer"]
    file = tmp_path / "names.txt"
    file.write_text("bear, grizzly bear  # two names\n\n# nothing\ndeer\n")
    assert read_vocabulary(file) == ["bear, grizzly bear", "deer"]
    file.write_text("# nothing\n")
    for bad, message in [(file, "names no class"), (" , ", "names no class"), ("a,b,a", "'a' occurs twice")]:
        with pytest.raises(ValueError, match=message):
            read_vocabulary(bad)
    with pytest.raises(ValueError, match="no such file"):
        read_vocabulary(tmp_path / "missing.txt")
