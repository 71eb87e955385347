"""What transformers' common tests of models assert, for ours: the wheels of transformers do not hold those tests."""

import copy
import inspect
import json
from functools import partial

import pytest
import torch
from test_sweep import CANVASES, CLASSES, KINDS, make_model, quiet, tensors_of, trained
from torch import nn

from uplvp_hf.models.modeling_base_uplvp import SEGMENTERS
from uplvp_hf.models.modeling_uplvp import UplvpForInstanceSegmentation, UplvpForPreTraining

BOTH = pytest.mark.parametrize("cls", [UplvpForInstanceSegmentation, UplvpForPreTraining])


@pytest.fixture(params=[kind for kind in KINDS if kind[1] != "mobilenet"], ids=lambda kind: kind[0])
def kind(request):
    return request.param


@pytest.fixture
def make_batch(make_batch, kind):
    return partial(make_batch, **CANVASES.get(kind[0], {}))


@pytest.fixture
def pixels(batch):
    return batch["pixel_values"]


def plain(kind, **settings):
    return make_model(kind, UplvpForInstanceSegmentation, **settings).eval()


@BOTH
def test_forward_begins_with_the_main_input(kind, cls):
    for one in (cls, SEGMENTERS[kind[0]]):
        names = list(inspect.signature(one.forward).parameters)
        assert names[:2] == ["self", one.main_input_name] == ["self", "pixel_values"]


@BOTH
def test_tuples_hold_what_the_output_holds(kind, pixels, cls):
    model = make_model(kind, cls).eval()
    options = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        named, plain_tuple = model(pixels, **options), model(pixels, **options, return_dict=False)
    assert isinstance(plain_tuple, tuple) and len(plain_tuple) == len(named.keys())

    def compare(one, other):
        assert type(one) is type(other)
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other)
        elif isinstance(one, dict):
            assert one.keys() == other.keys()
            compare(list(one.values()), list(other.values()))
        else:
            assert len(one) == len(other)
            for left, right in zip(one, other, strict=True):
                compare(left, right)

    compare(named.to_tuple(), plain_tuple)


def test_predictions_begin_with_the_class_logits(kind, pixels):
    """`Trainer` leaves out what `keys_to_ignore_at_inference` names: the rest are tensors, one row an image."""
    model = plain(kind)
    with torch.no_grad():
        output = model(pixels, output_hidden_states=True, output_attentions=True)
    kept = [name for name in output if name not in model.config.keys_to_ignore_at_inference]
    assert kept[0] == "class_queries_logits"
    assert all(isinstance(output[name], torch.Tensor) and len(output[name]) == len(pixels) for name in kept)


@pytest.mark.parametrize("option", ["output_hidden_states", "output_attentions"])
def test_options_of_the_configuration_are_those_of_forward(kind, pixels, option):
    model = plain(kind)
    model.set_attn_implementation("eager")  # without which transformers takes no configuration that wants attentions
    field = option.removeprefix("output_")
    with torch.no_grad():
        asked = getattr(model(pixels, **{option: True}), field)
        if option == "output_hidden_states":  # as transformers' Mask2Former: a choice of layers asks for all
            assert len(model(pixels, output_hidden_states=[0, -1]).hidden_states) == len(asked)
        setattr(model.segmenter.config, option, True)
        setattr(model.config, option, True)
        configured = getattr(model(pixels), field)
        assert getattr(model(pixels, **{option: False}), field) is None
    assert len(configured) == len(asked) and all(map(torch.equal, configured, asked))


def test_hidden_states_and_attentions_have_gradients(kind, pixels):
    output = plain(kind)(pixels, output_hidden_states=True, output_attentions=True)
    # Without a hook the first queries of RF-DETR are inside transformers' forward.
    kept = [*output.hidden_states[kind[0] == "rf_detr" :], *output.attentions]
    for value in kept:
        value.retain_grad()
    predictions = [output.class_queries_logits, output.masks_queries_logits]
    predictions += [value for layer in output.auxiliary_logits for value in layer.values()]
    sum(value.sum() for value in predictions).backward()
    assert all(value.grad is not None for value in kept)


def test_evaluation_is_deterministic(kind, pixels):
    model = plain(kind)
    with torch.no_grad():
        one, other = tensors_of(model(pixels)), tensors_of(model(pixels))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("reentrant", [False, True])
def test_every_weight_is_trained_under_checkpointing(kind, batch, reentrant):
    if reentrant and kind[0] == "rf_detr":
        pytest.skip("transformers hands its features to the decoder layers by keyword")
    model = quiet(make_model(kind, prompt_drop=0.0).train())
    batch["pixel_mask"] = torch.ones(3, *batch["pixel_values"].shape[-2:])
    batch["pixel_mask"][1, :, 50:] = 0
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        torch.manual_seed(1)
        model(**batch).loss.backward()
        assert all(parameter.grad is not None for _, parameter in trained(model))
        found.append({name: parameter.grad.clone() for name, parameter in trained(model)})
    scale = max(value.abs().max().item() for value in found[0].values())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-6 * scale, msg=name)
    model.activation_checkpointing_disable()
    assert not model.is_gradient_checkpointing


@pytest.mark.filterwarnings("ignore:torch.ao.quantization:DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:.*quantiz:UserWarning")
def test_linear_layers_can_be_quantized(kind, pixels):
    model = plain(kind)
    with torch.no_grad():
        exact = model(pixels)
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        output = quantized(pixels)
    assert sum("quantized" in type(layer).__module__ for layer in quantized.modules()) > 10
    for name in ("class_queries_logits", "masks_queries_logits"):
        value, expected = getattr(output, name), getattr(exact, name)
        assert torch.isfinite(value).all()
        error = (value - expected).abs().median() / expected.abs().median()
        assert 0 < error < 0.5, name


@pytest.mark.filterwarnings("ignore:torch.ao.quantization:DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:.*quantiz:UserWarning")
@pytest.mark.parametrize("injection", ["add", "concat"])
def test_the_prompting_path_can_be_quantized(kind, batch, injection):
    """The projection of prompts, their fusion and the text head are linear layers like any other."""
    model = make_model(kind, prompt_injection=injection, prompt_drop=0.0, text_dim=16).eval()
    model.set_text_features(torch.randn(len(CLASSES), 16), list(CLASSES.values()))
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    names = ["text_heads.heads.0.projection"] + ["prompt_fusion.linear"] * (injection == "concat")
    if kind[0] in ("mask2former", "vit_mask_decoder"):  # whose prompts have other channels than the queries
        names.append("prompt_projection")
    assert all("quantized" in type(quantized.get_submodule(name)).__module__ for name in names)
    with torch.no_grad():
        assert torch.isfinite(quantized(**batch).loss)


@BOTH
def test_the_saved_configuration_is_the_model_s(kind, cls, tmp_path):
    model = make_model(kind, cls)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    known = set(type(model.config)().to_dict()) | {"architectures", "dtype", "id2label", "label2id"}
    assert saved.keys() <= known
    loaded = type(model.config).from_pretrained(tmp_path)
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert json.loads((again / "config.json").read_text()) == saved
    assert loaded.id2label == CLASSES and type(loaded.segmenter_config) is type(model.config.segmenter_config)


def test_weights_load_in_the_dtype_asked_for(kind, pixels, tmp_path):
    model = plain(kind)
    model.save_pretrained(tmp_path)
    half = UplvpForInstanceSegmentation.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert half.dtype == torch.bfloat16
    with torch.no_grad():
        output = half(pixels.bfloat16())
    assert output.class_queries_logits.dtype == torch.bfloat16
    assert torch.isfinite(output.masks_queries_logits.float()).all()


def test_a_copy_shares_nothing_and_gives_the_same(kind, pixels):
    model = plain(kind)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        one, other = tensors_of(model(pixels)), tensors_of(copied(pixels))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    shared = {parameter.data_ptr() for parameter in model.parameters() if parameter.numel()}
    assert not shared & {parameter.data_ptr() for parameter in copied.parameters() if parameter.numel()}
    assert len(shared) == sum(1 for parameter in model.parameters() if parameter.numel())  # none are tied
