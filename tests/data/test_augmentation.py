"""Chains of augmentations on images whose objects are each painted in a color of their own."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from uplvp_hf.data import InstanceDataset, InstanceMasks, TrainingSet, TrainTransform, collate, encode_mask
from uplvp_hf.data.copy_paste import beside, choose, paste
from uplvp_hf.data.instance_masks import make_patch
from uplvp_hf.models.image_processing_uplvp import UplvpImageProcessor

HEIGHT, WIDTH = 180, 260
COLORS = np.array([[r, g, b] for r in (0, 255) for g in (0, 255) for b in (0, 255)][1:])  # 7, none black


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def painted(seed, colors, height=HEIGHT, width=WIDTH, radius=(18, 45)):
    """A black image with one disc of each color, of which a part may be hidden or outside, and their masks."""
    rng = np.random.default_rng(seed)
    pixels, masks = np.zeros((height, width, 3), dtype=np.uint8), []
    y, x = np.mgrid[0:height, 0:width]
    for color in colors:
        disc = np.zeros((height, width), dtype=bool)
        while disc.sum() < radius[0] ** 2:
            center = rng.integers(0, width), rng.integers(0, height)
            disc = (x - center[0]) ** 2 + (y - center[1]) ** 2 < rng.integers(*radius) ** 2
            disc &= (pixels == 0).all(axis=2)
        pixels[disc] = color
        masks.append(disc)
    return Image.fromarray(pixels), masks


def rows(count, per_image=3, **keywords):
    """Dataset of painted images; the category of an object is its color."""
    found = []
    for index in range(count):
        ids = [(index * per_image + k) % len(COLORS) for k in range(per_image)]
        image, masks = painted(index, COLORS[ids], **keywords)
        objects = {
            "segmentation": [encode_mask(mask) for mask in masks],
            "category_id": ids,
            "iscrowd": [0] * len(ids),
            "score": [0.5 + 0.01 * k for k in ids],
        }
        row = {"image": image, "image_id": index, "file_name": f"{index}.png", "objects": objects}
        found.append({**row, "width": image.width, "height": image.height})
    return InstanceDataset(found, [{"id": k, "name": str(k)} for k in range(len(COLORS))])


def samples_of(dataset, transform, **keywords):
    label_map = {k: k for k in range(len(COLORS))}
    return TrainingSet(dataset, transform, label_map, (0, 0, 0), (1, 1, 1), 0, **keywords)


def same(a, b):
    return all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


CHAINS = {
    "jitter": {"size": 256},
    "rotation": {"size": 256, "rotate": 30, "rotate_probability": 1},
    "short edges": {"size": 32, "short_edges": [150, 260], "longest_edge": 400},
    "stretched": {"size": 32, "short_edges": [150, 260], "longest_edge": 200, "keep_ratio": False},
    "all": {"size": 32, "short_edges": [150, 260], "longest_edge": 400, "rotate": 9},
}


@pytest.mark.parametrize("copy_paste", [0.0, 1.0])
@pytest.mark.parametrize("chain", CHAINS)
def test_masks_cover_their_color(chain, copy_paste):
    """Color and mask agree to an IoU of 0.95 for all large objects; labels and scores belong to the color."""
    samples = samples_of(
        rows(4), TrainTransform(**CHAINS[chain], color_jitter=0, fill=(0, 0, 0)), copy_paste=copy_paste
    )
    large = 0
    for index in range(4):
        for epoch in range(5):
            sample = samples.sample(index, epoch)
            pixels = (sample["pixel_values"] * 255).round().permute(1, 2, 0).numpy()
            labels, masks = sample["class_labels"].tolist(), sample["mask_labels"].dense().numpy()
            np.testing.assert_allclose(sample["prompt_scores"], [0.5 + 0.01 * k for k in labels], rtol=1e-5)
            nearest = np.abs(pixels[:, :, None] - np.vstack([COLORS, [[0, 0, 0]]])).sum(axis=3).argmin(axis=2)
            for label, mask in zip(labels, masks, strict=True):
                box = sample["mask_labels"].boxes[labels.index(label)]
                if labels.count(label) > 1 or mask.sum() < 1500 or min(box[2:] - box[:2]) < 30:
                    continue
                seen = nearest == label
                assert (mask & seen).sum() / (mask | seen).sum() > 0.95
                large += 1
    assert large > 10


def test_todays_samples_stay_when_all_options_are_off():
    """Pixels and masks are those of a plain version: resize by PIL, crop, mirror, jitter, in this order of draws."""

    def uniform(draws, low, high):
        return low + (high - low) * torch.rand((), generator=draws, dtype=torch.float64).item()

    def plain(image, masks, size, draws):
        for _ in range(3):
            scale = uniform(draws, 0.5, 1.5) * size / max(image.size)
            width, height = round(image.width * scale), round(image.height * scale)
            w, h = min(size, width), min(size, height)
            left, top = int(uniform(draws, 0, width - w + 1)), int(uniform(draws, 0, height - h + 1))
            step = -1 if uniform(draws, 0, 1) < 0.5 else 1
            x = ((left + np.arange(w) + 0.5) * (image.width / width)).astype(int)
            y = ((top + np.arange(h) + 0.5) * (image.height / height)).astype(int)
            moved = [mask[y][:, x][:, ::step] for mask in masks]
            if any(mask.sum() >= 16 for mask in moved):
                break
        sx, sy = image.width / width, image.height / height
        box = (left * sx, top * sy, min((left + w) * sx, image.width), min((top + h) * sy, image.height))
        pixels = np.array(image.resize((w, h), Image.Resampling.BILINEAR, box=box))[:, ::step].copy()
        pixels = torch.from_numpy(pixels).permute(2, 0, 1)
        for adjust in (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation):
            pixels = adjust(pixels, uniform(draws, 0.8, 1.2))
        return pixels, [mask for mask in moved if mask.sum() >= 16]

    dataset = rows(3, per_image=6)
    samples = samples_of(dataset, TrainTransform(128))
    for index in range(3):
        masks = [dataset.mask(index, k) for k in range(len(dataset[index]["objects"]["category_id"]))]
        for epoch in range(4):
            state = np.random.SeedSequence([0, epoch, index]).generate_state(1, np.uint64)
            draws = torch.Generator().manual_seed(int(state[0]) >> 1)
            pixels, expected = plain(dataset.load_image(index), masks, 128, draws)
            sample = samples.sample(index, epoch)
            assert torch.equal(sample["pixel_values"], pixels.to(torch.float32) / 255)
            np.testing.assert_array_equal(sample["mask_labels"].dense(), expected)


def test_new_options_that_are_off_draw_nothing():
    image, masks = painted(1, COLORS[:5])
    codes = [encode_mask(mask) for mask in masks]
    one, other, turned = generator(), generator(), generator()
    off = TrainTransform(128, rotate=0, rotate_probability=1)(image, codes, HEIGHT, WIDTH, one)
    plain = TrainTransform(128)(image, codes, HEIGHT, WIDTH, other)
    assert torch.equal(off[0], plain[0]) and off[1:] == plain[1:] and torch.equal(one.get_state(), other.get_state())
    TrainTransform(128, rotate=9)(image, codes, HEIGHT, WIDTH, turned)
    assert not torch.equal(turned.get_state(), one.get_state())
    never = samples_of(rows(3), TrainTransform(128), copy_paste=0.0)
    rare = samples_of(rows(3), TrainTransform(128), copy_paste=1e-9)
    assert all(same(never[index], rare[index]) for index in range(3)), "drawn last, so that all else stays"


@pytest.mark.parametrize("size", [(480, 640), (640, 480), (500, 1500), (333, 334)])
def test_short_edges_are_those_of_the_processor(size):
    """A fixed edge gives the size of inference, within the pixel that rounding may differ by."""
    image = Image.new("RGB", size[::-1])
    for settings, rule in (
        ({"short_edges": [200]}, {"shortest_edge": 200}),
        ({"short_edges": [200], "longest_edge": 333}, {"shortest_edge": 200, "longest_edge": 333}),
        ({"short_edges": [200], "longest_edge": 333, "keep_ratio": False}, {"height": 200, "width": 333}),
    ):
        shape = TrainTransform(32, **settings)(image, [], *size, generator())[0].shape
        processed = UplvpImageProcessor(size=rule, do_pad=False)(image, return_tensors="pt")["pixel_values"].shape
        assert max(abs(a - b) for a, b in zip(shape[1:], processed[2:], strict=True)) <= 1


def test_short_edges_are_drawn_evenly_and_nothing_is_cropped():
    image, masks = painted(2, COLORS[:4])
    draws, transform = generator(), TrainTransform(32, short_edges=[64, 67], color_jitter=0)
    heights = []
    for _ in range(200):
        pixels, _, kept = transform(image, [encode_mask(mask) for mask in masks], HEIGHT, WIDTH, draws)
        heights.append(pixels.shape[1])
        assert pixels.shape[2] == round(WIDTH * pixels.shape[1] / HEIGHT) and kept == [0, 1, 2, 3]
    counts = np.bincount(heights, minlength=68)[64:]
    assert counts.sum() == 200 and counts.min() > 30


def test_angles_are_drawn_in_their_range_and_with_their_probability():
    transform, draws = TrainTransform(128, rotate=9, rotate_probability=0.5), generator()
    angles = np.array([transform.draw_window(HEIGHT, WIDTH, draws).angle for _ in range(400)])
    assert 0.43 < np.mean(angles != 0) < 0.57 and np.abs(angles).max() <= 9
    turned = angles[angles != 0]
    assert abs(turned.mean()) < 1.2 and np.abs(turned).max() > 8 and turned.std() == pytest.approx(9 / 3**0.5, abs=0.6)


def test_what_is_turned_out_of_the_image_vanishes_after_three_attempts(monkeypatch):
    """A small object in the corner is lost by any turn of more than a few degrees."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[:6, :6] = True
    image = Image.new("RGB", (WIDTH, HEIGHT), (9, 9, 9))
    transform = TrainTransform(32, short_edges=[HEIGHT], rotate=45, rotate_probability=1, color_jitter=0)
    draw, angles, lost = transform.draw_window, [], 0
    monkeypatch.setattr(transform, "draw_window", lambda *given: angles.append(draw(*given)) or angles[-1])
    for seed in range(30):
        angles.clear()
        pixels, masks, kept = transform(image, [encode_mask(mask)], HEIGHT, WIDTH, generator(seed))
        assert pixels.shape == (3, HEIGHT, WIDTH) and len(masks) == len(kept) and 1 <= len(angles) <= 3
        if all(abs(window.angle) > 3 for window in angles):
            assert kept == [] and len(angles) == 3
            lost += 1
        else:
            assert kept == [0] or abs(angles[-1].angle) > 0.5
    assert lost > 15


def test_pasted_instances_hide_what_lies_below():
    """Against painting the layers in turn; sizes differ, so the offset is random."""
    for seed in range(12):
        below, below_masks = painted(seed, COLORS[:4])
        above, above_masks = painted(seed + 50, COLORS[4:], *((120, 300) if seed % 2 else (240, 200)))
        pixels = torch.from_numpy(np.array(below)).permute(2, 0, 1)
        others = torch.from_numpy(np.array(above)).permute(2, 0, 1)
        result, masks, kept, pasted = paste(
            pixels, InstanceMasks.from_dense(np.stack(below_masks)), others,
            InstanceMasks.from_dense(np.stack(above_masks)), 16, generator(seed),
        )  # fmt: skip
        assert torch.equal(pixels, torch.from_numpy(np.array(below)).permute(2, 0, 1)), "the input stays"
        labels = [*kept, *(4 + k for k in pasted)]
        result = result.permute(1, 2, 0).numpy()
        for label, mask, box in zip(labels, masks.dense().numpy(), masks.boxes, strict=True):
            np.testing.assert_array_equal(mask, (result == COLORS[label]).all(axis=2))
            y, x = np.nonzero(mask)
            assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1] and mask.sum() >= 16
        gone = set(range(7)) - set(labels)
        assert all((result == COLORS[label]).all(axis=2).sum() < 16 for label in gone)
        assert len(pasted) >= 1


def test_what_is_hidden_or_pasted_to_almost_nothing_is_dropped():
    size = (40, 50)
    corner, rest = np.zeros(size, dtype=bool), np.ones(size, dtype=bool)
    corner[:5, :3] = True  # 15 pixels
    rest[:5, :3] = False
    blank, whole = torch.zeros(3, *size, dtype=torch.uint8), InstanceMasks.from_dense(np.ones((1, *size), dtype=bool))
    over = InstanceMasks.from_dense(rest[None])
    _, masks, kept, pasted = paste(blank, whole, blank + 1, over, 16, generator())
    assert kept == [] and pasted == [0] and torch.equal(masks.dense()[0], torch.from_numpy(rest))
    _, masks, kept, pasted = paste(blank, whole, blank + 1, over, 15, generator())
    assert kept == [0] and torch.equal(masks.dense()[0], torch.from_numpy(corner))
    result, masks, kept, pasted = paste(
        blank, whole, blank + 1, InstanceMasks.from_dense(corner[None]), 16, generator()
    )
    assert kept == [0] and pasted == [] and not result.any(), "too small to be pasted, so it hides nothing"


def test_half_of_the_instances_are_chosen_up_to_the_room():
    draws = generator()
    chosen = [choose(10, 100, draws) for _ in range(300)]
    assert all(picked == sorted(set(picked)) for picked in chosen)
    assert np.mean([len(picked) for picked in chosen]) == pytest.approx(5, abs=0.3)
    assert choose(0, 5, draws) == [] and choose(10, 0, draws) == [] and choose(10, -3, draws) == []
    assert max(len(choose(10, 2, draws)) for _ in range(20)) == 2


def test_copy_paste_is_a_function_of_seed_epoch_and_index():
    """In worker processes too. The probability is kept, and an image never has more than max_instances."""
    pasted = samples_of(rows(8), TrainTransform(128), copy_paste=0.5, max_instances=6)
    plain = samples_of(rows(8), TrainTransform(128), max_instances=6)
    loader = torch.utils.data.DataLoader(pasted, 4, num_workers=2, collate_fn=list)
    for index, sample in enumerate(sample for batch in loader for sample in batch):
        assert same(sample, pasted[index])
    changed = more = 0
    for epoch in range(10):
        for index in range(8):
            one, two = plain.sample(index, epoch), pasted.sample(index, epoch)
            changed += not torch.equal(one["pixel_values"], two["pixel_values"])
            more += len(two["mask_labels"]) > len(one["mask_labels"])
            assert len(two["mask_labels"]) <= 6 and two["image_id"] == one["image_id"]
            assert len(two["mask_labels"]) == len(two["class_labels"]) == len(two["prompt_scores"])
    assert 20 < changed < 55 and more > 10


def test_copy_paste_bridges_images_that_cannot_be_opened():
    dataset = rows(3)
    broken = io.BytesIO(b"no image").getvalue()
    dataset.rows[1] = {**dataset.rows[1], "image": broken}
    samples = samples_of(dataset, TrainTransform(128), copy_paste=1)
    found = [samples.sample(0, epoch) for epoch in range(6)]
    assert all(sample["index"] == 0 for sample in found) and [f["row"] for f in samples.failures] == ["row 1"]


def test_a_neighbor_stands_beside_one_of_its_class():
    """Pasted pixels come with their mask; boxes of the two overlap by a third at most, or nearly touch."""
    plain = samples_of(rows(4, per_image=2), TrainTransform(128, color_jitter=0))
    samples = samples_of(rows(4, per_image=2), TrainTransform(128, color_jitter=0), side_by_side=1.0)
    added = 0
    for index, epoch in np.ndindex(4, 8):
        before, sample = plain.sample(index, epoch), samples.sample(index, epoch)
        masks, labels = sample["mask_labels"].dense(), sample["class_labels"].tolist()
        assert len(masks) == len(labels) == len(sample["prompt_scores"])
        pixels = (sample["pixel_values"] * 255).round().permute(1, 2, 0).long()
        for mask, label in zip(masks, labels):  # the edges of the resized discs are darker
            shade = pixels[mask].amax(1, keepdim=True)
            apart = (255 * pixels[mask] - shade * torch.tensor(COLORS[label])).abs().amax(1)
            assert ((apart <= 510) & (shade[:, 0] > 0)).float().mean() > 0.9
        if len(labels) <= len(before["class_labels"]):
            continue
        added += 1
        assert labels.count(labels[-1]) == before["class_labels"].tolist().count(labels[-1]) + 1 >= 2
    assert added > 10


def test_beside_is_a_side_of_the_anchor():
    anchor, patch = (
        make_patch(np.ones(size, dtype=bool), *at) for size, at in (((30, 20), (50, 40)), ((24, 40), (7, 3)))
    )
    sides, draws = set(), generator()
    for _ in range(200):
        right, down = beside(anchor, patch, 120, 130, draws)
        left, top = patch.left + right, patch.top + down
        across = min(left + 40, 70) - max(left, 50)  # of the boxes
        along = min(top + 24, 70) - max(top, 40)
        assert across > -1 and along > -1
        assert across <= 20 / 3 + 1 or along <= 24 / 3 + 1
        sides.add("across" if across <= 20 / 3 + 1 else "along")
    assert sides == {"across", "along"}
    full = make_patch(np.ones((100, 100), dtype=bool))
    assert beside(full, full, 100, 100, draws) is None


def test_negatives_stay_and_take_pasted_instances():
    dataset = rows(2)
    dataset.rows[0]["objects"] = {key: [] for key in dataset.rows[0]["objects"]}
    assert len(samples_of(dataset, TrainTransform(128))[0]["mask_labels"]) == 0
    samples = samples_of(dataset, TrainTransform(128), copy_paste=1)
    assert max(len(samples.sample(0, epoch)["mask_labels"]) for epoch in range(8)) > 0


def test_a_batch_of_different_sizes_is_padded_to_its_largest():
    samples = samples_of(rows(4), TrainTransform(32, short_edges=[100, 200], longest_edge=260))
    made = [samples[index] for index in range(4)]
    batch = collate(made)
    height, width = (max(sample["pixel_values"].shape[axis] for sample in made) for axis in (1, 2))
    assert batch["pixel_values"].shape[2:] == (-(-height // 32) * 32, -(-width // 32) * 32)
    assert all(masks.shape[1:] == batch["pixel_values"].shape[2:] for masks in batch["mask_labels"])


@pytest.mark.parametrize(
    "keywords",
    [
        {"rotate": 50},
        {"rotate_probability": 2},
        {"short_edges": []},
        {"short_edges": [200, 100]},
        {"short_edges": [100, 150, 200]},
        {"longest_edge": 100},
        {"keep_ratio": False},
        {"short_edges": [100], "keep_ratio": False},
        {"short_edges": [100], "longest_edge": 90},
    ],
)
def test_settings_that_do_not_fit(keywords):
    with pytest.raises(ValueError, match=list(keywords)[-1]):
        TrainTransform(64, **keywords)
    for name in ("copy_paste", "side_by_side"):
        with pytest.raises(ValueError, match=name):
            samples_of(rows(1), TrainTransform(64), **{name: 1.5})
