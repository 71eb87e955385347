"""The saliency steps against tensors recorded from the original script."""

import pytest
import torch

from uplvp_hf.labeling import saliency
from uplvp_hf.labeling.instances import matrix_nms

pytestmark = pytest.mark.golden
close = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def recorded(golden):
    return golden("sp_freemask")[0]


@pytest.mark.parametrize("case", ["case0", "case1", "case2"])
def test_steps_equal_the_recorded_ones(recorded, case):
    want = {key.removeprefix(f"{case}."): value for key, value in recorded.items() if key.startswith(case)}
    queries = saliency.make_queries(want["feat"])
    torch.testing.assert_close(queries, want["queries_raw"], **close)
    soft = saliency.similarity_maps(want["feat"], queries)
    torch.testing.assert_close(soft, want["soft_masks"], **close)
    masks = soft >= 0.5
    assert torch.equal(masks.sum(dim=(1, 2)), want["sum_masks"])
    large = masks.sum(dim=(1, 2)) > 1
    assert torch.equal(large, want["keep_area"].bool())
    scores = saliency.maskness(soft[large], masks[large])
    torch.testing.assert_close(scores, want["maskness"], **close)
    order = scores.argsort(descending=True)
    assert torch.equal(order, want["sort1"])
    decayed = matrix_nms(masks[large][order], scores[order])
    torch.testing.assert_close(decayed, want["maskness_after_nms"], **close)
    assert torch.equal(decayed.argsort(descending=True)[:20], want["sort2"][:20])


@pytest.mark.parametrize("case", ["case0", "case1", "case2"])
def test_proposals_boxes_and_filters_equal_the_recorded_ones(recorded, case):
    soft, scores = saliency.propose(recorded[f"{case}.feat"])
    masks = (soft >= 0.5).float()
    torch.testing.assert_close(scores, recorded[f"{case}.topk_maskness"], **close)
    assert torch.equal(masks, (recorded[f"{case}.topk_masks"] >= 0.5).float())
    torch.testing.assert_close(saliency.mass_boxes(masks), recorded[f"{case}.topk_boxes"], **close)
    keep = saliency.keep_plausible(masks, scores)
    assert torch.equal(keep, recorded[f"{case}.keep_final"].bool())
    torch.testing.assert_close(scores[keep], recorded[f"{case}.final_maskness"], **close)
    torch.testing.assert_close(saliency.mass_boxes(masks[keep]), recorded[f"{case}.final_boxes"], **close)
    assert torch.equal(masks[keep], (recorded[f"{case}.final_masks"] >= 0.5).float())


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("kernel, sigma", [("gaussian", 2.0), ("gaussian", 0.5), ("linear", 2.0)])
def test_matrix_nms(recorded, kernel, sigma, agnostic):
    masks, scores = recorded["nms.masks"].bool(), recorded["nms.scores_desc"]
    labels = None if agnostic else recorded["nms.labels"]
    name = f"nms.matrix_nms{'_agnostic' if agnostic else ''}.{kernel}.sigma{sigma}"
    torch.testing.assert_close(matrix_nms(masks, scores, labels, kernel, sigma), recorded[name], **close)


@pytest.mark.parametrize("case", ["case0", "case1", "case2"])
def test_centre_of_mass(recorded, case):
    x, y, _, _ = saliency.mass_geometry((saliency.propose(recorded[f"{case}.feat"])[0] >= 0.5).float())
    torch.testing.assert_close(x, recorded[f"{case}.center_ws"], **close)
    torch.testing.assert_close(y, recorded[f"{case}.center_hs"], **close)
