"""One sweep over all segmenters and kinds of backbone: what users and trainers may rely on."""

import copy
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from vit_segmenters import WHOLE

from uplvp_hf.models.configuration_uplvp import UplvpConfig
from uplvp_hf.models.modeling_base_uplvp import SEGMENTERS
from uplvp_hf.models.modeling_uplvp import UplvpForInstanceSegmentation, UplvpForPreTraining

ON_MAPS = ["mask2former", "knet", "queryinst"]
BACKBONES = {
    "resnet": {
        "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 24, 40], "depths": [1, 1, 1, 1],
        "layer_type": "basic", "out_features": ["stage1", "stage2", "stage3", "stage4"],
    },
    "mobilenet": {
        "model_type": "timm_backbone", "backbone": "mobilenetv2_035", "out_indices": [1, 2, 3, 4],
        "use_pretrained_backbone": False,
    },
}  # fmt: skip
HEADS = {
    "mask2former": {
        "feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 48,
        "dim_feedforward": 48, "encoder_layers": 1, "decoder_layers": 3, "num_attention_heads": 4,
        "train_num_points": 64,
    },
    "knet": {
        "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "norm_groups": 8, "num_stages": 2,
    },
    "queryinst": {
        "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "dynamic_channels": 8, "num_stages": 2,
        "num_mask_layers": 1, "finest_scale": 14,
    },
}  # fmt: skip
KINDS = [(segmenter, backbone) for segmenter in ON_MAPS for backbone in BACKBONES] + [(name, "vit") for name in WHOLE]
CANVASES = {name: {"height": 64, "width": 64} for name in WHOLE}  # of segmenters that want a square one
QUERIES, CLASSES = 10, {0: "cat", 1: "dog", 2: "horse"}
BOTH = pytest.mark.parametrize("cls", [UplvpForInstanceSegmentation, UplvpForPreTraining])


def settings_of(segmenter: str, backbone: str) -> dict:
    own = WHOLE.get(segmenter) or {"backbone_config": dict(BACKBONES[backbone]), **HEADS[segmenter]}
    return {"model_type": segmenter, "num_queries": QUERIES, "output_auxiliary_logits": True, **own}


def make_model(kind: tuple[str, str], cls=UplvpForPreTraining, seed: int = 0, **settings):
    torch.manual_seed(seed)
    settings.setdefault("id2label", dict(CLASSES))
    return cls(UplvpConfig(segmenter_config=settings_of(*kind), **settings))


@pytest.fixture(params=KINDS, ids="-".join)
def kind(request):
    return request.param


@pytest.fixture
def make_batch(make_batch, kind):
    return partial(make_batch, **CANVASES.get(kind[0], {}))


def trained(model: nn.Module):
    """Its parameters but for what a network has from its own pre-training, such as DINOv2's mask token."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def quiet(model: nn.Module) -> nn.Module:
    """Norms that take statistics over the batch do not, so that images are independent."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


def even(layer, kind, image, shape):
    """Draws that are the same for every image and mask, whatever the batch."""
    generator = torch.Generator().manual_seed(100 * layer + sum(map(ord, kind)))
    return torch.rand((1, *shape[1:]), generator=generator).expand(shape)


def tensors_of(output) -> dict[str, torch.Tensor]:
    names = ("class_queries_logits", "class_scores", "masks_queries_logits", "boxes", "roi_mask_logits", "queries")
    found = {name: getattr(output, name, None) for name in names}
    for index, layer in enumerate(output.auxiliary_logits):
        found.update({f"{name}_{index}": value for name, value in layer.items()})
    found = {name: value for name, value in found.items() if value is not None}
    if output.roi_mask_logits is not None:  # pasted probabilities, whose logits are steep near 0 and 1
        found["masks_queries_logits"] = found["masks_queries_logits"].sigmoid()
    return found


def assert_same_bits(one, other):
    one, other = tensors_of(one), tensors_of(other)
    assert one.keys() == other.keys() and len(one) > 3
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def grown(batch: dict, height: int, width: int) -> dict:
    """The batch on a larger canvas, with the mask that says so."""
    tall, wide = batch["pixel_values"].shape[-2:]
    pad = (0, width - wide, 0, height - tall)
    mask = torch.ones(len(batch["pixel_values"]), tall, wide)
    return {
        **batch,
        "pixel_values": nn.functional.pad(batch["pixel_values"], pad),
        "pixel_mask": nn.functional.pad(mask, pad),
        "mask_labels": [nn.functional.pad(masks, pad) for masks in batch["mask_labels"]],
    }


def configuration(model) -> dict:
    """Settings, less what says where and how a model was loaded."""
    found = model.config.to_dict()
    found["segmenter_config"] = {key: value for key, value in found["segmenter_config"].items() if key != "dtype"}
    return {key: value for key, value in found.items() if key not in ("_name_or_path", "dtype", "architectures")}


# ---- saving, loading, initialization ---------------------------------------------------------------------------------


@pytest.mark.slow
@BOTH
def test_save_and_load(kind, batch, cls, tmp_path):
    model = make_model(kind, cls).eval()
    model.save_pretrained(tmp_path)
    loaded, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert configuration(loaded) == configuration(model)
    with torch.no_grad():
        assert_same_bits(loaded.eval()(batch["pixel_values"]), model(batch["pixel_values"]))


@pytest.mark.slow
def test_loading_for_other_classes(kind, tmp_path):
    model = make_model(kind)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other, info = UplvpForInstanceSegmentation.from_pretrained(
            tmp_path, id2label={0: "dog", 1: "cow"}, ignore_mismatched_sizes=True, output_loading_info=True
        )
    sized = {f"segmenter.{name}" for name in model.segmenter.class_sized}
    assert {entry[0] for entry in info["mismatched_keys"]} == sized
    assert all(torch.isfinite(value).all() for value in other.state_dict().values())
    assert other.config.num_labels == 2 and other.segmenter.config.num_labels == 2
    remapped = UplvpForInstanceSegmentation.from_pretraining(tmp_path, {0: "dog", 1: "cow"})
    assert set(remapped.transfer_report.remapped) == sized and remapped.transfer_report.classes == ["dog"]
    assert not remapped.transfer_report.reinitialized
    old, new = model.state_dict(), remapped.state_dict()
    for name in sized:
        assert torch.equal(new[name][0], old[name][1]), name
    assert all(torch.equal(new[name], old[name]) for name in new.keys() - sized)


def test_every_weight_has_a_rule(kind, tmp_path):
    """What a checkpoint lacks is built on `meta` and initialized module by module: as by the constructor."""
    model = make_model(kind, text_dim=16, prompt_injection="concat")
    model.save_pretrained(tmp_path, state_dict={"segmenter.nothing": torch.zeros(1)})
    loaded, info = UplvpForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    direct, state = model.state_dict(), loaded.state_dict()
    counters = {name for name in direct if name.endswith("num_batches_tracked")}
    assert direct.keys() - counters <= info["missing_keys"]
    drawn = 0
    for name, value in state.items():
        value, other = value.float(), direct[name].float()
        assert value.device.type == "cpu" and torch.isfinite(value).all(), name
        if other.numel() == 1 or torch.equal(value, other):  # not drawn, or a constant
            torch.testing.assert_close(value, other, msg=name)
            continue
        drawn += 1
        deviation = other.std().item()
        if other.numel() >= 64:
            assert value.std().item() == pytest.approx(deviation, rel=0.4), name
        assert abs(value.mean().item() - other.mean().item()) < 7 * deviation / other.numel() ** 0.5, name
    assert drawn > 30


@pytest.mark.slow
def test_a_plain_segmenter_stands_alone_and_is_wrapped(kind, batch, tmp_path):
    model = make_model(kind, UplvpForInstanceSegmentation).eval()
    model.segmenter.save_pretrained(tmp_path)
    alone = SEGMENTERS[kind[0]].from_pretrained(tmp_path).eval()
    wrapped = UplvpForPreTraining.from_segmenter_pretrained(str(tmp_path)).eval()
    with torch.no_grad():
        ours = model(batch["pixel_values"])
        assert_same_bits(wrapped(batch["pixel_values"]), ours)
        theirs = alone(batch["pixel_values"])
    for name in ("class_queries_logits", "masks_queries_logits"):
        assert torch.equal(getattr(theirs, name), getattr(ours, name))
    assert wrapped.config.id2label == CLASSES and wrapped.config.prompt_drop == (0.1 if kind[0] == "knet" else 0.05)


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(3, 0, 2), (0, 0, 0), (QUERIES + 3, 1, 0)], ids=["some", "none", "many"])
@BOTH
def test_forward_and_backward(kind, make_batch, cls, counts):
    """Every parameter takes part whatever the number of objects: processes wait for all gradients."""
    model = make_model(kind, cls).train()
    output = model(**make_batch(counts=counts))
    assert output.loss.dtype == torch.float32 and torch.isfinite(output.loss)
    torch.testing.assert_close(output.loss, sum(output.losses.values()))
    output.loss.backward()
    for name, parameter in trained(model):
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    supervised = [name for name in output.losses if name.startswith(("mask", "dice", "box", "giou", "kernel"))]
    assert len(supervised) >= 4
    if sum(counts) == 0:
        assert all(output.losses[name] == 0 for name in supervised)
        assert any(value > 0 for value in output.losses.values())


@pytest.mark.parametrize("matching", ["cosine", "hungarian"])
def test_one_transfer_to_the_host_a_step(kind, make_batch, monkeypatch, matching):
    """Only the matching costs leave the device (the solver runs on the host): everything else stays there."""
    model, batch = make_model(kind, prompt_matching=matching, text_dim=16).train(), make_batch(scores=True)
    model.set_text_features(torch.eye(3, 16), list(CLASSES.values()))
    calls = []
    for name in ("cpu", "item", "tolist"):
        inner = getattr(torch.Tensor, name)

        def counted(tensor, *args, name=name, inner=inner, **kwargs):
            calls.append(name)
            return inner(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    loss = model(**batch).loss
    monkeypatch.undo()
    assert calls == ["cpu"] and torch.isfinite(loss)


def test_gradient_checkpointing_gives_equal_gradients(kind, batch):
    model = quiet(make_model(kind).train())
    runs = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(1)
        model(**batch).loss.backward()
        runs.append({name: parameter.grad.clone() for name, parameter in trained(model)})
    assert model.is_gradient_checkpointing
    for name, value in runs[0].items():
        torch.testing.assert_close(runs[1][name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_bfloat16(kind, batch):
    """Autocast and pure weights: float32 loss near the exact one, finite gradients of the weights' own type."""
    model = quiet(make_model(kind, prompt_drop=0.0).train())
    exact = model(**batch, draw=even).loss.item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = model(**batch, draw=even)
    half = copy.deepcopy(model).to(torch.bfloat16)
    pure = half(**{**batch, "pixel_values": batch["pixel_values"].bfloat16()}, draw=even)
    for output, network in ((cast, model), (pure, half)):
        assert output.loss.dtype == torch.float32 and output.loss.item() == pytest.approx(exact, rel=0.15)
        network.zero_grad()
        output.loss.backward()
        for name, parameter in trained(network):
            assert parameter.grad.dtype == parameter.dtype and torch.isfinite(parameter.grad).all(), name
    assert pure.class_queries_logits.dtype == torch.bfloat16


def test_normalizers_known_before_equal_those_of_the_batch(kind, make_batch):
    counts = (3, 0, QUERIES + 2)
    model, batch = quiet(make_model(kind).train()), make_batch(counts=counts)
    known = model.segmenter.normalizers(list(counts), model.config.num_prompts, batch["mask_labels"])
    own, given = (model(**batch, draw=even, normalizers=normalizers) for normalizers in (None, known))
    for name, value in own.losses.items():
        torch.testing.assert_close(given.losses[name], value, rtol=1e-5, atol=1e-6)


# ---- what comes out --------------------------------------------------------------------------------------------------


def test_hidden_states_and_attentions(kind, batch):
    model = make_model(kind).eval()
    with torch.no_grad():
        without = model(batch["pixel_values"])
        output = model(batch["pixel_values"], output_hidden_states=True, output_attentions=True)
    assert without.hidden_states is None and without.attentions is None
    for name, value in tensors_of(without).items():
        torch.testing.assert_close(tensors_of(output)[name], value, rtol=1e-4, atol=1e-4)
    stages = 2  # of every segmenter here; Mask2Former's first output comes before its first layer
    assert len(output.hidden_states) == stages + 1 and len(output.attentions) == stages
    assert torch.equal(output.hidden_states[-1], output.queries)
    assert all(hidden.shape == (3, QUERIES, 32) for hidden in output.hidden_states)
    # A ViT's queries see the 4 x 4 patches too, those of EoMT the class token and the register beside them.
    seen = QUERIES + {"eomt": 18, "eomt_dinov3": 18, "vit_mask_decoder": 16}.get(kind[0], 0)
    for weights in output.attentions:
        assert weights.shape == (3, 4, seen, seen)
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, seen), rtol=1e-4, atol=1e-4)
    scores = output.class_scores
    assert (scores is None) == (kind[0] not in ("knet", "queryinst", "rf_detr"))
    if scores is not None:
        assert torch.equal(scores, output.class_queries_logits.sigmoid())
    as_tuple = model(batch["pixel_values"], return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], without.class_queries_logits)


def test_an_image_alone_equals_itself_in_a_padded_batch(kind, batch):
    model = make_model(kind).eval()
    small, large, (height, width) = (64, 96), (128, 160), (56, 90)  # ends within a cell of every stride
    if model.segmenter.square_canvas:
        small, large, (height, width) = (64, 64), (64, 64), (56, 50)
    own = {**batch, "pixel_values": batch["pixel_values"][:, :, :height, :width]}
    own["mask_labels"] = [masks[:, :height, :width] for masks in batch["mask_labels"]]
    alone, padded = grown(own, *small), grown(own, *large)
    padded["pixel_mask"][1:] = 1  # mates that fill the canvas
    padded["pixel_values"][1:] = torch.randn(2, 3, *large, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        one = model(alone["pixel_values"][:1], alone["pixel_mask"][:1])
        other = model(padded["pixel_values"], padded["pixel_mask"])
    rows, columns = -(-height // 4), -(-width // 4)
    compared = 0
    for name, value in tensors_of(one).items():
        mate = tensors_of(other)[name][:1]
        if "masks_queries" in name:
            value, mate = value[..., :rows, :columns], mate[..., :rows, :columns]
        torch.testing.assert_close(mate, value, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
        compared += 1
    assert compared >= 4


def test_the_loss_does_not_depend_on_the_canvas(kind, batch):
    model = quiet(make_model(kind, prompt_drop=0.0).train())
    if model.segmenter.square_canvas:
        pytest.skip("has one canvas")
    losses = [model(**grown(batch, *canvas), draw=even).losses for canvas in ((64, 96), (128, 160))]
    # Mask2Former's points within half a cell of the border see zeros beyond the end of a map, and the image's edge
    # repeated on a canvas; an assignment of untrained queries may turn on that.
    tolerance = 0.1 if kind[0] == "mask2former" else 1e-3
    totals = [sum(found.values()) for found in losses]
    torch.testing.assert_close(totals[1], totals[0], rtol=tolerance, atol=0)
    if kind[0] != "mask2former":
        for name, value in losses[0].items():
            torch.testing.assert_close(losses[1][name], value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("off", [{"prompt_drop": 1.0}, {"prompt_matching": "none"}], ids=["dropped", "none"])
@pytest.mark.parametrize("injection", ["add", "every_stage", "concat"])
def test_without_prompts_pretraining_is_the_plain_model(kind, batch, off, injection):
    model = make_model(kind, prompt_injection=injection, **off).train()
    plain = make_model(kind, UplvpForInstanceSegmentation, seed=1).train()
    plain.segmenter.load_state_dict(model.segmenter.state_dict())
    ours, theirs = quiet(model)(**batch, draw=even), quiet(plain)(**batch, draw=even)
    assert_same_bits(ours, theirs)
    assert set(ours.losses) - set(theirs.losses) == {"kernel"}
    assert all(torch.equal(ours.losses[name], value) for name, value in theirs.losses.items())
    alone = quiet(plain.segmenter)(
        batch["pixel_values"], mask_labels=[m.float() for m in batch["mask_labels"]], class_labels=batch["class_labels"]
    )
    assert torch.equal(alone.class_queries_logits, ours.class_queries_logits)
    if kind[0] in ("knet", "queryinst"):  # the others draw points of their own
        assert torch.equal(alone.loss, theirs.loss)


@pytest.mark.parametrize("matching", ["cosine", "sequential", "random", "hungarian"])
@pytest.mark.parametrize("injection", ["add", "every_stage", "concat"])
def test_prompts_reach_images_with_masks_only(kind, batch, matching, injection):
    model = make_model(kind, prompt_matching=matching, prompt_injection=injection, prompt_drop=0.0).eval()
    with torch.no_grad():
        prompted, without = model(**batch, draw=even), model(batch["pixel_values"])
    changed = [not torch.equal(prompted.queries[i], without.queries[i]) for i in range(3)]
    assert changed == [True, False, True]
