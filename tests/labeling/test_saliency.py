"""The saliency labeler: batches, filters of the variants, where cells lie."""

import numpy as np
import pytest
import torch
from labeling_helpers import FixedEncoder, blob_image, propose, tiny_encoder

from uplvp_hf.labeling.labelers import saliency
from uplvp_hf.labeling.labelers.saliency import SaliencyLabeler


def everything(**options):
    """Options that filter nothing."""
    return {"min_center": 0.0, "max_width": 2.0, "min_score": 0.0} | options


def test_a_flat_map_gives_no_mask_and_no_nan():
    features = torch.ones(2, 4, 3, 3)
    assert not saliency.similarity_maps(features, saliency.make_queries(features)).isnan().any()
    for variant in saliency.VARIANTS:
        labeler = SaliencyLabeler(FixedEncoder(torch.ones(4, 3, 3)), image_size=96, variant=variant)
        (found,) = labeler([blob_image(0)])
        assert found.masks.shape == (0, 64, 96)


def test_the_odd_cells_are_found():
    feature = torch.zeros(2, 6, 9)
    feature[0] = 1
    feature[:, 3:5, 4:7] = torch.tensor([0.0, 1.0])[:, None, None]
    labeler = SaliencyLabeler(FixedEncoder(feature), image_size=288, **everything())
    (found,) = labeler([blob_image(0, 90, 60)])
    object_mask = min(found.masks, key=lambda mask: mask.sum())
    want = np.zeros((60, 90), bool)
    want[30:50, 40:70] = True
    assert (object_mask & want).sum() / (object_mask | want).sum() > 0.8
    shifted = SaliencyLabeler(FixedEncoder(feature), image_size=288, cell_offset=0.5, **everything())
    moved = min(shifted([blob_image(0, 90, 60)])[0].masks, key=lambda mask: mask.sum())
    assert (moved[5:, 5:] == object_mask[:-5, :-5]).all()  # half a cell of 10 pixels


def test_a_batch_of_maps_equals_its_maps():
    features = torch.randn(4, 12, 7, 10, generator=torch.Generator().manual_seed(0))
    features[1] = 1.0  # nothing survives there
    soft, scores, valid = saliency.propose_batch(features, min_cells=3)
    assert valid.sum(dim=1)[1] == 0 and valid.sum() > 3
    for feature, s, c, v in zip(features, soft, scores, valid):
        alone = propose(feature, min_cells=3)
        torch.testing.assert_close(s[v], alone[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(c[v], alone[1], atol=1e-5, rtol=1e-5)
        assert torch.equal(c[v], c[v].sort(descending=True).values)


def test_images_of_several_sizes_keep_their_place():
    labeler = SaliencyLabeler(tiny_encoder(), image_size=128, stage=-2, **everything(top=5))
    images = [blob_image(0), blob_image(1, 64, 80), blob_image(2)]
    for image, together in zip(images, labeler(images)):
        (alone,) = labeler([image])
        assert together.masks.shape[1:] == image.size[::-1] and 0 < len(together) <= 5
        assert (together.masks != alone.masks).mean() < 0.01
        assert together.scores == pytest.approx(alone.scores, abs=1e-4)
    stretched = SaliencyLabeler(tiny_encoder(), image_size=(100, 120), **everything())
    assert stretched._fit(640, 480, stretched.config.image_size) == (96, 128)
    assert [p.masks.shape[1:] for p in stretched(images)] == [i.size[::-1] for i in images]


def bars(*areas):
    """(N, 20, 20) masks of the given (top, bottom, left, right)."""
    masks = torch.zeros(len(areas), 20, 20)
    for mask, (top, bottom, left, right) in zip(masks, areas):
        mask[top:bottom, left:right] = 1
    return masks


@pytest.mark.parametrize(
    "variant, kept", [("offline", [True, False, False, False]), ("online", [True, True, True, False])]
)
def test_filters_of_the_variants(variant, kept):
    """A fine mask; one near the top (center row 3 of 20); one over the whole width; one that has decayed."""
    masks = bars((8, 14, 4, 12), (2, 5, 4, 12), (10, 14, 0, 20), (8, 14, 4, 12))
    filters = {k: v for k, v in saliency.VARIANTS[variant].items() if k != "when_empty"}
    assert saliency.keep_plausible(masks, torch.tensor([0.9, 0.8, 0.8, 0.69]), **filters).tolist() == kept


def test_filter_of_the_supervised_variant():
    """Large in both directions is dropped, large in one is not; extent counts gaps, unlike the projections' sums."""
    ring = bars((1, 19, 1, 19))[0]
    ring[2:18, 2:18] = 0
    masks = torch.stack([*bars((1, 19, 1, 19), (2, 18, 1, 19), (8, 12, 0, 20)), ring])
    filters = {k: v for k, v in saliency.VARIANTS["sup"].items() if k != "when_empty"}
    assert saliency.keep_plausible(masks, torch.ones(4), **filters).tolist() == [False, True, True, False]


def test_when_nothing_survives():
    images = [blob_image(0), blob_image(1)]
    options = {"image_size": 96, "stage": 0, "min_score": 1.5}
    skipped = SaliencyLabeler(tiny_encoder(), **options)(images)
    assert [len(p) for p in skipped] == [0, 0]
    best = SaliencyLabeler(tiny_encoder(), variant="online", **options)(images)
    whole = SaliencyLabeler(tiny_encoder(), image_size=96, stage=0, **everything())(images)
    for one, all_of_them in zip(best, whole):
        assert len(one) == 1 and (one.masks[0] == all_of_them.masks[0]).all()


def test_median_filter_of_masks():
    masks = torch.rand(2, 3, 6, 7, generator=torch.Generator().manual_seed(0))
    got = saliency.median_filter(masks) >= 0.5
    padded = np.pad(masks.numpy() >= 0.5, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    votes = sum(padded[..., a : a + 6, b : b + 7].astype(int) for a in range(3) for b in range(3))
    assert (got.numpy() == (votes >= 5)).all()


def test_settings_and_refusals():
    labeler = SaliencyLabeler(tiny_encoder(), variant="sup", min_score=0.5, kernel="linear", median=3)
    assert labeler.settings["max_extent"] == 0.8 and labeler.settings["min_score"] == 0.5
    half = tiny_encoder()
    half.dtype = torch.bfloat16
    assert (labeler.settings["dtype"], SaliencyLabeler(half).settings["dtype"]) == ("float32", "bfloat16")
    assert labeler.settings["when_empty"] == "best" and labeler.settings["scales"] == [1.0, 0.5, 0.25]
    assert labeler.calibrate(labeler.measure([])) == {}
    for options, message in [
        ({"variant": "paper"}, "`variant` must be one of offline, online, sup, got `paper`"),
        ({"kernel": "cubic"}, "`kernel` must be one of gaussian, linear, got `cubic`"),
        ({"when_empty": "all"}, "`when_empty` must be one of skip, best, got `all`"),
        ({"median": 4}, "has no middle"),
    ]:
        with pytest.raises(ValueError, match=message):
            SaliencyLabeler(tiny_encoder(), **options)
