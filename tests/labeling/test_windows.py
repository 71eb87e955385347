"""Dense features and sliding windows on a tiny random model."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from labeling_helpers import blob_image, tiny_clip
from PIL import Image
from torch import nn

from uplvp_hf.labeling.encoders.attention import Layout, run_blocks
from uplvp_hf.labeling.encoders.backbone import Encoder
from uplvp_hf.labeling.encoders.pixels import images_to_pixels
from uplvp_hf.labeling.encoders.windows import View, dense_features, dense_grids, guide_features, window_starts
from uplvp_hf.labeling.settings import ATTENTIONS, Recipe

H, W = 48, 40  # not the native 32 x 32, not square: 6 x 5 patches


@pytest.fixture(scope="module")
def clip():
    return tiny_clip()


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(2, 3, H, W, generator=torch.Generator().manual_seed(3))


def test_default_is_naclip_with_its_own_gaussian(clip, pixels):
    want = dense_features(clip, pixels, Recipe("naclip", sigma=5.0, scale=1.0))
    assert torch.equal(dense_features(clip, pixels), want)


def test_recipes_differ(clip, pixels):
    names = [name for name in ATTENTIONS if name != "proxy"]
    maps = [dense_features(clip, pixels, Recipe(name)) for name in names]
    for i in range(len(maps)):
        for j in range(i):
            assert (maps[i] - maps[j]).abs().max() > 1e-2


@pytest.mark.parametrize("size", [(32, 32), (48, 40)])
def test_vanilla_is_the_projection_of_the_last_hidden_state(clip, size):
    pixels = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        vision = clip.model.vision_model
        last = vision(pixels, interpolate_pos_encoding=size != (32, 32)).last_hidden_state[:, 1:]
        want = F.normalize(clip.model.visual_projection(vision.post_layernorm(last)), dim=-1)
    got = dense_features(clip, pixels, Recipe("vanilla"))
    assert got.shape == (1, 24, size[0] // 8, size[1] // 8)
    torch.testing.assert_close(got.flatten(2).transpose(1, 2), want, atol=1e-5, rtol=1e-4)


def test_a_pixel_outside_the_grid_is_refused(clip):
    with pytest.raises(ValueError, match="30x32 input is not a whole number of 8-pixel patches"):
        dense_features(clip, torch.zeros(1, 3, 30, 32))


@pytest.mark.parametrize(
    "length, window, stride", [(100, 32, 16), (32, 32, 16), (20, 32, 16), (33, 32, 50), (96, 32, 32)]
)
def test_windows_cover_everything_once_at_least(length, window, stride):
    starts = window_starts(length, window, stride)
    covered = {p for s in starts for p in range(s, min(s + window, length))}
    assert covered == set(range(length)) and len(set(starts)) == len(starts)
    assert all(s + window <= max(length, window) for s in starts)


def text_vectors(count: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, 24, generator=torch.Generator().manual_seed(5)), dim=-1)


def test_windows_are_averaged(clip):
    """By hand: every window alone through the model, sums and counts per patch."""
    image, vectors = blob_image(0, 80, 48), text_vectors(3)
    (got,) = dense_grids(clip, [image], vectors, View(48, window=32, stride=16))
    pixels = clip.pixels([image], (48, 80))
    total, count = torch.zeros(3, 6, 10), torch.zeros(6, 10)
    for top in (0, 16):
        for left in (0, 16, 32, 48):
            part = dense_features(clip, pixels[..., top : top + 32, left : left + 32])[0]
            place = slice(top // 8, top // 8 + 4), slice(left // 8, left // 8 + 4)
            total[(slice(None), *place)] += torch.einsum("td,dhw->thw", vectors, part)
            count[place] += 1
    torch.testing.assert_close(got, total / count, atol=1e-5, rtol=1e-4)
    (features,) = dense_grids(clip, [image], None, View(48, window=32, stride=16))
    torch.testing.assert_close(torch.einsum("td,dhw->thw", vectors, features), got, atol=1e-5, rtol=1e-4)


def test_whole_images_without_windows(clip):
    image, vectors = blob_image(0, 80, 48), text_vectors(2)
    (got,) = dense_grids(clip, [image], vectors, View(80, "longer", window=None))
    want = torch.einsum("td,dhw->thw", vectors, dense_features(clip, clip.pixels([image], (48, 80)))[0])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_a_stride_finer_than_a_patch_gives_a_finer_map(clip):
    (fine,) = dense_grids(clip, [blob_image(0, 72, 72)], text_vectors(2), View(48, window=32, stride=4))
    assert fine.shape == (2, 12, 12)


def test_images_of_a_batch_do_not_influence_each_other(clip):
    """Two sizes of windows, three of images, batches that end in the middle of a position."""
    images = [blob_image(0), blob_image(1, 64, 80), Image.new("RGB", (30, 30), "red"), blob_image(2)]
    vectors, recipe = text_vectors(2), Recipe("identity")
    for view in (View(48, window=32, stride=16), View(48, "longer", window=40, stride=16)):
        for window_batch in (1, 5, 64):
            together = dense_grids(clip, images, vectors, view, recipe, window_batch=window_batch)
            for image, grid in zip(images, together):
                (alone,) = dense_grids(clip, [image], vectors, view, recipe)
                torch.testing.assert_close(grid, alone, atol=1e-5, rtol=1e-4)


class GuideNet(nn.Module):
    """Patches of 4 pixels, two features: how red, and how red the patch's left half is against its right."""

    config = SimpleNamespace(patch_size=4)

    def forward(self, pixels: torch.Tensor) -> SimpleNamespace:
        red = F.avg_pool2d(pixels[:, :1], (4, 2))
        return SimpleNamespace(feature_maps=(torch.cat([red[..., ::2], red[..., ::2] - red[..., 1::2]], dim=1),))


def test_proxy_runs_its_guide_on_the_same_windows_of_non_square_images(clip):
    guide = Encoder(GuideNet(), "guide", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    image, vectors = blob_image(0, 80, 48), text_vectors(3)
    recipe = Recipe("proxy")
    (got,) = dense_grids(clip, [image], vectors, View(48, window=32, stride=16), recipe, guide)
    assert got.shape == (3, 12, 20)  # on the guide's grid, twice as fine
    plain = images_to_pixels([image], (48, 80), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    pixels, total, count = clip.pixels([image], (48, 80)), torch.zeros(3, 12, 20), torch.zeros(12, 20)
    with torch.inference_mode():
        for top in (0, 16):
            for left in (0, 16, 32, 48):
                cut = (..., slice(top, top + 32), slice(left, left + 32))
                layout = Layout((4, 4), 1, guide(plain[cut])[-1])
                tokens, grid = run_blocks(clip.vision.encoder.layers, clip.embed(pixels[cut]), layout, recipe)
                part = F.normalize(clip.project(tokens), dim=-1)[0].T.reshape(-1, *grid)
                total[:, top // 4 : top // 4 + 8, left // 4 : left // 4 + 8] += torch.einsum(
                    "td,dhw->thw", vectors, part
                )
                count[top // 4 : top // 4 + 8, left // 4 : left // 4 + 8] += 1
    torch.testing.assert_close(got, total / count, atol=1e-4, rtol=1e-3)
    with pytest.raises(ValueError, match="cells are shifted"):
        shifted = Encoder(GuideNet(), "mobile", (0.5,) * 3, (0.5,) * 3, shift=0.5)
        dense_grids(clip, [image], vectors, View(48), recipe, shifted)


def test_a_dino_guide_sees_pixels_that_fit_its_own_patches(clip):
    from transformers import Dinov2Backbone, Dinov2Config

    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "patch_size": 14, "image_size": 56}
    model = Dinov2Backbone(Dinov2Config(**sizes)).eval()
    guide = Encoder(model, "dino", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), size_multiple=14)
    pixels = clip.pixels([blob_image(0)], (64, 96))
    plain = images_to_pixels([blob_image(0)], (64, 96), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    with torch.inference_mode():
        want = model(F.interpolate(plain, (70, 98), mode="bilinear")).feature_maps[-1]
    got = guide_features(guide, clip, pixels)
    assert got.shape == (1, 48, 5, 7)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)


def test_view_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="side 'both' is unknown"):
        View(48, "both")
    with pytest.raises(ValueError, match="stride 0 must be at least 1"):
        View(48, stride=0)
