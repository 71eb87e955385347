"""The models: equal to transformers' Mask2Former without prompts, sound on odd inputs, in every precision."""

import copy

import pytest
import torch
from torch import nn
from transformers import Mask2FormerForUniversalSegmentation

from uplvp_hf.models.losses import Normalizers
from uplvp_hf.models.modeling_mask2former import SegmenterFeatures
from uplvp_hf.models.modeling_uplvp import UplvpForInstanceSegmentation, UplvpForPreTraining

BOTH = pytest.mark.parametrize("cls", [UplvpForInstanceSegmentation, UplvpForPreTraining])


def assert_same_bits(ours, theirs):
    assert torch.equal(ours.class_queries_logits, theirs.class_queries_logits)
    assert torch.equal(ours.masks_queries_logits, theirs.masks_queries_logits)
    assert len(ours.auxiliary_logits) == len(theirs.auxiliary_logits) > 0
    for one, other in zip(ours.auxiliary_logits, theirs.auxiliary_logits, strict=True):
        assert torch.equal(one["class_queries_logits"], other["class_queries_logits"])
        assert torch.equal(one["masks_queries_logits"], other["masks_queries_logits"])


def reference_of(model):
    reference = Mask2FormerForUniversalSegmentation(model.config.segmenter_config).train(model.training)
    reference.load_state_dict(model.segmenter.state_dict())
    return reference


@pytest.mark.parametrize("backbone", ["resnet", "swin"])
def test_predictions_equal_transformers(make_config, make_batch, backbone):
    torch.manual_seed(0)
    model = UplvpForInstanceSegmentation(make_config(backbone)).eval()
    pixels = make_batch()["pixel_values"]
    with torch.no_grad():
        theirs = reference_of(model)(pixels, output_auxiliary_logits=True)
        ours = model(pixels)
        assert_same_bits(ours, model(pixels, pixel_mask=torch.ones(len(pixels), *pixels.shape[-2:])))
    for one, other in zip([*ours.auxiliary_logits, ours], [*theirs.auxiliary_logits, theirs], strict=True):
        for name in ("class_queries_logits", "masks_queries_logits"):
            torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("auxiliary", [True, False])
def test_loss_and_gradients_equal_transformers_on_the_same_points(make_config, make_batch, monkeypatch, auxiliary):
    torch.manual_seed(0)
    model = UplvpForInstanceSegmentation(make_config(segmenter={"use_auxiliary_loss": True})).train()
    reference, batch = reference_of(model), make_batch()
    drawn, rand = [], torch.rand

    def recording(*shape, **options):
        drawn.append(rand(*shape, **options))
        return drawn[-1]

    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", recording)
        theirs = reference(**{**batch, "mask_labels": [masks.float() for masks in batch["mask_labels"]]})
    images, layers = len(batch["mask_labels"]), len(model(batch["pixel_values"]).auxiliary_logits) + 1
    assert len(drawn) == layers * (images + 2)

    def draw(layer, kind, image, shape):
        place = {"match": image, "oversample": images, "uniform": images + 1}[kind]
        first = 0 if layer == layers - 1 else layer + 1  # transformers begins with the last layer
        return drawn[first * (images + 2) + place].reshape(shape)

    draw.per_layer = True
    ours = model(**batch, draw=draw)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=2e-6, atol=0)
    ours.loss.backward()
    theirs.loss.backward()
    gradients = dict(reference.named_parameters())
    for name, parameter in model.segmenter.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-3, atol=2e-5, msg=name)


def test_without_labels_pretraining_is_the_plain_model(pretraining, plain, make_batch):
    plain.segmenter.load_state_dict(pretraining.segmenter.state_dict())
    pixels = make_batch()["pixel_values"]
    mask = torch.ones(len(pixels), *pixels.shape[-2:])
    mask[1, 40:], mask[1, :, 70:] = 0, 0
    with torch.no_grad():
        assert_same_bits(pretraining(pixels, mask), plain(pixels, mask))


@pytest.mark.parametrize("off", [{"prompt_drop": 1.0}, {"prompt_matching": "none"}])
def test_no_prompt_gives_the_plain_predictions_and_losses(make_config, make_batch, off):
    torch.manual_seed(0)
    model = UplvpForPreTraining(make_config("swin", **off)).train()
    plain = UplvpForInstanceSegmentation(make_config("swin")).train()
    plain.segmenter.load_state_dict(model.segmenter.state_dict())
    batch = make_batch()
    points = {}

    def draw(layer, kind, image, shape):
        return points.setdefault((layer, kind, image, shape), torch.rand(shape))

    ours, theirs = model(**batch, draw=draw), plain(**batch, draw=draw)
    assert_same_bits(ours, theirs)
    assert set(ours.losses) - set(theirs.losses) == {"kernel"}
    assert all(torch.equal(ours.losses[name], value) for name, value in theirs.losses.items())


def test_prompts_change_every_layer_and_only_images_with_masks(make_config, make_batch):
    torch.manual_seed(0)
    model = UplvpForPreTraining(make_config("swin", prompt_drop=0.0)).eval()
    batch = make_batch(counts=(3, 0, 2))
    with torch.no_grad():
        prompted, without = model(**batch), model(batch["pixel_values"])
    for image, changed in enumerate([True, False, True]):
        different = not torch.equal(prompted.queries[image], without.queries[image])
        assert different is changed
    first = prompted.auxiliary_logits[0]["masks_queries_logits"] - without.auxiliary_logits[0]["masks_queries_logits"]
    assert (first.abs().amax((1, 2, 3)) > 0).tolist() == [True, False, True]


def test_prompt_is_the_projected_average_of_the_last_map_under_the_matched_mask(make_config, make_batch):
    torch.manual_seed(0)
    model = UplvpForPreTraining(make_config("swin", prompt_drop=0.0)).eval()
    batch = make_batch(counts=(2,))
    with torch.no_grad():
        features = model.segmenter.encode(batch["pixel_values"])
        queries = model.segmenter.initial_queries(features)
        match, prompts = model.match_prompts(queries, model.make_prompts(features, batch["mask_labels"], None))
        injected = model.injection(match, prompts, model.kept_prompts(match, None))(queries)
        grid = features.prompt_map[0]
        pooled = []
        for mask in batch["mask_labels"][0]:
            total, area = torch.zeros(len(grid)), 0
            for y, x in mask.nonzero().tolist():
                total, area = total + grid[:, y // 32, x // 32], area + 1
            pooled.append(model.prompt_projection(total / area))
        for query, result in zip(queries[0], injected[0], strict=True):
            likeness = [torch.cosine_similarity(query, prompt, dim=0) for prompt in pooled]
            expected = query + pooled[int(torch.stack(likeness).argmax())]
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


@BOTH
@pytest.mark.parametrize("counts", [(0, 0), (1, 0), (20, 1)])
@pytest.mark.parametrize("backbone", ["resnet", "swin"])
def test_every_parameter_gets_a_gradient_whatever_the_number_of_objects(make_config, make_batch, cls, counts, backbone):
    torch.manual_seed(0)
    model = cls(make_config(backbone)).train()
    output = model(**make_batch(counts=counts))
    assert torch.isfinite(output.loss) and all(value.dtype == torch.float32 for value in output.losses.values())
    output.loss.backward()
    # Swin's closing norm feeds none of the maps; the training loop leaves it out (`freeze_unused`).
    unused = [name for name, p in model.named_parameters() if p.grad is None and "swin.layernorm" not in name]
    assert unused == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    if sum(counts) == 0:  # nothing but "no object" to learn
        assert output.losses["mask_0"] == 0 and output.losses["class_0"] > 0


def test_one_layer_losses(make_config, make_batch):
    """Without auxiliary losses only the last layer is supervised, its queries too."""
    torch.manual_seed(0)
    model = UplvpForPreTraining(make_config("swin", segmenter={"use_auxiliary_loss": False})).eval()
    batch = make_batch()
    torch.manual_seed(1)
    output = model(**batch)
    assert set(output.losses) == {"class_0", "mask_0", "dice_0", "kernel"}
    assert 0 < output.losses["kernel"] < 2
    pairs = model.segmenter.normalizers([3, 0, 2], 20).pairs
    assert pairs == 5
    torch.manual_seed(1)
    divided = model(**batch, normalizers=Normalizers(pairs=10))
    torch.testing.assert_close(divided.losses["kernel"], output.losses["kernel"] / 2)


def test_normalizers_computed_before_equal_those_of_the_batch(pretraining, make_batch):
    batch = make_batch(counts=(3, 0, 2))
    normalizers = pretraining.segmenter.normalizers([3, 0, 2], pretraining.config.num_prompts)
    torch.manual_seed(1)
    own = pretraining(**batch)
    torch.manual_seed(1)
    given = pretraining(**batch, normalizers=normalizers)
    for name, value in own.losses.items():
        torch.testing.assert_close(given.losses[name], value, rtol=1e-6, atol=1e-7)


@BOTH
def test_int32_labels_and_class_agnostic_labels(make_config, make_batch, cls):
    torch.manual_seed(0)
    model = cls(make_config()).eval()
    losses = []
    for dtype in (torch.int32, torch.int64):
        torch.manual_seed(1)
        losses.append(model(**make_batch(dtype=dtype)).loss)
    assert torch.equal(*losses)
    agnostic = cls(make_config(id2label={0: "object"}, class_agnostic=True)).eval()
    batch = make_batch()
    assert max(int(labels.max()) for labels in batch["class_labels"] if len(labels)) > 0
    torch.manual_seed(1)
    collapsed = agnostic(**batch).loss
    torch.manual_seed(1)
    assert torch.equal(collapsed, agnostic(**{**batch, "class_labels": None}).loss)
    with pytest.raises(ValueError, match="class_labels"):
        model(**{**batch, "class_labels": None})


def test_labels_out_of_range_are_refused(plain, make_batch):
    batch = make_batch()
    for wrong in (3, -1):
        batch["class_labels"][2] = torch.tensor([0, wrong])
        with pytest.raises(ValueError, match=r"Image 2 .* 3 classes \(0\.\.2\)"):
            plain(**batch)
    batch["class_labels"][2] = torch.tensor([0])
    with pytest.raises(ValueError, match="2 masks but 1 class labels"):
        plain(**batch)


@BOTH
def test_bfloat16_autocast_and_weights(make_config, make_batch, cls):
    torch.manual_seed(0)
    model = cls(make_config("swin")).train()
    batch = make_batch()
    torch.manual_seed(1)
    exact = model(**batch).loss.item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(1)
        output = model(**batch)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(exact, rel=0.05)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)

    half = copy.deepcopy(model).to(torch.bfloat16)
    half.zero_grad()
    torch.manual_seed(1)
    output = half(**batch, pixel_mask=torch.ones(3, 64, 96))  # the images may stay in float32
    output.loss.backward()
    assert output.loss.dtype == torch.float32 and output.class_queries_logits.dtype == torch.bfloat16
    assert output.loss.item() == pytest.approx(exact, rel=0.05)
    gradients = [p.grad for p in half.parameters() if p.grad is not None]
    assert len(gradients) > 100
    assert all(gradient.dtype == torch.bfloat16 and torch.isfinite(gradient).all() for gradient in gradients)


def test_gradient_checkpointing_recomputes_and_gives_equal_gradients(make_config, make_batch):
    torch.manual_seed(0)
    model = UplvpForPreTraining(make_config("swin")).train()
    batch, runs = make_batch(), []
    layer = model.segmenter.model.transformer_module.decoder.layers[0]
    calls, inner = [], layer.forward_post

    def counted(*args, **kwargs):
        calls.append(1)
        return inner(*args, **kwargs)

    layer.forward_post = counted
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        calls.clear()
        torch.manual_seed(1)
        model(**batch).loss.backward()
        runs.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        assert len(calls) == (2 if checkpointing else 1)
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_queries_do_not_attend_to_padding(make_config):
    torch.manual_seed(0)
    model = UplvpForInstanceSegmentation(make_config("swin")).eval()
    canvas, mask = torch.randn(2, 3, 128, 192), torch.zeros(2, 128, 192)
    mask[0, :64, :96], mask[1, :96] = 1, 1
    with torch.no_grad():
        features = model.segmenter.encode(canvas * mask[:, None], mask)
        queries = model.segmenter.initial_queries(features)
        before = model.segmenter.decode(features, queries)
        for level, padding in zip(features.levels, features.padding, strict=True):
            assert padding.any() and not padding.all()
            level.transpose(0, 1)[:, padding] = 100.0
        after = model.segmenter.decode(features, queries)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one.class_logits, other.class_logits) and torch.equal(one.mask_logits, other.mask_logits)


def test_decoding_does_not_depend_on_the_canvas(make_config):
    """From the same features, whatever stands on the padding: attention, positions and mask size all follow."""
    torch.manual_seed(0)
    model = UplvpForInstanceSegmentation(make_config("swin")).eval()

    def on_canvas(feature, rows, columns, value):
        height, width = feature.shape[-2:]
        return nn.functional.pad(feature, (0, width * columns - width, 0, height * rows - height), value=value)

    with torch.no_grad():
        small = model.segmenter.encode(torch.randn(1, 3, 64, 128), torch.ones(1, 64, 128))
        large = SegmenterFeatures(
            mask_features=on_canvas(small.mask_features, 2, 3, 7.0),
            levels=tuple(on_canvas(level, 2, 3, -50.0) for level in small.levels),
            padding=[on_canvas(torch.zeros(1, *level.shape[-2:]).bool(), 2, 3, True) for level in small.levels],
            prompt_map=small.prompt_map,
            pixel_mask=on_canvas(small.pixel_mask, 2, 3, 0.0),
        )
        queries = model.segmenter.initial_queries(small)
        one, other = model.segmenter.decode(small, queries), model.segmenter.decode(large, queries)
    for layer, padded in zip(one, other, strict=True):
        torch.testing.assert_close(padded.queries, layer.queries, rtol=0, atol=1e-4)
        torch.testing.assert_close(padded.mask_logits[..., :16, :32], layer.mask_logits, rtol=0, atol=1e-4)


def test_loss_points_lie_on_the_image(plain, make_batch):
    """What the model predicts on padding costs nothing: the loss there is the loss of the image alone."""
    loss = plain.segmenter.loss_function
    batch = make_batch(counts=(3,), height=64, width=64)
    with torch.no_grad():
        features = plain.segmenter.encode(batch["pixel_values"])
        layers = plain.segmenter.decode(features, plain.segmenter.initial_queries(features))
        torch.manual_seed(1)
        alone, _ = loss(layers, batch["mask_labels"], batch["class_labels"])
        for layer in layers:
            # the outermost real cells stretch over the half cell that sampling interpolates beyond the image
            grown = nn.functional.pad(layer.mask_logits, (0, 1, 0, 1), value=0.0)
            layer.mask_logits = nn.functional.pad(grown, (0, 15, 0, 15), value=1e4)
        canvas = [nn.functional.pad(masks, (0, 64, 0, 64)) for masks in batch["mask_labels"]]
        mask = torch.zeros(1, 128, 128)
        mask[:, :64, :64] = 1
        torch.manual_seed(1)
        padded, _ = loss(layers, canvas, batch["class_labels"], mask)
        torch.manual_seed(1)
        careless, _ = loss(layers, canvas, batch["class_labels"])
    for name, value in alone.items():
        torch.testing.assert_close(padded[name], value, rtol=1e-3, atol=1e-4)
    assert careless["mask_0"] > 100 * alone["mask_0"]


def test_losses_are_exact_under_autocast(pretraining, make_batch):
    batch = make_batch()
    with torch.no_grad():
        features = pretraining.segmenter.encode(batch["pixel_values"])
        layers = pretraining.segmenter.decode(features, pretraining.segmenter.initial_queries(features))
        torch.manual_seed(1)
        exact, _ = pretraining.segmenter.loss(layers, features, batch["mask_labels"], batch["class_labels"])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.manual_seed(1)
            cast, _ = pretraining.segmenter.loss(layers, features, batch["mask_labels"], batch["class_labels"])
    assert all(torch.equal(cast[name], value) for name, value in exact.items())


def test_matching_costs_are_exact_under_autocast(pretraining, make_batch):
    costs = []
    batch = make_batch()
    loss = pretraining.segmenter.loss_function
    inner = loss._costs

    def keep(*arguments):
        costs.append(inner(*arguments))
        return costs[-1]

    loss._costs = keep
    with torch.no_grad():
        features = pretraining.segmenter.encode(batch["pixel_values"])
        layers = pretraining.segmenter.decode(features, pretraining.segmenter.initial_queries(features))
        for enabled in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                torch.manual_seed(1)
                loss(layers, batch["mask_labels"], batch["class_labels"])
    assert all(torch.equal(one, other) for one, other in zip(*costs, strict=True))


def test_kernel_supervision_is_weighted(make_config, make_batch):
    """Twice the weight gives twice the term; zero leaves it out. Equal weights, prompts and random points."""
    terms = {}
    for weight in (0.0, 0.5, 1.0):
        torch.manual_seed(0)
        model = UplvpForPreTraining(make_config(kernel_supervision_weight=weight, prompt_drop=0.0)).train()
        torch.manual_seed(1)
        terms[weight] = model(**make_batch(scores=True)).losses.get("kernel")
    assert terms[0.0] is None
    torch.testing.assert_close(2 * terms[0.5], terms[1.0])
