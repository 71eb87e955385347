"""Class maps, components and the whole cutting against brute force."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from uplvp_hf.labeling.cutting.cut import cut_instances
from uplvp_hf.labeling.cutting.proposals import Proposals
from uplvp_hf.labeling.cutting.refine import pamr
from uplvp_hf.labeling.cutting.segments import class_layers, class_map, connected_segments
from uplvp_hf.labeling.settings import Cutting

SIZE = 53, 71
unrefined = partial(Cutting, refine=None)  # without an image


def noise(seed, classes=7, height=9, width=13, smooth=True):
    maps = torch.randn(classes, height, width, generator=torch.Generator().manual_seed(seed))
    return F.avg_pool2d(maps, 3, 1, 1) * 3 if smooth else maps


def enlarged(evidence, size):
    return F.interpolate(evidence[None], size, mode="bilinear", align_corners=False)[0]


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("threshold", [-9.0, 0.3, 1.0, 99.0])
@pytest.mark.parametrize("size, grid", [(SIZE, (9, 13)), ((40, 30), (10, 5)), ((9, 7), (1, 1)), ((31, 8), (4, 1))])
def test_class_map_is_the_argmax_of_all_enlarged_maps(smooth, threshold, size, grid):
    evidence = noise(1, 7, *grid, smooth=smooth)
    owners, values = class_map(evidence, size, threshold)
    best, label = enlarged(evidence, size).max(dim=0)
    best, label = best.numpy(), label.numpy()
    clear = np.abs(best - threshold) > 1e-5
    assert (owners[clear] == np.where(best > threshold, label, -1)[clear]).mean() > 0.999  # exact ties may differ
    inside = owners >= 0
    np.testing.assert_allclose(values[inside], best[inside], atol=1e-5)
    assert np.isneginf(values[~inside]).all()


def test_a_dropped_class_owns_nothing_and_hides_nothing():
    evidence = noise(2)
    evidence[3] = -torch.inf
    owners, _ = class_map(evidence, SIZE, 0.2)
    others = evidence[[0, 1, 2, 4, 5, 6]]
    want, _ = class_map(others, SIZE, 0.2)
    assert (owners == np.array([-1, 0, 1, 2, 4, 5, 6])[want + 1]).all() and (owners >= 0).any()


def test_layers_may_overlap():
    evidence = noise(3)
    areas = {label: area for label, area, _ in class_layers(evidence, SIZE, 0.5)}
    for label in range(7):
        want = enlarged(evidence, SIZE)[label].numpy() > 0.5
        assert (areas.get(label, np.zeros(SIZE, bool)) == want).mean() > 0.999
    assert sum(area.astype(int) for area in areas.values()).max() > 1


@pytest.mark.parametrize("fill", [False, True])
def test_segments_are_the_components_of_every_class(fill):
    evidence = noise(4)
    owners, values = class_map(evidence, SIZE, 0.1)
    got = connected_segments(owners, values, 12, fill)
    want = []
    for label in range(7):
        area = owners == label
        labeled, count = ndimage.label(ndimage.binary_fill_holes(area) if fill else area)
        masks = [labeled == k for k in range(1, count + 1)]
        want += [(label, mask) for mask in masks if mask.sum() >= 12]
    assert len(got) == len(want) > 5
    for segment, (label, mask) in zip(got, want):
        assert segment.label == label and (segment.full(SIZE) == mask).all()
        under = values[mask][np.isfinite(values[mask])]
        assert segment.peak == under.max() and segment.mean == pytest.approx(under.mean(), abs=1e-6)


@pytest.mark.parametrize("size", [(1, 9), (9, 1), (17, 23), (40, 8)])
def test_pieces_of_random_maps(size):
    """Specks, neighbors at row ends, single rows and columns."""
    rng = np.random.default_rng(size[0])
    owners, values = rng.integers(-1, 3, size).astype(np.int32), rng.random(size).astype(np.float32)
    for least, labels in ((1, None), (3, None), (1, {0, 2})):
        want = []
        for label in range(3) if labels is None else sorted(labels):
            labeled, count = ndimage.label(owners == label)
            want += [(label, labeled == k) for k in range(1, count + 1) if (labeled == k).sum() >= least]
        got = connected_segments(owners, values, least, labels=labels)
        assert [segment.label for segment in got] == [label for label, _ in want]
        assert all((segment.full(size) == mask).all() for segment, (_, mask) in zip(got, want))


def brute_force(evidence, size, threshold, peak, min_area, max_area, max_border, top):
    maps = enlarged(evidence, size).numpy()
    found = []
    for label in range(len(maps)):
        labeled, count = ndimage.label((maps.argmax(0) == label) & (maps.max(0) > threshold))
        for k in range(1, count + 1):
            mask = labeled == k
            edge = np.concatenate([mask[0], mask[-1], mask[1:-1, 0], mask[1:-1, -1]])
            if min_area <= mask.mean() <= max_area and maps[label][mask].max() >= peak and edge.mean() <= max_border:
                found.append((maps[label][mask].mean(), label, mask))
    return sorted(found, key=lambda entry: -entry[0])[:top]


@pytest.mark.parametrize("seed", range(4))
def test_cutting_equals_brute_force(seed):
    evidence = noise(seed)
    cutting = unrefined(0.3, 0.8, 0.0, min_area=0.01, max_area=0.2, max_border=0.1, top=6)
    got = cut_instances(evidence, SIZE, cutting, lambda mean: mean)
    want = brute_force(evidence, SIZE, 0.3, 0.8, 0.01, 0.2, 0.1, 6)
    assert len(got) == len(want) > 1 and got.labels.tolist() == [label for _, label, _ in want]
    for k, (score, _, mask) in enumerate(want):
        assert got.scores[k] == pytest.approx(score, abs=1e-4)
        assert (got.masks[k] != mask).sum() <= 2
    agnostic = cut_instances(evidence, SIZE, Cutting(**{**vars(cutting), "class_agnostic": True}), lambda mean: mean)
    assert agnostic.labels is None and (agnostic.masks == got.masks).all()


def test_few_masks_are_kept_whatever_the_number_of_components():
    """Thousands of specks and no least area: the best ones come back, as when all are looked at."""
    evidence = noise(5, 9, 60, 60, smooth=False)
    cutting = unrefined(0.0, 0.0, 0.0, min_area=0.0, top=5)
    got = cut_instances(evidence, (120, 120), cutting, lambda mean: mean)
    want = brute_force(evidence, (120, 120), 0.0, 0.0, 0.0, 0.9, 1.0, 5)
    np.testing.assert_allclose(got.scores, [score for score, _, _ in want], atol=1e-4)


@pytest.mark.parametrize("kind, count", [("none", 2), ("mask", 1), ("matrix", 1)])
def test_overlapping_classes_compete_only_when_agnostic(kind, count):
    evidence = torch.zeros(2, 20, 20)
    evidence[0, 4:14, 4:14] = 0.9
    evidence[1, 4:14, 4:15] = 0.8
    options = {"exclusive": False, "nms_kind": kind, "nms_sigma": 4.0, "max_area": 1.0}
    each = cut_instances(evidence, (20, 20), unrefined(0.5, 0.5, 0.1, **options), lambda mean: mean)
    assert each.labels.tolist() == [0, 1]
    both = cut_instances(
        evidence, (20, 20), unrefined(0.5, 0.5, 0.1, class_agnostic=True, **options), lambda mean: mean
    )
    assert len(both) == count


def test_ncut_splits_what_the_features_tell_apart():
    """One component, two halves of unlike features, a background of its own."""
    evidence, features = torch.zeros(1, 8, 12), torch.zeros(3, 8, 12)
    evidence[0, 2:6, 2:10] = 1.0
    features[0], features[1, 2:6, 2:6], features[2, 2:6, 6:10] = 1.0, 5.0, 5.0
    size = 80, 120
    whole = cut_instances(evidence, size, unrefined(0.5, 0.5, 0.0), lambda mean: mean)
    parts = cut_instances(evidence, size, unrefined(0.5, 0.5, 0.0, split="ncut"), lambda mean: mean, features=features)
    assert len(whole) == 1 and len(parts) == 2
    assert (parts.masks.sum(axis=0) == whole.masks[0]).all()  # nothing lost, nothing twice
    columns = sorted(mask.any(axis=0).nonzero()[0].mean() for mask in parts.masks)
    assert columns[0] < 60 < columns[1]
    assert abs(parts.masks[0].sum() - parts.masks[1].sum()) < 0.05 * whole.masks.sum()
    with pytest.raises(ValueError, match="needs the features"):
        cut_instances(evidence, size, unrefined(0.5, 0.5, 0.0, split="ncut"), lambda mean: mean)


def test_pamr_is_applied_to_the_enlarged_evidence_before_the_class_map():
    from labeling_helpers import blob_image

    image, evidence = blob_image(3, 96, 64), noise(6, 3, 8, 12)
    cutting = Cutting(0.4, 0.4, 0.0, refine_size=32)
    got = cut_instances(evidence, (64, 96), cutting, lambda mean: mean, image)
    small = torch.from_numpy(np.asarray(image.resize((48, 32), 2)).copy()).permute(2, 0, 1)[None] / 255
    refined = pamr(small, enlarged(evidence, (32, 48))[None], 10, (1, 2))[0]  # 8 and 16 pixels in 336
    want = brute_force(refined, (64, 96), 0.4, 0.4, 0.01, 0.9, 1.0, 20)
    assert len(got) == len(want) > 0 and got.labels.tolist() == [label for _, label, _ in want]
    for mask, (_, _, other) in zip(got.masks, want):
        assert (mask != other).sum() <= 2
    plain = cut_instances(evidence, (64, 96), unrefined(0.4, 0.4, 0.0), lambda mean: mean)
    assert len(plain) != len(got) or (plain.masks != got.masks).any()
    with pytest.raises(ValueError, match="needs the image"):
        cut_instances(evidence, (64, 96), cutting, lambda mean: mean)


def test_filters_on_the_box():
    evidence = torch.zeros(1, 40, 60)
    evidence[0, 5:15, 5:15], evidence[0, 25:29, 5:50] = 0.9, 0.8
    for options, count in (({}, 2), ({"max_aspect": 3.0}, 1), ({"min_side": 6}, 1), ({"min_score": 0.85}, 1)):
        cutting = unrefined(**{"threshold": 0.5, "peak": 0.5, "min_score": 0.0, **options})
        assert len(cut_instances(evidence, (40, 60), cutting, lambda mean: mean)) == count


def test_nothing_above_the_threshold():
    for agnostic in (False, True):
        empty = cut_instances(torch.zeros(2, 4, 4), SIZE, Cutting(0.5, 0.5, 0.0, class_agnostic=agnostic), float)
        assert isinstance(empty, Proposals) and empty.masks.shape == (0, *SIZE)
        assert (empty.labels is None) == agnostic


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match="`top` must be at least 1, got 0"):
        Cutting(top=0)
    for name, value in (("split", "watershed"), ("refine", "crf"), ("nms_kind", "soft")):
        with pytest.raises(ValueError, match=f"`{name}` must be one of .*, got `{value}`"):
            Cutting(**{name: value})
