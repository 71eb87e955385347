"""K-Net against tensors recorded from the original: same weights and images, every intermediate result."""

import pytest
import torch
from torch.nn import functional as F

from uplvp_hf.conversion.knet import config_from_mmdet_knet, convert_mmdet_knet
from uplvp_hf.models.configuration_knet import SEMANTIC_TARGETS, KNetConfig
from uplvp_hf.models.losses_knet import semantic_targets, soft_targets
from uplvp_hf.models.masks import tight_boxes
from uplvp_hf.models.modeling_knet import KNetForInstanceSegmentation, doubled
from uplvp_hf.models.postprocessing_uplvp import best_scores, input_probabilities

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module", params=["knet_inst", "knet_inst_empty"])
def run(golden, request):
    tensors, info = golden(request.param)
    model = KNetForInstanceSegmentation(KNetConfig(**config_from_mmdet_knet(info["config"])))
    state = {name.removeprefix("state."): value for name, value in tensors.items() if name.startswith("state.")}
    missing, unexpected = model.load_state_dict(convert_mmdet_knet(state), strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)
    model.train()
    model.backbone.eval()  # norm_eval
    pixels, batch = tensors["input.img"], len(info["img_metas"])
    masks = []
    for i in range(batch):
        mask = tensors[f"input.gt_masks.{i}"].bool()
        right, bottom = pixels.shape[-1] - mask.shape[-1], pixels.shape[-2] - mask.shape[-2]
        masks.append(F.pad(mask, (0, right, 0, bottom)))
    inner = {}

    def keep(name):
        return lambda module, inputs, output: inner.__setitem__(name, output)

    for index, stage in enumerate(model.model.stages):
        stage.feature_transform.register_forward_hook(keep(f"{index}.map"))
        stage.update.register_forward_pre_hook(lambda module, args, i=index: inner.update({f"{i}.gathered": args[0]}))
        stage.update.register_forward_hook(keep(f"{index}.updated"))
        stage.self_attn_norm.register_forward_hook(keep(f"{index}.attended"))
        stage.feedforward_norm.register_forward_hook(keep(f"{index}.kernels"))
    model.model.semantic_pyramid.register_forward_hook(keep("semantic_pyramid"))
    # The original does not mask padding, hence no pixel_mask.
    features = model.encode(pixels)
    queries = model.initial_queries(features)
    return {
        "tensors": tensors, "info": info, "model": model, "batch": batch, "features": features, "queries": queries,
        "layers": model.decode(features, queries), "inner": inner, "masks": masks,
        "labels": [tensors[f"input.gt_labels.{i}"] for i in range(batch)],
    }  # fmt: skip


def test_features(run, close):
    tensors, model, features = run["tensors"], run["model"], run["features"]
    for index, map_ in enumerate(model.backbone(tensors["input.img"]).feature_maps):
        close(map_, tensors[f"backbone.{index}"])
    for index, map_ in enumerate(features.pyramid):
        close(map_, tensors[f"neck.{index}"])
    assert torch.equal(features.prompt_map, features.pyramid[-1])
    for index, map_ in enumerate(run["inner"]["semantic_pyramid"]):
        close(map_, tensors[f"sem_fpn.{index}"])


def test_kernel_head(run, close):
    tensors, features = run["tensors"], run["features"]
    close(features.maps, tensors["rpn.x_feats"])
    close(features.class_maps, tensors["rpn.seg_preds"])
    close(features.masks, tensors["rpn.mask_preds"])
    close(doubled(features.masks, None), tensors["rpn.scaled_mask_preds"])
    close(run["queries"], tensors["rpn.proposal_feats"][..., 0, 0])
    close(run["queries"], tensors["stage_in.proposal_feats"][..., 0, 0])


def test_every_stage(run, close):
    tensors, inner = run["tensors"], run["inner"]
    for index, layer in enumerate(run["layers"]):
        recorded = f"train.stage{index}."
        if f"{recorded}inner_feat_transform" in tensors:
            close(inner[f"{index}.map"], tensors[f"{recorded}inner_feat_transform"])
        close(inner[f"{index}.gathered"], tensors[f"{recorded}inner_x_feat"])
        close(inner[f"{index}.updated"].flatten(0, 1), tensors[f"{recorded}inner_kernel_update"][:, 0])
        close(inner[f"{index}.attended"], tensors[f"{recorded}inner_attn"].transpose(0, 1))
        close(inner[f"{index}.kernels"], tensors[f"{recorded}inner_ffn"][:, :, 0])
        close(layer.queries, tensors[f"{recorded}object_feats"][..., 0, 0])
        close(layer.class_logits, tensors[f"{recorded}cls_score"])
        close(layer.small_masks, tensors[f"{recorded}mask_preds"])
        close(layer.mask_logits, tensors[f"{recorded}scaled_mask_preds"])
    assert f"train.stage{len(run['layers'])}.cls_score" not in tensors


def targets_of(run):
    size = run["layers"][0].mask_logits.shape[-2:]
    return [soft_targets(mask, size) for mask in run["masks"]]


def assigned(tensors, name, i):
    """Recorded pairs; nothing is recorded for an image without objects."""
    if f"{name}assign_query.{i}" not in tensors:
        return []
    return sorted(zip(tensors[f"{name}assign_query.{i}"].tolist(), tensors[f"{name}assign_gt.{i}"].tolist()))


def test_targets_costs_and_assignments(run, close):
    tensors, model, layers = run["tensors"], run["model"], run["layers"]
    targets, classes = targets_of(run), model.config.num_labels
    loss = model.loss_function
    masks = [doubled(run["features"].masks, None), *(layer.mask_logits for layer in layers)]
    costs = loss.costs(masks, layers, targets, run["labels"])
    matches = loss._match(costs, None)
    names = ["rpn.", *(f"train.stage{stage}." for stage in range(len(layers)))]
    for i, target in enumerate(targets):
        if len(target):
            assert torch.equal(target, tensors[f"gt_masks_assign.{i}"])
        _, wanted = matches[0][i]
        cells = semantic_targets(target[wanted], run["labels"][i][wanted], classes, model.config.semantic_targets)
        cells = torch.cat([cells, 1 - cells.sum(0, keepdim=True)]).argmax(0)
        assert torch.equal(cells, tensors["rpn.seg_targets"][i])
        for stage, name in enumerate(names):
            pairs = sorted(zip(*(part.tolist() for part in matches[stage][i])))
            assert pairs == assigned(tensors, name, i)
            if pairs:
                close(costs[i][max(stage - 1, 0)], tensors[f"{name}assign_cost.{i}"])
            labels = torch.full((run["queries"].shape[1],), classes)
            for query, target_id in pairs:
                labels[query] = run["labels"][i][target_id]
            assert torch.equal(labels, tensors[f"{name}labels"].view(run["batch"], -1)[i])


NAMES = {"semantic": "loss_rpn_seg", "initial_mask": "loss_rpn_mask", "initial_dice": "loss_rpn_dice"}


def test_losses_and_gradients(run, close):
    tensors, info, model = run["tensors"], run["info"], run["model"]
    model.zero_grad()
    output = model(tensors["input.img"], mask_labels=run["masks"], class_labels=run["labels"])
    recorded = {name.removeprefix("loss.") for name in tensors if name.startswith("loss.") and "acc" not in name}
    for ours, value in output.losses.items():
        theirs = NAMES.get(ours) or "s{1}_loss_{0}".format(*ours.replace("class", "cls").split("_"))
        close(value, tensors[f"loss.{theirs}"], whole=output.loss.item())
        recorded.remove(theirs)
    assert not recorded
    close(output.loss, tensors["loss_total"].float())

    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    state = {name.removeprefix("state."): value for name, value in tensors.items() if name.startswith("state.")}
    places = _places(state)
    whole = max(info["grad_norm"].values())
    for name, norm in info["grad_norm"].items():
        total = torch.stack([gradients[n].double().square().sum() for n in places[name]]).sum().sqrt().item()
        close(total, norm, share=1e-4, message=name, whole=whole)
    covered = {ours for name in info["grad_norm"] for ours in places[name]}
    frozen = info["config"]["backbone"].get("frozen_stages", -1) >= 0  # what is frozen has no recorded gradient
    assert covered <= set(gradients) and None not in gradients.values()
    assert all(frozen and name.startswith("model.backbone.") for name in set(gradients) - covered)
    for name in (name.removeprefix("grad.") for name in tensors if name.startswith("grad.")):
        found = convert_mmdet_knet({name: state[name]})
        value = torch.cat([gradients[ours] for ours in found]).view_as(tensors[f"grad.{name}"])
        close(value, tensors[f"grad.{name}"], share=1e-4, message=name, whole=whole)


def _places(state):
    """Recorded name -> our names (several for packed projections), found by marking every tensor with its number."""
    numbered = {name: torch.full_like(value, index) for index, (name, value) in enumerate(state.items())}
    names, places = list(state), {}
    for ours, value in convert_mmdet_knet(numbered).items():
        places.setdefault(names[int(value.flatten()[0])], []).append(ours)
    return places


def test_final_scores_labels_and_masks(run, close):
    tensors, info, model = run["tensors"], run["info"], run["model"]
    if "test.topk_scores.0" not in tensors:
        pytest.skip("this recording has no inference")
    model.eval()
    with torch.no_grad():
        output = model(tensors["input.img"])
    model.train()
    model.backbone.eval()
    last = f"test.stage{model.num_stages - 1}."
    close(output.class_queries_logits, tensors[f"{last}cls_score"])
    close(output.masks_queries_logits, tensors[f"{last}scaled_mask_preds"])
    close(output.queries, tensors[f"{last}object_feats"][..., 0, 0])
    close(output.class_scores, tensors[f"{last}cls_score"].sigmoid())
    settings = info["config"]["test_cfg"]["rcnn"]
    for i, meta in enumerate(info["img_metas"]):
        sizes = tuple(meta["img_shape"][:2]), tuple(meta["ori_shape"][:2])
        best = best_scores(output.class_scores[i], 0.0, settings["max_per_img"])
        found = dict(zip(("scores", "labels", "queries"), best, strict=True))
        probability = input_probabilities(output.masks_queries_logits[i][found["queries"]], sizes[0])
        probability = F.interpolate(probability[None], sizes[1], mode="bilinear")[0]
        found["masks"] = probability > settings["mask_thr"]
        found["boxes"] = tight_boxes(found["masks"]).float()
        close(found["scores"], tensors[f"test.topk_scores.{i}"])
        assert torch.equal(found["labels"], tensors[f"test.topk_labels.{i}"])
        assert torch.equal(found["queries"], tensors[f"test.topk_query.{i}"])
        differs = found["masks"] != tensors[f"test.topk_masks.{i}"].bool()
        wrong = differs.flatten(1).any(1)  # only where a probability lies on the threshold but for rounding
        assert ((probability - settings["mask_thr"]).abs()[differs] < 1e-5).all()
        assert not wrong[tensors[f"test.topk_mask_prob_absmargin.{i}"] > 1e-5].any()
        if f"test.topk_mask_probs_first4.{i}" in tensors:
            first = tensors[f"test.topk_mask_probs_first4.{i}"]
            close(probability[: len(first)], first)
        # The recorded result is grouped by class, in order of score within a class.
        order = found["labels"].argsort(stable=True)
        assert torch.equal(found["labels"][order], tensors[f"test.result_labels.{i}"])
        boxes = tensors[f"test.result_bbox_score.{i}"]
        close(found["scores"][order], boxes[:, 4])
        close(found["boxes"][order][~wrong[order]], boxes[:, :4][~wrong[order]])


def test_the_default_class_map_targets_differ(run, close):
    """Why the option exists: half-covered cells and overlaps."""
    tensors, model, labels = run["tensors"], run["model"], run["labels"]
    pairs = list(zip(targets_of(run), labels, strict=True))
    rules = [[semantic_targets(*pair, model.config.num_labels, rule) for pair in pairs] for rule in SEMANTIC_TARGETS]
    if all(torch.equal(*both) for both in zip(*rules, strict=True)):
        pytest.skip("the masks of this recording end on cell borders and do not overlap")
    model.config.semantic_targets = "majority"
    try:
        output = model(tensors["input.img"], mask_labels=run["masks"], class_labels=run["labels"])
    finally:
        model.config.semantic_targets = "touched"
    assert output.losses["semantic"].item() != pytest.approx(tensors["loss.loss_rpn_seg"].item(), rel=1e-4)
    close(output.losses["mask_0"], tensors["loss.s0_loss_mask"], whole=output.loss.item())
