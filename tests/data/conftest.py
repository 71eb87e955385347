import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def coco_sample():
    """84 COCO images with crowds, multi-part polygons and sparse ids."""
    folder = Path(os.environ.get("UPLVP_DATA", ROOT.parent / "shared" / "data")) / "coco_sample"
    if not folder.is_dir():
        pytest.skip(f"no {folder}; set UPLVP_DATA to the folder of real datasets")
    return folder


@pytest.fixture
def make_coco(tmp_path):
    """Writes a COCO folder: one 40 x 30 image a name, and the annotations given; returns the folder."""

    def make(annotations, names=("a.png", "b.png"), categories=({"id": 7, "name": "x"}, {"id": 3, "name": "y"})):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "annotations").mkdir(exist_ok=True)
        images = []
        for index, name in enumerate(names):
            pixels = np.random.default_rng(index).integers(0, 256, (30, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / Path(name).name)
            images.append({"id": 10 + index, "file_name": name, "width": 40, "height": 30})
        content = {"images": images, "annotations": annotations, "categories": list(categories)}
        (tmp_path / "annotations" / "instances.json").write_text(json.dumps(content))
        return tmp_path

    return make


@pytest.fixture
def annotation():
    """A square of 10 x 10 px at (5, 5) in image 10, with changes."""

    def make(**changes):
        square = {"id": 1, "image_id": 10, "category_id": 7, "segmentation": [[5, 5, 15, 5, 15, 15, 5, 15]]}
        return {**square, "bbox": [5, 5, 10, 10], "area": 100, "iscrowd": 0, **changes}

    return make
