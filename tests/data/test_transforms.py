import numpy as np
import pytest
import torch
from PIL import Image

from uplvp_hf.data import DataError, TrainTransform, encode_mask

HEIGHT, WIDTH = 90, 130


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def augment(transform, *arguments):
    """Pixels, dense masks, and the indices of those kept."""
    pixels, masks, kept = transform(*arguments)
    return pixels, masks.dense(), kept


def scene(seed):
    """A black image with four discs, each painted in its own pure color, and their masks."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    colors = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]], dtype=np.uint8)
    masks = []
    for index, color in enumerate(colors):
        disc = (x - rng.integers(10, 32) - 32 * index) ** 2 + (y - rng.integers(20, 70)) ** 2 < rng.integers(7, 14) ** 2
        disc &= (pixels == 0).all(axis=2)
        pixels[disc] = color
        masks.append(disc)
    return Image.fromarray(pixels), masks, colors


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("seed", range(8))
def test_masks_follow_their_pixels(size, seed):
    """Where a mask lies, its color lies; what differs is a fifth of the outline at most."""
    image, masks, colors = scene(seed)
    transform = TrainTransform(size, color_jitter=0)
    pixels, moved, kept = augment(transform, image, [encode_mask(m) for m in masks], HEIGHT, WIDTH, generator(seed))
    assert pixels.dtype == torch.uint8 and moved.dtype == torch.bool
    assert max(pixels.shape[1:]) <= size and moved.shape[1:] == pixels.shape[1:] and len(moved) == len(kept)
    painted = pixels.permute(1, 2, 0).numpy().astype(int)
    for index, color in enumerate(colors.astype(int)):
        seen = np.abs(painted - color).max(axis=2) < 128  # more than half of the pixel is of this color
        if index not in kept:
            assert seen.sum() < 16 + 12, "an instance that shows was dropped"
            continue
        mask = moved[kept.index(index)].numpy()
        outline = np.count_nonzero(mask[1:] != mask[:-1]) + np.count_nonzero(mask[:, 1:] != mask[:, :-1])
        assert np.count_nonzero(mask ^ seen) <= 0.2 * outline + 3


@pytest.mark.parametrize("size", [64, 128, 256])
def test_masks_are_not_shifted_against_their_pixels(size):
    """Over many draws the centers agree to a twentieth of a pixel (measured: 0.016)."""
    shifts = []
    for seed in range(40):
        image, masks, colors = scene(seed)
        pixels, moved, kept = augment(
            TrainTransform(size, color_jitter=0), image, [encode_mask(m) for m in masks], HEIGHT, WIDTH, generator(seed)
        )
        painted = pixels.permute(1, 2, 0).numpy().astype(int)
        for index, mask in zip(kept, moved.numpy()):
            seen = np.abs(painted - colors[index].astype(int)).max(axis=2) < 128
            shifts.append(np.argwhere(mask).mean(axis=0) - np.argwhere(seen).mean(axis=0))
    assert len(shifts) > 100 and np.abs(np.mean(shifts, axis=0)).max() < 0.05


def test_without_jitter_the_image_is_kept_exactly():
    image, masks, _ = scene(0)
    transform = TrainTransform(160, scale_range=(130 / 160, 130 / 160), flip=0, color_jitter=0)
    pixels, moved, kept = augment(transform, image, [encode_mask(m) for m in masks], HEIGHT, WIDTH, generator())
    np.testing.assert_array_equal(pixels.permute(1, 2, 0), np.asarray(image))
    np.testing.assert_array_equal(moved, np.stack(masks))
    assert kept == [0, 1, 2, 3]
    mirror = TrainTransform(160, scale_range=(130 / 160, 130 / 160), flip=1, color_jitter=0)
    pixels, moved, _ = augment(mirror, image, [encode_mask(m) for m in masks], HEIGHT, WIDTH, generator())
    np.testing.assert_array_equal(pixels.permute(1, 2, 0), np.asarray(image)[:, ::-1])
    np.testing.assert_array_equal(moved, np.stack(masks)[:, :, ::-1])


def test_masks_equal_resize_then_crop():
    """The masks of a plain nearest-exact resize of the whole mask hold every crop somewhere."""
    _, masks, _ = scene(3)
    transform = TrainTransform(64, scale_range=(1.5, 1.5), flip=0, color_jitter=0)
    _, moved, kept = augment(transform, scene(3)[0], [encode_mask(m) for m in masks], HEIGHT, WIDTH, generator(2))
    size = (round(HEIGHT * 96 / WIDTH), 96)
    whole = torch.nn.functional.interpolate(
        torch.from_numpy(np.stack(masks)[None]).float(), size=size, mode="nearest-exact"
    )[0].bool()
    found = [
        (top, left)
        for top in range(size[0] - moved.shape[1] + 1)
        for left in range(size[1] - moved.shape[2] + 1)
        if torch.equal(whole[kept, top : top + moved.shape[1], left : left + moved.shape[2]], moved)
    ]
    assert len(kept) >= 2 and len(found) == 1


def test_scale_stays_in_its_range():
    image = Image.new("RGB", (WIDTH, HEIGHT))
    transform, draws = TrainTransform(256, scale_range=(0.5, 1.5)), generator(1)
    sizes = [tuple(transform(image, [], HEIGHT, WIDTH, draws)[0].shape[1:]) for _ in range(200)]
    widths = np.array([w for _, w in sizes])
    assert widths.min() < 140 and widths.min() >= 128 and widths.max() == 256
    assert 0.35 < np.mean(widths == 256) < 0.65, "half of the factors are above 1"
    assert max(h for h, _ in sizes) <= round(1.5 * 256 * HEIGHT / WIDTH)


def test_emptied_instances_are_dropped_and_negatives_kept():
    image, masks, _ = scene(1)
    tiny = np.zeros((HEIGHT, WIDTH), dtype=bool)
    tiny[4:7, 4:7] = True
    codes = [encode_mask(tiny), *(encode_mask(m) for m in masks)]
    plain = TrainTransform(160, scale_range=(130 / 160, 130 / 160), flip=0)
    assert plain(image, codes, HEIGHT, WIDTH, generator())[2] == [1, 2, 3, 4]
    pixels, moved, kept = augment(plain, image, codes[:1], HEIGHT, WIDTH, generator())
    assert kept == [] and moved.shape == (0, *pixels.shape[1:]) and moved.dtype == torch.bool
    pixels, moved, kept = augment(plain, image, [], HEIGHT, WIDTH, generator())
    assert kept == [] and moved.shape == (0, HEIGHT, WIDTH)


def test_crops_that_lose_everything_are_drawn_again():
    """One small object; a crop shows it with a chance of about a quarter, three crops clearly more often."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[2:10, 2:10] = True
    image = Image.fromarray(np.where(mask[..., None], 255, 0).astype(np.uint8).repeat(3, axis=2))
    transform = TrainTransform(32, scale_range=(4, 4), flip=0, color_jitter=0)
    shown = []
    for seed in range(300):
        pixels, moved, kept = augment(transform, image, [encode_mask(mask)], HEIGHT, WIDTH, generator(seed))
        assert len(moved) == len(kept) == int((pixels[0] > 128).sum() >= 16)
        shown.append(len(kept))
    # Crop corners are uniform on (128 - 32 + 1) x (89 - 32 + 1); count those that show 16 px of the object.
    scale = 128 / WIDTH
    inside = (np.arange(128)[None, :] + 0.5) / scale, (np.arange(89)[:, None] + 0.5) * HEIGHT / 89
    resized = (inside[0] >= 2) & (inside[0] < 10) & (inside[1] >= 2) & (inside[1] < 10)
    chance = np.mean(
        [resized[t : t + 32, left : left + 32].sum() >= 16 for t in range(89 - 31) for left in range(128 - 31)]
    )
    assert np.mean(shown) == pytest.approx(1 - (1 - chance) ** 3, abs=0.05) and chance < 0.1


def test_color_jitter_is_mild_and_does_not_move_anything():
    image, masks, _ = scene(2)
    codes = [encode_mask(m) for m in masks]
    for seed in range(5):
        still = augment(TrainTransform(128, color_jitter=0), image, codes, HEIGHT, WIDTH, generator(seed))
        jittered = augment(TrainTransform(128, color_jitter=0.2), image, codes, HEIGHT, WIDTH, generator(seed))
        assert torch.equal(still[1], jittered[1]) and still[2] == jittered[2]
        difference = (still[0].int() - jittered[0].int()).abs()
        assert 0 < difference.max() < 160 and difference.float().mean() < 40


def test_only_the_passed_generator_is_used():
    image, masks, _ = scene(0)
    codes = [encode_mask(m) for m in masks]
    transform = TrainTransform(128)
    torch.manual_seed(0)
    first = augment(transform, image, codes, HEIGHT, WIDTH, generator(4))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    second = augment(transform, image, codes, HEIGHT, WIDTH, generator(4))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first[0], transform(image, codes, HEIGHT, WIDTH, generator(5))[0])


@pytest.mark.parametrize(
    "keywords",
    [
        {"size": 0},
        {"size": 64, "scale_range": (0, 1)},
        {"size": 64, "scale_range": (2, 1)},
        {"size": 64, "flip": 1.5},
        {"size": 64, "color_jitter": -0.1},
        {"size": 64, "min_area": 0},
    ],
)
def test_arguments_out_of_range(keywords):
    with pytest.raises(ValueError, match=list(keywords)[-1]):
        TrainTransform(**keywords)


def test_extreme_shapes_and_wrong_sizes():
    thin = Image.new("RGB", (2000, 1))
    pixels, _, _ = TrainTransform(64)(thin, [], 1, 2000, generator())
    assert pixels.shape[1] == 1 and pixels.shape[2] <= 64
    with pytest.raises(ValueError, match="2000x1"):
        TrainTransform(64)(thin, [], 2000, 1, generator())
    with pytest.raises(DataError, match="at least 3 points"):
        TrainTransform(64)(thin, [[[0, 0, 1, 1]]], 1, 2000, generator())
