"""The saliency steps against tensors recorded from the original script."""

import pytest
import torch
from labeling_helpers import propose

from uplvp_hf.labeling.cutting.proposals import Proposals, apply_nms, matrix_nms, top_k
from uplvp_hf.labeling.labelers import saliency
from uplvp_hf.models.masks import tight_boxes

pytestmark = pytest.mark.golden


def mass_boxes(masks):
    """x1, y1, x2, y2 around the center of mass, as the script has them."""
    x, y, width, height = saliency.mass_geometry(masks)
    return torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], dim=1)


@pytest.fixture(scope="module")
def recorded(golden):
    return golden("sp_freemask")[0]


@pytest.mark.parametrize("case", ["case0", "case1", "case2"])
def test_steps_equal_the_recorded_ones(recorded, case, close):
    want = {key.removeprefix(f"{case}."): value for key, value in recorded.items() if key.startswith(case)}
    queries = saliency.make_queries(want["feat"])
    close(queries, want["queries_raw"])
    soft = saliency.similarity_maps(want["feat"], queries)
    close(soft, want["soft_masks"])
    masks = soft >= 0.5
    assert torch.equal(masks.sum(dim=(1, 2)), want["sum_masks"])
    large = masks.sum(dim=(1, 2)) > 1
    assert torch.equal(large, want["keep_area"].bool())
    scores = saliency.maskness(soft[large], masks[large])
    close(scores, want["maskness"])
    order = scores.argsort(descending=True)
    assert torch.equal(order, want["sort1"])
    decayed = matrix_nms(masks[large][order], scores[order])
    close(decayed, want["maskness_after_nms"])
    assert torch.equal(decayed.argsort(descending=True)[:20], want["sort2"][:20])


@pytest.mark.parametrize("case", ["case0", "case1", "case2"])
def test_proposals_boxes_and_filters_equal_the_recorded_ones(recorded, case, close):
    soft, scores = propose(recorded[f"{case}.feat"])
    masks = (soft >= 0.5).float()
    close(scores, recorded[f"{case}.topk_maskness"])
    assert torch.equal(masks, (recorded[f"{case}.topk_masks"] >= 0.5).float())
    close(mass_boxes(masks), recorded[f"{case}.topk_boxes"])
    keep = saliency.keep_plausible(masks, scores)
    assert torch.equal(keep, recorded[f"{case}.keep_final"].bool())
    close(scores[keep], recorded[f"{case}.final_maskness"])
    close(mass_boxes(masks[keep]), recorded[f"{case}.final_boxes"])
    assert torch.equal(masks[keep], (recorded[f"{case}.final_masks"] >= 0.5).float())


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("kernel, sigma", [("gaussian", 2.0), ("gaussian", 0.5), ("linear", 2.0)])
def test_matrix_nms(recorded, kernel, sigma, agnostic, close):
    masks, scores = recorded["nms.masks"].bool(), recorded["nms.scores_desc"]
    labels = None if agnostic else recorded["nms.labels"]
    name = f"nms.matrix_nms{'_agnostic' if agnostic else ''}.{kernel}.sigma{sigma}"
    close(matrix_nms(masks, scores, labels, kernel, sigma), recorded[name])


@pytest.mark.parametrize("case", ["case0", "case1", "case2"])
def test_center_of_mass(recorded, case, close):
    x, y, _, _ = saliency.mass_geometry((propose(recorded[f"{case}.feat"])[0] >= 0.5).float())
    close(x, recorded[f"{case}.center_ws"])
    close(y, recorded[f"{case}.center_hs"])


def test_suppression_of_unsorted_masks(recorded, close):
    """mask_matrix_nms of both code bases: sort, decay, filter by score, keep the best; one mask where none passes."""
    perm = recorded["nms.perm"]
    given = Proposals(
        recorded["nms.masks"].bool()[perm].numpy(),
        recorded["nms.scores_desc"][perm].numpy(),
        recorded["nms.labels"][perm].numpy(),
    )
    everything = apply_nms(given, "matrix")
    cases = {
        "default": everything,
        "filt": apply_nms(given, "matrix", min_score=0.3),
        "top": top_k(everything, 5),
        "filt_all": top_k(everything, 1),
    }
    assert not len(apply_nms(given, "matrix", min_score=0.99))
    for source in ("mask_matrix_nms", "mmdet_mask_matrix_nms"):
        for case, got in cases.items():
            name = f"nms.{source}.{case}"
            if f"{name}.scores" not in recorded:  # mmdet's returns nothing where no mask passes
                continue
            close(torch.from_numpy(got.scores), recorded[f"{name}.scores"])
            want = given.take(recorded[f"{name}.keep_inds"].numpy())
            assert (got.labels == want.labels).all() and (got.masks == want.masks).all()


def test_sides_of_tight_boxes(recorded):
    boxes = recorded["mask2bbox.boxes"]
    found = tight_boxes(recorded["mask2bbox.masks"].bool()).float()
    assert torch.equal(found[:, 2:] - found[:, :2], boxes[:, 2:] - boxes[:, :2])
