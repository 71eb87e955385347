"""The method on K-Net and QueryInst against tensors recorded from the authors' code, and its parts."""

import pytest
import torch
from torch.nn import functional as F

from uplvp_hf.conversion.knet import config_from_mmdet_knet, convert_mmdet_knet
from uplvp_hf.conversion.queryinst import config_from_mmdet_queryinst, convert_mmdet_queryinst
from uplvp_hf.models.configuration_uplvp import UplvpConfig
from uplvp_hf.models.losses import LayerOutput, kernel_supervision
from uplvp_hf.models.losses_knet import soft_targets
from uplvp_hf.models.matching import pair_up
from uplvp_hf.models.modeling_knet import doubled
from uplvp_hf.models.modeling_uplvp import UplvpForPreTraining
from uplvp_hf.models.prompts import Prompts, box_weights, pool_prompts
from uplvp_hf.models.text_head import TextHead

pytestmark = pytest.mark.golden

KNETS = ["upknet_feature", "upknet_cosine_fixed", "upknet_feature_clip"]
QUERYINSTS = ["queryinst_prompt", "queryinst_cosine"]


# ---- parts -----------------------------------------------------------------------------------------------------------


def test_box_prompts_and_slots(golden, close):
    tensors, info = golden("up_prompts")
    for case in info["cases"]:
        name, size = case["name"], tuple(case["image_size"])
        maps = tensors[f"{name}.feats"]
        boxes = [tensors[f"{name}.gt_bbox_from_mask.{i}"] for i in range(len(maps))]
        masks = []
        for own in boxes:
            mask = torch.zeros(len(own), *size, dtype=torch.bool)
            for one, (x1, y1, x2, y2) in zip(mask, own.long().tolist(), strict=True):
                one[y1:y2, x1:x2] = True
            masks.append(mask)
        slots = len(tensors[f"{name}.feature.expanded"]) // len(maps)
        prompts = pool_prompts(maps, masks, None, slots, "box")
        assert prompts.valid.sum(1).tolist() == [min(count, slots) for count in case["num_gt"]]
        expected = tensors[f"{name}.feature.expanded"].view(len(maps), slots, -1)
        close(prompts.to_slots(slots).vectors, expected)
        stride = (size[0] / maps.shape[-2], size[1] / maps.shape[-1])
        for own in boxes:  # a box never loses all its cells
            assert (box_weights(own, tuple(maps.shape[-2:]), stride).flatten(1).sum(1) > 0).all()


def test_kernel_supervision_pairs_by_the_assignment(golden, close):
    tensors, _ = golden("sp_emb_loss")
    queries = tensors["object_feats"][..., 0, 0].requires_grad_()
    images = len(queries)
    targets = [tensors[f"gt_kernels.{i}"] for i in range(images)]
    vectors = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True)
    source = torch.stack([F.pad(torch.arange(len(t)), (0, vectors.shape[1] - len(t)), value=-1) for t in targets])
    table = Prompts(vectors, source >= 0, source).of_mask(vectors.shape[1])
    matches, ordered = [], []
    for i in range(images):
        query = tensors[f"pos_inds.{i}"]
        matches.append((query, tensors[f"assign_gt_inds.{i}"][query] - 1))
        ordered.append((query, torch.arange(len(query))))
    layer = LayerOutput(None, None, queries)
    ours = kernel_supervision([layer], [matches], vectors, table)
    close(ours, tensors["loss_emb_matched_pairing"])
    # The released loss, under which the recorded gradient was taken, pairs by order; the formula is the same.
    by_order = kernel_supervision([layer], [ordered], vectors, table)
    close(by_order, tensors["loss.loss_emb"])
    close(torch.autograd.grad(by_order, queries)[0], tensors["grad.loss_emb.object_feats"][..., 0, 0])
    reordered = any(not torch.equal(target, torch.arange(len(target))) for _, target in matches)
    assert ((ours - by_order).abs() > 1e-4 * by_order) == reordered  # beyond any rounding


# ---- the whole step --------------------------------------------------------------------------------------------------


class SharedSlots(UplvpForPreTraining):
    """The QueryInst of the recordings: the slots of every image hold the prompts of the first images of the batch."""

    def match_prompts(self, queries, prompts):
        slots, zero = self.config.prompt_slots, prompts.vectors.new_zeros((1, prompts.vectors.shape[-1]))
        own = [row[known] if known.any() else zero for row, known in zip(prompts.vectors, prompts.valid, strict=True)]
        every, filled = torch.cat(own), []
        for rows in own:
            runs = every[: len(rows)].repeat_interleave(slots // len(rows), dim=0)
            filled.append(torch.cat([runs, every[: slots - len(runs)]]))
        valid = torch.ones(len(own), slots, dtype=torch.bool)
        return super().match_prompts(queries, Prompts(torch.stack(filled), valid, torch.full(valid.shape, -1)))


class RecordedTextHead(TextHead):
    """The class head of the recordings: the visual side is rectified, and has neither temperature nor bias."""

    def forward(self, queries, text_features):
        return self.norm(self.projection(queries)).relu() @ text_features.T


class Recording:
    """A recorded step, and our model of the same weights after the same step with the recorded draws."""

    def __init__(self, golden, name: str):
        self.tensors, self.info = golden(name)
        self.name, self.is_knet = name, name in KNETS
        self.convert = convert_mmdet_knet if self.is_knet else convert_mmdet_queryinst
        self.pixels, self.batch = self.tensors["input.img"], len(self.info["img_metas"])
        self.masks = [self.tensors[f"input.gt_masks.{i}"].bool() for i in range(self.batch)]
        self.labels = [self.tensors[f"input.gt_labels.{i}"] for i in range(self.batch)]
        # The original K-Net lets padding take part; QueryInst scales its boxes by the size of each image.
        self.pixel_mask = None if self.is_knet else self._pixel_mask()
        self.model = self.build()
        self.output = self.model(
            self.pixels, self.pixel_mask, self.masks, self.labels, draw=self.draw, output_hidden_states=True
        )

    def _pixel_mask(self):
        mask = torch.zeros(self.batch, *self.pixels.shape[-2:])
        for own, meta in zip(mask, self.info["img_metas"], strict=True):
            own[: meta["img_shape"][0], : meta["img_shape"][1]] = 1
        return mask

    def config(self) -> UplvpConfig:
        original = self.info["config"]
        if self.is_knet:
            segmenter = {"model_type": "knet", **config_from_mmdet_knet(original)}
        else:
            segmenter = {"model_type": "queryinst", **config_from_mmdet_queryinst(original)}
            segmenter.update(mask_padding=False)
        classes = segmenter.pop("num_labels")
        text = self.tensors.get("input.text_features")
        return UplvpConfig(
            segmenter_config=segmenter,
            id2label={i: f"class{i}" for i in range(classes)},
            prompt_matching="cosine" if "cosine" in self.name else "sequential",
            prompt_slots=len(self.tensors["up.expanded20"]) // self.batch,
            prompt_pooling="box",
            prompt_drop=self.info["mask_ratio"],
            kernel_supervision_weight=0.0,
            text_dim=None if text is None else len(text),
        )

    def state(self):
        return {name.removeprefix("state."): value for name, value in self.tensors.items() if name.startswith("state.")}

    def places(self, names) -> dict[str, list[str]]:
        """Recorded name -> our names (several for packed projections)."""
        state, places = self.state(), {}
        for name in names:
            if "cls_clip_fcs" in name:
                _, _, stage, _, place, part = name.rsplit(".", 5)
                places[name] = [f"text_heads.heads.{stage}.{'projection' if place == '0' else 'norm'}.{part}"]
            else:
                places[name] = [f"segmenter.{ours}" for ours in self.convert({name: state[name]})]
        return places

    def build(self) -> UplvpForPreTraining:
        model, state = (UplvpForPreTraining if self.is_knet else SharedSlots)(self.config()), self.state()
        for head in [] if model.text_heads is None else model.text_heads.heads:
            head.__class__, head.log_scale, head.bias = RecordedTextHead, None, None
        plain = {name: value for name, value in state.items() if "cls_clip_fcs" not in name}
        ours = {f"segmenter.{name}": value for name, value in self.convert(plain).items()}
        for name in state.keys() - plain.keys():
            ours[self.places([name])[name][0]] = state[name]
        missing, unexpected = model.load_state_dict(ours, strict=False)
        assert not unexpected
        assert all(name.endswith(("num_batches_tracked", "text_features")) for name in missing)
        if "input.text_features" in self.tensors:
            model.set_text_features(self.tensors["input.text_features"].T, list(model.config.id2label.values()))
        model.train()
        model.segmenter.backbone.eval()  # norm_eval
        return model

    def draw(self, layer, kind, image, shape):
        assert kind == "keep"
        drawn = self.tensors["up.rand"][..., 0]
        return drawn if tuple(drawn.shape) == shape else drawn.T

    def layers(self):
        """Features, matched prompts and per-stage outputs of the step."""
        model = self.model
        features = model.segmenter.encode(self.pixels, self.pixel_mask)
        queries = model.segmenter.initial_queries(features)
        match, slots = model.match_prompts(queries, model.make_prompts(features, self.masks, None))
        prompted = model.injection(match, slots, model.kept_prompts(match, self.draw))(queries)
        return features, queries, match, slots, model.segmenter.decode(features, prompted)


@pytest.fixture(scope="module", params=KNETS + QUERYINSTS)
def run(golden, request):
    return Recording(golden, request.param)


def test_prompts_matches_and_injection(run, close):
    tensors, model = run.tensors, run.model
    features, queries, match, slots, _ = run.layers()
    own = model.make_prompts(features, run.masks, None)
    patches, empty = tensors["up.patches"], [len(labels) == 0 for labels in run.labels]
    counts = [max(len(labels), 1) for labels in run.labels]
    recorded = [rows for rows, none in zip(patches.split(counts), empty, strict=True) if not none]
    close(own.vectors[own.valid], torch.cat(recorded))
    close(slots.vectors.flatten(0, 1), tensors["up.expanded20"])
    if f"up.cos_match_index.{0}" in tensors:
        likeness = F.normalize(queries, dim=-1) @ F.normalize(slots.vectors, dim=-1).transpose(1, 2)
        for i in range(run.batch):
            close(likeness[i], tensors[f"up.cos_affinity.{i}"])
            theirs = tensors["up.expanded20"].view_as(slots.vectors)[i][tensors[f"up.cos_match_index.{i}"]]
            close(slots.vectors[i][match[i]], theirs)  # repeated prompts tie, so rows are compared, not places
    else:
        count, repeats = match.shape[1], match.shape[1] // slots.vectors.shape[1]
        prompted = slots.valid.any(1)
        assert torch.equal(match[prompted], (torch.arange(count) // repeats).expand_as(match)[prompted])
        assert (match[~prompted] == -1).all()
    before = tensors["rpn.proposal_feats"].view(run.batch, *queries.shape[-2:])
    after = tensors["stage_in.proposal_feats"].view_as(before)
    close(queries, before)
    close(run.output.hidden_states[0], after)
    kept = tensors["up.keep_mask"][..., 0].bool()
    kept = kept if tuple(kept.shape) == tuple(match.shape) else kept.T
    # An image without objects has a prompt of zeros there, and none here.
    chosen = slots.vectors.gather(1, match.clamp(min=0)[..., None].expand(-1, -1, slots.vectors.shape[-1]))
    kept = kept & (match >= 0) & (chosen != 0).any(-1)
    assert torch.equal((run.output.hidden_states[0] != queries).any(-1), kept) and kept.any()


def test_validity_in_place_of_slots_selects_the_same_prompts(run, close):
    """Our default, without repetition, for cosine matching: equal to the recorded rows where these are not mixed up."""
    if run.model.config.prompt_matching != "cosine" or not run.is_knet:
        pytest.skip("recorded without cosine matching, or with the prompts of other images")
    features, queries, match, slots, _ = run.layers()
    run.model.config.prompt_slots = None
    try:
        plain_match, prompts = run.model.match_prompts(queries, run.model.make_prompts(features, run.masks, None))
    finally:
        run.model.config.prompt_slots = slots.vectors.shape[1]
    for i in range(run.batch):
        close(prompts.vectors[i][plain_match[i]], slots.vectors[i][match[i]])


def test_every_stage(run, close):
    layers, tensors = run.layers()[-1], run.tensors
    texts = run.model._text_logits(layers) if run.model.text_heads is not None else [None] * len(layers)
    for stage, (layer, text) in enumerate(zip(layers, texts, strict=True)):
        theirs = {name.removeprefix(f"train.stage{stage}."): value for name, value in tensors.items()}
        close(layer.queries, theirs["object_feats"].view_as(layer.queries))
        close(layer.class_logits, theirs["cls_score_head" if text is not None else "cls_score"])
        close(run.output.hidden_states[stage + 1], theirs["object_feats"].view_as(layer.queries))
        if text is not None:
            close(text, theirs["cls_score_clip"])
        if run.is_knet:
            close(layer.small_masks, theirs["mask_preds"])
            close(layer.mask_logits, theirs["scaled_mask_preds"])
        else:
            close(layer.attended, theirs["attn_feats"])
            close(layer.boxes.flatten(0, 1), theirs["decode_bbox_pred"])
    assert f"train.stage{len(layers)}.object_feats" not in tensors


def assigned(tensors, name, i):
    if f"{name}assign_query.{i}" not in tensors:
        return []
    return sorted(zip(tensors[f"{name}assign_query.{i}"].tolist(), tensors[f"{name}assign_gt.{i}"].tolist()))


def test_costs_assignments_and_targets(run, close):
    tensors, segmenter = run.tensors, run.model.segmenter
    features, _, _, _, layers = run.layers()
    loss, extra = segmenter.loss_function, {}
    if run.model.text_heads is not None:
        extra["text_logits"] = run.model._text_logits(layers)
    if run.is_knet:
        masks = [doubled(features.masks, None), *(layer.mask_logits for layer in layers)]
        targets = [soft_targets(mask, masks[0].shape[-2:]) for mask in run.masks]
        for i, target in enumerate(targets):
            if len(target):
                close(target, tensors[f"gt_masks_assign.{i}"])
        costs = loss.costs(masks, layers, targets, run.labels, **extra)
    else:
        logits, boxes = torch.stack([layer.class_logits for layer in layers]), torch.stack([la.boxes for la in layers])
        wanted = [tensors[f"input.gt_bboxes.{i}"] for i in range(run.batch)]
        costs = loss.costs(logits, boxes, wanted, run.labels, features.sizes.flip(1).repeat(1, 2))
    _, matches = segmenter.loss(layers, features, run.masks, run.labels, **extra)
    classes = layers[0].class_logits.shape[-1]
    for stage, match in enumerate(matches):
        name = f"train.stage{stage}."
        labels = torch.full(layers[0].class_logits.shape[:2], classes)
        for i, (query, target) in enumerate(match):
            if len(run.labels[i]):  # nothing is recorded for an image without objects
                close(costs[i][stage], tensors[f"{name}assign_cost.{i}"])
            assert sorted(zip(query.tolist(), target.tolist())) == assigned(tensors, name, i)
            labels[i, query] = run.labels[i][target]
        assert torch.equal(labels.flatten(), tensors[f"{name}labels"])
    if not run.is_knet:
        pairs = pair_up(matches, [len(labels) for labels in run.labels], torch.device("cpu"))
        for stage, layer in enumerate(layers):
            image, query = pairs.image[stage], pairs.query[stage]
            theirs = tensors[f"train.stage{stage}.mask_logits"]
            close(segmenter.model.predict_masks(stage, layer, features, image, query), theirs)


KNET_NAMES = {"semantic": "loss_rpn_seg", "initial_mask": "loss_rpn_mask", "initial_dice": "loss_rpn_dice"}
PARTS = {"class": "cls", "text_class": "cls_clip", "mask": "mask", "dice": "dice", "box": "bbox", "giou": "iou"}


def test_losses_and_gradients(run, close):
    tensors, model, output = run.tensors, run.model, run.output
    recorded = {name.removeprefix("loss.") for name in tensors if name.startswith("loss.") and "acc" not in name}
    for ours, value in output.losses.items():
        kind, _, stage = ours.rpartition("_")
        theirs = KNET_NAMES.get(ours) or f"{'s' if run.is_knet else 'stage'}{stage}_loss_{PARTS[kind]}"
        close(value, tensors[f"loss.{theirs}"], whole=output.loss.item())
        recorded.remove(theirs)
    assert not recorded
    close(output.loss, tensors["loss_total"].float())
    model.zero_grad()
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    places = run.places(run.info["grad_norm"])
    covered = {ours for found in places.values() for ours in found}
    frozen = run.info["config"]["backbone"].get("frozen_stages", -1) >= 0  # what is frozen has no recorded gradient
    assert covered <= set(gradients)
    assert all(frozen and name.startswith("segmenter.model.backbone.") for name in set(gradients) - covered)
    # RoIAlign has no gradient for its boxes, as that of mmdetection and torchvision; the recording has one.
    boxes = "rpn_head.init_proposal_bboxes.weight"
    whole = max(run.info["grad_norm"].values())
    for name, norm in run.info["grad_norm"].items():
        if name == boxes:
            continue
        total = torch.stack([gradients[ours].double().square().sum() for ours in places[name]]).sum().sqrt().item()
        close(total, norm, share=1e-4, message=name, whole=whole)
    for name in (name.removeprefix("grad.") for name in tensors if name.startswith("grad.") and boxes not in name):
        value = torch.cat([gradients[ours] for ours in places[name]]).view_as(tensors[f"grad.{name}"])
        close(value, tensors[f"grad.{name}"], share=1e-4, message=name, whole=whole)
