"""Settings of the augmentation: what is refused, what the processor becomes, and that runs train with all of them."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from uplvp_hf.data import InstanceMasks, load_dataset_rows
from uplvp_hf.models.image_processing_uplvp import UplvpImageProcessor
from uplvp_hf.training.build import build_processor, build_samples, with_image_settings
from uplvp_hf.training.config import ConfigError, DataSettings, load_settings
from uplvp_hf.training.loop import train
from uplvp_hf.training.stream import make_loader

EVERYTHING = {
    "short_edges": [48, 80],
    "longest_edge": 90,
    "rotate": 9,
    "copy_paste": 0.7,
    "color_jitter": 0.4,
}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.rotate=60"], r"data\.rotate` must be from 0 to 45, got 60"),
        (["data.copy_paste=2"], r"data\.copy_paste` must be from 0 to 1, got 2"),
        (["data.rotate_probability=-1"], r"data\.rotate_probability` must be"),
        (["data.flip=1.5"], r"data\.flip` must be from 0 to 1"),
        (["data.scale_range=[2, 1]"], r"data\.scale_range` must be two positive numbers, the lower first, got \[2"),
        (["data.canvas=round"], r"data\.canvas` must be one of square, batch, got `round`"),
        (["data.longest_edge=1333"], r"need `data\.short_edges"),
        (["data.keep_ratio=false"], r"need `data\.short_edges"),
        (["data.short_edges=[640, 720, 800]"], r"data\.short_edges` must be one or two numbers"),
        (["data.short_edges=[800, 640]"], r"the lower first, got \[800, 640\]"),
        (["data.short_edges=[800]", "data.longest_edge=640"], r"data\.longest_edge` must not be shorter"),
        (["data.short_edges=[800]", "data.keep_ratio=false"], r"keep_ratio=false` needs `data\.longest_edge"),
        (
            ["data.short_edges=[800]", "data.longest_edge=1333", "data.canvas=square", "data.size=1024"],
            r"canvas=square` of 1024 pixels does not hold .*: raise `data\.size",
        ),
        (["data.short_edges=[800]", "data.canvas=square", "data.size=1024"], r"does not hold"),
    ],
)
def test_settings_that_do_not_fit_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        load_settings(None, words)


@pytest.mark.parametrize(
    ("data", "size", "pad_size"),
    [
        ({"size": 64}, {"longest_edge": 64}, 64),
        ({"size": 64, "canvas": "batch"}, {"longest_edge": 64}, None),
        ({"short_edges": [48, 80]}, {"shortest_edge": 80}, None),
        ({"short_edges": [48, 80], "longest_edge": 90}, {"shortest_edge": 80, "longest_edge": 90}, None),
        (
            {"short_edges": [48], "longest_edge": 90, "canvas": "square", "size": 96},
            {"shortest_edge": 48, "longest_edge": 90},
            96,
        ),
        ({"short_edges": [48], "longest_edge": 90, "keep_ratio": False}, {"height": 48, "width": 90}, None),
    ],
)
def test_the_processor_and_the_batches_follow(data, size, pad_size, scenes_dir, tmp_path):
    settings = load_settings(None, [], data={"train": str(scenes_dir), **data}, optim={"steps": 1, "batch_size": 3})
    settings = with_image_settings(settings)
    build_processor(settings.data).save_pretrained(tmp_path)
    processor = UplvpImageProcessor.from_pretrained(tmp_path)
    assert {key: processor.size[key] for key in size} == size
    given = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert {key for key, value in given["size"].items() if value is not None} == set(size)
    assert (given.get("pad_size") or {}).get("height") == pad_size
    samples = build_samples(settings, load_dataset_rows(scenes_dir))
    (batch,) = make_loader(samples, settings, 0, 0, 1)
    height, width = batch["pixel_values"].shape[2:]
    assert height % 32 == width % 32 == 0
    if pad_size:
        assert height == width == pad_size
    else:
        shown = batch["pixel_mask"].amax(0)
        assert shown[:, -32:].any() and shown[-32:].any(), "no more padding than the largest image needs"
    assert all(
        isinstance(masks, InstanceMasks) and masks.shape[1:] == (height, width) for masks in batch["mask_labels"]
    )


def test_workers_make_the_same_batches(scenes_dir):
    def batches(workers):
        data = {"train": str(scenes_dir), "workers": workers, **EVERYTHING}
        settings = with_image_settings(load_settings(None, [], data=data, optim={"steps": 4, "batch_size": 2}))
        return list(make_loader(build_samples(settings, load_dataset_rows(scenes_dir)), settings, 0, 0, 1))

    for alone, shared in zip(batches(0), batches(2), strict=True):
        assert torch.equal(alone["pixel_values"], shared["pixel_values"])
        assert alone["mask_labels"] == shared["mask_labels"] and alone["image_ids"] == shared["image_ids"]


@pytest.mark.parametrize("more", [{}, {"keep_ratio": False}, {"canvas": "square", "size": 96}])
def test_a_run_with_everything_on(more, scenes_dir, tmp_path, tiny_segmenter):
    settings = load_settings(
        None,
        [f"output={tmp_path / 'run'}"],
        data={"train": str(scenes_dir), "val": str(scenes_dir), **EVERYTHING, **more},
        model={"segmenter": tiny_segmenter("resnet")},
        optim={"steps": 3, "batch_size": 2, "accumulation": 2, "lr": 1e-3},
        log_every=1,
    )
    result = train(settings, progress=False)
    assert result.skipped == 0 and set(result.evaluations) == {3}
    losses = [json.loads(line).get("loss") for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert all(0 < loss < 1000 for loss in losses if loss is not None)


def test_the_guide_names_settings_with_their_defaults():
    text = (Path(__file__).parents[2] / "docs" / "augmentation.md").read_text()
    defaults = dataclasses.asdict(DataSettings())
    table = dict(re.findall(r"^\| `data\.(\w+)` \| ([^|]+) \|", text, re.MULTILINE))
    assert set(re.findall(r"[` ]data\.(\w+)", text)) <= set(defaults) and len(table) == 19
    for name, shown in table.items():
        if name == "extra":
            assert shown == defaults[name]
        elif shown not in ("see right", "none", "512"):  # 512: filled in by `with_image_settings`
            assert json.loads(shown) == defaults[name], name
        else:
            assert defaults[name] is None
