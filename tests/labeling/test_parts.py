"""Which images are in which part, and labeling a part with the calibration of another."""

import pytest
from label_tiny import tiny_labeler
from labeling_helpers import image_folder, tiny_encoder

from uplvp_hf.data import load_dataset_rows
from uplvp_hf.labeling.labelers.foreground import ForegroundLabeler
from uplvp_hf.labeling.merge import merge_stores
from uplvp_hf.labeling.part import Part
from uplvp_hf.labeling.pipeline import label_images
from uplvp_hf.labeling.store import StoreError
from uplvp_hf.models.errors import UserError


@pytest.mark.parametrize("images, size, of", [(1, 8, 3), (11, 2, 3), (100, 8, 16), (7, 3, 7), (64, 8, 8)])
def test_parts_are_disjoint_complete_and_of_whole_blocks(images, size, of):
    count = -(-images // size)
    parts = [Part(number, of) for number in range(1, of + 1)]
    assert [block for part in parts for block in part.blocks(count)] == list(range(count))
    assert sum(part.images(images, size) for part in parts) == images
    assert max(len(part.blocks(count)) for part in parts) - min(len(part.blocks(count)) for part in parts) <= 1
    assert all(sum(part.has(number) for part in parts) == 1 for number in range(50))


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "a/b", "1/0", "-1/3", "1/3/5", ""])
def test_wrong_parts_are_refused(text):
    with pytest.raises(UserError, match="--shard must be like 3/16"):
        Part.parse(text)


@pytest.mark.slow
def test_a_calibration_is_taken_over(tmp_path):
    """A machine that has its own images alone labels with the calibration of another."""
    first = image_folder(tmp_path / "a", 4)
    image_folder(tmp_path / "b", 9)
    for k in range(4):
        (tmp_path / "b" / f"{k:03d}.png").unlink()
    second = load_dataset_rows(tmp_path / "b")
    options = {"progress": False, "batch_size": 2, "calibration_images": 4}
    label_images(first, tiny_labeler(), None, tmp_path / "first", **options)
    label_images(second, tiny_labeler(), None, tmp_path / "alone", **options)
    both = [tmp_path / "first", tmp_path / "alone"]
    with pytest.raises(StoreError, match=r"state\..* in .*first, .* in .*alone.*run\.calibration=.*first"):
        merge_stores(both, tmp_path / "merged", progress=False)
    label_images(second, tiny_labeler(), None, tmp_path / "second", calibration=str(tmp_path / "first"), **options)
    assert merge_stores([both[0], tmp_path / "second"], tmp_path / "merged", progress=False).images == 9
    with pytest.raises(StoreError, match="its calibration does not fit"):
        label_images(
            first,
            ForegroundLabeler(tiny_encoder()),
            None,
            tmp_path / "other",
            calibration=str(tmp_path / "first"),
            **options,
        )
