"""Dense CLIP features against independent few-line references on a tiny random model."""

import math

import pytest
import torch
import torch.nn.functional as F
from labeling_helpers import blob_picture, tiny_clip
from PIL import Image

from uplvp_hf.labeling import dense_clip

H, W = 48, 40  # not the native 32 x 32, not square: 6 x 5 patches


@pytest.fixture(scope="module")
def clip():
    return tiny_clip()


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(2, 3, H, W, generator=torch.Generator().manual_seed(3))


def reference(model, pixels, attention, sigma, scale):
    """The table of recipes, one head and one token pair at a time where attention is concerned."""
    vision = model.vision_model
    states = vision(pixels, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
    x, block = states[-2], vision.encoder.layers[-1]
    a, h = block.self_attn, block.layer_norm1(states[-2])
    q, k, v = a.q_proj(h), a.k_proj(h), a.v_proj(h)
    tokens, d = x.shape[1], a.head_dim
    out = torch.zeros_like(v)
    columns = pixels.shape[3] // 8
    for head in range(a.num_heads):
        part = slice(head * d, (head + 1) * d)
        if attention in ("maskclip", "identity"):
            weights = torch.eye(tokens).expand(len(x), -1, -1)
        else:
            left, right = {"vanilla": (q, k), "clearclip": (q, q), "naclip": (k, k)}[attention]
            scores = left[..., part] @ right[..., part].transpose(1, 2) / math.sqrt(d)
            if attention == "naclip":
                for i in range(1, tokens):
                    for j in range(1, tokens):
                        (yi, xi), (yj, xj) = divmod(i - 1, columns), divmod(j - 1, columns)
                        distance = (yi - yj) ** 2 + (xi - xj) ** 2
                        scores[:, i, j] += scale * math.exp(-distance / (2 * sigma**2))
            weights = scores.softmax(-1)
        out[..., part] = weights @ v[..., part]
    y = a.out_proj(out)
    if attention in ("vanilla", "maskclip"):
        y = x + y
        y = y + block.mlp(block.layer_norm2(y))
    y = model.visual_projection(vision.post_layernorm(y[:, 1:]))
    return F.normalize(y, dim=-1).transpose(1, 2).reshape(len(x), -1, pixels.shape[2] // 8, columns)


@pytest.mark.parametrize("attention", dense_clip.ATTENTIONS)
def test_recipes_equal_the_reference(clip, pixels, attention):
    with torch.inference_mode():
        got = dense_clip.dense_features(clip.model, pixels, attention, sigma=1.5, scale=5.0)
        want = reference(clip.model, pixels, attention, 1.5, 5.0)
    assert got.shape == (2, 24, 6, 5)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_default_is_naclip_with_its_own_gaussian(clip, pixels):
    want = dense_clip.dense_features(clip.model, pixels, "naclip", sigma=5.0, scale=1.0)
    assert torch.equal(dense_clip.dense_features(clip.model, pixels), want)


def test_recipes_differ(clip, pixels):
    maps = [dense_clip.dense_features(clip.model, pixels, attention) for attention in dense_clip.ATTENTIONS]
    for i in range(len(maps)):
        for j in range(i):
            assert (maps[i] - maps[j]).abs().max() > 1e-2


def test_vanilla_is_the_projection_of_the_last_hidden_state(clip):
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        vision = clip.model.vision_model
        last = vision(pixels).last_hidden_state[:, 1:]  # native size: no interpolation at all
        want = F.normalize(clip.model.visual_projection(vision.post_layernorm(last)), dim=-1)
    got = dense_clip.dense_features(clip.model, pixels, "vanilla").flatten(2).transpose(1, 2)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_a_pixel_outside_the_grid_is_refused(clip):
    with pytest.raises(ValueError, match="30x32 input is not a whole number of 8-pixel patches"):
        dense_clip.dense_features(clip.model, torch.zeros(1, 3, 30, 32))
    with pytest.raises(ValueError, match="attention 'qq' is unknown; use one of vanilla"):
        dense_clip.dense_features(clip.model, torch.zeros(1, 3, 32, 32), "qq")


@pytest.mark.parametrize(
    "length, window, stride", [(100, 32, 16), (32, 32, 16), (20, 32, 16), (33, 32, 50), (96, 32, 32)]
)
def test_windows_cover_everything_once_at_least(length, window, stride):
    starts = dense_clip.window_starts(length, window, stride)
    covered = {p for s in starts for p in range(s, min(s + window, length))}
    assert covered == set(range(length)) and len(set(starts)) == len(starts)
    assert all(s + window <= max(length, window) for s in starts)


def test_windows_are_averaged(clip):
    """By hand: every window alone through the model, sums and counts per patch."""
    image = blob_picture(0, 80, 48)
    vectors = F.normalize(torch.randn(3, 24, generator=torch.Generator().manual_seed(5)), dim=-1)
    (got,) = dense_clip.similarity_grids(clip, [image], vectors, 48, window=32, stride=16, attention="naclip")
    pixels = clip.pixels([image], (48, 80))
    total, count = torch.zeros(3, 6, 10), torch.zeros(6, 10)
    for top in (0, 16):
        for left in (0, 16, 32, 48):
            part = dense_clip.dense_features(clip.model, pixels[..., top : top + 32, left : left + 32], "naclip")[0]
            place = slice(top // 8, top // 8 + 4), slice(left // 8, left // 8 + 4)
            total[(slice(None), *place)] += torch.einsum("td,dhw->thw", vectors, part)
            count[place] += 1
    torch.testing.assert_close(got, total / count, atol=1e-5, rtol=1e-4)


def test_a_stride_finer_than_a_patch_gives_a_finer_map(clip):
    vectors = F.normalize(torch.randn(2, 24, generator=torch.Generator().manual_seed(5)), dim=-1)
    (fine,) = dense_clip.similarity_grids(clip, [blob_picture(0, 72, 72)], vectors, 48, window=32, stride=4)
    assert fine.shape == (2, 12, 12)


def test_pictures_of_a_batch_do_not_influence_each_other(clip):
    images = [blob_picture(0), blob_picture(1, 64, 80), Image.new("RGB", (30, 30), "red")]
    vectors = F.normalize(torch.randn(2, 24, generator=torch.Generator().manual_seed(5)), dim=-1)
    settings = {"image_size": 48, "window": 32, "stride": 16, "attention": "identity"}
    together = dense_clip.similarity_grids(clip, images, vectors, window_batch=5, **settings)
    for image, grid in zip(images, together):
        (alone,) = dense_clip.similarity_grids(clip, [image], vectors, window_batch=64, **settings)
        torch.testing.assert_close(grid, alone, atol=1e-5, rtol=1e-4)


def test_load_clip_round_trip(clip, tmp_path):
    clip.model.save_pretrained(tmp_path)
    clip.tokenizer.save_pretrained(tmp_path)
    loaded = dense_clip.load_clip(str(tmp_path))
    assert loaded.image_mean == dense_clip.OPENAI_MEAN  # no preprocessor configuration
    assert (loaded.image_size, loaded.patch_size) == (32, 8)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_processor_type": "CLIPImageProcessor", "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}'
    )
    assert dense_clip.load_clip(str(tmp_path)).image_mean == (0.1, 0.2, 0.3)
    assert dense_clip.load_clip(str(tmp_path), image_mean=(0.5,) * 3, image_std=(0.5,) * 3).image_mean == (0.5,) * 3
