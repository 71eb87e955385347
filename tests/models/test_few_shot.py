"""Support prompts on all three segmenters: what a class is, what it depends on, and what travels with a model."""

import copy

import processes
import pytest
import torch
from PIL import Image
from test_sweep import ON_MAPS, even, grown, quiet, settings_of
from transformers import AutoModelForInstanceSegmentation, pipeline

from uplvp_hf.models.configuration_few_shot import UplvpFewShotConfig
from uplvp_hf.models.configuration_uplvp import UplvpConfig
from uplvp_hf.models.errors import DataError, UserError
from uplvp_hf.models.image_processing_uplvp import UplvpImageProcessor
from uplvp_hf.models.modeling_few_shot import NOT_ASKED, UplvpForFewShotSegmentation
from uplvp_hf.models.modeling_uplvp import UplvpForInstanceSegmentation, UplvpForPreTraining
from uplvp_hf.models.supports import class_vectors, fit_similarity, pool_predictions, pool_supports

SIZE = (64, 96)


def make_model(segmenter: str, seed: int = 0, **settings) -> UplvpForFewShotSegmentation:
    torch.manual_seed(seed)
    return UplvpForFewShotSegmentation(
        UplvpFewShotConfig(segmenter_config=settings_of(segmenter, "resnet"), **settings)
    )


@pytest.fixture(params=ON_MAPS)
def segmenter(request):
    return request.param


@pytest.fixture
def model(segmenter):
    return make_model(segmenter).eval()


@pytest.fixture
def supports(make_batch):
    """Three objects in three images: pixels (3, 3, 64, 96) and masks (3, 64, 96)."""
    batch = make_batch(counts=(1, 1, 1), height=SIZE[0], width=SIZE[1], seed=5)
    return batch["pixel_values"], torch.cat(batch["mask_labels"])


@pytest.fixture
def pixels(make_batch):
    return make_batch(counts=(2, 1), seed=7)["pixel_values"]


def answers(model, pixels) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Class name -> (scores (B, n), masks (B, n, h, w)) of what was found for it."""
    with torch.no_grad():
        output = model(pixels)
    found = {}
    for label, name in model.config.id2label.items():
        kept = output.class_scores[..., label] > NOT_ASKED
        shape = (len(pixels), -1)
        masks = output.masks_queries_logits[kept].unflatten(0, shape)
        found[name] = (output.class_scores[..., label][kept].unflatten(0, shape), masks)
    return found


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensors in one.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, other[name], strict=True)), name


# ---- supports --------------------------------------------------------------------------------------------------------


def test_pooled_is_the_plain_average_under_the_mask():
    features = torch.randn(2, 5, 4, 6, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(2, 32, 48, dtype=torch.bool)
    masks[0, 8:24, 16:32] = True  # whole cells of 8 pixels: rows 1 and 2, columns 2 and 3
    masks[1, 0:4, 0:8] = True  # half of one cell
    pooled = pool_supports(features, masks)
    torch.testing.assert_close(pooled[0], features[0, :, 1:3, 2:4].mean((1, 2)))
    torch.testing.assert_close(pooled[1], features[1, :, 0, 0])
    logits = torch.where(masks[:, None, ::4, ::4], 50.0, -50.0)
    torch.testing.assert_close(pool_predictions(features, logits)[:, 0], pooled)


def test_shots_are_averaged_whatever_their_order():
    vectors = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    owner = torch.tensor([0, 1, 0, 1, 0])
    order = torch.tensor([4, 3, 2, 1, 0])
    means = class_vectors(vectors, owner, 2)
    torch.testing.assert_close(means[1], (vectors[1] + vectors[3]) / 2)
    torch.testing.assert_close(class_vectors(vectors[order], owner[order], 2), means, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        class_vectors(vectors[:1].expand(7, -1), torch.zeros(7, dtype=torch.int64), 1), vectors[:1]
    )


@pytest.mark.parametrize("support_map", ["fine", "prompt"])
def test_a_support_does_not_depend_on_padding_or_mates(segmenter, supports, support_map):
    model, (values, masks) = make_model(segmenter, support_map=support_map).eval(), supports
    batch = {"pixel_values": values[:1, :, :56, :90], "mask_labels": [masks[:1, :56, :90] | True]}
    alone, wide = grown(batch, 64, 96), grown(batch, 128, 160)
    mates = torch.randn(2, 3, 128, 160, generator=torch.Generator().manual_seed(1))
    together = torch.cat([wide["pixel_values"], mates])
    mask = torch.cat([wide["pixel_mask"], torch.ones(2, 128, 160)])
    shown = torch.cat([wide["mask_labels"][0], torch.ones(2, 128, 160, dtype=torch.bool)])
    with torch.no_grad():
        one = model.encode_support(alone["pixel_values"], alone["mask_labels"][0], alone["pixel_mask"])
        other = model.encode_support(together, shown, mask)[:1]
    torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)


def test_an_empty_support_names_its_image(model, supports):
    values, masks = supports
    masks[1] = False
    with pytest.raises(DataError, match=r"second\.png: the mask of the object covers no pixel"):
        model.encode_support(values, masks, names=["first.png", "second.png", "third.png"])


# ---- classes ---------------------------------------------------------------------------------------------------------


def test_without_supports_nothing_is_found(model, pixels):
    with torch.no_grad():
        output = model(pixels)
    results = UplvpImageProcessor().post_process_instance_segmentation(output, threshold=0.0)
    assert [len(one["scores"]) for one in results] == [0, 0]
    assert all(one["masks"].shape == (0, *SIZE) for one in results)


@pytest.mark.parametrize("conditioning", ["prompt", "prototype"])
def test_classes_do_not_influence_one_another(segmenter, supports, pixels, conditioning):
    """Adding, removing and permuting classes leaves what is found for each as it is, to the bit."""
    model, (values, masks) = make_model(segmenter, conditioning=conditioning).eval(), supports
    for name, place in (("cat", 0), ("dog", 1)):
        model.add_class(name, values[place : place + 1], masks[place : place + 1])
    before = answers(model, pixels)
    assert not torch.equal(before["cat"][0], before["dog"][0])
    model.add_class("horse", values[2:], masks[2:])
    three = answers(model, pixels)
    assert_same({name: three[name] for name in before}, before)
    vectors, order = model.supports.clone(), [2, 0, 1]
    model.set_supports([["cat", "dog", "horse"][place] for place in order], vectors[order])
    assert_same(dict(sorted(answers(model, pixels).items())), three)
    model.remove_class("horse")
    assert_same(dict(sorted(answers(model, pixels).items())), before)
    with pytest.raises(UserError, match=r"has a class 'cat': call remove_class"):
        model.add_class("cat", values, masks)
    with pytest.raises(UserError, match=r"no class 'cow'; it has: cat, dog"):
        model.remove_class("cow")


def test_the_best_pairs_of_mask_and_class_are_kept(model, supports, pixels):
    values, masks = supports
    for place in range(3):
        model.add_class(str(place), values[place : place + 1], masks[place : place + 1])
    with torch.no_grad():
        every = model(pixels)
        model.config.max_masks = 7
        some = model(pixels)
    assert some.masks_queries_logits.shape[1] == 7
    best = every.class_scores.amax(-1).sort(1, descending=True).values[:, :7]
    assert torch.equal(some.class_scores.amax(-1).sort(1, descending=True).values, best)


def test_live_supports_equal_stored_ones_and_travel_with_the_model(model, supports, pixels, tmp_path):
    values, masks = supports
    owner = torch.tensor([0, 1, 0])
    with torch.no_grad():
        live = model(pixels, support_values=values, support_masks=masks, support_owner=owner)
        vectors = class_vectors(model.encode_support(values, masks), owner, 2)
    model.set_supports(["cat", "dog"], vectors, counts=[2, 1], category_ids=[17, 18])
    model.save_pretrained(tmp_path)
    loaded, info = UplvpForFewShotSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (loaded.config.id2label, loaded.config.category_ids) == ({0: "cat", 1: "dog"}, [17, 18])
    assert loaded.config.support_counts == [2, 1] and loaded.segmenter.config.id2label == {0: "object"}
    with torch.no_grad():
        stored = loaded.eval()(pixels)
    assert torch.equal(stored.class_scores, live.class_scores)
    assert torch.equal(stored.masks_queries_logits, live.masks_queries_logits)


# ---- what prompts do -------------------------------------------------------------------------------------------------


def test_a_zero_prompt_is_the_plain_model_of_one_class(segmenter, pixels):
    """A support that equals the running mean is no prompt at all: all queries stay as they are, to the bit."""
    model = make_model(segmenter, support_score="head").eval()
    model.support_mean.mean.normal_()
    plain = UplvpForInstanceSegmentation(
        UplvpConfig(segmenter_config=settings_of(segmenter, "resnet"), id2label={0: "object"})
    ).eval()
    plain.segmenter.load_state_dict(model.segmenter.state_dict())
    with torch.no_grad():
        prompted = model(pixels, support_vectors=model.support_mean.mean[None].clone())
        without = plain(pixels)
        elsewhere = model(
            pixels, support_vectors=model.support_mean.mean[None] + torch.randn(1, len(model.support_mean.mean))
        )
    assert torch.equal(prompted.masks_queries_logits, without.masks_queries_logits)
    if without.class_scores is not None:
        assert torch.equal(prompted.class_scores, without.class_scores)
    assert not torch.equal(elsewhere.masks_queries_logits, without.masks_queries_logits)


@pytest.mark.parametrize("injection", ["add", "every_stage", "concat"])
def test_gradients_reach_projection_and_encoder_through_the_supports(segmenter, make_batch, supports, injection):
    model = quiet(make_model(segmenter, prompt_injection=injection, prompt_drop=0.0).train())
    batch = make_batch(counts=(2, 0))
    batch.pop("class_labels")
    vectors = model.encode_support(*supports)
    vectors.retain_grad()
    given = class_vectors(vectors, torch.tensor([0, 1, 1]), 2)
    model(**batch, support_vectors=given, draw=even).loss.backward(retain_graph=True)
    assert model.prompt_projection.weight.grad.abs().sum() > 0
    weights = list(model.segmenter.backbone.parameters())
    reached = torch.autograd.grad(vectors, weights, vectors.grad, allow_unused=True)
    assert sum(gradient.abs().sum() for gradient in reached if gradient is not None) > 0


def test_training_asks_one_question_an_image(segmenter, make_batch, supports):
    model, (values, masks) = make_model(segmenter, kernel_supervision_weight=1.0).train(), supports
    batch = make_batch(counts=(2, 0))
    labels = batch.pop("class_labels")
    asked = {"support_values": values, "support_masks": masks, "support_owner": torch.tensor([0, 0, 1])}
    output = model(**batch, **asked, class_labels=labels, draw=even)
    assert "kernel" in output.losses and torch.isfinite(output.loss)
    output.loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())
    with pytest.raises(UserError, match=r"2 images with labels need as many classes, got 1"):
        model(**batch, support_vectors=torch.zeros(1, model.supports.shape[1]))
    with pytest.raises(UserError, match=r"mask_labels need supports"):
        model(**batch)


def test_centering_follows_the_supports_in_training_alone(model):
    vectors = torch.randn(4, model.supports.shape[1], generator=torch.Generator().manual_seed(0)) + 3
    model.make_prompts(vectors)
    assert not model.support_mean.mean.any()
    model.train().make_prompts(vectors)
    torch.testing.assert_close(model.support_mean.mean, vectors.mean(0))


# ---- starting from other checkpoints ---------------------------------------------------------------------------------


def test_starts_from_agnostic_named_and_pretrained_models(segmenter, tmp_path):
    settings = settings_of(segmenter, "resnet")
    named = UplvpForInstanceSegmentation(UplvpConfig(segmenter_config=settings, id2label={0: "cat", 1: "dog"}))
    named.save_pretrained(tmp_path / "named")
    agnostic = UplvpForPreTraining(UplvpConfig(segmenter_config=settings, id2label={0: "object"}, class_agnostic=True))
    agnostic.save_pretrained(tmp_path / "agnostic")
    for folder, source in (("named", named), ("agnostic", agnostic)):
        model = UplvpForFewShotSegmentation.from_pretraining(tmp_path / folder, support_map="prompt")
        assert model.config.id2label == {} and model.config.support_map == "prompt"
        old, new = source.segmenter.state_dict(), model.segmenter.state_dict()
        sized = set(source.segmenter.class_sized)
        assert all(torch.equal(new[name], old[name]) for name in new.keys() - sized)
        for name in sized & {name for name in new if name.endswith("weight")}:
            rows = 1 if folder == "agnostic" else 2
            if "empty_weight" not in name:
                torch.testing.assert_close(new[name][0], old[name][:rows].mean(0))
    model.set_supports(["cow"], torch.ones_like(model.support_mean.mean)[None])
    model.save_pretrained(tmp_path / "few_shot")
    again = UplvpForFewShotSegmentation.from_pretraining(tmp_path / "few_shot", conditioning="prototype")
    assert (again.config.conditioning, again.config.support_map, again.config.id2label) == ("prototype", "prompt", {})
    names = {0: "cow", 1: "pig"}
    tuned = UplvpForInstanceSegmentation.from_pretraining(tmp_path / "few_shot", names, class_head="spread")
    assert tuned.config.model_type == "uplvp" and tuned.segmenter.config.id2label == names
    assert not tuned.transfer_report.reinitialized


def test_wrong_settings_are_refused():
    with pytest.raises(UserError, match=r"conditioning must be one of prompt, prototype"):
        UplvpFewShotConfig(conditioning="prompts")
    with pytest.raises(UserError, match=r"support_counts must hold a number a class, 1 of them"):
        UplvpFewShotConfig(id2label={0: "cat"}, support_counts=[1, 2])
    with pytest.raises(UserError, match=r"similarity_temperature must be positive"):
        UplvpFewShotConfig(similarity_temperature=0)


def test_similarity_is_fitted_between_same_and_different():
    generator = torch.Generator().manual_seed(0)
    same = torch.rand(4000, generator=generator) < 0.1
    cosines = torch.where(same, 0.7, 0.3) + 0.1 * torch.randn(4000, generator=generator)
    midpoint, temperature = fit_similarity(cosines, same)
    # Two Gaussians of one deviation: the logit of balanced classes is linear, with slope distance / variance.
    assert midpoint == pytest.approx(0.5, abs=0.02) and temperature == pytest.approx(0.01 / 0.4, rel=0.15)
    apart, width = fit_similarity(torch.tensor([0.1, 0.9]), torch.tensor([False, True]))
    assert 0.1 < apart < 0.9 and width > 0


# ---- as any other model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conditioning", ["prompt", "prototype"])
def test_an_image_alone_equals_itself_in_a_padded_batch(segmenter, supports, conditioning):
    model, (values, masks) = make_model(segmenter, conditioning=conditioning).eval(), supports
    model.add_class("cat", values[:2], masks[:2])
    image = {"pixel_values": values[2:, :, :56, :90], "mask_labels": []}
    alone, wide = grown(image, 64, 96), grown(image, 128, 160)
    mates = torch.randn(2, 3, 128, 160, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        one = model(alone["pixel_values"], alone["pixel_mask"])
        together = torch.cat([wide["pixel_values"], mates])
        other = model(together, torch.cat([wide["pixel_mask"], torch.ones(2, 128, 160)]))
    torch.testing.assert_close(other.class_scores[:1], one.class_scores, rtol=1e-3, atol=1e-4)
    seen = [output.masks_queries_logits[:1, :, :14, :23].sigmoid() for output in (one, other)]
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-3, atol=1e-3)


def test_bfloat16(segmenter, make_batch, supports):
    """Autocast and pure weights train, and predict finite scores."""
    model, (values, masks) = quiet(make_model(segmenter, prompt_drop=0.0).train()), supports
    batch = make_batch(counts=(2, 1, 0))
    del batch["class_labels"]
    asked = {"support_values": values, "support_masks": masks, "support_owner": torch.arange(3), "draw": even}
    exact = model(**batch, **asked).loss.item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = model(**batch, **asked).loss
    half = copy.deepcopy(model).to(torch.bfloat16)
    pure = half(**{**batch, "pixel_values": batch["pixel_values"].bfloat16()}, **asked).loss
    for loss, trained in ((cast, model), (pure, half)):
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact, rel=0.15)
        trained.zero_grad()
        loss.backward()
        assert all(torch.isfinite(weight.grad).all() for weight in trained.parameters() if weight.grad is not None)
    half.eval().add_class("cat", values.bfloat16(), masks)
    with torch.no_grad():
        assert torch.isfinite(half(batch["pixel_values"].bfloat16()).class_scores).all()


def test_checkpointing_gives_equal_gradients(segmenter, make_batch, supports):
    model, (values, masks) = quiet(make_model(segmenter).train()), supports
    batch = make_batch(counts=(2, 1, 0))
    del batch["class_labels"]
    runs = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(1)
        model(**batch, support_values=values, support_masks=masks, support_owner=torch.arange(3)).loss.backward()
        runs.append([weight.grad.clone() for weight in model.parameters()])
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


def test_pipelines_name_the_classes_of_the_supports(supports, tmp_path):
    model, (values, masks) = make_model("mask2former").eval(), supports
    for name, place in (("cat", 0), ("dog", 1)):
        model.add_class(name, values[place : place + 1], masks[place : place + 1])
    model.save_pretrained(tmp_path)
    UplvpImageProcessor(size={"longest_edge": 96}).save_pretrained(tmp_path)
    assert isinstance(AutoModelForInstanceSegmentation.from_pretrained(tmp_path), UplvpForFewShotSegmentation)
    found = pipeline("instance-segmentation", model=str(tmp_path))(Image.new("RGB", (96, 64)), threshold=0.0)
    assert {one["label"] for one in found} == {"cat", "dog"}
    stock = pipeline("image-segmentation", model=str(tmp_path))
    assert {one["label"] for one in stock(Image.new("RGB", (96, 64)), threshold=0.0)} <= {"cat", "dog"}


@pytest.mark.slow
def test_a_saved_folder_needs_no_library(without_library, supports, tmp_path):
    model, (values, masks) = make_model("knet").eval(), supports
    model.add_class("cat", values, masks)
    model.save_pretrained(tmp_path / "model", with_code=True)
    UplvpImageProcessor(size={"longest_edge": 96}).save_pretrained(tmp_path / "model")
    program = """
from PIL import Image
from transformers import pipeline
own = pipeline("instance-segmentation", model=sys.argv[1], trust_remote_code=True)
found = own(Image.new("RGB", (96, 64)), threshold=0.0)
assert {one["label"] for one in found} == {"cat"}, found
"""
    done = processes.run(without_library + program, tmp_path / "model", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
