"""The share of every loss term in the gradient: right numbers, at the right steps, without a trace in the training."""

import json

import pytest
import torch

from uplvp_hf.training.config import load_settings
from uplvp_hf.training.gradient_shares import gradient_shares, is_due


def test_shares_are_those_of_the_norms():
    torch.manual_seed(0)
    layer, unused = torch.nn.Linear(4, 3), torch.nn.Linear(2, 2)
    frozen = torch.nn.Linear(3, 3).requires_grad_(False)
    inputs = torch.randn(5, 4)
    losses = {
        "class": 3 * layer(inputs).square().mean(),
        "mask_0": frozen(layer(inputs)).abs().sum(),
        "mask_1": layer(inputs).sum(),
        "constant": torch.ones(()),
    }
    found = gradient_shares(losses, [*layer.parameters(), *unused.parameters(), *frozen.parameters()])
    assert all(parameter.grad is None for parameter in layer.parameters())
    norms = []
    for loss in (losses["class"], losses["mask_0"] + losses["mask_1"]):
        layer.zero_grad()
        loss.backward(retain_graph=True)
        norms.append(torch.cat([parameter.grad.flatten() for parameter in layer.parameters()]).norm())
    assert found.keys() == {"gradient_share_class", "gradient_share_mask"}
    assert list(found.values()) == pytest.approx([float(norm / sum(norms)) for norm in norms], abs=1e-5)
    assert gradient_shares({"class": layer(inputs).sum() * torch.inf}, layer.parameters()) == {}
    assert gradient_shares({"class": torch.ones(())}, layer.parameters()) == {}


@pytest.mark.parametrize(
    ("every", "line", "steps", "expected"),
    [
        (100, 10, 250, [100, 200, 250]),
        (25, 10, 100, [30, 50, 80, 100]),  # the first lines of the log from 25, 50, 75 and 100 on
        (5, 10, 30, [10, 20, 30]),
        (100, 10, 7, [7]),
        (0, 10, 100, []),
    ],
)
def test_when_they_are_measured(every, line, steps, expected):
    settings = load_settings(None, [f"gradients_every={every}", f"log_every={line}", f"optim.steps={steps}"])
    assert [done for done in range(1, steps + 1) if is_due(done, settings)] == expected


@pytest.mark.slow
def test_training_is_the_same_to_the_bit(run, tmp_path):
    words = ["stage=pretrain", "optim.steps=4", "log_every=1"]
    run("with", *words, "gradients_every=2")
    run("without", *words, "gradients_every=0")
    one, other = (tmp_path / name / "model.safetensors" for name in ("with", "without"))
    assert one.read_bytes() == other.read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "with" / "log.jsonl").read_text().splitlines()]
    shares = [{key: one[key] for key in one if key.startswith("gradient_share_")} for one in lines]
    assert [bool(one) for one in shares] == [False, True, False, True]
    assert all(sum(one.values()) == pytest.approx(1, abs=1e-3) and "gradient_share_mask" in one for one in shares[1::2])
    assert "gradient_share" not in (tmp_path / "without" / "log.jsonl").read_text()
