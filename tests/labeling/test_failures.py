"""One image never ends a labeling run, and no image loses its frame."""

import json

import numpy as np
import pytest
import torch
from labeling_helpers import image_folder, tiny_clip
from PIL import Image

from uplvp_hf.data import load_dataset_rows, read_store
from uplvp_hf.data.dataset import InstanceDataset
from uplvp_hf.labeling import DenseClipLabeler, Proposals, StoreError, label_images
from uplvp_hf.labeling.cutting.proposals import upsample_grid
from uplvp_hf.labeling.encoders.windows import MAX_ASPECT, working_size
from uplvp_hf.labeling.failures import as_failure
from uplvp_hf.labeling.protocol import Labeler
from uplvp_hf.models.errors import UserError

QUIET = {"progress": False, "batch_size": 2}


class Fragile(Labeler):
    """One mask an image, and an error for images of certain names."""

    name, encoder_name, settings = "fragile", "none", {}

    def __init__(self, error, bad):
        self.error, self.bad = error, bad

    def __call__(self, images, rows=None):
        if any(row["file_name"] in self.bad for row in rows):
            raise self.error
        return [Proposals.build([np.ones(image.size[::-1], bool)], [1.0], image.size[::-1]) for image in images]


class FragileNamer:
    name, names, settings = "fragile", ["thing"], {}

    def __call__(self, images, proposals):
        if len(images) > 1 or images[0].getpixel((0, 0)) == (255, 0, 0):
            raise RuntimeError("CUDA error: something odd")
        return [Proposals(p.masks, p.scores, np.zeros(len(p), int), np.ones(len(p))) for p in proposals]


@pytest.mark.parametrize(
    "error, reason",
    [
        (RuntimeError("shape '[1, 3]' is invalid"), "labeling it failed (RuntimeError: shape '[1, 3]' is invalid)"),
        (MemoryError(), "there was not enough memory to label it. Shrink the image."),
        (torch.OutOfMemoryError("CUDA out of memory"), "there was not enough memory to label it. Shrink the image."),
        (IndexError("list index out of range"), "labeling it failed (IndexError: list index out of range)"),
    ],
)
def test_an_image_that_fails_is_listed_and_the_others_are_labeled(tmp_path, error, reason):
    dataset = image_folder(tmp_path / "images", 5)
    bad = dataset[2]["file_name"]
    summary = label_images(dataset, Fragile(error, {bad}), None, tmp_path / "labels", **QUIET)
    assert (summary.done, summary.failed) == (4, 1)
    (failure,) = [json.loads(line) for line in (tmp_path / "labels" / "failures.jsonl").read_text().splitlines()]
    assert failure["file"].endswith(bad) and failure["reason"] == reason
    again = label_images(dataset, Fragile(error, ()), None, tmp_path / "labels", **QUIET)
    assert (again.done, again.skipped, again.failed) == (1, 4, 0)


def test_an_image_that_cannot_be_named_is_listed(tmp_path):
    dataset = image_folder(tmp_path / "images", 4)
    Image.new("RGB", (40, 30), (255, 0, 0)).save(dataset[1]["image"])
    dataset = InstanceDataset([{**row} for row in dataset.rows], [])
    dataset.rows[1].update(width=40, height=30)
    summary = label_images(dataset, Fragile(None, ()), FragileNamer(), tmp_path / "labels", **QUIET)
    assert (summary.done, summary.failed) == (3, 1)
    assert "CUDA error: something odd" in (tmp_path / "labels" / "failures.jsonl").read_text()


def test_what_concerns_all_images_ends_the_run(tmp_path, monkeypatch):
    dataset = image_folder(tmp_path / "images", 6)
    names = {row["file_name"] for row in dataset.rows}
    for error in (UserError("a wrong setting"), OSError(28, "No space left on device")):
        with pytest.raises(type(error)):
            label_images(dataset, Fragile(error, names), None, tmp_path / "labels", **QUIET)
    monkeypatch.setattr("uplvp_hf.labeling.run.HOPELESS", 3)
    with pytest.raises(StoreError, match=r"none of the first \d images could be labeled; .*ZeroDivisionError"):
        label_images(dataset, Fragile(ZeroDivisionError(), names), None, tmp_path / "labels", **QUIET)


def test_failures_keep_their_own_words():
    assert as_failure(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")).reason.startswith(
        "there was not enough memory"
    )


def test_long_strips_cost_no_more_than_their_pixels(tmp_path):
    """A dense interpolation matrix of this size would have 10^10 entries."""
    large = upsample_grid(torch.arange(100_000.0)[None, None], (1, 100_000))
    torch.testing.assert_close(large[0, 0], torch.arange(100_000.0))
    assert working_size(5000, 2, 64, "shorter", 16) == (16, 64 * MAX_ASPECT)
    assert working_size(64 * MAX_ASPECT, 64, 64, "shorter", 16) == (64, 64 * MAX_ASPECT)
    (tmp_path / "images").mkdir()
    for size in ((5000, 2), (2, 5000), (1, 1)):
        Image.new("RGB", size, (90, 120, 30)).save(tmp_path / "images" / f"{size[0]}.png")
    strips = load_dataset_rows(tmp_path / "images", unlabeled=True)
    labeler = DenseClipLabeler(tiny_clip(), ["bear", "deer"], image_size=32)
    summary = label_images(strips, labeler, None, tmp_path / "labels", **QUIET)
    assert (summary.done, summary.failed) == (3, 0)


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_images_that_were_annotated_as_stored_stay_so(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.zeros((20, 20, 3), np.uint8)
    pixels[:5, :8] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    row = {"image": str(tmp_path / "a.png"), "image_id": 1, "file_name": "a.png", "width": 20, "height": 20}
    row |= {"as_stored": True, "objects": {}}

    class Bright(Labeler):
        name, encoder_name, settings = "bright", "none", {}

        def __call__(self, images, rows=None):
            masks = [np.asarray(image.convert("L")) > 128 for image in images]
            return [Proposals.build([mask], [1.0], mask.shape) for mask in masks]

    label_images(InstanceDataset([row], []), Bright(), None, tmp_path / "labels", progress=False)
    stored = read_store(tmp_path / "labels")
    assert stored[0]["as_stored"]
    np.testing.assert_array_equal(stored.mask(0, 0), np.asarray(stored.load_image(0))[..., 0] > 128)
    np.testing.assert_array_equal(stored.mask(0, 0), pixels[..., 0] > 128)
