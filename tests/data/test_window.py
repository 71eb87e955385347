import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode, functional as reference

from uplvp_hf.data import encode_mask
from uplvp_hf.data.window import Window

FILL = (124, 116, 104)
HEIGHT, WIDTH = 90, 130


def noise(height=HEIGHT, width=WIDTH, seed=0):
    """A smooth random image."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def shapes(seed=0):
    """Six overlapping discs, some cut by the border."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    centers = rng.integers(0, (WIDTH, HEIGHT), (6, 2))
    return [(x - a) ** 2 + (y - b) ** 2 < r * r for (a, b), r in zip(centers, rng.integers(6, 30, 6))]


@pytest.mark.parametrize("angle", [9.0, -4.5, 30.0])
def test_a_turned_image_is_the_one_of_torchvision_and_pil(angle):
    image, masks = noise(), shapes()
    window = Window(WIDTH, HEIGHT, 0, 0, WIDTH, HEIGHT, False, angle)
    pixels = window.pixels(image, FILL)
    pil = np.asarray(image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=FILL)).astype(int)
    theirs = reference.rotate(
        torch.from_numpy(np.array(image)).permute(2, 0, 1), angle, InterpolationMode.BILINEAR, fill=list(FILL)
    )
    assert np.abs(pixels.permute(1, 2, 0).numpy().astype(int) - pil).max() <= 1
    # torchvision fades into the fill along the outermost pixel of the image, PIL does not.
    difference = (pixels.int() - theirs.int()).abs().amax(0)
    assert (difference > 2).float().mean() < 0.03

    found, kept = window.masks([encode_mask(mask) for mask in masks], HEIGHT, WIDTH, 1)
    turned = reference.rotate(tv_tensors.Mask(np.stack(masks)), angle)
    assert kept == [index for index in range(6) if turned[index].any()]
    for mask, expected in zip(found.dense(), turned[kept]):
        assert (mask ^ expected).sum() <= 2, "ties of rounding only"


@pytest.mark.parametrize("seed", range(6))
def test_a_crop_of_a_turned_image_is_cut_from_the_whole_turned_image(seed):
    """Though only what the crop shows is resized and turned; at any scale, with and without mirroring."""
    rng = np.random.default_rng(seed)
    width = int(rng.integers(60, 260))
    height = round(width * HEIGHT / WIDTH)
    angle, flip = float(rng.uniform(-20, 20)), bool(seed % 2)
    image, rles = noise(seed=seed), [encode_mask(mask) for mask in shapes(seed)]
    whole = Window(width, height, 0, 0, width, height, False, angle)
    left, top = int(rng.integers(0, width // 2)), int(rng.integers(0, height // 2))
    part = Window(width, height, left, top, width // 2, height // 2, flip, angle)
    everything, all_kept = whole.masks(rles, HEIGHT, WIDTH, 1)
    found, kept = part.masks(rles, HEIGHT, WIDTH, 1)
    cut = everything.dense()[:, top : top + height // 2, left : left + width // 2]
    cut, seen = cut.flip(-1) if flip else cut, cut.flatten(1).any(1)
    assert kept == [index for index, shown in zip(all_kept, seen.tolist()) if shown] and len(kept) >= 1
    assert (found.dense() ^ cut[seen]).sum() <= 2 * len(kept)
    expected = whole.pixels(image, FILL)[:, top : top + height // 2, left : left + width // 2]
    expected = expected.flip(-1) if flip else expected
    assert (part.pixels(image, FILL).int() - expected.int()).abs().max() <= 2


def test_a_window_beyond_what_is_turned_into_it_is_filled():
    """A thin image turned by 45 degrees: its ends leave the frame, and the corners show nothing."""
    image, mask = Image.new("RGB", (400, 20), (255, 0, 0)), np.ones((20, 400), dtype=bool)
    window = Window(400, 20, 0, 0, 60, 20, False, 45.0)
    assert (window.pixels(image, FILL) == torch.tensor(FILL).view(3, 1, 1)).all()
    assert window.masks([encode_mask(mask)], 20, 400, 1)[1] == []


def test_without_an_angle_masks_are_as_if_turned_by_almost_nothing():
    rles = [encode_mask(mask) for mask in shapes(3)]
    plain = Window(200, 138, 30, 20, 120, 90, True).masks(rles, HEIGHT, WIDTH, 16)
    turned = Window(200, 138, 30, 20, 120, 90, True, 1e-9).masks(rles, HEIGHT, WIDTH, 16)
    assert plain[1] == turned[1] and (plain[0].dense() ^ turned[0].dense()).sum() <= 4
