"""Two views of an image: the map between them against decode, transform, compare; the changes of the strong one."""

import numpy as np
import pytest
import torch
from PIL import Image

from uplvp_hf.data import load_dataset_rows
from uplvp_hf.data.transforms import TrainTransform
from uplvp_hf.data.views import StrongColors, UnlabeledViews, collate_views, seen_from
from uplvp_hf.data.window import Window
from uplvp_hf.models.masks import encode_masks

PLAIN = StrongColors(0.0, 0.0, 0.0, 0.0, 0, (0.02, 0.2), (0, 0, 0))
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def blobs(height, width, seed):
    """(3, height, width) bool: ellipses, the last with a hole."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    masks = []
    for _ in range(3):
        center, radii = (
            generator.uniform(0.2, 0.8, 2) * (height, width),
            generator.uniform(0.1, 0.4, 2) * (height, width),
        )
        masks.append((((y - center[0]) / radii[0]) ** 2 + ((x - center[1]) / radii[1]) ** 2) < 1)
    masks[-1] &= ~masks[0]
    return np.stack(masks)


def brute_force(mask, window):
    """The mask (h, w) bool in the window, pixel by pixel: mirrored back, turned back, the nearest source pixel."""
    height, width = mask.shape
    shown = np.zeros((window.height, window.width), dtype=bool)
    angle = np.deg2rad(window.angle)
    middle_x, middle_y = window.resized_width / 2, window.resized_height / 2
    for row in range(window.height):
        for column in range(window.width):
            x = (window.width - 1 - column if window.flip else column) + window.left + 0.5 - middle_x
            y = row + window.top + 0.5 - middle_y
            x, y = np.cos(angle) * x - np.sin(angle) * y + middle_x, np.sin(angle) * x + np.cos(angle) * y + middle_y
            x, y = int(np.floor(x * width / window.resized_width)), int(np.floor(y * height / window.resized_height))
            shown[row, column] = 0 <= x < width and 0 <= y < height and mask[y, x]
    return shown


@pytest.mark.parametrize("angle", [0.0, 11.0])
@pytest.mark.parametrize("mirrored", [False, True], ids=["weak upright", "weak mirrored"])
@pytest.mark.parametrize("flip", [False, True], ids=["strong upright", "strong mirrored"])
def test_masks_of_the_weak_view_lie_where_they_are_in_the_strong_one(angle, mirrored, flip):
    """The mask is known in the weak view only, as a teacher gives it. Brute force undoes the mirroring of the weak view
    in pixels and looks every pixel of the strong view up. Turned, PIL rounds a few pixels of an edge otherwise."""
    weak = Window(61, 47, 0, 0, 61, 47, mirrored)
    strong = Window(83, 64, 13, 5, 52, 48, flip, angle)
    for mask in blobs(47, 61, seed=3):
        masks, kept = seen_from(strong, weak).masks(encode_masks(mask[None]), 47, 61, 1)
        expected = brute_force(mask[:, ::-1] if mirrored else mask, strong)
        assert kept == [0] and expected.any() and not expected.all()
        differing = (masks.dense()[0].numpy() != expected).sum()
        assert differing <= (0.01 * expected.sum() if angle else 0)


def test_the_pixels_of_both_views_agree_with_the_map():
    """An image of one bright object: where the mapped mask is, the strong view is bright."""
    mask = blobs(90, 120, seed=5)[0]
    image = Image.fromarray(np.repeat((255 * mask).astype(np.uint8)[..., None], 3, axis=2))
    transform = TrainTransform(96, (0.7, 1.6), 0.5, 0.0, rotate=8.0)
    weak_transform, draws = TrainTransform(96, (1.0, 1.0), 0.5, 0.0), torch.Generator().manual_seed(0)
    for _ in range(12):
        weak, strong = (one.draw_window(90, 120, draws) for one in (weak_transform, transform))
        assert (weak.left, weak.top, weak.width, weak.height) == (0, 0, weak.resized_width, weak.resized_height)
        seen = weak.pixels(image, (0, 0, 0))[0] > 127
        shown = strong.pixels(image, (0, 0, 0))[0] > 127
        masks, kept = seen_from(strong, weak).masks(encode_masks(seen[None]), weak.height, weak.width, 1)
        mapped = masks.dense()[0] if kept else torch.zeros_like(shown)
        edge = 2 * (strong.resized_width / weak.width) * 4 * mask.sum() ** 0.5  # two pixels along the outline
        assert int((mapped != shown).sum()) <= edge


def views_of(scenes_dir, colors=PLAIN, seed=0, flip=0.5):
    weak, strong = TrainTransform(64, (1.0, 1.0), flip, 0.0), TrainTransform(64, (0.6, 1.5), flip, 0.0)
    return UnlabeledViews(load_dataset_rows(scenes_dir), weak, strong, colors, MEAN, STD, seed)


def test_a_sample_depends_on_seed_epoch_and_index_alone(scenes_dir):
    views = views_of(scenes_dir, StrongColors(0.4, 0.1, 0.2, 0.5, 3, (0.02, 0.2), (9, 9, 9)))
    one, again = views.sample(2, 5), views_of(scenes_dir, views.colors).sample(2, 5)
    assert one["windows"] == again["windows"]
    assert all(torch.equal(one[name], again[name]) for name in ("weak", "strong"))
    others = views.sample(2, 6), views_of(scenes_dir, views.colors, seed=1).sample(2, 5)
    assert all(other["windows"] != one["windows"] for other in others)


def test_batches_are_padded_view_by_view(scenes_dir):
    samples = [views_of(scenes_dir).sample(index, 0) for index in range(3)]
    batch = collate_views(samples, pad_to=96)
    assert batch["weak"]["pixel_values"].shape == batch["strong"]["pixel_values"].shape == (3, 3, 96, 96)
    for index, sample in enumerate(samples):
        for name, window in zip(("weak", "strong"), batch["windows"][index], strict=True):
            real = batch[name]["pixel_mask"][index]
            assert int(real.sum()) == window.height * window.width == sample[name][0].numel()
            assert torch.equal(batch[name]["pixel_values"][index, :, : window.height, : window.width], sample[name])


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"gray": 1.0}, lambda before, after: bool((after == after[:1]).all())),
        ({"cutouts": 8}, lambda before, after: 0.02 < float((after == 7).all(0).float().mean()) < 1),
        (
            {"blur": 1.0},
            lambda before, after: after.float().diff(dim=2).abs().mean() < before.float().diff(dim=2).abs().mean(),
        ),
        ({"color": 0.4, "hue": 0.1}, lambda before, after: not torch.equal(before, after)),
        ({}, torch.equal),
    ],
    ids=["gray", "cut-out", "blur", "color", "none"],
)
def test_the_strong_view_changes_as_told(changes, check):
    pixels = torch.randint(20, 200, (3, 40, 50), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    values = {"color": 0.0, "hue": 0.0, "gray": 0.0, "blur": 0.0, "cutouts": 0, **changes}
    after = StrongColors(**values, cutout_area=(0.1, 0.2), fill=(7, 7, 7))(pixels, torch.Generator().manual_seed(4))
    assert after.shape == pixels.shape and after.dtype == torch.uint8 and check(pixels, after)


@pytest.mark.parametrize("size", [(1, 200), (200, 2), (3, 3)])
def test_thin_images_are_blurred_too(size):
    blurred = StrongColors(0.0, 0.0, 0.0, 1.0, 0, (0.02, 0.2), (0, 0, 0))
    pixels = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    for seed in range(5):
        assert blurred(pixels, torch.Generator().manual_seed(seed)).shape == pixels.shape
