"""Loss terms and costs against recorded tensors of the reference implementations."""

import pytest
import torch
from torch.nn import functional as F
from transformers.models.mask2former.modeling_mask2former import Mask2FormerSinePositionEmbedding

from uplvp_hf.models import losses as terms
from uplvp_hf.models.losses_mask2former import pairwise_mask_costs

pytestmark = pytest.mark.golden


def gradient(total: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(total, leaf, retain_graph=True)[0]


def test_focal_loss_and_its_gradients(golden, close):
    tensors, _ = golden("mmdet_primitives")
    logits = tensors["focal.logits"].requires_grad_()
    loss = 2 * terms.sigmoid_focal_loss(logits, tensors["focal.labels_bg_is_C"])  # recorded with weight 2
    for name, total in {
        "plain": loss.mean(),
        "weight": (loss * tensors["focal.weight"][:, None]).mean(),
        "weight2d": (loss * tensors["focal.weight2d"]).mean(),
        "avg7": (loss * tensors["focal.weight"][:, None]).sum() / 7,
    }.items():
        close(total, tensors[f"focal.loss.{name}"])
        close(gradient(total, logits), tensors[f"focal.grad.{name}"])


def test_class_costs(golden, close):
    tensors, _ = golden("mmdet_primitives")
    logits, labels = tensors["focal.logits"], tensors["focal_cost.labels"]
    cost = terms.focal_cost(logits, labels)
    weight = (tensors["focal_cost"] / cost).median()  # recorded with a weight of its own
    close(weight, weight.round())
    close(weight.round() * cost, tensors["focal_cost"])
    stacked = terms.focal_cost(logits.expand(3, 2, -1, -1), labels)
    close(stacked, cost.expand(3, 2, -1, -1))


def test_mask_costs(golden, close):
    tensors, _ = golden("mmdet_primitives")
    probability, target = tensors["mask.logits"].flatten(1).sigmoid(), tensors["mask.gt"].flatten(1)
    dice = terms.dice_cost(probability, target, 1e-3, "squared")
    close(dice, tensors["dice_cost.raw"])
    close(4 * dice, tensors["dice_cost.w4_sigmoid"])
    close(terms.mask_cost(probability, target), tensors["mask_cost.sigmoid"])
    close(2 * terms.mask_cost(probability, target), tensors["mask_cost.raw_prob"])
    close(5 * terms.dice_cost(probability, target, 1.0, "linear"), tensors["mmdet_dice_cost.w5_eps1_sigmoid"])
    cross_entropy, linear = pairwise_mask_costs(tensors["mask.logits"].flatten(1), target)
    close(5 * cross_entropy, tensors["mmdet_bce_cost.w5"])
    close(5 * linear, tensors["mmdet_dice_cost.w5_eps1_sigmoid"])


def test_box_terms(golden, close):
    tensors, _ = golden("mmdet_primitives")
    boxes, targets = tensors["box.a"].requires_grad_(), tensors["box.b"]
    close(-terms.box_giou_cost(boxes, targets), tensors["box.giou_matrix"])
    close(terms.box_giou_cost(boxes.expand(2, 3, -1, -1), targets)[1, 2], terms.box_giou_cost(boxes, targets))
    distance = (boxes[:, None] - targets[None]).abs().sum(-1)
    close(terms.box_l1_cost(boxes.expand(2, -1, -1), targets)[0], distance)
    # Both losses were recorded with a divisor of 4 (positives of the batch), whatever the number of pairs.
    total = 5 * distance.diagonal().sum() / 4
    close(total, tensors["box.loss.l1_w5"])
    close(gradient(total, boxes), tensors["box.grad.l1_w5"])
    total = 2 * terms.giou_loss(boxes, targets).sum() / 4
    close(total, tensors["box.loss.giou_w2"])
    close(gradient(total, boxes), tensors["box.grad.giou_w2"])


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_dice_losses(golden, kind, close):
    tensors, _ = golden("sp_losses")
    logits, target = tensors["logits"].requires_grad_(), tensors["gt" if kind == "hard" else "gt_soft"]
    probability = logits.sigmoid()
    flat = probability.flatten(1), target.flatten(1)
    for name, total in {
        "mmdet_dice_w4": 4 * terms.dice_loss(*flat, 1e-3, "squared").mean(),
        "mmdet_dice_naive_eps1_w5": 5 * terms.dice_loss(*flat, 1.0, "linear").mean(),
        "mmdet_bce_w1": F.binary_cross_entropy_with_logits(logits, target),
    }.items():
        close(total, tensors[f"loss.{name}.{kind}"])
        close(gradient(total, logits), tensors[f"grad.{name}.{kind}"])


@pytest.mark.parametrize("kind", ["norm", "raw"])
def test_position_encoding(golden, kind, close):
    """The one that K-Net adds to its coarsest level."""
    expected = golden("mmdet_primitives")[0][f"posenc.{kind}.full"]
    encoding = Mask2FormerSinePositionEmbedding(expected.shape[1] // 2, normalize=kind == "norm")
    close(encoding(expected.shape, expected.device, expected.dtype), expected)
