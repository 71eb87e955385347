"""Deformable attention against transformers' own module: same parameters, same results, same gradients."""

import copy

import pytest
import torch
from torch import nn
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerPixelDecoderEncoderOnly,
    multi_scale_deformable_attention,
)

from uplvp_hf.models.deformable_attention import sample_levels, use_deformable_attention

SIZES = [(3, 4), (6, 7), (12, 5)]


def inputs(heads=4, channels=8, points=4, queries=31, batch=2, dtype=torch.float64, spread=4.0):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    tokens = sum(height * width for height, width in SIZES)
    value = random(batch, tokens, heads, channels).requires_grad_()
    reference = torch.rand(batch, queries, len(SIZES), 2, generator=generator, dtype=dtype)
    offsets = (spread * random(batch, queries, heads, len(SIZES), points, 2)).requires_grad_()
    weights = random(batch, queries, heads, len(SIZES), points).requires_grad_()
    return value, reference, offsets, weights


def by_grid_sample(value, reference, offsets, weights):
    scale = offsets.new_tensor([[width, height] for height, width in SIZES])
    locations = reference[:, :, None, :, None] + offsets / scale[:, None]
    return multi_scale_deformable_attention(value, SIZES, locations, weights)


@pytest.mark.parametrize("shape", [{}, {"heads": 1, "channels": 3, "points": 1}, {"queries": 1, "spread": 10.0}])
def test_samples_and_gradients_equal_grid_sample_in_double_precision(shape):
    value, reference, offsets, weights = inputs(**shape)
    ours = sample_levels(value, SIZES, reference, offsets, weights)
    theirs = by_grid_sample(value, reference, offsets, weights)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    gradient = torch.randn_like(ours)
    one = torch.autograd.grad(ours, (value, offsets, weights), gradient)
    other = torch.autograd.grad(theirs, (value, offsets, weights), gradient)
    for ours, theirs in zip(one, other, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_points_on_borders_and_outside():
    value, reference, offsets, weights = inputs(queries=4, points=2)
    offsets = offsets.detach().round()  # with the references below, points on corners and centers of cells
    reference = (torch.arange(4.0, dtype=torch.float64) / 2 - 0.5)[None, :, None, None].expand_as(reference)
    ours = sample_levels(value, SIZES, reference, offsets, weights)
    torch.testing.assert_close(ours, by_grid_sample(value, reference, offsets, weights), rtol=1e-10, atol=1e-12)


def test_lost_positions_stay_not_a_number():
    value, reference, offsets, weights = inputs(dtype=torch.float32)
    offsets = offsets.detach().clone()
    offsets[0, 3, 1], offsets[1, 2, 0, 0, 0, 0] = torch.nan, torch.inf
    result = sample_levels(value, SIZES, reference, offsets, weights)
    assert result[0, 3].view(4, -1).isnan().all(1).tolist() == [False, True, False, False]
    assert torch.isfinite(result[0, :3]).all()


@pytest.fixture(scope="module")
def encoders():
    torch.manual_seed(0)
    config = Mask2FormerConfig(feature_size=32, num_attention_heads=4, encoder_layers=2, encoder_feedforward_dim=48)
    theirs = Mask2FormerPixelDecoderEncoderOnly(config)
    for layer in theirs.layers:  # fresh ones look at the same places whatever they see
        nn.init.normal_(layer.self_attn.sampling_offsets.weight, std=0.3)
        nn.init.normal_(layer.self_attn.attention_weights.weight, std=0.3)
    ours = copy.deepcopy(theirs)
    use_deformable_attention(ours)
    assert {name: value.shape for name, value in ours.state_dict().items()} == {
        name: value.shape for name, value in theirs.state_dict().items()
    }
    return ours, theirs


def run(encoder, padding=None, dtype=torch.float32, **options):
    generator = torch.Generator().manual_seed(1)
    tokens = sum(height * width for height, width in SIZES)
    hidden = torch.randn(2, tokens, 32, generator=generator).to(dtype).requires_grad_()
    output = encoder(
        inputs_embeds=hidden, attention_mask=padding, spatial_shapes_list=SIZES, return_dict=True,
        position_embeddings=torch.randn(2, tokens, 32, generator=generator).to(dtype),
        valid_ratios=torch.ones(2, 3, 2, dtype=dtype), **options,
    )  # fmt: skip
    return hidden, output


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_encoder_equals_transformers(encoders, padded, training):
    padding = torch.rand(2, sum(h * w for h, w in SIZES), generator=torch.Generator().manual_seed(2)) < 0.3
    results = []
    for encoder in encoders:
        encoder.train(training).zero_grad()
        hidden, output = run(encoder, padding if padded else None, output_attentions=True)
        (output.last_hidden_state * hidden.detach().flip(1)).sum().backward()
        gradients = [hidden.grad, *(p.grad for p in encoder.parameters())]
        results.append(([output.last_hidden_state, *output.attentions], gradients))
    for one, other in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max().clamp(min=1)))


def test_a_repeated_run_gives_the_same_bits(encoders):
    runs = []
    for _ in range(2):
        hidden, output = run(encoders[0])
        runs.append((output.last_hidden_state, *torch.autograd.grad(output.last_hidden_state.sum(), hidden)))
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_half_precision_and_autocast(encoders):
    exact = run(encoders[0].eval())[1].last_hidden_state
    half = copy.deepcopy(encoders[0]).bfloat16()
    hidden, output = run(half, dtype=torch.bfloat16)
    output.last_hidden_state.float().square().mean().backward()
    assert output.last_hidden_state.dtype == hidden.grad.dtype == torch.bfloat16
    assert all(torch.isfinite(p.grad).all() for p in half.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run(encoders[0])[1].last_hidden_state
    for inexact in (output.last_hidden_state.float(), cast.float()):
        assert (inexact - exact).abs().mean() < 0.02


@pytest.mark.slow
def test_exported_and_compiled_the_results_are_the_same(encoders):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = encoders[0].eval()

        def forward(self, hidden):
            return self.encoder(
                inputs_embeds=hidden, spatial_shapes_list=SIZES, return_dict=True,
                position_embeddings=torch.zeros_like(hidden), valid_ratios=hidden.new_ones(hidden.shape[0], 3, 2),
            ).last_hidden_state  # fmt: skip

    hidden = torch.randn(2, sum(h * w for h, w in SIZES), 32, generator=torch.Generator().manual_seed(3))
    model = Wrapped()
    with torch.no_grad():
        exported = torch.export.export(model, (hidden,), dynamic_shapes={"hidden": {0: torch.export.Dim("batch")}})
        torch.testing.assert_close(exported.module()(hidden), model(hidden), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(exported.module()(hidden[:1]), model(hidden[:1]), rtol=1e-5, atol=1e-5)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(hidden), model(hidden), rtol=1e-5, atol=1e-5)
