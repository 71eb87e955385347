"""Features of other programs: files, keys, layouts, and labels from them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from labeling_helpers import blob_image, image_folder
from safetensors.torch import save_file

from uplvp_hf.data.dataset import empty_objects
from uplvp_hf.data.store_reader import read_failures
from uplvp_hf.labeling.encoders.precomputed import PrecomputedFeatures
from uplvp_hf.labeling.encoders.text import TextEmbeddings
from uplvp_hf.labeling.labelers.dense_clip import DenseClipLabeler
from uplvp_hf.labeling.pipeline import label_images


def row(image_id, file_name):
    return {
        "image": "",
        "image_id": image_id,
        "file_name": file_name,
        "objects": empty_objects(),
        "width": 0,
        "height": 0,
    }


ROWS = [row(7, "a/one.jpg"), row(9, "b/two.jpg")]


def arrays():
    rng = np.random.default_rng(0)
    return [rng.normal(size=(5, 4, 6)).astype(np.float16), rng.normal(size=(5, 3, 2)).astype(np.float16)]


def write(path, form):
    one, two = arrays()
    path.mkdir(exist_ok=True)
    if form == "nested npy":
        for folder, name, values in (("a", "one", one), ("b", "two", two)):
            (path / folder).mkdir()
            np.save(path / folder / f"{name}.npy", values)
        return path
    if form == "npz by stem":
        np.savez(path / "one.npz", features=one, size=np.ones(2))
        np.savez(path / "two.npz", whatever=two)
        return path
    if form == "safetensors by id":
        for name, values in (("7", one), ("9", two)):
            save_file({"x": torch.from_numpy(values)}, path / f"{name}.safetensors")
        return path
    if form == "one npz":
        np.savez(path / "all.npz", **{"one": one, "9": two})
        return path / "all.npz"
    save_file({"a/one.jpg": torch.from_numpy(one), "two": torch.from_numpy(two)}, path / "all.safetensors")
    return path / "all.safetensors"


@pytest.mark.parametrize("form", ["nested npy", "npz by stem", "safetensors by id", "one npz", "one safetensors"])
def test_every_place_they_may_lie(tmp_path, form):
    features = PrecomputedFeatures(write(tmp_path / "features", form))
    for got, want in zip(features(ROWS, 5), arrays()):
        want = torch.from_numpy(want.astype(np.float32))
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want / want.norm(dim=0, keepdim=True))


def test_channels_last_and_a_leading_axis(tmp_path):
    one = arrays()[0]
    np.save(tmp_path / "one.npy", one.transpose(1, 2, 0)[None])
    (got,) = PrecomputedFeatures(tmp_path, layout="hwd")(ROWS[:1], 5)
    torch.testing.assert_close(got, F.normalize(torch.from_numpy(one.astype(np.float32)), dim=0))
    with pytest.raises(ValueError, match=r"one.*4 channels, the text embeddings have 5.*or layout='hwd'"):
        PrecomputedFeatures(tmp_path)(ROWS[:1], 5)


def test_the_path_comes_before_the_name_and_the_id_last(tmp_path):
    """Two images of one name in two folders; a running number that is another image's name."""
    values = {"a/x": 1.0, "b/x": 2.0, "0": 3.0}
    rng = np.random.default_rng(0)
    base = {name: rng.normal(size=(3, 2, 2)) for name in values}
    for name in values:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        np.save(tmp_path / f"{name}.npy", base[name])
    features = PrecomputedFeatures(tmp_path)
    got = features([row(0, "a/x.jpg"), row(1, "b/x.jpg"), row(2, "0.jpg")])
    for feature, name in zip(got, values):
        torch.testing.assert_close(feature, F.normalize(torch.from_numpy(base[name]).float(), dim=0))
    with pytest.raises(ValueError, match=r"nothing for image 'c/x.jpg' \(image id 5\); looked for c/x, c/x.jpg, x, 5"):
        features([row(5, "c/x.jpg")])  # ambiguous by its name alone


def test_unreadable_things_are_named(tmp_path):
    with pytest.raises(ValueError, match="neither a folder nor"):
        PrecomputedFeatures(tmp_path / "missing")
    with pytest.raises(ValueError, match="in it"):
        PrecomputedFeatures(tmp_path)
    with pytest.raises(ValueError, match="layout 'chw' of features is unknown"):
        PrecomputedFeatures(tmp_path, layout="chw")
    np.savez(tmp_path / "one.npz", a=np.ones((5, 2, 2)), b=np.ones((5, 2, 2)))
    np.save(tmp_path / "two.npy", np.full((5, 2, 2), np.nan))
    np.save(tmp_path / "7.npy", np.ones((2, 2)))
    features = PrecomputedFeatures(tmp_path)
    with pytest.raises(ValueError, match=r"one\.npz: holds 2 arrays"):
        features(ROWS[:1])
    with pytest.raises(ValueError, match="'two': has values that are not finite"):
        features(ROWS[1:])
    with pytest.raises(ValueError, match=r"shape \(2, 2\) is not d x h x w"):
        features([row(7, "other.jpg")])


def test_labels_from_features_through_the_whole_pipeline(tmp_path):
    """Features that are the text vector of one class inside a rectangle and orthogonal to all outside."""
    dataset = image_folder(tmp_path / "images", 3)
    features = tmp_path / "features"
    features.mkdir()
    basis = torch.eye(6)
    for k in range(3):
        grid = basis[5].view(6, 1, 1).repeat(1, 8, 12)
        grid[:, 2:5, 3:7] = (basis[k % 2] + 0.1 * basis[4]).view(6, 1, 1)
        np.save(features / f"{k:03d}.npy", grid.numpy() * 7)
    text = TextEmbeddings(basis[:2], torch.arange(2), 2, ("bear", "deer"))
    options = {"calibration": None, "refine": None}  # the features, and nothing of the images' edges
    labeler = DenseClipLabeler(PrecomputedFeatures(features), ["bear", "deer"], text=text, **options)
    assert labeler.settings["threshold"] == 0.2 and labeler.settings["min_score"] == 0.15  # UPLVP's t1, t2
    for rows in ([dataset[k] for k in range(3)],):
        images = [blob_image(k) for k in range(3)]
        found = labeler(images, rows)
        assert [p.labels.tolist() for p in found] == [[0], [1], [0]]
        assert all(p.masks[0, 16:40, 24:56].all() and p.masks[0].sum() < 32 * 40 for p in found)
    summary = label_images(dataset, labeler, None, tmp_path / "labels", progress=False)
    assert (summary.done, summary.instances) == (3, 3)
    with pytest.raises(ValueError, match="call with rows"):
        labeler([blob_image(0)])
    with pytest.raises(ValueError, match="precomputed features need `text`"):
        DenseClipLabeler(PrecomputedFeatures(features), ["bear"])


def test_one_bad_file_is_one_failed_image(tmp_path):
    """Missing, cut off and not finite: the other images are labeled nonetheless."""
    dataset = image_folder(tmp_path / "images", 6)
    features = tmp_path / "features"
    features.mkdir()
    for k in range(6):
        np.save(features / f"{k:03d}.npy", np.random.default_rng(k).normal(size=(6, 8, 12)))
    (features / "001.npy").unlink()
    (features / "002.npy").write_bytes((features / "002.npy").read_bytes()[:300])
    np.save(features / "003.npy", np.full((6, 8, 12), np.nan))
    (features / "004.npy").unlink()
    (features / "004.npz").write_bytes(b"PK\x03\x04 cut off")
    text = TextEmbeddings(torch.eye(6)[:2], torch.arange(2), 2, ("bear", "deer"))
    labeler = DenseClipLabeler(PrecomputedFeatures(features), ["bear", "deer"], text=text)
    summary = label_images(dataset, labeler, None, tmp_path / "labels", progress=False, max_failed=0.7)
    assert (summary.done, summary.failed) == (2, 4)
    reasons = [entry["reason"] for entry in read_failures(tmp_path / "labels")]
    for reason, word in zip(reasons, ("nothing for image '001", "002.npy: cannot be read", "not finite", "004.npz")):
        assert word in reason


def test_nothing_to_calibrate_on_is_explained(tmp_path):
    dataset = image_folder(tmp_path / "images", 2)
    (tmp_path / "features").mkdir()
    np.save(tmp_path / "features" / "other.npy", np.ones((6, 8, 12)))
    text = TextEmbeddings(torch.eye(6)[:2], torch.arange(2), 2, ("bear", "deer"))
    labeler = DenseClipLabeler(PrecomputedFeatures(tmp_path / "features"), ["bear", "deer"], text=text)
    with pytest.raises(ValueError, match=r"no image can be calibrated on; the first: .*nothing for image '000"):
        label_images(dataset, labeler, None, tmp_path / "labels", progress=False)


def test_settings_of_an_image_tower_are_refused(tmp_path):
    features = PrecomputedFeatures(write(tmp_path / "features", "folder"))
    text = TextEmbeddings(torch.eye(2, 5), torch.arange(2), 2, ("a", "b"))
    for option in ({"window": 64}, {"image_size": 128}, {"sigma": 2.0}):
        with pytest.raises(ValueError, match=rf"{next(iter(option))}: no effect with precomputed features"):
            DenseClipLabeler(features, ["a", "b"], text=text, **option)
    with pytest.raises(ValueError, match=r"`min_area` 0\.5 is above `max_area` 0\.1"):
        DenseClipLabeler(features, ["a", "b"], text=text, min_area=0.5, max_area=0.1)
