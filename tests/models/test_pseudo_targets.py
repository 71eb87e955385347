"""Pseudo labels in the three set losses: weights, soft classes, what is left out; plain ones change nothing."""

import pytest
import torch

from uplvp_hf.models.losses_mask2former import MaskClassificationLoss
from uplvp_hf.models.matching import Pairs
from uplvp_hf.models.modeling_base_uplvp import SEGMENTERS
from uplvp_hf.models.pseudo_targets import PseudoTargets, leave_out

KNET = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "norm_groups": 8, "num_stages": 2}
QUERYINST = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "dynamic_channels": 8, "num_stages": 2,
    "num_mask_layers": 1, "finest_scale": 14,
}  # fmt: skip


@pytest.fixture(params=["mask2former", "knet", "queryinst"])
def model(request, tiny_segmenter):
    """A tiny segmenter of three classes, in evaluation mode but for QueryInst, whose masks are lost there."""
    backbone = tiny_segmenter("resnet")["backbone_config"]
    own = {
        "mask2former": tiny_segmenter("resnet"),
        "knet": {"backbone_config": backbone, "num_queries": 12, **KNET},
        "queryinst": {"backbone_config": backbone, "num_queries": 12, **QUERYINST},
    }[request.param]
    kind = SEGMENTERS[request.param]
    torch.manual_seed(0)
    values = {key: value for key, value in own.items() if key != "model_type"}
    config = kind.config_class(**values, num_labels=3)
    return kind(config).train()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[0, 4:30, 4:30] = True
    masks[1, 20:60, 36:60] = True
    return {
        "pixel_values": torch.randn(2, 3, 64, 64, generator=generator),
        "mask_labels": [masks, masks[:1]],
        "class_labels": [torch.tensor([0, 2]), torch.tensor([1])],
    }


def losses(model, batch, pseudo=None):
    torch.manual_seed(5)  # points
    return model(**batch, pseudo=pseudo).losses


def test_targets_that_say_nothing_change_nothing(model, batch):
    plain = losses(model, batch)
    same = PseudoTargets([torch.ones(2), torch.ones(1)], None, torch.zeros(2, 64, 64, dtype=torch.bool))
    for name, value in losses(model, batch, same).items():
        assert torch.allclose(value, plain[name]), name
    if type(model) is SEGMENTERS["mask2former"]:  # focal losses of hard labels and of certain ones are the same too
        same = PseudoTargets(class_targets=[torch.eye(3)[[0, 2]], torch.eye(3)[[1]]])
        assert all(torch.allclose(value, plain[name]) for name, value in losses(model, batch, same).items())


def test_weights_act_on_masks_and_boxes_alone(model, batch):
    plain = losses(model, batch)
    halved = losses(model, batch, PseudoTargets([torch.full((2,), 0.5), torch.full((1,), 0.5)]))
    for name, value in halved.items():
        share = 0.5 if name.split("_")[0] in ("mask", "dice", "box", "giou", "initial") else 1.0
        assert torch.allclose(value, share * plain[name]), name


def test_gradients_of_weighted_masks(model, batch):
    """Weights of zero: the mask terms have no gradient left."""
    nothing = losses(model, batch, PseudoTargets([torch.zeros(2), torch.zeros(1)]))
    masked = [value for name, value in nothing.items() if name.split("_")[0] in ("mask", "dice", "initial")]
    gradients = torch.autograd.grad(sum(masked), list(model.parameters()), allow_unused=True)
    assert all(gradient is None or not gradient.any() for gradient in gradients)


def test_background_is_left_out(model, batch):
    """Everywhere: without targets no class is taught. Where all is unsure: only what is matched is."""
    empty = {**batch, "mask_labels": [batch["mask_labels"][0][:0]] * 2, "class_labels": [torch.zeros(0).long()] * 2}
    taught = losses(model, empty, PseudoTargets(background=False))
    assert all(not value.any() for value in taught.values())
    plain = losses(model, batch)
    unsure = losses(model, batch, PseudoTargets(unsure=torch.ones(2, 64, 64, dtype=torch.bool)))
    for name in [name for name in plain if name.startswith("class_")]:
        assert 0 < unsure[name] < plain[name], name
    assert "semantic" not in plain or unsure["semantic"] == 0


def test_queries_lie_on_what_is_unsure_by_half_of_their_mask_or_box():
    unsure = torch.zeros(1, 32, 32, dtype=torch.bool)
    unsure[0, :, 16:] = True
    pseudo = PseudoTargets(unsure=unsure)
    logits = torch.full((1, 4, 8, 8), -1.0)
    logits[0, 0, :, 4:] = 1  # inside
    logits[0, 1, :, :5] = 1  # a fifth
    logits[0, 2, :, 2:6] = 1  # half; the last is empty
    assert pseudo.left_out_by_masks([logits, -logits]).tolist()[0] == [[True, False, True, False]]
    boxes = torch.tensor([[[[16.0, 0, 32, 32], [0, 0, 20, 32], [8, 4, 24, 9], [40, 40, 50, 50]]]])
    assert pseudo.left_out_by_boxes(boxes).tolist() == [[[True, False, True, False]]]


def test_matched_queries_are_never_left_out():
    pairs = Pairs(*torch.tensor([[[0]], [[0]], [[1]], [[0]]]))
    kept = leave_out(torch.ones(1, 1, 3), pairs, torch.ones(1, 1, 3, dtype=torch.bool))
    assert kept.tolist() == [[[0.0, 1.0, 0.0]]]


def test_soft_classes_by_hand():
    """One query, matched: cross-entropy with the teacher's probabilities, the rest of which is "no object"."""
    logits = torch.tensor([[[1.0, 2.0, -1.0]]])
    pairs = Pairs(*torch.tensor([[[0]], [[0]], [[0]], [[0]]]))
    pseudo = PseudoTargets(class_targets=[torch.tensor([[0.6, 0.3]])])
    (term,) = MaskClassificationLoss()._class_terms(
        [logits], [torch.tensor([0])], pairs, 1.0, pseudo, torch.zeros(1, 1, 1, dtype=torch.bool)
    )
    expected = -(torch.tensor([0.6, 0.3, 0.1]) * logits[0, 0].log_softmax(-1)).sum()
    assert term == pytest.approx(expected.item())
