"""The moving average of the weights against its definition, and where it is used."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from uplvp_hf.models.modeling_uplvp import UplvpForPreTraining
from uplvp_hf.training.ema import WeightAverage


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).to(dtype)
    model[0].requires_grad_(False)
    return model


def walk(model, average, steps, seed=0):
    """Random updates of all trained weights. Returns the weights after each, in float64."""
    generator, history = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        average.update()
        history.append({name: value.detach().double().clone() for name, value in model.named_parameters()})
    return history


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_average_is_its_definition_in_float32(dtype):
    model = make_model(dtype)
    start = {name: value.detach().double().clone() for name, value in model.named_parameters()}
    average = WeightAverage(model, 0.6)
    history = walk(model, average, 25)
    found = average.tensors()
    assert set(found) == {name for name, p in model.named_parameters() if p.requires_grad} and len(found) == 4
    for name, value in found.items():
        expected = start[name]
        for n, weights in enumerate(history):
            decay = min(0.6, (1 + n) / (10 + n))
            expected = decay * expected + (1 - decay) * weights[name]
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-5)


def test_decay_warms_up():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average = WeightAverage(model, 0.999)
    nn.init.ones_(model.weight)
    average.update()
    assert average.tensors()["weight"].item() == pytest.approx(0.9)  # 1 / 10 of the start is left
    average.update()
    assert average.tensors()["weight"].item() == pytest.approx(1 - 0.1 * 2 / 11)


def test_weights_come_back_to_the_bit():
    model = make_model(torch.bfloat16)
    average = WeightAverage(model, 0.9)
    walk(model, average, 3)
    before, wanted = copy.deepcopy(model.state_dict()), average.tensors()
    with average.applied():
        for name, parameter in model.named_parameters():
            expected = wanted[name].bfloat16() if name in wanted else before[name]
            assert torch.equal(parameter, expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(KeyError), average.applied():
        raise KeyError
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_saved_and_loaded_goes_on_to_the_bit():
    model = make_model()
    average = WeightAverage(model, 0.9)
    walk(model, average, 4)
    twin = copy.deepcopy(model)
    other = WeightAverage(twin, 0.9)
    other.load({name: value.clone() for name, value in average.tensors().items()}, average.updates)
    walk(model, average, 4, seed=1), walk(twin, other, 4, seed=1)
    assert all(torch.equal(value, other.tensors()[name]) for name, value in average.tensors().items())
    model[0].requires_grad_(True)
    with pytest.raises(ValueError, match="other parameters"):
        WeightAverage(model, 0.9).load(average.tensors(), 4)


@pytest.mark.slow
def test_a_run_saves_the_average_and_trains_on_the_weights(run, tmp_path):
    """The average has no influence on the training; what is saved at the end is the average."""
    words = ["log_every=1", "checkpoint.every=1"]
    plain = run("without", *words)
    result = run("with", *words, "optim.ema=0.9")
    one, other = tmp_path / "without", tmp_path / "with"
    assert (one / "log.jsonl").read_bytes() == (other / "log.jsonl").read_bytes()
    for step in (1, 5):
        files = [folder / f"checkpoint-{step}" / "model.safetensors" for folder in (one, other)]
        assert files[0].read_bytes() == files[1].read_bytes()
    raw, expected = plain.model.state_dict(), load_file(other / "checkpoint-5" / "average.safetensors")
    saved = UplvpForPreTraining.from_pretrained(other).state_dict()
    decay = min(0.9, 6 / 15)
    for name, value in expected.items():
        torch.testing.assert_close(saved[name], decay * value + (1 - decay) * raw[name], rtol=0, atol=1e-6)
    assert all(torch.equal(value, result.model.state_dict()[name]) for name, value in saved.items())
    assert any(not torch.equal(raw[name], saved[name]) for name in saved)
