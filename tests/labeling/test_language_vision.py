"""Text embeddings, calibration, and the way from evidence to instances."""

import pytest
import torch
import torch.nn.functional as F
from labeling_helpers import blob_picture, tiny_clip

from uplvp_hf.labeling.language_vision import DenseClipLabeler
from uplvp_hf.labeling.text import embed_classes, read_vocabulary

TEMPLATES = ["a photo of a {}", "the {}"]


@pytest.fixture(scope="module")
def clip():
    return tiny_clip()


def make(clip, entries=("bear", "deer"), **options):
    return DenseClipLabeler(clip, list(entries), TEMPLATES, image_size=48, window=32, stride=16, **options)


def test_templates_are_averaged_then_normalised(clip):
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
    labeler, images = make(clip), [blob_picture(k, 96 + 8 * k) for k in range(3)]
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
    assert labeler.measure([]) == [] and labeler.calibrate([]) == {} and labeler.cutting.threshold == 0.5
    (grid,) = labeler.similarities([blob_picture(0)])
    assert grid.shape[0] == 3
    want = (50 * grid).softmax(0)[:2]
    torch.testing.assert_close(labeler.evidence(grid), want)
    with pytest.raises(ValueError, match="exclude each other"):
        make(clip, background=["sky"])


def test_instances_of_a_drawn_evidence_map(clip):
    """Two blobs of class 0, one of class 1 that overlaps none, one too small, on a grid of the picture's size."""
    labeler = make(clip, calibration=None, threshold=0.5, min_area=0.02)
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
    peaked = make(clip, calibration=None, threshold=0.5, min_area=0.02, peak=0.75)
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
