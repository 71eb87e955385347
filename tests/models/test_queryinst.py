"""QueryInst as a model of transformers: loading, batches, dtypes, compilation, hard cases."""

import copy
import math

import pytest
import torch

from uplvp_hf.models.configuration_queryinst import QueryInstConfig
from uplvp_hf.models.modeling_queryinst import QueryInstForInstanceSegmentation, QueryInstModel
from uplvp_hf.models.roi_masks import paste_masks

RESNET = {
    "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1],
    "layer_type": "basic", "out_features": ["stage1", "stage2", "stage3", "stage4"],
}  # fmt: skip
TIMM = {
    "model_type": "timm_backbone", "backbone": "test_resnet", "out_indices": [1, 2, 3, 4],
    "timm_kwargs": {"zero_init_last": False},
}  # fmt: skip
BACKBONES = {"resnet": RESNET, "timm": TIMM}


def make(backbone="resnet", seed=0, kind=QueryInstForInstanceSegmentation, **changes):
    settings = {
        "backbone_config": copy.deepcopy(BACKBONES[backbone]), "num_queries": 9, "hidden_size": 32, "num_stages": 2,
        "num_attention_heads": 4, "intermediate_size": 48, "dynamic_channels": 8, "num_mask_layers": 2,
        "finest_scale": 14, "id2label": {0: "cat", 1: "dog", 2: "horse"},
        "label2id": {"cat": 0, "dog": 1, "horse": 2}, **changes,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = kind(QueryInstConfig(**settings))
    # Boxes as after training: apart from each other, of several sizes, some across the border.
    body = getattr(model, "model", model)
    with torch.no_grad():
        count = model.config.num_queries
        body.proposal_boxes.weight.copy_(torch.cat([torch.rand(count, 2), torch.rand(count, 2) * 0.8 + 0.1], 1))
    return model


def same_state(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("backbone", BACKBONES)
def test_save_and_load(backbone, tmp_path):
    model = make(backbone).eval()
    model.save_pretrained(tmp_path)
    again, report = QueryInstForInstanceSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    same_state(model.state_dict(), again.state_dict())
    for name in QueryInstConfig.__annotations__:
        if name != "backbone_config":
            assert getattr(again.config, name) == getattr(model.config, name), name
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(image).masks_queries_logits, again.eval()(image).masks_queries_logits)
    body = QueryInstModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(body(image).boxes, model(image).boxes)


def test_other_classes_reinitialize_what_has_a_row_a_class(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    again, report = QueryInstForInstanceSegmentation.from_pretrained(
        tmp_path, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {key[0] for key in report["mismatched_keys"]} == set(again.class_sized) == set(model.class_sized)
    for name, value in again.state_dict().items():
        assert torch.isfinite(value).all()
        if name in again.class_sized:
            assert value.shape[0] == 5
        else:
            assert torch.equal(value, model.state_dict()[name])
    prior = again.model.stages[0].class_predictor.bias
    torch.testing.assert_close(prior.sigmoid(), torch.full_like(prior, 0.01))


def test_every_tensor_is_initialized_by_rule():
    """Built on `meta` and materialized with rubbish, every tensor gets its rule; statistics are the original's."""
    settings = {"hidden_size": 64, "dynamic_channels": 16, "intermediate_size": 256, "num_attention_heads": 4}
    with torch.device("meta"):
        model = QueryInstForInstanceSegmentation(make(**settings).config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for value in [*model.parameters(), *model.buffers()]:
            value.fill_(77) if value.is_floating_point() else value.fill_(7)
    for module in model.modules():
        module._is_hf_initialized = False
    torch.manual_seed(0)
    model.init_weights()
    body, stage, head = model.model, model.model.stages[1], model.model.mask_heads[1]
    assert all(not (value == 77).any() for value in model.state_dict().values())
    assert torch.equal(body.proposal_boxes.weight, torch.tensor([0.5, 0.5, 1, 1]).expand_as(body.proposal_boxes.weight))
    assert body.proposal_features.weight.std().item() == pytest.approx(1, rel=0.1)
    for layer, fan_in, fan_out in (
        (stage.attention.in_proj, 64, 192), (stage.attention.out_proj, 64, 64), (stage.fc1, 64, 256),
        (stage.dynamic_conv.kernels, 64, 2 * 64 * 16), (stage.dynamic_projection, 49 * 64, 64),
        (stage.class_layers[0].linear, 64, 64), (stage.box_layers[2].linear, 64, 64), (head.convs[0].conv, 576, 576),
        (head.upsample, 256, 256), (body.neck.output[0], 576, 576), (body.neck.lateral[3], 32, 64),
    ):  # fmt: skip
        bound = math.sqrt(6 / (fan_in + fan_out))  # uniform of Xavier
        assert layer.weight.abs().max().item() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    for layer, fan_in in ((stage.fc1, 64), (stage.dynamic_conv.kernels, 64)):
        assert layer.bias.std().item() == pytest.approx(1 / math.sqrt(3 * fan_in), rel=0.1)
    for bias in (
        stage.attention.in_proj.bias,
        stage.attention.out_proj.bias,
        head.class_masks.bias,
        body.neck.output[0].bias,
    ):
        assert not bias.any()
    torch.testing.assert_close(stage.class_predictor.bias, torch.full((3,), -math.log(99)))
    for norm in (stage.ffn_norm, head.convs[0].norm, head.dynamic_conv.norm_in):
        assert (norm.weight == 1).all() and (norm.bias == 0).all()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_parameter_gets_a_gradient(backbone, make_batch):
    model = make(backbone).train()
    output = model(**make_batch((3, 0, 2)))
    assert set(output.losses) == {f"{term}_{stage}" for term in ("class", "box", "giou", "mask") for stage in (0, 1)}
    assert torch.equal(output.loss, torch.stack(list(output.losses.values())).sum())
    output.loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert model.model.mask_heads[0].convs[0].norm.num_batches_tracked == 1


def test_no_objects_at_all(make_batch):
    model = make().train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    output = model(**make_batch((0, 0)), output_auxiliary_logits=True)
    output.loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    losses = {name: value.item() for name, value in output.losses.items()}
    assert all(value == 0 for name, value in losses.items() if not name.startswith("class"))
    logits = torch.stack([a["class_queries_logits"] for a in output.auxiliary_logits] + [output.class_queries_logits])
    probability = logits.double().sigmoid()
    expected = -(2 * 0.75 * probability**2 * (1 - probability).log()).sum((1, 2, 3))  # divided by 1, not by nothing
    assert [losses["class_0"], losses["class_1"]] == pytest.approx(expected.tolist(), rel=1e-5)
    for name, value in model.named_buffers():
        if "mask_heads" in name:
            assert torch.equal(value, before[name])


def test_more_objects_than_queries(make_batch):
    model = make(num_queries=2).train()
    batch = make_batch((5, 1))
    features = model.encode(batch["pixel_values"])
    layers = model.decode(features, model.initial_queries(features))
    losses, matches = model.loss(layers, features, batch["mask_labels"], batch["class_labels"])
    for match in matches:
        assert [len(query) for query, _ in match] == [2, 1]
        assert match[0][0].tolist() == [0, 1] and len(set(match[0][1].tolist())) == 2
    assert all(torch.isfinite(value) for value in losses.values())
    known = model.normalizers([5, 1], 20)
    assert (known.masks, known.pairs) == (3, 6)
    again, _ = model.loss(layers, features, batch["mask_labels"], batch["class_labels"], known)
    halved, _ = model.loss(layers, features, batch["mask_labels"], batch["class_labels"], type(known)(masks=6))
    for name, value in losses.items():
        torch.testing.assert_close(again[name], value)
        torch.testing.assert_close(2 * halved[name], value)


def test_wrong_labels_are_named(make_batch):
    model, batch = make(), make_batch((1, 1))
    with pytest.raises(ValueError, match=r"Image 1 .* 3 classes"):
        model(**{**batch, "class_labels": [torch.tensor([0]), torch.tensor([3])]})
    with pytest.raises(ValueError, match="class_labels"):
        model(batch["pixel_values"], mask_labels=batch["mask_labels"])


def on_canvas(image, height, width):
    """(3, h, w) in the upper left corner of a batch of one, and its pixel mask."""
    canvas, mask = torch.zeros(1, 3, height, width), torch.zeros(1, height, width, dtype=torch.int64)
    canvas[0, :, : image.shape[1], : image.shape[2]] = image
    mask[0, : image.shape[1], : image.shape[2]] = 1
    return canvas, mask


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("size", [(64, 96), (50, 85)])
def test_an_image_alone_equals_itself_in_a_padded_batch(backbone, size):
    model = make(backbone).eval()
    image, other = torch.randn(3, *size), torch.randn(3, 128, 128)
    masks = [torch.zeros(2, 128, 128, dtype=torch.bool), torch.zeros(0, 128, 128, dtype=torch.bool)]
    masks[0][0, 5:40, 10:50] = True
    masks[0][1, 20 : size[0], 40 : size[1]] = True  # touches the end of the image
    labels = [torch.tensor([0, 2]), torch.tensor([], dtype=torch.int64)]
    alone = on_canvas(image, 64, 96)
    alone = alone[:1] if size == (64, 96) else alone  # without padding no mask is needed
    batch = [torch.cat(parts) for parts in zip(on_canvas(image, 128, 128), on_canvas(other, 128, 128), strict=True)]
    with torch.no_grad():
        single = model(*alone, mask_labels=[masks[0][:, :64, :96]], class_labels=labels[:1])
        padded = model(*batch, mask_labels=masks, class_labels=labels)
    for name in ("class_queries_logits", "boxes", "roi_mask_logits", "queries"):
        torch.testing.assert_close(padded[name][:1], single[name], rtol=1e-4, atol=1e-4)
    on_image = padded.masks_queries_logits[:1, :, :16, :24].sigmoid()
    torch.testing.assert_close(on_image, single.masks_queries_logits.sigmoid(), rtol=0, atol=1e-4)
    # all but the class term, which also counts the other image's queries
    for name, value in single.losses.items():
        if not name.startswith("class"):
            torch.testing.assert_close(padded.losses[name], value, rtol=1e-4, atol=1e-4)


def test_without_masking_padding_takes_part():
    """The original's way, for its numbers: the mask only tells the sizes."""
    masked, plain = make().eval(), make(mask_padding=False).eval()
    image, mask = on_canvas(torch.randn(3, 50, 85), 128, 128)
    with torch.no_grad():
        assert not torch.allclose(masked(image, mask).boxes, plain(image, mask).boxes, atol=1e-3)
        features = plain.encode(image, mask)
        whole = plain.encode(image)
    assert features.sizes.tolist() == [[50, 85]] and whole.sizes.tolist() == [[128, 128]]
    assert torch.equal(features.maps[0], whole.maps[0])


def test_a_full_pixel_mask_changes_nothing(make_batch):
    model, batch = make().train(), make_batch((2, 1))
    full = torch.ones(2, *batch["pixel_values"].shape[-2:], dtype=torch.int64)
    state = copy.deepcopy(model.state_dict())
    first = model(**batch)
    model.load_state_dict(state)
    assert torch.equal(model(**batch, pixel_mask=full).loss, first.loss)


def test_masks_on_the_image_are_those_in_the_boxes():
    model = make().eval()
    with torch.no_grad():
        output = model(torch.randn(2, 3, 64, 96))
    for i in range(2):
        best = output.class_queries_logits[i].argmax(-1)
        grids = output.roi_mask_logits[i, torch.arange(9), best].sigmoid()
        pasted = paste_masks(grids, output.boxes[i] / 4, (16, 24))
        torch.testing.assert_close(output.masks_queries_logits[i].sigmoid(), pasted, rtol=0, atol=2e-6)
    outside = output.masks_queries_logits.min().item()
    assert outside == pytest.approx(math.log(1e-6), rel=1e-3)
    torch.testing.assert_close(output.class_scores, output.class_queries_logits.sigmoid())


def test_in_training_masks_are_predicted_for_the_loss_only(make_batch):
    model, batch = make().train(), make_batch((2, 1))
    assert model(batch["pixel_values"]).masks_queries_logits is None
    seen = []
    model.model.mask_heads[1].register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    model(**batch)
    assert seen == [3]


def test_hidden_states_and_attentions_of_both_implementations():
    model = make().eval()
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        output = model(image, output_hidden_states=True, output_attentions=True)
        fast = model(image)
        model.set_attn_implementation("eager")
        slow = model(image)
    assert len(output.hidden_states) == 3 and torch.equal(output.hidden_states[-1], output.queries)
    assert torch.equal(output.hidden_states[0][0], model.model.proposal_features.weight)
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 4, 9, 9)] * 2
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(2, 4, 9))
    assert fast.attentions is None and fast.hidden_states is None
    for other in (output, slow):
        torch.testing.assert_close(other.boxes, fast.boxes, rtol=1e-5, atol=1e-4)
    # the layer itself against torch's own
    layer = model.model.stages[0].attention
    theirs = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    theirs.load_state_dict({
        "in_proj_weight": layer.in_proj.weight, "in_proj_bias": layer.in_proj.bias,
        "out_proj.weight": layer.out_proj.weight, "out_proj.bias": layer.out_proj.bias,
    })  # fmt: skip
    x = torch.randn(2, 9, 32)
    expected, weights = theirs(x, x, x, average_attn_weights=False)
    ours, ours_weights = layer(x, output_attentions=True)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours_weights, weights, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant, make_batch):
    gradients = []
    for checkpointing in (False, True):
        model = make().train()
        batch = make_batch((3, 1))
        batch["pixel_mask"] = torch.ones(2, 64, 96, dtype=torch.int64)
        batch["pixel_mask"][1, :, 70:] = 0
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            assert model.model.stages[0].gradient_checkpointing
        loss = model(**batch).loss
        loss.backward()
        gradients.append((loss, [p.grad for p in model.parameters()], dict(model.named_buffers())))
    torch.testing.assert_close(*(entry[0] for entry in gradients), rtol=1e-6, atol=0)
    for one, other in zip(gradients[0][1], gradients[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    for name, value in gradients[0][2].items():
        if "mask_heads" in name:
            torch.testing.assert_close(value, gradients[1][2][name])


@pytest.mark.parametrize("way", ["autocast", "weights"])
def test_bfloat16_trains_and_predicts(way, make_batch):
    model, batch = make().train(), make_batch((3, 0))
    exact = model(**batch).loss
    model = make().train()
    if way == "weights":
        model = model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        output = model(**batch)
    assert all(value.dtype == torch.float32 for value in output.losses.values())
    assert output.boxes.dtype == torch.float32
    torch.testing.assert_close(output.loss, exact, rtol=0.1, atol=0)
    output.loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        assert torch.isfinite(model.eval()(batch["pixel_values"]).masks_queries_logits).all()


def test_queries_can_be_changed_before_and_between_the_stages():
    model = make().eval()
    with torch.no_grad():
        pixels = torch.randn(2, 3, 64, 64)
        features, queries, plain = model.run(pixels)
        calls = []

        def nothing(queries, features, stage):
            assert features.prompt_map.shape[0] == len(pixels)
            calls.append((tuple(queries.shape), stage))
            return queries

        again = model.run(pixels, inject=nothing)[2]
        for one, other in zip(plain, again, strict=True):
            assert torch.equal(one.class_logits, other.class_logits) and torch.equal(one.boxes, other.boxes)
        assert calls == [((2, 9, 32), 0), ((2, 9, 32), 1)]
        late = model.run(pixels, inject=lambda q, features, stage: q + stage)[2]
        assert torch.equal(late[0].queries, plain[0].queries) and not torch.equal(late[1].queries, plain[1].queries)
        changed = queries.clone()
        changed[1] += 1
        other = model.decode(features, changed)
    torch.testing.assert_close(other[-1].boxes[0], plain[-1].boxes[0])
    assert not torch.allclose(other[-1].boxes[1], plain[-1].boxes[1])
    assert torch.equal(features.prompt_map.float(), features.maps[-1])
    assert model.prompt_channels == features.prompt_map.shape[1] and model.query_channels == queries.shape[-1]


def test_text_logits_and_a_label_guide_enter_the_matching(make_batch):
    model, batch = make().eval(), make_batch((2, 3))
    with torch.no_grad():
        features = model.encode(batch["pixel_values"])
        layers = model.decode(features, model.initial_queries(features))
        arguments = (layers, features, batch["mask_labels"], batch["class_labels"])
        plain, matches = model.loss(*arguments)
        same, _ = model.loss(*arguments, text_logits=[layer.class_logits for layer in layers])
        assert set(same) - set(plain) == {"text_class_0", "text_class_1"}
        # the same logits in both heads are the same loss as long as the assignment is
        assert same["text_class_0"] == pytest.approx(same["class_0"].item())

        def guide(cost, image):  # query n must take target G - 1 - n
            assert cost.shape == (2, 9, len(batch["class_labels"][image]))
            return (
                1000.0 * (torch.arange(9)[:, None] + torch.arange(cost.shape[-1]) - cost.shape[-1] + 1).abs() + cost * 0
            )

        _, guided = model.loss(*arguments, label_guide=guide)
    for match in guided:
        assert [part.tolist() for part in match[1]] == [[0, 1, 2], [2, 1, 0]]
    assert any(
        not torch.equal(a, b) for m, g in zip(matches[0], guided[0], strict=True) for a, b in zip(m, g, strict=True)
    )


def test_only_the_last_stage_without_auxiliary_losses(make_batch):
    batch = make_batch((2, 1))
    torch.manual_seed(0)
    losses = make().eval()(**batch).losses
    last = make(use_auxiliary_loss=False).eval()(**batch).losses
    assert set(last) == {"class_0", "box_0", "giou_0", "mask_0"}
    for name, value in last.items():
        torch.testing.assert_close(value, losses[name.replace("_0", "_1")])


def test_settings_are_checked():
    with pytest.raises(ValueError, match="num_queries"):
        QueryInstConfig(num_querys=3)
    with pytest.raises(ValueError, match="multiple of num_attention_heads"):
        QueryInstConfig(hidden_size=30)
    with pytest.raises(ValueError, match="4 are needed"):
        make(**{"backbone_config": {**RESNET, "out_features": ["stage3", "stage4"]}})
    assert tuple(QueryInstConfig().backbone_config.depths) == (3, 4, 6, 3)
