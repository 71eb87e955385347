"""Losses are divided by what the whole effective batch holds: however it is cut, the weights move alike."""

from types import MethodType

import pytest
import torch
import yaml
from training_helpers import DESCENT, largest_difference, log_of

from uplvp_hf.training import loop


@pytest.fixture
def without_head_statistics(monkeypatch):
    """The batch norms of QueryInst's mask heads, which see the micro-batch at hand, keep their statistics."""
    inner = loop.training_mode

    def mode(model, freeze_norm):
        inner(model, freeze_norm)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
                module.train = MethodType(lambda self, mode=True: self, module)

    monkeypatch.setattr(loop, "training_mode", mode)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("kind", ["mask2former", "knet", "queryinst"])
def test_accumulated_equals_a_larger_batch(
    run, recipe, segmenters, deterministic, without_head_statistics, tmp_path, kind, stage
):
    settings = yaml.safe_load(recipe.read_text())
    settings["model"]["segmenter"] = segmenters[kind]
    recipe.write_text(yaml.safe_dump(settings))
    rate = {"mask2former": 0.05, "knet": 0.02, "queryinst": 0.01}[kind]
    words = [*DESCENT, f"stage={stage}", f"optim.lr={rate}", "model.freeze_backbone_norm=true", "optim.clip=3"]
    run("large", *words, "optim.batch_size=4")
    run("small", *words, "optim.batch_size=1", "optim.accumulation=4")
    run("start", *words, "optim.lr=0")
    large, small, start = (tmp_path / name for name in ("large", "small", "start"))
    assert largest_difference(large, start) > 1e-3  # there is something to compare
    assert largest_difference(large, small) < 1e-5
    for one, other in zip(log_of(large), log_of(small), strict=True):
        # Shares of the gradient are those of one micro-batch.
        one, other = ({k: v for k, v in line.items() if not k.startswith("gradient_")} for line in (one, other))
        assert other == pytest.approx(one, rel=1e-4, abs=1e-6)
