"""Small runs: six updates on six scenes of 64 px."""

import pytest
import torch
import yaml
from training_helpers import DETERMINISTIC

from uplvp_hf.training import loop
from uplvp_hf.training.config import load_settings
from uplvp_hf.training.loop import train

KNET = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "norm_groups": 8, "num_stages": 2}
QUERYINST = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "dynamic_channels": 8, "num_stages": 2,
    "num_mask_layers": 1, "finest_scale": 14,
}  # fmt: skip


@pytest.fixture(scope="session")
def segmenters(tiny_segmenter):
    """Settings of one tiny segmenter of each kind, on a ResNet."""
    own = {"backbone_config": tiny_segmenter("resnet")["backbone_config"], "num_queries": 12}
    return {
        "mask2former": tiny_segmenter("resnet"),
        "knet": {"model_type": "knet", **own, **KNET},
        "queryinst": {"model_type": "queryinst", **own, **QUERYINST},
    }


@pytest.fixture
def recipe(tmp_path, scenes_dir, tiny_segmenter):
    """A recipe file: six updates on six scenes of 64 px."""
    content = {
        "stage": "pretrain",
        "log_every": 4,
        "data": {"train": str(scenes_dir), "size": 64},
        "model": {"segmenter": tiny_segmenter("swin")},
        "optim": {"steps": 6, "batch_size": 2, "lr": 1e-3, "warmup": 1},
        "checkpoint": {"every": 2, "keep": 9, "stay": True},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.fixture
def run(recipe, tmp_path):
    """run(name, *words) trains into tmp_path/name."""

    def go(name="run", *words, resume=False):
        settings = load_settings(str(recipe), [*words, f"output={tmp_path / name}"])
        return train(settings, resume=resume, progress=False)

    return go


@pytest.fixture
def deterministic(monkeypatch):
    monkeypatch.setattr(torch, "rand", torch.rand)
    monkeypatch.setattr(loop, "make_optimizer", loop.make_optimizer)
    exec(DETERMINISTIC, {"torch": torch, "loop": loop})
