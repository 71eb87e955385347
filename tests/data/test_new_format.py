"""A data format is one file with two functions and one line in `LAYOUTS`: a toy format, added here so."""

import numpy as np
from PIL import Image

from uplvp_hf.cli import main
from uplvp_hf.data import load_dataset_rows, rows
from uplvp_hf.data.coco import read_content
from uplvp_hf.data.shapes import Shapes


# The new file: boxes.tsv with the image, the class and a filled rectangle a line.
def is_toy(path):
    return path.endswith("boxes.tsv")


def read_toy(path, split=None, unlabeled=False):
    shapes = Shapes()
    with open(path, encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            name, label, *sides = line.split("\t")
            x0, y0, x1, y1 = map(float, sides)
            if all(name != entry["id"] for entry in shapes.images):
                shapes.add_image(name, name)
            shapes.add(name, label, f"line {number}", [x0, y0, x1, y0, x1, y1, x0, y1])
    return read_content(shapes.content(), path, unlabeled=unlabeled)


def test_a_format_is_one_file_and_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(rows.LAYOUTS, "toy", (is_toy, read_toy))  # the line
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    file = tmp_path / "boxes.tsv"
    file.write_text("a.png\tcat\t5\t5\t15\t15\na.png\tdog\t20\t2\t36\t12\n")
    dataset = load_dataset_rows(file)
    assert dataset.id2label == {0: "cat", 1: "dog"} and dataset.load_image(0).size == (40, 30)
    expected = np.zeros((30, 40), dtype=bool)
    expected[5:15, 5:15] = True
    np.testing.assert_array_equal(dataset.mask(0, 0), expected)
    assert main(["data", "check", str(file), "--quiet"]) == 0
    assert "Training uses 1 images, 2 objects of 2 classes" in capsys.readouterr().out
    assert main(["data", "convert", str(file), "--output", str(tmp_path / "coco.json"), "--quiet"]) == 0
    assert len(load_dataset_rows(tmp_path / "coco.json")[0]["objects"]["area"]) == 2
