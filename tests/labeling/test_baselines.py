"""The trivial mask sources."""

import pytest
from PIL import Image

from uplvp_hf.labeling.labelers.baselines import CenterBoxLabeler, WholeImageLabeler


def test_center_box_lies_in_the_middle():
    (found,) = CenterBoxLabeler(side=0.5)([Image.new("RGB", (60, 41))])
    assert found.masks.shape == (1, 41, 60) and found.scores.tolist() == [1.0]
    rows, columns = found.masks[0].any(axis=1).nonzero()[0], found.masks[0].any(axis=0).nonzero()[0]
    assert (columns[0], columns[-1]) == (15, 44) and (rows[0], rows[-1], len(rows)) == (10, 29, 20)
    (half,) = CenterBoxLabeler()([Image.new("RGB", (600, 400))])
    assert half.masks.mean() == pytest.approx(0.5, abs=0.01)
    with pytest.raises(ValueError, match=r"`side` must be above 0 and at most 1, got 1.5"):
        CenterBoxLabeler(side=1.5)


def test_whole_image():
    images = [Image.new("RGB", (60, 41)), Image.new("RGB", (7, 5))]
    found = WholeImageLabeler()(images)
    assert [p.masks.shape for p in found] == [(1, 41, 60), (1, 5, 7)] and all(p.masks.all() for p in found)
    assert WholeImageLabeler().settings == {"side": 1.0}
