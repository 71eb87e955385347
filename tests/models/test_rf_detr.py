"""RF-DETR's instance segmenter: the native model untouched, and its loss with assignments."""

import pytest
import torch
from transformers import RfDetrConfig, RfDetrForInstanceSegmentation
from transformers.image_transforms import center_to_corners_format
from transformers.loss.loss_rf_detr import RfDetrForSegmentationLoss
from vit_segmenters import GROUPS, QUERIES, RF_DETR

from uplvp_hf.models.errors import UserError
from uplvp_hf.models.image_processing_uplvp import UplvpImageProcessor
from uplvp_hf.models.masks import tight_boxes
from uplvp_hf.models.modeling_base_uplvp import coco_category_ids, distinct_names
from uplvp_hf.models.modeling_rf_detr import RfDetrSegmenter
from uplvp_hf.models.modeling_uplvp import UplvpForPreTraining


@pytest.fixture
def pair(tmp_path):
    """transformers' model with random heads (they start at zero), and ours, loaded from what it saves."""
    torch.manual_seed(0)
    native = RfDetrForInstanceSegmentation(RfDetrConfig(**RF_DETR))
    with torch.no_grad():
        for name, parameter in native.named_parameters():
            if "class_embed" in name or "bbox_embed" in name or "sampling_offsets" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    native.eval().save_pretrained(tmp_path / "native")
    return native, RfDetrSegmenter.from_pretrained(tmp_path / "native").eval()


@pytest.fixture
def batch(make_batch):
    return make_batch(counts=(3, 2), height=64, width=64)


@torch.no_grad()
def test_inference_is_native_to_the_bit(pair, batch, tmp_path):
    native, ours = pair
    mask = torch.ones(2, 64, 64)
    mask[1, :, 48:] = 0
    for pixel_mask in (None, mask):
        expected = native(batch["pixel_values"], pixel_mask=None if pixel_mask is None else pixel_mask.long())
        found = ours(batch["pixel_values"], pixel_mask)
        assert torch.equal(found.class_queries_logits, expected.logits)
        assert torch.equal(found.masks_queries_logits, expected.pred_masks)
        shown = torch.tensor([[64.0, 64.0], [64.0 if pixel_mask is None else 48.0, 64.0]]).repeat(1, 2)[:, None]
        torch.testing.assert_close(found.boxes, center_to_corners_format(expected.pred_boxes) * shown)
    assert ours.state_dict().keys() == native.state_dict().keys()
    ours.save_pretrained(tmp_path / "back")
    again, info = RfDetrForInstanceSegmentation.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(again.eval()(batch["pixel_values"]).pred_masks, native(batch["pixel_values"]).pred_masks)


@pytest.mark.parametrize("training", [True, False])
def test_the_loss_is_that_of_transformers_on_equal_points(pair, batch, training, monkeypatch):
    """Masks have 16 x 16 cells, so that both look at equally many points in the matching: 2 images x 32 boxes x 4
    numbers, as transformers counts, are as many. Equal shapes are given equal points."""
    native, ours = (model.train(training) for model in pair)

    def rand(*shape, device=None):
        shape = shape[0] if isinstance(shape[0], tuple | list) else shape
        return torch.empty(shape).uniform_(generator=torch.Generator().manual_seed(sum(shape)))

    labels = []
    for masks, classes in zip(batch["mask_labels"], batch["class_labels"], strict=True):
        boxes = tight_boxes(masks).float() / 64
        centers = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1)
        labels.append({"class_labels": classes, "boxes": centers, "masks": masks})
    features, _, layers = ours.run(batch["pixel_values"])
    groups, last, proposals = ours.groups, layers[-1], features.proposals
    monkeypatch.setattr(torch, "rand", rand)
    if training:
        expected, terms, _ = native_loss(native.config, layers, proposals, labels)
        found, matches = ours.loss(
            layers, features, batch["mask_labels"], batch["class_labels"], draw=lambda *call: rand(call[-1])
        )
        torch.testing.assert_close(sum(found.values()), expected, rtol=1e-4, atol=1e-4)
        names = {"class": ("ce", 1), "box": ("bbox", 5), "giou": ("giou", 2)}
        names |= {"mask": ("mask_ce", 5), "dice": ("mask_dice", 5)}
        for ours_suffix, suffix in (("_0", "_0"), ("_1", ""), ("_enc", "_enc")):
            for own, (theirs, weight) in names.items():
                value = weight * terms[f"loss_{theirs}{suffix}"].squeeze()
                torch.testing.assert_close(found[own + ours_suffix], value, rtol=1e-4, atol=1e-4)
        assert [len(query) for query, _ in matches[0]] == [3 * groups, 2 * groups]
        for query, target in matches[1]:  # every group finds every mask
            assert sorted((query // QUERIES * 10 + target).tolist()) == sorted(
                10 * group + mask for group in range(groups) for mask in set(target.tolist())
            )
    else:
        found, matches = ours.loss(layers, features, batch["mask_labels"], batch["class_labels"])
        assert [len(query) for query, _ in matches[0]] == [3, 2] and last.class_logits.shape[1] == QUERIES


def native_loss(config, layers, proposals, labels):
    last = layers[-1]
    return RfDetrForSegmentationLoss(
        last.class_logits, labels, "cpu", last.relative, last.mask_logits, config,
        torch.stack([layer.class_logits for layer in layers]), torch.stack([layer.relative for layer in layers]),
        [layer.mask_logits for layer in layers],
        proposals.class_logits, proposals.relative, proposals.mask_logits,
    )  # fmt: skip


def test_prompts_enter_every_group_and_leave_nothing_behind(pair, batch):
    ours, stages = pair[1].train(), []
    prompts = torch.zeros(2, GROUPS * QUERIES, 32, requires_grad=True)

    def inject(queries, features, stage):
        stages.append(stage)
        assert features.prompt_map.shape == (2, 32, 8, 8)
        return queries + prompts

    torch.manual_seed(1)
    features, queries, layers = ours.run(batch["pixel_values"], None, inject)
    assert stages == [0, 1] and queries.shape == prompts.shape
    torch.manual_seed(1)
    plain = ours.run(batch["pixel_values"])[2]
    assert torch.equal(layers[-1].mask_logits, plain[-1].mask_logits)
    decoder = ours.model.model.decoder
    assert not decoder._forward_pre_hooks and not any(layer._forward_pre_hooks for layer in decoder.layers)
    layers[-1].mask_logits.square().sum().backward()
    assert prompts.grad.abs().amin((0, 2)).gt(0).all()
    steps = ours.decode(features, ours.initial_queries(features))
    assert torch.equal(steps[-1].mask_logits, plain[-1].mask_logits)


def test_classes_go_by_name_in_every_head(pair, tmp_path):
    native = pair[0]
    native.save_pretrained(tmp_path)
    model = UplvpForPreTraining.from_pretraining(str(tmp_path), {0: "horse", 1: "fox"})
    heads = ["model.class_embed", *(f"model.model.enc_out_class_embed.{group}" for group in range(GROUPS))]
    for head in heads:
        ours, theirs = model.segmenter.get_submodule(head).weight, native.get_submodule(head).weight
        assert ours.shape == (2, 32) and torch.equal(ours[0], theirs[2])
    assert model.transfer_report.new_classes == ["fox"] and len(model.transfer_report.remapped) == 2 * len(heads)


def test_classes_that_are_numbered_by_coco_keep_its_ids():
    names = dict.fromkeys(range(91), "N/A") | {1: "person", 90: "toothbrush"}
    distinct = distinct_names(names)
    assert len(set(distinct.values())) == 91 and (distinct[0], distinct[12], distinct[90]) == (
        "N/A",
        "N/A 12",
        "toothbrush",
    )
    assert coco_category_ids(distinct) == list(range(91)) and coco_category_ids({0: "person"}) is None


@torch.no_grad()
def test_results_have_the_boxes_of_the_model(pair, batch):
    ours = pair[1]
    output = ours(batch["pixel_values"])
    processor = UplvpImageProcessor(size={"longest_edge": 64}, size_divisor=16)
    (result, _) = processor.post_process_instance_segmentation(output, threshold=0.0, target_sizes=[(128, 128)] * 2)
    scores, order = output.class_scores[0].flatten().sort(descending=True, stable=True)
    best = int(order[0]) // 3
    shown = (result["scores"] == scores[0]).nonzero().flatten()
    if len(shown):
        torch.testing.assert_close(result["boxes"][shown[0]], 2 * output.boxes[0, best])
    assert len(result["boxes"]) == len(result["scores"]) > 0


def test_other_canvases_are_refused(pair):
    ours = pair[1]
    assert ours.size_divisor == 16 and ours(torch.randn(1, 3, 32, 48)).masks_queries_logits.shape[-2:] == (8, 12)
    with pytest.raises(UserError, match="multiples of 16"):
        ours(torch.randn(1, 3, 40, 48))
    with pytest.raises(UserError, match="multiples of 16"):
        ours.fit_canvas(40)
