"""Kernel supervision beyond the papers' form: frozen targets, contrastive loss, centering, weight as a share."""

import math

import pytest
import torch

from uplvp_hf.models import modeling_uplvp
from uplvp_hf.models.errors import UserError
from uplvp_hf.models.kernel_targets import (
    RunningMean,
    contrastive_supervision,
    given_targets,
    possible_negatives,
)
from uplvp_hf.models.losses import LayerOutput, Normalizers, kernel_supervision
from uplvp_hf.models.modeling_uplvp import UplvpForInstanceSegmentation, UplvpForPreTraining
from uplvp_hf.models.prompts import Prompts

DIM = 24


def vectors_for(batch, dim=DIM, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(len(masks), dim, generator=generator) for masks in batch["mask_labels"]]


def frozen(make_config, **settings):
    torch.manual_seed(0)
    settings = {"kernel_target": "labeler", "kernel_target_dim": DIM, "prompt_matching": "none", **settings}
    return UplvpForPreTraining(make_config(**settings)).train()


def box(top, left, bottom, right):
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def iou(one, other):
    return (one & other).sum().item() / max((one | other).sum().item(), 1)


@pytest.mark.parametrize("classes_count", [True, False])
def test_contrastive_supervision_equals_a_loop(classes_count):
    """Every pair against all targets of the batch but those of its class and those that overlap its mask."""
    torch.manual_seed(0)
    masks = [
        torch.stack([box(0, 0, 8, 8), box(0, 0, 8, 10), box(10, 10, 16, 16), box(0, 0, 8, 15)]),  # IoU .8, 0, .53
        torch.stack([box(0, 0, 8, 8), box(4, 4, 12, 12)]),  # the first is where one of the other image is; IoU .14
        torch.zeros(0, 16, 16, dtype=torch.bool),
    ]
    labels = [torch.tensor([0, 1, 0, 2]), torch.tensor([1, 2]), torch.zeros(0, dtype=torch.int64)]
    source = torch.tensor([[0, 1, 2, 3], [1, -1, 0, -1], [-1, -1, -1, -1]])
    targets = Prompts(torch.randn(3, 4, 6), source >= 0, source)
    layers = [LayerOutput(None, None, torch.randn(3, 5, 6, requires_grad=True)) for _ in range(2)]
    none = torch.zeros(0, dtype=torch.int64)
    queries = torch.tensor([0, 1, 3, 4]), torch.tensor([1, 2])
    matches = [[*((query, torch.randperm(len(query))) for query in queries), (none, none)] for _ in layers]
    given = labels if classes_count else None
    negatives = possible_negatives(targets, masks, given, overlap=0.5)
    loss = contrastive_supervision(layers, matches, targets.vectors, targets.of_mask(4), negatives, temperature=0.2)

    place = {(i, int(source[i, p])): p for i in range(3) for p in range(4) if source[i, p] >= 0}
    total = 0.0
    for layer, match in zip(layers, matches, strict=True):
        for i, (query, target) in enumerate(match):
            for n, j in zip(query.tolist(), target.tolist(), strict=True):

                def likeness(i2, j2, i=i, n=n, layer=layer):
                    goal = targets.vectors[i2, place[i2, j2]]
                    return torch.cosine_similarity(layer.queries[i, n], goal, dim=0) / 0.2

                compared = [likeness(i, j)]
                for i2, j2 in place:
                    same = classes_count and labels[i][j] == labels[i2][j2]
                    near = i == i2 and (j == j2 or iou(masks[i][j], masks[i][j2]) >= 0.5)
                    if not same and not near:
                        compared.append(likeness(i2, j2))
                total += torch.stack(compared).logsumexp(0) - compared[0]
    torch.testing.assert_close(loss, total / 12)
    loss.backward()
    touched = [(layer.queries.grad.abs().sum(-1) > 0).sum().item() for layer in layers]
    assert touched == [6, 6]


def test_without_negatives_or_pairs_the_contrast_is_zero():
    layer = LayerOutput(None, None, torch.randn(1, 4, 6, requires_grad=True))
    targets = given_targets([torch.randn(2, 6)], [torch.ones(2, 8, 8, dtype=torch.bool)], 6)
    alone = possible_negatives(targets, [torch.ones(2, 8, 8, dtype=torch.bool)], None, 0.5)
    assert not alone.any()  # the two masks are one
    match = [[(torch.tensor([1, 3]), torch.tensor([0, 1]))]]
    empty = [[(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))]]
    for matches in (match, empty):
        loss = contrastive_supervision([layer], matches, targets.vectors, targets.of_mask(2), alone, 0.1)
        loss.backward()
        assert loss == 0 and (layer.queries.grad == 0).all()


def test_the_mean_runs_over_valid_targets_in_training_only():
    mean = RunningMean(3, momentum=0.9).train()
    batches = [torch.randn(2, 4, 3) for _ in range(12)]
    valid = torch.tensor([[True, True, False, True], [False, True, False, False]])
    expected = torch.zeros(3)
    for number, vectors in enumerate(batches):
        momentum = min(0.9, number / (number + 1))
        expected = momentum * expected + (1 - momentum) * vectors[valid].mean(0)
        result = mean(vectors, valid)
    torch.testing.assert_close(mean.mean, expected)
    torch.testing.assert_close(result[valid], batches[-1][valid] - expected)
    assert (result[~valid] == 0).all() and mean.batches == 12
    before = {name: value.clone() for name, value in mean.state_dict().items()}
    mean(batches[0], torch.zeros(2, 4, dtype=torch.bool))  # nothing to take in
    mean.eval()(batches[0], valid)
    assert all(torch.equal(before[name], value) for name, value in mean.state_dict().items())


def test_the_papers_form_is_as_before(make_config, make_batch, monkeypatch):
    """No further tensor in the checkpoint, and the very bits of `losses.kernel_supervision`."""
    torch.manual_seed(0)
    model = UplvpForPreTraining(make_config(prompt_drop=0.0, kernel_supervision_weight=2.0)).train()
    assert not [name for name in model.state_dict() if "kernel_supervision" in name]
    seen = {}
    supervise = UplvpForPreTraining.supervise_kernels

    def spied(self, layers, matches, targets, *others):
        first = 1 if self.segmenter.predicts_first else 0
        seen["own"] = kernel_supervision(
            layers[first:], matches[first:], targets.vectors, targets.of_mask(3), num_pairs=None
        )
        return supervise(self, layers, matches, targets, *others)

    monkeypatch.setattr(modeling_uplvp.UplvpForPreTraining, "supervise_kernels", spied)
    output = model(**make_batch())
    assert output.losses["kernel"].item() == (2.0 * seen["own"]).item() > 0


@pytest.mark.parametrize("loss", ["cosine", "contrastive"])
def test_frozen_targets_reach_queries_and_head(make_config, make_batch, loss):
    model, batch = frozen(make_config, kernel_loss=loss, kernel_centering=0.9), make_batch()
    assert model.prompt_projection is None  # nothing is pooled where nothing is injected
    own = vectors_for(batch)
    output = model(**batch, kernel_targets=own)
    output.losses["kernel"].backward()
    head = model.kernel_supervision.head
    assert head.weight.shape == (DIM, model.segmenter.query_channels) and head.weight.grad.abs().sum() > 0
    assert model.segmenter.model.transformer_module.queries_features.weight.grad.abs().sum() > 0
    torch.testing.assert_close(model.kernel_supervision.center.mean, torch.cat(own).mean(0))
    with torch.no_grad():
        other = model(**batch, kernel_targets=[vectors.flip(0) for vectors in own]).losses["kernel"]
    assert abs(other.item() - output.losses["kernel"].item()) > 1e-4  # which vector is whose matters


def test_all_parameters_have_gradients_where_no_image_has_a_mask(make_config, make_batch):
    model, batch = frozen(make_config, kernel_loss="contrastive"), make_batch((0, 0))
    output = model(**batch, kernel_targets=vectors_for(batch))
    output.loss.backward()
    assert output.losses["kernel"] == 0
    assert (model.kernel_supervision.head.weight.grad == 0).all()


def test_missing_or_wrong_targets_are_refused(make_config, make_batch):
    model, batch = frozen(make_config), make_batch()
    with pytest.raises(UserError, match="give `kernel_targets`"):
        model(**batch)
    with pytest.raises(
        UserError, match=r"Image 0 .* shape \(3, 8\); 3 masks and `kernel_target_dim` 24 need \(3, 24\)"
    ):
        model(**batch, kernel_targets=vectors_for(batch, dim=8))
    assert model(batch["pixel_values"]).loss is None  # without labels nothing is asked for


def test_the_weight_can_be_a_share_of_the_other_terms(make_config, make_batch):
    batch = make_batch()
    losses = frozen(make_config, kernel_loss_share=0.25)(**batch, kernel_targets=vectors_for(batch)).losses
    others = sum(value.item() for name, value in losses.items() if name != "kernel")
    assert losses["kernel"].item() == pytest.approx(0.25 * others, rel=1e-5)


def test_a_term_that_is_nearly_met_is_not_raised(make_config):
    supervision = frozen(make_config, kernel_loss_share=0.5).kernel_supervision
    losses = {"mask": torch.tensor(3.0), "class": torch.tensor(1.0)}
    assert supervision.weight(torch.tensor(2.0), losses) == 1.0
    assert supervision.weight(torch.tensor(1e-4), losses) == pytest.approx(20.0)


def test_only_queries_without_a_prompt_are_supervised(make_config, make_batch):
    batch = make_batch()

    def kernel(drop, **settings):
        torch.manual_seed(0)
        model = UplvpForPreTraining(make_config(prompt_drop=drop, **settings)).train()
        torch.manual_seed(1)
        return model(**batch).losses["kernel"].item()

    assert kernel(0.0, kernel_queries="unprompted") == 0.0
    assert kernel(1.0, kernel_queries="unprompted") == kernel(1.0) > 0
    some = kernel(0.5, kernel_queries="unprompted")
    assert 0 < some != kernel(0.5)


def test_accumulated_steps_divide_by_the_pairs_of_queries_without_a_prompt(make_config, make_batch):
    """With the pairs of two equal micro-batches as divisor, each gives half: the share without a prompt is its own."""
    batch = make_batch()
    losses = []
    for pairs in (None, 20.0, 40.0):
        torch.manual_seed(0)
        model = UplvpForPreTraining(make_config(prompt_drop=0.5, kernel_queries="unprompted")).train()
        torch.manual_seed(1)
        given = None if pairs is None else Normalizers(pairs=pairs)
        losses.append(model(**batch, normalizers=given).losses["kernel"].item())
    assert losses[1] == pytest.approx(2 * losses[2], rel=1e-5)
    torch.manual_seed(0)
    model = UplvpForPreTraining(make_config(prompt_drop=0.5, kernel_queries="unprompted")).train()
    counts = [len(masks) for masks in batch["mask_labels"]]
    own = model.segmenter.normalizers(counts, model.config.most_targets).pairs  # of this batch, as the loop sums them
    torch.manual_seed(1)
    again = model(**batch, normalizers=Normalizers(pairs=own)).losses["kernel"].item()
    assert again == pytest.approx(losses[0], rel=1e-5)


def test_injection_fades_out_over_epochs(make_config):
    model = UplvpForPreTraining(make_config(prompt_drop=0.2, prompt_epochs=4.0)).train()
    match = torch.zeros(50, 200, dtype=torch.int64)
    for epoch, share in ((0.0, 0.2), (2.0, 0.6), (4.0, 1.0), (9.0, 1.0)):
        model.set_progress(epoch)
        dropped = 1 - model.kept_prompts(match, None).float().mean().item()
        assert dropped == pytest.approx(share, abs=4 * math.sqrt(0.25 / match.numel()))
    assert model.eval().kept_prompts(match, None).all()


@pytest.mark.parametrize("kind", ["labeler", "centered"])
def test_checkpoints_keep_the_mean_and_the_plain_model_leaves_it(make_config, make_batch, tmp_path, kind):
    if kind == "labeler":
        model = frozen(make_config, kernel_centering=0.5)
        batch = make_batch()
        model(**batch, kernel_targets=vectors_for(batch))
    else:
        torch.manual_seed(0)
        model = UplvpForPreTraining(make_config(kernel_centering=0.5, kernel_head="linear")).train()
        model(**make_batch())
    model.save_pretrained(tmp_path)
    loaded, info = UplvpForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.kernel_supervision.center.batches == 1
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    _, info = UplvpForInstanceSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    fresh = UplvpForPreTraining(loaded.config)
    assert fresh.kernel_supervision.center.batches == 0 and (fresh.kernel_supervision.center.mean == 0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel_target": "labeler"}, "set both"),
        ({"kernel_target_dim": 8}, "set both"),
        ({"kernel_target": "labeler", "kernel_target_dim": 8, "kernel_head": "none"}, "are no queries"),
        ({"kernel_target": "text"}, "must be one of prompt, labeler"),
        ({"kernel_loss": "l2"}, "must be one of cosine, contrastive"),
        ({"kernel_temperature": 0.0}, "must be positive"),
        ({"kernel_loss_share": -0.1}, "must be positive"),
        ({"kernel_centering": 1.0}, "below 1"),
        ({"kernel_overlap": 1.5}, "between 0 and 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(make_config, settings, message):
    with pytest.raises(UserError, match=message):
        make_config(**settings)
