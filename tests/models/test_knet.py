"""K-Net on its own: saving, initialization, padding, labels of every number, precision, export."""

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from uplvp_hf.data.synthetic import make_scene
from uplvp_hf.models.configuration_knet import KNetConfig
from uplvp_hf.models.layers_knet import gather_objects
from uplvp_hf.models.modeling_knet import KNetForInstanceSegmentation, KNetModel

RESNET = {
    "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1],
    "layer_type": "basic", "out_features": ["stage1", "stage2", "stage3", "stage4"],
}  # fmt: skip
TIMM = {"model_type": "timm_backbone", "backbone": "mobilenetv2_035", "out_indices": [1, 2, 3, 4]}
BACKBONES = pytest.mark.parametrize("backbone", ["resnet", "timm"])


def make_config(backbone="resnet", **changes):
    settings = {
        "backbone_config": dict({"resnet": RESNET, "timm": TIMM}[backbone]), "hidden_size": 16, "norm_groups": 4,
        "num_attention_heads": 2, "intermediate_size": 24, "num_queries": 12, "num_stages": 2,
        "id2label": {0: "cat", 1: "dog", 2: "horse"},
    }  # fmt: skip
    return KNetConfig(**{**settings, **changes})


def make_model(backbone="resnet", cls=KNetForInstanceSegmentation, **changes):
    torch.manual_seed(0)
    model = cls(make_config(backbone, **changes)).eval()
    with torch.no_grad():  # at initialization class logits are nearly constant
        for name, parameter in model.named_parameters():
            if name.endswith("classifier.weight"):
                parameter.normal_(std=0.5)
    return model


def padded(batch, height, width):
    """The same images on a larger canvas, with a pixel mask."""
    tall, wide = batch["pixel_values"].shape[-2:]
    margin = (0, width - wide, 0, height - tall)
    return {
        "pixel_values": F.pad(batch["pixel_values"], margin, value=1.5),
        "pixel_mask": F.pad(torch.ones(len(batch["pixel_values"]), tall, wide, dtype=torch.int64), margin),
        "mask_labels": [F.pad(mask, margin) for mask in batch["mask_labels"]],
        "class_labels": batch["class_labels"],
    }


@BACKBONES
def test_round_trip(backbone, make_batch, tmp_path):
    model = make_model(backbone, dice_weight=3.0, semantic_targets="touched")
    model.save_pretrained(tmp_path)
    loaded = KNetForInstanceSegmentation.from_pretrained(tmp_path).eval()
    assert loaded.config.dice_weight == 3 and loaded.config.semantic_targets == "touched"
    assert loaded.config.id2label == {0: "cat", 1: "dog", 2: "horse"}
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    pixels = make_batch()["pixel_values"]
    body = KNetModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        output = model(pixels)
        assert torch.equal(loaded(pixels).masks_queries_logits, output.masks_queries_logits)
        assert torch.equal(body(pixels).queries, output.queries)
    half = KNetForInstanceSegmentation.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_other_classes_keep_everything_else(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    other = KNetForInstanceSegmentation.from_pretrained(
        tmp_path, id2label={i: str(i) for i in range(5)}, ignore_mismatched_sizes=True
    )
    old, new = model.state_dict(), other.state_dict()
    assert {name for name in new if new[name].shape != old[name].shape} == set(model.class_sized)
    assert all(len(new[name]) == 5 and torch.isfinite(new[name]).all() for name in model.class_sized)
    assert all(torch.equal(new[name], old[name]) for name in new if name not in model.class_sized)


def test_initialization_by_rule(tmp_path):
    """Statistics of every tensor, in a new model and where a checkpoint lacks them."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_queries": 80, "num_attention_heads": 4}
    torch.manual_seed(0)
    fresh = KNetForInstanceSegmentation(make_config(**sizes))
    fresh.save_pretrained(tmp_path)
    kept = {"model.stages.0.fc1.bias": torch.full((96,), 5.0)}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = KNetForInstanceSegmentation.from_pretrained(tmp_path)
    assert (loaded.state_dict()["model.stages.0.fc1.bias"] == 5).all()
    prior, c = -np.log(99), 64
    for model in (fresh, loaded):
        own = {k: v for k, v in model.state_dict().items() if ".backbone." not in k and k not in kept}
        for name, value in own.items():
            kind = name.split(".", 1)[1]
            if "norm" in name or ".class_layers.1." in name or ".mask_layers.1." in name:
                expected = (1, 0) if name.endswith("weight") else (0, 0)
            elif "classifier.bias" in name:
                expected = (prior, 0)
            elif "kernels.weight" in name:
                expected = (0, 1)
            elif kind.startswith(("semantic_pyramid", "kernel_head")):
                expected = (0, 0.01)
            elif kind.startswith("pyramid"):
                fans = value.numel() / len(value) + value.numel() / value.shape[1] if value.dim() > 1 else 0
                expected = (0, (2 / fans) ** 0.5 if fans else 0)
            elif value.dim() > 1:
                rows = 3 * c if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj") else len(value)
                expected = (0, (2 / (rows + value.shape[1])) ** 0.5)
            elif "self_attn" in name or "feature_transform" in name:
                expected = (0, 0)
            else:  # torch's rule for the biases of linear layers
                fan = 96 if ".fc2." in name else c
                expected = (0, (fan * 3) ** -0.5)
            mean, std = expected
            assert value.mean().item() == pytest.approx(mean, abs=5 * std / value.numel() ** 0.5 + 1e-5), name
            assert value.std(correction=0).item() == pytest.approx(std, rel=0.25, abs=1e-7), name


@BACKBONES
@pytest.mark.parametrize("counts", [(3, 0, 2), (0, 0), (20, 1)], ids=["some", "none", "more than queries"])
def test_training_step(backbone, counts, make_batch):
    model = make_model(backbone)
    batch = make_batch(counts=counts)
    output = model(**batch)
    names = {"semantic", "initial_mask", "initial_dice"}
    names |= {f"{kind}_{stage}" for kind in ("class", "mask", "dice") for stage in range(2)}
    assert set(output.losses) == names and torch.isfinite(output.loss)
    torch.testing.assert_close(output.loss, torch.stack(list(output.losses.values())).sum())
    if not any(counts):
        assert all(output.losses[name] == 0 for name in names if "mask" in name or "dice" in name)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    features = model.encode(batch["pixel_values"])
    layers = model.decode(features, model.initial_queries(features))
    _, matches = model.loss(layers, features, batch["mask_labels"], batch["class_labels"])
    assert len(matches) == model.num_stages
    for match in matches:
        for count, (query, target) in zip(counts, match, strict=True):
            assert len(set(query.tolist())) == len(set(target.tolist())) == len(query) == min(count, 12)


@BACKBONES
def test_an_image_alone_equals_the_same_image_in_a_padded_batch(backbone, make_batch):
    model = make_model(backbone)
    alone = make_batch(counts=(3,), height=64, width=96)
    large = padded(alone, 128, 160)
    full = make_batch(counts=(2,), height=128, width=160, seed=1)
    both = {
        "pixel_values": torch.cat([large["pixel_values"], full["pixel_values"]]),
        "pixel_mask": torch.cat([large["pixel_mask"], torch.ones_like(large["pixel_mask"])]),
    }
    with torch.no_grad():
        one, many, whole = model(**alone), model(**both), model(full["pixel_values"])
        torch.testing.assert_close(one.losses, model(**large).losses, rtol=1e-4, atol=1e-5)
    for index, single, cells in [(0, one, (16, 24)), (1, whole, (32, 40))]:
        masks = many.masks_queries_logits[index, :, : cells[0], : cells[1]]
        torch.testing.assert_close(masks, single.masks_queries_logits[0], rtol=0, atol=1e-4)
        for name in ("class_scores", "queries", "class_queries_logits"):
            torch.testing.assert_close(many[name][index], single[name][0], rtol=0, atol=1e-4)
    # An all-ones mask changes no bit.
    with torch.no_grad():
        masked = model(full["pixel_values"], torch.ones(1, 128, 160))
    assert torch.equal(masked.masks_queries_logits, whole.masks_queries_logits)


def test_hidden_states_and_attentions(make_batch):
    model, pixels = make_model(), make_batch()["pixel_values"]
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        plain = model(pixels)
        options = {"output_hidden_states": True, "output_attentions": True, "output_auxiliary_logits": True}
        output = model(pixels, **options)
    assert plain.hidden_states is None and plain.attentions is None and plain.auxiliary_logits is None
    assert len(output.hidden_states) == 3 and torch.equal(output.hidden_states[-1], output.queries)
    assert len(output.attentions) == 2 and output.attentions[0].shape == (3, 2, 12, 12)
    torch.testing.assert_close(output.attentions[1].sum(-1), torch.ones(3, 2, 12))
    torch.testing.assert_close(output.masks_queries_logits, plain.masks_queries_logits, rtol=0, atol=1e-5)
    assert len(output.auxiliary_logits) == 1
    names = [name for name in output if output[name] is not None]
    assert len(model(pixels, **options, return_dict=False)) == len(names)
    # The weights are those of the attention: they reproduce its output from the values.
    attention, kernels = model.model.stages[0].self_attn, torch.randn(1, 12, 16)
    mixed, weights = attention(kernels, output_attentions=True)
    values = attention.v_proj(kernels).view(1, 12, 2, 8)
    expected = attention.out_proj(torch.einsum("bhnm,bmhd->bnhd", weights, values).flatten(2))
    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(attention(kernels)[0], expected)


def test_injection_at_every_stage(make_batch):
    model, pixels = make_model(), make_batch()["pixel_values"]
    seen = []

    def inject(queries, features, stage):
        seen.append(stage)
        return queries + 1

    with torch.no_grad():
        features, queries, plain = model.run(pixels)
        nothing = model.run(pixels, inject=lambda queries, features, stage: queries)[2]
        layers = model.run(pixels, inject=inject)[2]
    assert seen == [0, 1]
    assert torch.equal(plain[-1].mask_logits, nothing[-1].mask_logits)
    once = model.model.stages[0](features.maps, features.masks, queries + 1, None)
    torch.testing.assert_close(layers[0].queries, once[2])
    again = model.model.stages[1](features.maps, once[1], once[2] + 1, None)
    torch.testing.assert_close(layers[1].queries, again[2])


def gradients(model, batch, **keywords):
    model.zero_grad()
    output = model(**batch, **keywords)
    output.loss.backward()
    return output.loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def test_gradient_checkpointing_changes_nothing(make_batch):
    model = make_model().train()
    model.backbone.eval()
    batch = padded(make_batch(counts=(2, 3)), 96, 128)
    loss, plain = gradients(model, batch)
    model.gradient_checkpointing_enable()
    ran = []
    model.model.stages[0].fc1.register_forward_hook(lambda *_: ran.append(1))
    checkpointed = gradients(model, batch)
    assert len(ran) == 2  # forwards again in the backward pass
    torch.testing.assert_close(checkpointed[0], loss)
    torch.testing.assert_close(checkpointed[1], plain)


def test_half_precision_trains(make_batch):
    model, batch = make_model().train(), make_batch(counts=(2, 1))
    model.backbone.eval()
    reference = gradients(model, batch)[0]
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**batch)
    assert all(value.dtype == torch.float32 for value in output.losses.values())
    assert output.loss.item() == pytest.approx(reference.item(), rel=0.1)
    output.loss.backward()
    half = copy.deepcopy(model).to(torch.bfloat16)
    loss, found = gradients(half, batch)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(reference.item(), rel=0.1)
    assert all(grad.dtype == torch.bfloat16 and torch.isfinite(grad).all() for grad in found.values())
    assert half(**batch).class_scores.dtype == torch.float32


@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("way", ["weights", "autocast"])
def test_float16_holds_sums_over_large_images(pooling, way):
    """What a kernel takes in of a large object is beyond the range of float16, 65504; the results are not."""
    model = make_model(object_pooling=pooling).eval()
    with torch.no_grad():
        for block in [*model.model.kernel_head.localization, *model.model.kernel_head.semantic]:
            block.norm.bias.fill_(20.0)  # maps of this size, as trained networks have them
        model.model.kernel_head.kernels.weight.abs_()  # every initial mask covers the whole image
        pixels = torch.randn(1, 3, 640, 640, generator=torch.Generator().manual_seed(0))
        exact = model(pixels)
        assert pooling == "mean" or model.encode(pixels).kernels.max() > 65504
        if way == "weights":
            output = copy.deepcopy(model).half()(pixels.half())
        else:
            with torch.autocast("cpu", torch.float16):
                output = model(pixels)
    for name in ("class_queries_logits", "masks_queries_logits", "queries"):
        assert torch.isfinite(output[name]).all(), name
    torch.testing.assert_close(output.class_scores, exact.class_scores, rtol=0, atol=0.02)


def test_divisors_of_several_batches_equal_those_of_one(make_batch):
    model = make_model(semantic_weight=2.0)
    batch = make_batch(counts=(3, 0, 2))
    loss, whole = gradients(model, batch)
    counts = [len(labels) for labels in batch["class_labels"]]
    normalizers = model.normalizers(counts, 20, batch["mask_labels"])
    assert (normalizers.masks, normalizers.pairs) == (5, 10)
    total, summed = 0, None
    for part in (slice(0, 1), slice(1, 3)):
        one, found = gradients(model, {name: value[part] for name, value in batch.items()}, normalizers=normalizers)
        total = total + one
        summed = found if summed is None else {name: summed[name] + found[name] for name in found}
    torch.testing.assert_close(total, loss)
    torch.testing.assert_close(summed, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_and_exported_forward(make_batch):
    model = make_model()
    pixels = make_batch(counts=(1, 1, 1))["pixel_values"]
    with torch.no_grad():
        expected = model(pixels)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(pixels)
        torch.testing.assert_close(compiled.masks_queries_logits, expected.masks_queries_logits, rtol=0, atol=1e-4)
        program = torch.export.export(model, (pixels[:2],), dynamic_shapes={"pixel_values": {0: torch.export.Dim("b")}})
        exported = program.module()(pixels)
    torch.testing.assert_close(exported.class_scores, expected.class_scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(exported.masks_queries_logits, expected.masks_queries_logits, rtol=0, atol=1e-4)


def test_wrong_settings_and_labels_are_refused(make_batch):
    with pytest.raises(ValueError, match=r"no setting `dice_wieght`\. Did you mean `dice_weight`"):
        KNetConfig(dice_wieght=1.0)
    for wrong, message in [
        ({"hidden_size": 18, "num_attention_heads": 4}, "num_attention_heads: 4"),
        ({"num_stages": 0}, "num_stages must be at least 1"),
        ({"semantic_targets": "all"}, "majority, touched"),
        ({"object_pooling": "max"}, "sum, mean"),
        ({"prior_probability": 0.0}, "prior_probability"),
        ({"dropout": 1.0}, "dropout"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_config(**wrong)
    model, batch = make_model(), make_batch(counts=(2,))
    with pytest.raises(ValueError, match="class_labels"):
        model(batch["pixel_values"], mask_labels=batch["mask_labels"])
    with pytest.raises(ValueError, match=r"3 classes \(0..2\)"):
        model(**{**batch, "class_labels": [torch.tensor([0, 3])]})
    with pytest.raises(ValueError, match="4 are needed"):
        make_model(backbone_config={**RESNET, "out_features": ["stage2", "stage4"]}, num_stages=1)


def test_defaults_are_those_of_the_paper():
    config = KNetConfig()
    assert (config.num_queries, config.num_stages, config.hidden_size) == (100, 3, 256)
    assert config.backbone_config.model_type == "resnet" and tuple(config.backbone_config.depths) == (3, 4, 6, 3)
    with torch.device("meta"):
        model = KNetForInstanceSegmentation(config)
    assert model.backbone.channels == [256, 512, 1024, 2048]
    kernels = model.model.kernel_head.kernels.weight
    assert kernels.shape == (100, 256) and kernels.is_meta and len(model.model.stages) == 3


@pytest.mark.slow
def test_learns_one_image():
    scene = make_scene(seed=3, size=96, min_objects=2, max_objects=3)
    pixels = torch.from_numpy(np.array(scene["image"])).permute(2, 0, 1)[None].float() / 127.5 - 1
    batch = {
        "pixel_values": pixels,
        "mask_labels": [torch.as_tensor(np.stack(scene["masks"])).bool()],
        "class_labels": [torch.as_tensor(scene["labels"])],
    }
    classes = int(max(scene["labels"])) + 1
    torch.manual_seed(0)
    config = make_config(hidden_size=32, id2label={i: str(i) for i in range(classes)})
    model = KNetForInstanceSegmentation(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        output = model(**batch)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(output.loss.item())
    assert np.mean(losses[-5:]) < 0.5 * losses[0]


@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_what_a_kernel_takes_in(pooling):
    torch.manual_seed(0)
    x, logits, valid = torch.randn(2, 5, 4, 6), torch.randn(2, 3, 4, 6), torch.rand(2, 4, 6) > 0.3
    logits[1, 2] = -1.0  # a mask without cells
    found = gather_objects(x, logits, valid, pooling)
    for image in range(2):
        for kernel in range(3):
            cells = x[image][:, (logits[image, kernel] > 0) & valid[image]]  # (D, cells)
            wanted = cells.sum(1) if pooling == "sum" or not cells.numel() else cells.mean(1)
            torch.testing.assert_close(found[image, kernel], wanted)


def test_mean_pooling_is_used_and_saved(make_batch, tmp_path):
    """The same weights with the mean differ from those with the sum; the choice comes back with the checkpoint."""
    total, mean = make_model(object_pooling="sum"), make_model(object_pooling="mean")
    mean.load_state_dict(total.state_dict())
    batch = make_batch()
    logits = [model(batch["pixel_values"]).class_queries_logits for model in (total, mean)]
    assert not torch.allclose(*logits)
    mean.save_pretrained(tmp_path)
    loaded = KNetForInstanceSegmentation.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(batch["pixel_values"]).class_queries_logits, logits[1])
