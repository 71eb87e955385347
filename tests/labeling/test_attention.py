"""Every last-block recipe against an independent reference, head by head, on random weights and non-square grids."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from labeling_helpers import tiny_clip, tiny_siglip

from uplvp_hf.labeling.encoders.attention import Layout, gaussian_bias, proxy_weights, run_blocks
from uplvp_hf.labeling.settings import ATTENTIONS, Recipe

GRID = 6, 4  # patches, not the native 4 x 4
KNOBS = {"sigma": 1.5, "scale": 5.0, "gem_depth": 2, "gem_iterations": 2, "beta": 0.9, "gamma": 2.0}


@pytest.fixture(scope="module", params=["clip", "siglip"])
def clip(request):
    return tiny_clip() if request.param == "clip" else tiny_siglip()


@pytest.fixture(scope="module")
def tokens(clip):
    pixels = torch.randn(2, 3, 8 * GRID[0], 8 * GRID[1], generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        return clip.embed(pixels)


def heads_of(a, *values):
    """One (B, T, head_dim) slice a head of every value."""
    d = a.head_dim
    for head in range(a.num_heads):
        yield [value[..., head * d : (head + 1) * d] for value in values]


def rows_to_one(scores):
    weights = scores.double().exp()
    return (weights / weights.sum(-1, keepdim=True)).float()


def near(prefix):
    """The gaussian by its formula, for every pair of patches."""
    count = prefix + GRID[0] * GRID[1]
    bias = torch.zeros(count, count)
    for i in range(count - prefix):
        for j in range(count - prefix):
            (yi, xi), (yj, xj) = divmod(i, GRID[1]), divmod(j, GRID[1])
            distance = (yi - yj) ** 2 + (xi - xj) ** 2
            bias[prefix + i, prefix + j] = KNOBS["scale"] * math.exp(-distance / (2 * KNOBS["sigma"] ** 2))
    return bias


def one_block(block, x, attention, prefix):
    a, h = block.self_attn, block.layer_norm1(x)
    q, k, v = a.q_proj(h), a.k_proj(h), a.v_proj(h)
    parts = []
    for qi, ki, vi in heads_of(a, q, k, v):
        pairs = [(qi, qi), (ki, ki), (qi, ki)]
        qq, kk, qk = (left @ right.transpose(1, 2) / math.sqrt(a.head_dim) for left, right in pairs)
        weights = {
            "vanilla": rows_to_one(qk),
            "maskclip": torch.eye(x.shape[1]).expand(len(x), -1, -1),
            "identity": torch.eye(x.shape[1]).expand(len(x), -1, -1),
            "sclip": rows_to_one(qq) + rows_to_one(kk),
            "clearclip": rows_to_one(qq),
            "naclip": rows_to_one(kk + (near(prefix) if attention == "naclip" else 0)),
        }[attention]
        parts.append(weights @ vi)
    y = a.out_proj(torch.cat(parts, dim=-1))
    if attention in ("vanilla", "maskclip", "sclip"):
        y = x + y
        y = y + block.mlp(block.layer_norm2(y))
    return y


def gem(blocks, x):
    path = x
    for block in blocks:
        a, h = block.self_attn, block.layer_norm1(x)
        q, k, v = a.q_proj(h), a.k_proj(h), a.v_proj(h)
        temperature = h.norm(dim=-1).mean(dim=-1).view(-1, 1, 1) / math.sqrt(a.head_dim)
        parts = []
        for qi, ki, vi in heads_of(a, q, k, v):
            mixed = 0
            for z in (qi, ki, vi):
                for _ in range(KNOBS["gem_iterations"]):
                    z = z / z.norm(dim=-1, keepdim=True)
                    z = rows_to_one(temperature * (z @ z.transpose(1, 2))) @ z
                z = z / z.norm(dim=-1, keepdim=True)
                mixed = mixed + rows_to_one(temperature * (z @ z.transpose(1, 2))) @ vi / 3
            parts.append(mixed)
        path = path + a.out_proj(torch.cat(parts, dim=-1))
        x = one_block(block, x, "vanilla", 0)
    return path


@pytest.mark.parametrize("attention", [name for name in ATTENTIONS if name != "proxy"])
def test_recipes_equal_the_reference(clip, tokens, attention):
    layers = clip.vision.encoder.layers
    with torch.inference_mode():
        got, grid = run_blocks(layers, tokens, Layout(GRID, clip.prefix), Recipe(attention, **KNOBS))
        x = tokens
        for layer in layers[: 1 if attention == "gem" else 2]:
            x = layer(x, None)
        want = gem(layers[1:], x) if attention == "gem" else one_block(layers[2], x, attention, clip.prefix)
    assert grid == GRID and got.shape == (2, 24, 48)
    torch.testing.assert_close(got, want[:, clip.prefix :], atol=1e-5, rtol=1e-4)


def lerp_at(values, y, x):
    """A bilinear sample of (H, W, C) values at cell coordinates, edges repeated."""
    height, width = values.shape[:2]
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    i, j = min(int(y), height - 2), min(int(x), width - 2)
    fy, fx = y - i, x - j
    top = (1 - fx) * values[i, j] + fx * values[i, j + 1]
    return (1 - fy) * top + fy * ((1 - fx) * values[i + 1, j] + fx * values[i + 1, j + 1])


def test_proxy_equals_the_reference_on_a_finer_non_square_grid(clip, tokens):
    height, width = 7, 9  # wider than high, while the patches are higher than wide: swapped axes would show
    guide = torch.randn(2, 5, height, width, generator=torch.Generator().manual_seed(4))
    guide = guide + 0.5  # a common direction, so that some affinities lie below the mean and some above
    recipe = Recipe("proxy", **KNOBS)
    layers = clip.vision.encoder.layers
    with torch.inference_mode():
        got, grid = run_blocks(layers, tokens, Layout(GRID, clip.prefix, guide), recipe)
        x = layers[1](layers[0](tokens, None), None)
        block = layers[2]
        v = block.self_attn.v_proj(block.layer_norm1(x))[:, clip.prefix :]
        assert grid == (height, width)
        for image in range(2):
            values = v[image].view(*GRID, -1)
            resized = torch.stack(
                [
                    lerp_at(values, (i + 0.5) * GRID[0] / height - 0.5, (j + 0.5) * GRID[1] / width - 0.5)
                    for i in range(height)
                    for j in range(width)
                ]
            )
            cells = guide[image].permute(1, 2, 0).reshape(-1, 5)
            cosine = F.cosine_similarity(cells[:, None], cells[None], dim=-1)
            logits = KNOBS["gamma"] * (cosine - KNOBS["beta"] * cosine.mean())
            weights = torch.where(logits < 0, 0, logits.exp())
            assert (weights == 0).any(), "nothing was masked: the test would not see it"
            weights = weights / weights.sum(dim=1, keepdim=True)
            want = block.self_attn.out_proj(weights @ resized)
            torch.testing.assert_close(got[image], want, atol=1e-5, rtol=1e-4)


def test_proxy_of_a_uniform_image_is_finite():
    weights = proxy_weights(torch.ones(1, 4, 2, 3))  # every affinity is the mean: all logits below 0
    assert torch.equal(weights[0], torch.eye(6))


def test_gaussian_of_a_non_square_grid_by_its_formula():
    for prefix in (0, 1):
        torch.testing.assert_close(gaussian_bias(*GRID, KNOBS["sigma"], KNOBS["scale"], prefix), near(prefix))


def test_key_smoothing_averages_with_positive_key_cosines(clip, tokens):
    layers, prefix = clip.vision.encoder.layers, clip.prefix
    with torch.inference_mode():
        got, _ = run_blocks(layers, tokens, Layout(GRID, prefix), Recipe("identity", key_smoothing=True))
        plain, _ = run_blocks(layers, tokens, Layout(GRID, prefix), Recipe("identity"))
        x = layers[1](layers[0](tokens, None), None)
        keys = layers[2].self_attn.k_proj(layers[2].layer_norm1(x))[:, prefix:]
        for image in range(2):
            for i in range(0, 24, 7):
                cosines = [max(0.0, F.cosine_similarity(keys[image, i], key, dim=0).item()) for key in keys[image]]
                want = sum(c * token for c, token in zip(cosines, plain[image])) / sum(cosines)
                torch.testing.assert_close(got[image, i], want, atol=1e-5, rtol=1e-4)


def test_bfloat16_follows_float32(clip, tokens):
    layers = clip.vision.encoder.layers
    rounded = copy.deepcopy(layers).bfloat16()
    for attention in ATTENTIONS:
        guide = torch.randn(2, 5, 7, 9, generator=torch.Generator().manual_seed(4))
        layout = Layout(GRID, clip.prefix, guide)
        with torch.inference_mode():
            exact, _ = run_blocks(layers, tokens, layout, Recipe(attention))
            half, _ = run_blocks(rounded, tokens.bfloat16(), layout, Recipe(attention))
        assert half.dtype == torch.bfloat16
        assert F.cosine_similarity(exact, half.float(), dim=-1).min() > 0.98


def test_unknown_names_and_impossible_knobs_are_refused(clip, tokens):
    bad = [
        ({"attention": "qq"}, "`attention` must be one of vanilla, maskclip, .*, got `qq`"),
        ({"sigma": 0.0}, "`sigma` must be above 0, got 0.0"),
        ({"attention": "gem", "gem_depth": 0}, "`gem_depth` must be at least 1, got 0"),
        ({"attention": "gem", "key_smoothing": True}, "not with gem"),
    ]
    for knobs, message in bad:
        with pytest.raises(ValueError, match=message):
            Recipe(**knobs)
    with torch.inference_mode(), pytest.raises(ValueError, match="'proxy' needs the features of another backbone"):
        run_blocks(clip.vision.encoder.layers, tokens, Layout(GRID, clip.prefix), Recipe("proxy"))
