"""Maps to masks: each helper against a plain version."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from uplvp_hf.labeling.cutting.proposals import (
    Proposals,
    apply_nms,
    border_fraction,
    connected_components,
    filter_proposals,
    mask_nms,
    matrix_nms,
    otsu_threshold,
    upsample_grid,
)
from uplvp_hf.models.masks import mask_iou_matrix


def test_upsample_grid_without_offset_is_interpolate():
    grid = torch.randn(3, 4, 6)
    want = F.interpolate(grid[None], (30, 50), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(upsample_grid(grid, (30, 50)), want, atol=1e-5, rtol=1e-4)


def test_upsample_grid_moves_a_cell_by_its_offset():
    """A map whose value is the cell's own position must read back the position of the pixels."""
    rows = (torch.arange(8) + 0.5 + 0.25)[:, None].expand(8, 5)  # cells lie a quarter of a cell lower
    columns = (torch.arange(5) + 0.5 - 0.5)[None].expand(8, 5)  # and half a cell further left
    large = upsample_grid(torch.stack([rows, columns]).float(), (80, 50), (0.25, -0.5))
    y = (torch.arange(80) + 0.5) / 10
    inner = slice(10, 70)
    torch.testing.assert_close(large[0, inner, 25], y[inner], atol=1e-4, rtol=0)
    torch.testing.assert_close(large[1, 40, 5:40], ((torch.arange(50) + 0.5) / 10)[5:40], atol=1e-4, rtol=0)


def test_otsu_separates_two_heaps():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0, 1, 500), rng.normal(10, 1, 100)])
    assert 3 < otsu_threshold(values) < 8
    assert otsu_threshold(np.full(9, 2.0)) == 2.0


def test_connected_components():
    mask = np.zeros((8, 10), bool)
    mask[1:4, 1:4] = True
    mask[2, 2] = False
    mask[4, 4] = True  # touches the ring at a corner only
    mask[6:8, 5:10] = True
    parts = connected_components(mask)
    assert [part.sum() for part in parts] == [10, 8, 1]
    assert (np.sum(parts, axis=0) == mask).all()
    assert [part.sum() for part in connected_components(mask, min_area=9, fill_holes=True)] == [10, 9]


def test_filters():
    masks = np.zeros((3, 10, 10), bool)
    masks[0, :, :5] = True  # half of the image, 18 of 36 border pixels
    masks[1, 4:6, 4:6] = True
    masks[2] = True
    proposals = Proposals(masks, np.array([0.5, 0.9, 0.8]))
    assert border_fraction(masks).tolist() == [0.5, 0.0, 1.0]
    for options, kept in [
        ({"min_area": 0.05}, [0, 2]),
        ({"max_area": 0.9}, [0, 1]),
        ({"max_border": 0.4}, [1]),
        ({"min_score": 0.8}, [1, 2]),
    ]:
        got = filter_proposals(proposals, **options)
        assert (got.masks == masks[kept]).all()


def test_mask_nms_per_class():
    masks = np.zeros((4, 10, 10), bool)
    masks[0, :5], masks[1, :6], masks[2, :5], masks[3, 7:] = True, True, True, True
    proposals = Proposals(masks, np.array([0.6, 0.9, 0.8, 0.1]), np.array([0, 0, 1, 0]))
    kept = mask_nms(proposals)
    assert kept.scores.tolist() == [0.9, 0.8, 0.1]
    agnostic = mask_nms(Proposals(masks, proposals.scores))
    assert agnostic.scores.tolist() == [0.9, 0.1]


def test_filters_on_box_sides():
    masks = np.zeros((4, 20, 20), bool)
    masks[0, 3, 2:12] = True  # 1 x 10
    masks[1, 2:6, 2:8] = True  # 4 x 6
    masks[2, 0:20, 5:8] = True  # 20 x 3
    proposals = Proposals(masks, np.ones(4))
    assert (filter_proposals(proposals, max_aspect=1.5, min_side=1).masks == masks[[1]]).all()
    assert (filter_proposals(proposals, max_aspect=7, min_side=1).masks == masks[[1, 2]]).all()
    assert (filter_proposals(proposals, min_side=3).masks == masks[[1, 2]]).all()


def test_kinds_of_suppression():
    masks = np.zeros((4, 10, 10), bool)
    masks[0, :5], masks[1, :6], masks[2, :5], masks[3, 7:] = True, True, True, True
    proposals = Proposals(masks, np.array([0.6, 0.9, 0.8, 0.1], np.float32), np.array([0, 0, 1, 0]))
    assert apply_nms(proposals, "none").scores == pytest.approx([0.9, 0.8, 0.6, 0.1])
    assert apply_nms(proposals, "mask").scores == pytest.approx([0.9, 0.8, 0.1])
    assert apply_nms(proposals, "mask", agnostic=True).scores == pytest.approx([0.9, 0.1])
    # Masks 0 and 1 overlap by 5 / 6; mask 2 is alone in its class, or overlaps mask 1 alike.
    decay = np.exp(-2 * (5 / 6) ** 2)
    got = apply_nms(proposals, "matrix", sigma=2.0)
    assert got.scores == pytest.approx([0.9, 0.8, 0.6 * decay, 0.1]) and got.labels.tolist() == [0, 1, 0, 0]
    got = apply_nms(proposals, "matrix", sigma=2.0, agnostic=True, min_score=0.15)
    assert got.scores == pytest.approx([0.9, 0.8 * decay])
    assert apply_nms(proposals, "matrix", kernel="linear").scores == pytest.approx([0.9, 0.8, 0.1, 0.1])
    assert len(apply_nms(proposals.take([]), "matrix")) == 0
    with pytest.raises(ValueError, match="'soft' is unknown"):
        apply_nms(proposals, "soft")


def test_three_equal_masks_leave_no_nan():
    masks = torch.ones(3, 4, 4, dtype=torch.bool)
    got = matrix_nms(masks, torch.tensor([0.9, 0.8, 0.7]), kernel="linear")
    assert got.tolist() == pytest.approx([0.9, 0, 0])


def test_iou_in_chunks():
    masks = torch.rand(5, 9, 11, generator=torch.Generator().manual_seed(0)) > 0.5
    want = [[((a & b).sum() / (a | b).sum()).item() for b in masks] for a in masks]
    assert mask_iou_matrix(masks, chunk=10).tolist() == [pytest.approx(row) for row in want]


def test_matrix_nms_by_loops():
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(6, 9, 9, generator=generator) > 0.5
    scores = torch.rand(6, generator=generator).sort(descending=True).values
    iou = [[((a & b).sum() / (a | b).sum()).item() for b in masks] for a in masks]
    got = matrix_nms(masks, scores, sigma=3.0)
    for j in range(6):
        decays = [1.0]
        for i in range(j):
            worst = max([iou[k][i] for k in range(i)], default=0.0)
            decays.append(np.exp(-3 * iou[i][j] ** 2) / np.exp(-3 * worst**2))
        assert got[j].item() == pytest.approx(scores[j].item() * min(decays), abs=1e-6)
    with pytest.raises(ValueError, match="'cubic' is unknown"):
        matrix_nms(masks, scores, kernel="cubic")
