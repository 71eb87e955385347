"""Label-guided assignment and the text class head, for all segmenters."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from uplvp_hf.models.configuration_uplvp import UplvpConfig
from uplvp_hf.models.matching import guidance, hungarian, label_guide
from uplvp_hf.models.modeling_uplvp import UplvpForInstanceSegmentation, UplvpForPreTraining
from uplvp_hf.models.text_head import TextHead

CLASSES = {0: "cat", 1: "dog", 2: "horse"}
HEADS = {
    "mask2former": {
        "feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 48,
        "dim_feedforward": 48, "encoder_layers": 1, "decoder_layers": 3, "num_attention_heads": 4,
        "train_num_points": 64,
    },
    "knet": {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "norm_groups": 8, "num_stages": 2},
    "queryinst": {
        "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "dynamic_channels": 8, "num_stages": 2,
        "num_mask_layers": 1,
    },
}  # fmt: skip


@pytest.fixture(params=list(HEADS))
def make(request, tiny_segmenter):
    def build(cls=UplvpForPreTraining, **settings):
        torch.manual_seed(0)
        backbone = tiny_segmenter()["backbone_config"]
        segmenter = {
            "model_type": request.param,
            "backbone_config": backbone,
            "num_queries": 12,
            **HEADS[request.param],
        }
        return cls(UplvpConfig(segmenter_config=segmenter, id2label=dict(CLASSES), **settings))

    return build


def even(layer, kind, image, shape):
    generator = torch.Generator().manual_seed(100 * layer + sum(map(ord, kind)))
    return torch.rand((1, *shape[1:]), generator=generator).expand(shape)


def test_the_curriculum_rises_from_a_tenth_to_one_in_six_epochs():
    assert [guidance(epoch) for epoch in (0, 3, 6, 7)] == pytest.approx([0.1, 0.55, 1.0, 1.0])
    assert guidance(0, epochs=0) == 1.0 and guidance(1.5, 0.4, 3.0) == pytest.approx(0.7)


@pytest.mark.parametrize("theta", [0.0, 0.1, 0.55, 1.0])
def test_label_guided_cost_equals_a_loop(theta):
    torch.manual_seed(0)
    cost, labels = torch.randn(2, 6, 4), torch.tensor([1, 0, 1, 2])
    match, source = torch.tensor([[-1] * 6, [0, 2, 1, 1, -1, 0]]), torch.tensor([[-1, -1, -1], [3, 0, 1]])
    guided = label_guide(match, source, [torch.zeros(0, dtype=torch.int64), labels], theta)(cost, 1)
    for layer, n, g in itertools.product(range(2), range(6), range(4)):
        prompt = int(match[1, n])
        same = prompt >= 0 and labels[source[1, prompt]] == labels[g]
        second = cost[layer].min() if same else cost[layer].max()
        assert guided[layer, n, g].item() == pytest.approx(
            (theta * cost[layer, n, g] + (1 - theta) * second).item(), abs=1e-6
        )
    assert label_guide(match, source, [labels, labels], theta)(cost[..., :0], 0).shape == (2, 6, 0)


def test_at_the_start_masks_go_to_queries_whose_prompt_has_their_class():
    torch.manual_seed(0)
    labels, source = torch.tensor([0, 1, 2]), torch.tensor([[0, 1, 2]])
    match = torch.arange(9)[None] // 3
    guide = label_guide(match, source, [labels], 0.0)
    for _ in range(20):
        ((query, target),) = hungarian([guide(torch.randn(1, 9, 3), 0)])[0]
        assert (labels[source[0, match[0, query]]] == labels[target]).all()


def test_guidance_changes_assignments_and_fades_out(make, make_batch):
    """With the same weights and prompts: early it differs from sequential matching, after the epochs it does not."""
    batch = make_batch(counts=(4, 5, 0))
    guided, plain = (make(prompt_matching=how, prompt_drop=0.0).eval() for how in ("hungarian", "sequential"))
    losses = {}
    for epoch in (0.0, 6.0):
        guided.set_progress(epoch)
        losses[epoch] = guided(**batch, draw=even).losses
    reference = plain(**batch, draw=even).losses
    assert all(torch.equal(losses[6.0][name], value) for name, value in reference.items())
    assert any(not torch.equal(losses[0.0][name], value) for name, value in reference.items())


def test_text_logits_are_cosines_over_a_temperature():
    torch.manual_seed(0)
    queries, text = torch.randn(2, 5, 8), F.normalize(torch.randn(3, 16), dim=-1)
    settings = {"channels": 8, "text_dim": 16, "temperature": 0.07, "prior": 0.01}
    head = TextHead(no_object=False, **settings)
    head.init_weights()
    logits = head(queries, text)
    visual = F.layer_norm(queries @ head.projection.weight.T, (16,))
    for n, k in itertools.product(range(5), range(3)):
        expected = torch.cosine_similarity(visual[1, n], text[k], dim=0) / 0.07 - torch.tensor(99.0).log()
        torch.testing.assert_close(logits[1, n, k], expected, rtol=1e-4, atol=1e-4)
    with_nothing = TextHead(no_object=True, **settings)
    with_nothing.init_weights()
    assert with_nothing(queries, text).shape == (2, 5, 4)


def test_text_head_trains_is_saved_and_dropped(make, make_batch, tmp_path):
    batch, features = make_batch(counts=(3, 0, 2)), torch.randn(4, 16)
    model = make(text_dim=16).train()
    with pytest.raises(ValueError, match=r"are not set.*cat, dog, horse"):
        model(**batch)
    model.set_text_features(features, ["horse", "zebra", "Cat", "dog"])
    rows = F.normalize(features, dim=-1)[[2, 3, 0]]
    torch.testing.assert_close(model.text_heads.text_features, rows)
    output = model(**batch, draw=even)
    terms = [name for name in output.losses if name.startswith("text_class")]
    assert len(terms) == len([name for name in output.losses if name.startswith("class")]) > 1
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.text_heads.parameters())
    assert any(parameter.grad.abs().sum() > 0 for parameter in model.text_heads.parameters())

    model.save_pretrained(tmp_path)
    loaded = UplvpForPreTraining.from_pretrained(tmp_path).train()
    assert torch.equal(loaded(**batch, draw=even).loss, model(**batch, draw=even).loss)
    plain, info = UplvpForInstanceSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not any("text" in name for name in plain.state_dict())
    other = UplvpForPreTraining.from_pretraining(str(tmp_path), {0: "cat", 1: "cow", 2: "dog"}).train()
    with pytest.raises(ValueError, match="are those of cat, dog, horse"):
        other(**batch)


def test_text_features_that_do_not_fit_are_refused(make):
    model = make(text_dim=16)
    for features, names, message in [
        (torch.randn(2, 16), ["cat", "dog"], "No text feature for the classes: horse"),
        (torch.randn(3, 16), ["cat", "dog"], "do not fit 2 class names"),
        (torch.randn(3, 8), list(CLASSES.values()), "8 channels, but text_dim is 16"),
        (torch.zeros(3, 16), list(CLASSES.values()), "finite and not zero"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.set_text_features(features, names)
    with pytest.raises(ValueError, match="set `text_dim`"):
        make().set_text_features(torch.randn(3, 16), list(CLASSES.values()))


def test_text_cost_takes_part_in_the_matching(make, make_batch):
    """A text head that is sure of one query for a class draws the masks of that class to it."""
    batch = make_batch(counts=(1, 0, 0))
    model = make(text_dim=16, prompt_matching="none", kernel_supervision_weight=0.0).eval()
    model.set_text_features(torch.eye(3, 16), list(CLASSES.values()))
    features = model.segmenter.encode(batch["pixel_values"])
    layers = model.segmenter.decode(features, model.segmenter.initial_queries(features))
    wanted, label, taken = 7, int(batch["class_labels"][0]), []
    for strength in (0.0, 40.0):
        logits = []
        for layer in layers:
            text = torch.full(layer.class_logits.shape, -strength)
            text[:, wanted, label] = strength
            logits.append(text)
        extra = {"text_logits": logits} if strength else {}
        _, matches = model.segmenter.loss(
            layers, features, batch["mask_labels"], batch["class_labels"], None, even, **extra
        )
        taken.append(int(matches[-1][0][0]))  # the last stage: K-Net's first one has no classes to match by
    assert taken[1] == wanted
