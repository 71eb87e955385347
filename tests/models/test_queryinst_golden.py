"""QueryInst against tensors recorded from mmdetection: same weights and images, every intermediate result."""

import pytest
import torch
from torch.nn import functional as F

from uplvp_hf.conversion.queryinst import config_from_mmdet_queryinst, convert_mmdet_queryinst, queryinst_name
from uplvp_hf.models.configuration_queryinst import QueryInstConfig
from uplvp_hf.models.losses_queryinst import mask_targets
from uplvp_hf.models.matching import pair_up
from uplvp_hf.models.modeling_queryinst import QueryInstForInstanceSegmentation
from uplvp_hf.models.roi_masks import paste_masks

pytestmark = pytest.mark.golden


def build(tensors, info, training):
    """The recorded network: padding takes part."""
    settings = config_from_mmdet_queryinst(info["config"])
    model = QueryInstForInstanceSegmentation(QueryInstConfig(**settings, mask_padding=False))
    state = {name.removeprefix("state."): value for name, value in tensors.items() if name.startswith("state.")}
    missing, unexpected = model.load_state_dict(convert_mmdet_queryinst(state), strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)
    model.train(training)
    if info["config"]["backbone"].get("norm_eval", True):
        model.backbone.eval()
    return model


def sizes_mask(info, size):
    """1 on the images: the recording scales proposals by each image's own size."""
    mask = torch.zeros(len(info["img_metas"]), *size)
    for own, meta in zip(mask, info["img_metas"], strict=True):
        own[: meta["img_shape"][0], : meta["img_shape"][1]] = 1
    return mask


@pytest.fixture(scope="module")
def run(golden):
    tensors, info = golden("queryinst")
    model, batch = build(tensors, info, training=True), len(info["img_metas"])
    inner = {}

    def keep(name):
        return lambda module, inputs, output: inner.__setitem__(name, output)

    for index, stage in enumerate(model.model.stages):
        stage.dynamic_projection_norm.register_forward_hook(keep(f"dynamic{index}"))
    model.model.stages[0].dynamic_conv.register_forward_pre_hook(lambda module, args: inner.update(regions=args[1]))
    mask = sizes_mask(info, tensors["input.img"].shape[-2:])
    features = model.encode(tensors["input.img"], mask)
    queries = model.initial_queries(features)
    return {
        "tensors": tensors, "info": info, "model": model, "batch": batch, "features": features, "queries": queries,
        "layers": model.decode(features, queries), "inner": inner, "pixel_mask": mask,
        "masks": [tensors[f"input.gt_masks.{i}"].bool() for i in range(batch)],
        "labels": [tensors[f"input.gt_labels.{i}"] for i in range(batch)],
    }  # fmt: skip


def test_features_and_proposals(run, close):
    tensors, model, features = run["tensors"], run["model"], run["features"]
    for index, map_ in enumerate(model.backbone(tensors["input.img"]).feature_maps):
        close(map_, tensors[f"backbone.{index}"])
    for index, map_ in enumerate(features.maps):
        close(map_, tensors[f"neck.{index}"])
    assert torch.equal(features.prompt_map, features.maps[-1])
    close(run["queries"], tensors["rpn.proposal_feats"])
    close(model.model.initial_boxes(features), tensors["rpn.proposal_boxes"])
    close(features.sizes.flip(1).repeat(1, 2)[:, None], tensors["rpn.imgs_whwh"])


def test_every_stage(run, close):
    tensors, inner = run["tensors"], run["inner"]
    close(inner["regions"], tensors["train.stage0.bbox_roi_feats"])
    entering, boxes = run["queries"], run["model"].model.initial_boxes(run["features"])
    image = torch.arange(run["batch"]).repeat_interleave(boxes.shape[1])[:, None]
    for index, layer in enumerate(run["layers"]):
        theirs = {name: tensors[f"train.stage{index}.{name}"] for name in (
            "in_rois", "in_object_feats", "inner_dynamic_conv", "attn_feats", "object_feats", "cls_score",
            "bbox_delta", "decode_bbox_pred",
        )}  # fmt: skip
        close(torch.cat([image, boxes.flatten(0, 1)], 1), theirs["in_rois"])
        close(entering, theirs["in_object_feats"])
        close(F.relu(inner[f"dynamic{index}"]), theirs["inner_dynamic_conv"])
        close(layer.attended, theirs["attn_feats"])
        close(layer.queries, theirs["object_feats"])
        close(layer.class_logits, theirs["cls_score"])
        close(layer.deltas, theirs["bbox_delta"])
        close(layer.boxes.flatten(0, 1), theirs["decode_bbox_pred"])
        entering, boxes = layer.queries, layer.boxes
    assert f"train.stage{len(run['layers'])}.cls_score" not in tensors


def matched(run):
    """Costs per image and assignments, by the very functions that the loss uses."""
    model, features, layers = run["model"], run["features"], run["layers"]
    costs = model.loss_function.costs(
        torch.stack([layer.class_logits for layer in layers]),
        torch.stack([layer.boxes for layer in layers]),
        [run["tensors"][f"input.gt_bboxes.{i}"] for i in range(run["batch"])],
        run["labels"],
        features.sizes.flip(1).repeat(1, 2),
    )
    _, matches = model.loss(layers, features, run["masks"], run["labels"])
    return costs, matches


def test_costs_assignments_and_targets(run, close):
    tensors, costs_matches = run["tensors"], matched(run)
    costs, matches = costs_matches
    pairs = pair_up(matches, [len(labels) for labels in run["labels"]], torch.device("cpu"))
    boxes = torch.cat([tensors[f"input.gt_bboxes.{i}"] for i in range(run["batch"])])
    queries, classes = run["layers"][0].class_logits.shape[1:]
    for stage in range(len(run["layers"])):
        for i in range(run["batch"]):
            if len(run["labels"][i]) == 0:  # nothing is recorded
                assert len(matches[stage][i][0]) == 0
                continue
            close(costs[i][stage], tensors[f"train.stage{stage}.assign_cost.{i}"])
            expected = zip(tensors[f"train.stage{stage}.assign_query.{i}"].tolist(),
                           tensors[f"train.stage{stage}.assign_gt.{i}"].tolist(), strict=True)  # fmt: skip
            ours = zip(*(part.tolist() for part in matches[stage][i]), strict=True)
            assert set(ours) == set(expected)
        place = pairs.image[stage] * queries + pairs.query[stage]
        labels = torch.full((run["batch"] * queries,), classes)
        labels[place] = torch.cat(run["labels"])[pairs.target[stage]]
        assert torch.equal(labels, tensors[f"train.stage{stage}.labels"])
        assert (tensors[f"train.stage{stage}.label_weights"] == 1).all()  # as the unweighted class term has it
        targets = torch.zeros(run["batch"] * queries, 4)
        targets[place] = boxes[pairs.target[stage]]
        assert torch.equal(targets, tensors[f"train.stage{stage}.bbox_targets"])
        assert torch.equal((labels < classes).float()[:, None].expand(-1, 4),
                           tensors[f"train.stage{stage}.bbox_weights"])  # fmt: skip


def test_masks_in_matched_boxes(run, close):
    tensors, model, features, layers = run["tensors"], run["model"], run["features"], run["layers"]
    _, matches = matched(run)
    pairs = pair_up(matches, [len(labels) for labels in run["labels"]], torch.device("cpu"))
    boxes = torch.stack([layer.boxes for layer in layers]).detach()
    limits = torch.tensor(features.canvas).expand(run["batch"], 2)
    targets = None
    for stage, layer in enumerate(layers):
        image, query = pairs.image[stage], pairs.query[stage]
        close(
            torch.cat([image[:, None], boxes[stage, image, query]], 1),
            tensors[f"train.stage{stage}.mask_rois"],
        )
        assert torch.equal(
            torch.cat(run["labels"])[pairs.target[stage]], tensors[f"train.stage{stage}.mask_pos_labels"]
        )
        logits = model.model.predict_masks(stage, layer, features, image, query)
        close(logits, tensors[f"train.stage{stage}.mask_logits"])
        if targets is None:
            targets = mask_targets(run["masks"], boxes, limits, pairs, logits.shape[-1])
        assert torch.equal(targets[stage], tensors[f"train.stage{stage}.mask_targets"])


def test_losses_and_gradients(run, close):
    tensors, info = run["tensors"], run["info"]
    model = build(tensors, info, training=True)
    output = model(tensors["input.img"], run["pixel_mask"], run["masks"], run["labels"])
    assert output.masks_queries_logits is None  # mask heads have run on matched queries only
    names = {"class": "loss_cls", "box": "loss_bbox", "giou": "loss_iou", "mask": "loss_mask"}
    assert len(output.losses) == len(names) * model.num_stages
    for ours, value in output.losses.items():
        kind, stage = ours.split("_")
        close(value, tensors[f"loss.stage{stage}_{names[kind]}"], whole=output.loss.item())
    close(output.loss, tensors["loss_total"])
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    recorded = {queryinst_name(name) for name in info["grad_norm"]}
    assert recorded <= set(gradients)
    frozen = info["config"]["backbone"].get("frozen_stages", -1) >= 0
    assert all(frozen and name.startswith("model.backbone.") for name in set(gradients) - recorded)
    # RoIAlign has no gradient for its boxes, as that of mmdetection and torchvision; the recording has one.
    boxes = "rpn_head.init_proposal_bboxes.weight"
    whole = max(info["grad_norm"].values())
    for name, norm in info["grad_norm"].items():
        if name == boxes:
            continue
        total = gradients[queryinst_name(name)].double().norm()
        close(total, norm, share=1e-4, message=name, whole=whole)
    for name in (name.removeprefix("grad.") for name in tensors if name.startswith("grad.") and boxes not in name):
        close(gradients[queryinst_name(name)], tensors[f"grad.{name}"], share=1e-4, message=name, whole=whole)


@pytest.fixture(scope="module")
def evaluated(run):
    model = build(run["tensors"], run["info"], training=False)
    with torch.no_grad():
        features = model.encode(run["tensors"]["input.img"], run["pixel_mask"])
        return model, model.decode(features, model.initial_queries(features))[-1]


def test_last_stage_in_evaluation(run, evaluated, close):
    tensors, layer = run["tensors"], evaluated[1]
    close(layer.class_logits, tensors["test.cls_score"])
    close(layer.attended, tensors["test.attn_feats"])
    close(layer.queries, tensors["test.object_feats"])
    close(layer.boxes.flatten(0, 1), tensors["test.decode_bbox_pred"])
    close(layer.boxes.flatten(0, 1), tensors["test.mask_rois"][:, 1:])
    close(layer.roi_mask_logits.flatten(0, 1), tensors["test.mask_logits"])


def test_results_of_single_images(run, evaluated, close):
    """Top scores over (query, class), masks of that class pasted at the original size, alone and in the batch."""
    tensors, model = run["tensors"], evaluated[0]
    rcnn = run["info"]["config"]["test_cfg"]["rcnn"]
    with torch.no_grad():
        batched = model(tensors["input.img"], run["pixel_mask"])
    for i, meta in enumerate(run["info"]["img_metas"]):
        with torch.no_grad():
            alone = model(tensors["input.img"][i : i + 1], run["pixel_mask"][i : i + 1])
        for output, row in ((alone, 0), (batched, i)):
            scores, place = output.class_scores[row].flatten().topk(rcnn["max_per_img"])
            label, query = place % model.config.num_labels, place // model.config.num_labels
            boxes, grids = output.boxes[row, query], output.roi_mask_logits[row, query, label]
            theirs = {name.split(".")[2]: tensors[name] for name in tensors if name.startswith(f"test.img{i}.")}
            scale = torch.tensor(meta["scale_factor"])
            # Their lists have no order: line them up by the numbers that identify a row.
            for order, label_name, box_name, factor in (
                (match_rows(theirs["topk_labels"], theirs["topk_boxes_img_scale"], label, boxes),
                 "topk_labels", "topk_boxes_img_scale", torch.ones(4)),
                (match_rows(theirs["labels"], theirs["bboxes_scores"][:, :4] * scale, label, boxes),
                 "labels", "bboxes_scores", scale),
            ):  # fmt: skip
                assert torch.equal(theirs[label_name][order], label)
                close(boxes / factor, theirs[box_name][order][:, :4])
                if box_name == "bboxes_scores":
                    close(scores, theirs[box_name][order][:, 4])
                    pasted = paste_masks(grids.sigmoid(), boxes / factor, meta["ori_shape"][:2])
                    expected = theirs["masks"][order].bool()
                    differ = (pasted >= rcnn["mask_thr_binary"]) != expected
                    assert expected.any()
                    # Only where a probability lies on the threshold but for rounding.
                    assert ((pasted[differ] - rcnn["mask_thr_binary"]).abs() < 1e-5).all()
                else:
                    close(grids, theirs["mask_logits_of_topk"][order])


def match_rows(labels, boxes, our_labels, our_boxes):
    """For each of our rows, the place of the same label and nearest box among theirs; each place once."""
    distance = torch.cdist(our_boxes, boxes, compute_mode="donot_use_mm_for_euclid_dist")  # exact for any number
    distance = distance + 1e6 * (our_labels[:, None] != labels[None])
    order = distance.argmin(1)
    assert len(order.unique()) == len(order) and distance.min(1).values.max() < 1e-2
    return order
