"""A new labeler is one file and one line; so is a new namer. This one finds the pixels that are brighter than most."""

import json
import sys
import types

import pytest
from labeling_helpers import image_folder

from uplvp_hf.commands.label import main
from uplvp_hf.data import read_store
from uplvp_hf.labeling import catalog

# The file: 20 lines.
FILE = """
from dataclasses import dataclass

import numpy as np

from uplvp_hf.labeling.cutting.proposals import Proposals
from uplvp_hf.labeling.protocol import Labeler
from uplvp_hf.settings import Settings, setting


@dataclass(frozen=True)
class BrightSettings(Settings):
    percentile: float = setting(90.0, "share of the pixels that are darker, percent", least=0, below=100)


class BrightLabeler(Labeler):
    name, encoder_name = "bright", "none"

    def __init__(self, settings=None, **changes):
        self.config = BrightSettings.of(settings, **changes)

    def __call__(self, images, rows=None):
        grays = [np.asarray(image.convert("L")) for image in images]
        masks = [gray >= np.percentile(gray, self.config.percentile) for gray in grays]
        return [Proposals.build([mask], [1.0], mask.shape) for mask in masks]
"""
# The line.
LINE = catalog.Entry("labelers.bright:BrightLabeler", "labelers.bright:BrightSettings")


@pytest.fixture
def bright(monkeypatch):
    assert len([line for line in FILE.splitlines() if line.strip()]) <= 20
    module = types.ModuleType("uplvp_hf.labeling.labelers.bright")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(FILE, "bright.py", "exec"), vars(module))
    monkeypatch.setitem(catalog.LABELERS, "bright", LINE)
    return module


def test_a_labeler_of_one_file_and_one_line(bright, tmp_path, capsys):
    image_folder(tmp_path / "images", 2)
    call = [str(tmp_path / "images"), "--output", str(tmp_path / "labels"), "--labeler", "bright", "--quiet"]
    assert main([*call, "labeler.percentile=75", "--report"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["done"], summary["instances"]) == (2, 2)
    header = json.loads((tmp_path / "labels" / "header.json").read_text())
    assert (header["labeler"], header["settings"]["percentile"]) == ("bright", 75.0)
    stored = read_store(tmp_path / "labels")
    assert 0.2 < stored.mask(0, 0).mean() <= 0.6 and stored.categories == [{"id": 1, "name": "object"}]
    assert main([*call, "labeler.percentile=100"]) == 2
    assert "`labeler.percentile` must be at least 0 and below 100, got 100.0" in capsys.readouterr().err
    assert main([*call, "labeler.percent=50"]) == 2
    assert "Did you mean `labeler.percentile`?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--labeler", "bright", "--help"])
    assert "share of the pixels that are darker, percent" in capsys.readouterr().out
