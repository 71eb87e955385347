"""Overlays and sheets: what must be tinted is tinted, and nothing else."""

import numpy as np
import pytest
from PIL import Image

from uplvp_hf.data import encode_masks
from uplvp_hf.evaluation.visualize import contact_sheet, draw_instances, instance_color


@pytest.fixture
def masks():
    masks = np.zeros((2, 600, 800), dtype=bool)
    masks[0, 300:500, 100:300] = True
    masks[1, 350:450, 500:700] = True
    return masks


def test_only_instances_and_their_captions_change(masks):
    image = Image.new("RGB", (800, 600), (128, 128, 128))
    drawn = draw_instances(image, masks, [0, 1], [0.9, 0.5], {0: "cat", 1: "dog"})
    assert drawn.size == image.size and drawn.mode == "RGB"
    changed = (np.asarray(drawn) != 128).any(-1)
    assert changed[masks.any(0)].all()
    assert not changed[510:].any() and not changed[:200].any()
    inside = np.asarray(drawn)[400, 200].astype(float)
    expected = 128 + 0.42 * (np.array(instance_color(0)) - 128)
    assert np.abs(inside - expected).max() < 2
    assert (np.asarray(image) == 128).all()
    outline = np.asarray(drawn)[499, 200]
    assert tuple(outline) == instance_color(0)


def test_masks_and_run_lengths_draw_the_same(masks):
    image = Image.new("RGB", (800, 600))
    assert draw_instances(image, masks, [0, 1]) == draw_instances(image, encode_masks(masks), [0, 1])


def test_colors_are_far_apart():
    colors = np.array([instance_color(index) for index in range(24)], dtype=float)
    distances = np.abs(colors[:, None] - colors[None]).sum(-1)
    assert distances[np.triu_indices(24, 1)].min() > 20
    assert np.abs(np.diff(colors, axis=0)).sum(1).min() > 150


def test_small_images_are_enlarged_and_empty_masks_are_skipped():
    image = Image.new("L", (100, 60))
    drawn = draw_instances(image, np.zeros((1, 60, 100), dtype=bool), [0], [1.0], {0: "nothing"})
    assert drawn.size == (500, 300) and not np.asarray(drawn).any()
    assert draw_instances(image, [], []).size == (500, 300)


def test_wrong_input_raises():
    image = Image.new("RGB", (100, 60))
    with pytest.raises(ValueError, match="2 labels for 1 masks"):
        draw_instances(image, np.zeros((1, 60, 100), dtype=bool), [0, 1])
    with pytest.raises(ValueError, match="height, width"):
        draw_instances(image, np.zeros((1, 100, 60), dtype=bool), [0])
    with pytest.raises(ValueError, match="no sheet"):
        contact_sheet([])


def test_contact_sheet_holds_every_image():
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)]
    images = [Image.new("RGB", (40 + 30 * i, 100), color) for i, color in enumerate(colors)]
    sheet = contact_sheet(images, columns=2, captions=["a very long caption that cannot fit " * 3] * 5, cell=64)
    pixels = np.asarray(sheet).reshape(-1, 3)
    for color, image in zip(colors, images):
        scale = 64 / max(image.size)
        expected = image.width * image.height * scale**2
        assert abs((pixels == color).all(1).sum() - expected) < 0.05 * expected + 40
