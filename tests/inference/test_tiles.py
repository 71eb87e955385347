"""Windows, run lengths moved between frames, and the union of what windows saw, against masks painted globally."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from uplvp_hf.data import InstanceDataset, Row, decode_segmentation, empty_objects, encode_mask, mask_iou
from uplvp_hf.inference import Tiles, predict_rows
from uplvp_hf.inference.tiles import merge_windows, place_rle
from uplvp_hf.models.image_processing_uplvp import UplvpImageProcessor

BLACK = (0, 0, 0)


class ColorSegmenter(torch.nn.Module):
    """An analytic segmenter: every color but black is an instance, wherever its pixels are; red says the class.

    Keeps pixels of cells of 4 x 4 in which the color fills at least half, so what it sees of an object does not
    depend on the window as long as windows start at multiples of 4.
    """

    def __init__(self, queries: int = 12, miss: tuple[int, int, int] | None = None):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.queries, self.miss, self.largest = queries, miss, 0
        self.config = SimpleNamespace(id2label={0: "low", 1: "high"}, category_ids=[7, 9])

    def forward(self, pixel_values, pixel_mask):
        batch, _, height, width = pixel_values.shape
        self.largest = max(self.largest, height * width)
        scores = torch.zeros(batch, self.queries, 2)
        logits = torch.full((batch, self.queries, height // 4, width // 4), -9.0)
        for b, image in enumerate((pixel_values * 255).round().int()):
            colors = image.flatten(1).unique(dim=1).T.tolist()
            for query, color in enumerate(c for c in colors if tuple(c) not in (BLACK, self.miss)):
                inside = (image == torch.tensor(color)[:, None, None]).all(0)
                cells = torch.nn.functional.avg_pool2d(inside[None].float(), 4)[0] >= 0.5
                logits[b, query] = torch.where(cells, 9.0, -9.0)
                scores[b, query, int(color[0] >= 128)] = 0.5 + min(0.4, float(inside.sum()) / 1e5)
        return SimpleNamespace(class_queries_logits=scores.logit(), class_scores=scores, masks_queries_logits=logits)


def plain_processor(side):
    """Images of up to `side` pixels pass as they are."""
    return UplvpImageProcessor(size={"longest_edge": side}, do_resize=False, image_mean=[0, 0, 0], image_std=[1, 1, 1])


def dataset_of(*images):
    rows = [
        Row(image=Image.fromarray(p), image_id=n, file_name=f"{n}", width=p.shape[1], height=p.shape[0],
            objects=empty_objects())
        for n, p in enumerate(images, 1)
    ]  # fmt: skip
    return InstanceDataset(rows, [])


def predict(model, image, tiles):
    processor = plain_processor(max(image.shape))
    ((_, result),) = predict_rows(model, processor, dataset_of(image), tiles, progress=False, threshold=0.3)
    return result


def scene(height=224, width=320):
    """Objects within a window, across two, across four, across all columns; a ring; two that touch."""
    image = np.zeros((height, width, 3), dtype=np.uint8)
    image[20:60, 24:72] = (10, 0, 1)
    image[84:180, 68:180] = (200, 0, 2)
    image[192:212, 8:312] = (10, 0, 3)
    image[8:68, 140:212] = (200, 0, 4)
    image[24:52, 156:188] = BLACK
    image[72:188, 216:252] = (10, 0, 5)
    image[72:188, 252:300] = (10, 0, 6)
    return image


def sets_of(result, shape):
    """{(label, bytes of the mask)}, and how many there were."""
    masks = [decode_segmentation(rle, *shape) for rle in result["rle"]]
    return {(label, mask.tobytes()) for label, mask in zip(result["labels"].tolist(), masks)}, len(masks)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("size", "overlap"), [(128, 0.25), (160, 0.4), (96, 0.3)])
def test_tiles_give_the_masks_of_the_whole_image(size, overlap, full):
    image, tiles = scene(), Tiles(size, overlap, full)
    starts = {start for window in tiles.windows(320, 224) for start in window[:2]}
    assert len(tiles.windows(320, 224)) > 4 and (size == 96 or all(start % 4 == 0 for start in starts))
    model = ColorSegmenter()
    whole, tiled = predict(model, image, None), predict(ColorSegmenter(), image, tiles)
    assert len(whole["rle"]) == 6
    if size == 96:  # windows off the grid of cells: borders may move by a cell
        assert len(tiled["rle"]) == 6
        assert (mask_iou(whole["rle"], tiled["rle"]).max(1) > 0.9).all()
        return
    assert sets_of(tiled, (224, 320)) == sets_of(whole, (224, 320))
    for result in (whole, tiled):
        for rle, box in zip(result["rle"], result["boxes"].tolist()):
            rows, columns = np.nonzero(decode_segmentation(rle, 224, 320))
            assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert tiled["scores"].tolist() == sorted(tiled["scores"].tolist(), reverse=True)


def test_only_windows_go_through_the_model():
    model = ColorSegmenter()
    predict(model, scene(), Tiles(128, 0.25))
    assert model.largest == 128 * 128


def test_an_image_of_one_tile_is_as_without_tiles():
    image = scene()
    whole = predict(ColorSegmenter(), image, None)
    one = predict(ColorSegmenter(), image, Tiles(320))
    for key in ("scores", "labels", "boxes"):
        assert torch.equal(whole[key], one[key])
    assert whole["rle"] == one["rle"]


def test_a_real_model_on_one_tile_is_as_without_tiles(tiny_model_dir):
    from uplvp_hf.inference import load_model

    model, processor = load_model(tiny_model_dir, "cpu")
    data = dataset_of(scene(96, 128))
    settings = {"threshold": 0.02, "progress": False, "batch_size": 1}
    ((_, whole),) = predict_rows(model, processor, data, None, **settings)
    ((_, one),) = predict_rows(model, processor, data, Tiles(128), **settings)
    assert len(whole["rle"]) > 0 and whole["rle"] == one["rle"] and torch.equal(whole["scores"], one["scores"])
    ((_, many),) = predict_rows(model, processor, data, Tiles(64), **settings)
    assert all(rle["size"] == [96, 128] for rle in many["rle"])


def test_windows_cover_the_image_with_the_overlap_asked_for():
    generator = np.random.default_rng(0)
    for _ in range(200):
        width, height, size = (int(n) for n in generator.integers([1, 1, 32], [900, 900, 400]))
        overlap = float(generator.uniform(0.01, 0.85))
        windows = Tiles(size, overlap).windows(width, height)
        seen = np.zeros((height, width), dtype=bool)
        for x1, y1, x2, y2 in windows:
            assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
            assert x2 - x1 == min(size, width) and y2 - y1 == min(size, height)
            seen[y1:y2, x1:x2] = True
        assert seen.all() and len(set(windows)) == len(windows)
        for axis, length in ((0, width), (1, height)):
            starts = sorted({window[axis] for window in windows})
            assert all(b - a <= size - np.ceil(size * overlap) + 1 for a, b in itertools.pairwise(starts))
            assert length > size or starts == [0]


def test_run_lengths_are_moved_as_pixels_are():
    generator = np.random.default_rng(0)
    for trial in range(200):
        width, height = (int(n) for n in generator.integers(1, 30, 2))
        x1, y1 = int(generator.integers(0, width)), int(generator.integers(0, height))
        x2, y2 = int(generator.integers(x1 + 1, width + 1)), int(generator.integers(y1 + 1, height + 1))
        part = generator.random((y2 - y1, x2 - x1)) < (0.0, 0.5, 0.9, 1.0)[trial % 4]
        mask = np.zeros((height, width), dtype=bool)
        mask[y1:y2, x1:x2] = part
        moved = place_rle(encode_mask(part), (x1, y1, x2, y2), width, height)
        assert moved == encode_mask(mask)


def result_of(masks, labels, scores):
    from uplvp_hf.data import encode_masks, tight_boxes

    masks = np.stack(masks)
    return {
        "scores": torch.tensor(scores), "labels": torch.tensor(labels), "rle": encode_masks(masks),
        "boxes": torch.from_numpy(tight_boxes(masks)),
    }  # fmt: skip


def rectangle(x1, y1, x2, y2, width=64, height=64):
    mask = np.zeros((height, width), dtype=bool)
    mask[y1:y2, x1:x2] = True
    return mask


LEFT, RIGHT = (0, 0, 64, 64), (48, 0, 112, 64)  # 16 columns in common


def merged(left, right, **settings):
    return merge_windows([(LEFT, left), (RIGHT, right)], 112, 64, Tiles(64, 0.2, **settings))


def test_classes_are_kept_apart_and_the_best_score_is_kept():
    left = result_of([rectangle(30, 10, 64, 30)], [0], [0.6])
    right = result_of([rectangle(0, 10, 20, 30), rectangle(0, 10, 20, 30)], [0, 1], [0.8, 0.7])
    result = merged(left, right)
    assert result["labels"].tolist() == [0, 1] and torch.allclose(result["scores"], torch.tensor([0.8, 0.7]))
    assert result["boxes"].tolist() == [[30, 10, 68, 30], [48, 10, 68, 30]]
    assert (decode_segmentation(result["rle"][0], 64, 112) == rectangle(30, 10, 68, 30, 112)).all()


def test_neighbors_of_one_class_are_not_joined():
    """Two objects in the overlap, one above the other, seen by either window."""
    masks = [(50, 4, 60, 20), (50, 24, 60, 40)]
    left = result_of([rectangle(*box) for box in masks], [0, 0], [0.9, 0.8])
    right = result_of([rectangle(x1 - 48, y1, x2 - 48, y2) for x1, y1, x2, y2 in masks], [0, 0], [0.7, 0.6])
    result = merged(left, right)
    assert sorted(result["boxes"].tolist()) == [[50, 4, 60, 20], [50, 24, 60, 40]]


def test_a_cut_piece_inside_another_instance_is_left_out():
    """The right window sees little of the object and outlines it badly: no agreement, but nothing of its own."""
    left = result_of([rectangle(20, 10, 58, 50)], [0], [0.9])
    right = result_of([rectangle(0, 12, 10, 24)], [0], [0.8])
    assert len(merged(left, right)["rle"]) == 1
    assert len(merged(left, right, contained=1.0)["rle"]) == 1  # all of it is inside
    # A whole object of the same class in front of it is one of its own.
    right = result_of([rectangle(3, 12, 9, 24)], [0], [0.8])
    assert len(merged(left, right)["rle"]) == 2


def test_nothing_found():
    empty = {"scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
    result = merged({**empty, "rle": []}, {**empty, "rle": []})
    assert result["boxes"].shape == (0, 4) and result["rle"] == []


@pytest.mark.parametrize(
    "settings", [{"size": 16}, {"overlap": 0.0}, {"overlap": 0.9}, {"agreement": 0}, {"contained": 2}]
)
def test_values_out_of_range(settings):
    with pytest.raises(ValueError, match=r"at least 32|overlap|agreement"):
        Tiles(**{"size": 64, **settings})


def test_a_large_image_takes_no_memory_for_its_masks(tmp_path):
    """20 instances on 36 million pixels: their masks would take 720 MB, one of them 36 MB."""
    import tracemalloc

    side = 6000
    results = []
    for k in range(20):
        x, y = 250 * k, 100 + 200 * k
        results.append(((x, y, x + 512, y + 512), result_of([rectangle(10, 10, 500, 500, 512, 512)], [k % 2], [0.5])))
    tracemalloc.start()
    result = merge_windows(results, side, side, Tiles(512))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 1 < len(result["rle"]) <= 20 and peak < 36e6 / 4


def test_an_image_that_loses_a_window_is_listed_and_not_half_predicted():
    class Small(ColorSegmenter):
        def forward(self, pixel_values, pixel_mask):
            if (pixel_values * 255).round().eq(77).any():
                raise MemoryError
            return super().forward(pixel_values, pixel_mask)

    faulty, failures = scene(), []
    faulty[200, 300] = 77
    rows = dataset_of(scene(), faulty, scene())
    tiles = Tiles(128, overlap=0.25)
    found = list(
        predict_rows(Small(), plain_processor(320), rows, tiles, progress=False, failures=failures, threshold=0.3)
    )
    assert [row["image_id"] for row, _ in found] == [1, 3]
    (failure,) = failures
    assert failure["row"] == "row 1" and "window" in failure["reason"] and "not enough memory" in failure["reason"]
