"""The benchmark script: it measures what it says. Its numbers are not asserted, they are the machine's."""

import json
from pathlib import Path

import pytest
import torch

from uplvp_hf.data import load_dataset_rows


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("benchmark_label")


def test_both_arms_see_the_same_windows(script, tmp_path):
    dataset = load_dataset_rows(script.write_images(tmp_path / "images", 5, (96, 64), distinct=3))
    labeler = script.build_labeler("small", 224, classes=4)
    windows = script.windows_of(labeler, dataset, batch_size=2)
    # 64 to 224 pixels, 96 to 336: windows at 0 and 112, in one forward pass for each block of 2, 2 and 1 images.
    assert [tuple(batch.shape) for batch in windows] == [(4, 3, 224, 224), (4, 3, 224, 224), (2, 3, 224, 224)]
    whole = labeler.source.pixels([dataset.load_image(4)], (224, 336))[0]
    torch.testing.assert_close(windows[2], torch.stack([whole[..., :224], whole[..., 112:]]))
    assert script.bare_forward(labeler, windows, "cpu") > 0
    assert len({Path(row["image"]).read_bytes() for row in dataset.rows}) == 3


@pytest.mark.slow
def test_the_last_line_is_one_json_object(script, capsys):
    assert script.main(["--only", "memory", "--memory-images", "2", "6", "--image-size", "96", "64"]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    few, many = results["rss_mib"]
    assert results["rss_ratio"] == pytest.approx(many / few, abs=1e-3) and few > 100
    assert results["rss_images"] == [2, 6] and results["goals"] == {"rss_ratio": 1.3}


@pytest.mark.slow
def test_quality_of_a_few_scenes_and_images(script, tmp_path, capsys):
    """The whole script with little to do: the same rows on stdout, in the file, and in the last line's object."""
    from uplvp_hf.data.synthetic import write_scenes

    quality = script.load_quality()
    data = write_scenes(tmp_path / "few", 3, seed=5)
    words = ["--clip", "--scenes", "3", "--only", "identity", "without PAMR", "--output", str(tmp_path / "rows.jsonl")]
    assert quality.main(words) == 0
    printed = capsys.readouterr().out.splitlines()
    found = json.loads(printed[-1])["clip"]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    names = ["identity, calibrated", "identity, background", "naclip, without PAMR"]
    assert [row["source"] for row in rows] == names == [name for name in found if name != "scenes"]
    for row in rows:
        assert row["seed"] == 0 and row["images"] == 3 and "images_per_second" not in row
        assert all(found[row["source"]][key] == row[key] for key in (*quality.KEYS, *quality.NAMED_KEYS))
    sources = {name: build() for name, build in quality.image_sources(None).items() if name in ("whole image",)}
    dataset = load_dataset_rows(data)
    values = quality.measure(dataset, sources["whole image"], None, 2)
    shares = [max(row["objects"]["area"]) / (row["width"] * row["height"]) for row in dataset.rows]
    assert values["proposals_per_image"] == 1 and values["precision"] == (max(shares) >= 0.5)
