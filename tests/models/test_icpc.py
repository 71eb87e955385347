"""The behavior of ICPC's model: forms of prompts, saving, other classes, losses against plain loops."""

import json
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, AutoTokenizer, pipeline

import uplvp_hf
from uplvp_hf import IcpcConfig, IcpcForSemanticSegmentation, IcpcImageProcessor
from uplvp_hf.labeling.encoders.attention import Layout, run_blocks
from uplvp_hf.labeling.settings import Recipe
from uplvp_hf.models.configuration_icpc import CONTRASTIVE, PROMPTS
from uplvp_hf.models.errors import UserError
from uplvp_hf.models.icpc_prompts import name_tokens, spoken_names
from uplvp_hf.models.losses_icpc import Anchors, cell_labels, contrastive_loss, sample_anchors

CLIP = Path(uplvp_hf.__file__).parent / "assets" / "synthetic_clip"
NAMES = ["background", "blue heart", "orange disc", "green cross"]
SMALL = {
    "num_context": 2, "num_image_tokens": 2, "fpn_channels": 16, "head_channels": 16, "decoder_width": 16,
    "decoder_layers": 1, "drop_path_rate": 0.0, "dropout": 0.0, "head_dropout": 0.0,
}  # fmt: skip


def build(prompt="dynamic_concat", names=NAMES, **settings):
    torch.manual_seed(0)
    model = IcpcForSemanticSegmentation.from_clip(CLIP, dict(enumerate(names)), prompt=prompt, **{**SMALL, **settings})
    return model.eval()


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def labels():
    found = torch.full((2, 64, 96), 255)
    found[0, :32], found[0, 32:, :48], found[1, :, 40:] = 0, 1, 2
    return found


@pytest.mark.parametrize("prompt, post", [*((prompt, False) for prompt in PROMPTS), ("dynamic_concat", True)])
def test_every_prompt(prompt, post, pixels, labels, tmp_path):
    model = build(prompt, post=post)
    output = model(pixels, labels=labels)
    assert output.logits.shape == (2, 4, 16, 24)
    assert set(output.score_maps or {}) == (set() if prompt == "none" else {8, 16, 32})
    output.loss.backward()
    missing = [name for name, one in model.named_parameters() if one.requires_grad and one.grad is None]
    assert not missing
    assert all(not name.startswith("text.") for name, one in model.named_parameters() if one.requires_grad)
    if prompt != "none":
        assert all(scores.abs().max() <= 1 + 1e-5 for scores in output.score_maps.values())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(pixels).logits, output.logits)
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    assert trained == {name for name, one in loaded.named_parameters() if one.requires_grad}


def test_batch_mates_do_not_matter(pixels, assert_close):
    model = build(post=True)
    with torch.no_grad():
        both = model(pixels)
        for index in range(2):
            alone = model(pixels[index : index + 1])
            assert_close(alone.logits[0], both.logits[index], 1e-5)
            assert_close(alone.text_embeds[0], both.text_embeds[index], 1e-5)


def test_image_conditions_the_text(pixels, assert_close):
    """Another image gives other texts, though not for static prompts. dynamic_add of nothing is static."""
    with torch.no_grad():
        for prompt, differs in (("static", False), ("dynamic_concat", True), ("dynamic_last", True)):
            text = build(prompt)(pixels).text_embeds
            assert bool((text[0] - text[1]).abs().max() > 1e-6) == differs
        model, static = build("dynamic_add"), build("static")
        model.prompts.image.linear2.weight.zero_()
        static.prompts.contexts.copy_(model.prompts.contexts)
        assert_close(model(pixels).text_embeds, static(pixels).text_embeds, 1e-6)


@pytest.mark.parametrize("prompt", ["static", "dynamic_concat", "dynamic_add", "dynamic_last"])
def test_shared_prefixes_equal_whole_sequences(prompt, pixels, assert_close):
    """Every prompt of every image written out and run through transformers' own layers."""
    model = build(prompt, text_chunk=2)
    tower, prompts = model.text, model.prompts
    with torch.no_grad():
        _, pooled, local = model.backbone(pixels)
        ours = model.text_features(pooled, local).expand(2, -1, -1)
        embed = tower.text_model.embeddings
        start, end = embed.token_embedding(torch.tensor([model.config.start_token_id, model.config.end_token_id]))
        contexts = prompts.contexts
        for image in range(2):
            token = prompts.image(pooled, None)[image] if prompt != "static" else torch.zeros(1, 64)
            for index, ids in enumerate(model.config.class_token_ids):
                name = embed.token_embedding(torch.tensor(ids))
                parts = {
                    "static": [contexts, name], "dynamic_concat": [contexts, token, name],
                    "dynamic_add": [contexts + token, name], "dynamic_last": [contexts, name, token],
                }[prompt]  # fmt: skip
                x = torch.cat([start[None], *parts, end[None]])[None]
                x = x + embed.position_embedding.weight[: x.shape[1]]
                mask = torch.full((x.shape[1],) * 2, float("-inf")).triu(1)[None, None]
                for block in tower.text_model.encoder.layers:
                    x = block(x, attention_mask=mask)
                theirs = tower.text_projection(tower.text_model.final_layer_norm(x[:, -1]))
                assert_close(ours[image, index], theirs[0], 1e-5)


def test_other_classes_keep_what_is_known_by_name(pixels):
    model = build()
    before = model(pixels)
    model.set_classes(["orange disc", "pink hexagon", "background"], AutoTokenizer.from_pretrained(CLIP))
    after = model(pixels)
    assert after.logits.shape[1] == 3
    for stride, scores in after.score_maps.items():
        assert torch.allclose(scores[:, 0], before.score_maps[stride][:, 2], atol=1e-6)
        assert torch.allclose(scores[:, 2], before.score_maps[stride][:, 0], atol=1e-6)
    assert torch.equal(model.head.classifier.weight[0], build().head.classifier.weight[2])
    assert model.config.id2label == {0: "orange disc", 1: "pink hexagon", 2: "background"}


def test_the_same_classes_in_another_order_predict_the_same(pixels, tmp_path, assert_close):
    model = build(post=True)
    model.save_pretrained(tmp_path)
    order = [3, 0, 2, 1]
    other = IcpcForSemanticSegmentation.from_pretraining(tmp_path, {i: NAMES[k] for i, k in enumerate(order)}).eval()
    with torch.no_grad():
        assert_close(other(pixels).logits, model(pixels).logits[:, order], 1e-5)
    with pytest.raises(UserError, match="no tokenizer, which the new class 'pink hexagon' needs"):
        IcpcForSemanticSegmentation.from_pretraining(tmp_path, {0: "pink hexagon", 1: "background"})


def test_names():
    assert spoken_names(["wall-brick", "desk-stuff", "building-other", "desk", "sky"]) == [
        "wall brick", "desk stuff", "building", "desk", "sky",
    ]  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(CLIP)
    with pytest.raises(UserError, match="'zebra'"):
        name_tokens(["blue heart", "zebra"], tokenizer)
    with pytest.raises(UserError, match="has room for"):
        build(num_context=14)


@pytest.mark.parametrize("wrong, message", [
    ({"prompt": "dinamic"}, "prompt must be one of"), ({"align_strides": [5]}, "align_strides"),
    ({"semantic_loss_ignore_index": 2}, "number of a class"), ({"tau": 0}, "tau"),
])  # fmt: skip
def test_settings_that_make_no_sense(wrong, message):
    with pytest.raises(UserError, match=message):
        build(**wrong)


def test_labels_that_make_no_sense(pixels, labels):
    model = build()
    with pytest.raises(UserError, match="hold the id 7"):
        model(pixels, labels=labels.masked_fill(labels == 2, 7))
    with pytest.raises(UserError, match="labels have the shape"):
        model(pixels, labels=labels[:, :32])
    with pytest.raises(UserError, match="multiples of 32"):
        model(pixels[..., :60])
    nothing = model(pixels, labels=torch.full_like(labels, 255))
    nothing.loss.backward()
    assert nothing.loss == 0


def loop_contrastive(local, text, labels, tau):
    """Reading A by the letter, all cells being anchors."""
    cells = F.normalize(local.flatten(2).transpose(1, 2), dim=-1)
    text = F.normalize(text, dim=-1)
    anchors = [(b, i) for b in range(len(labels)) for i in range(labels.shape[1]) if labels[b, i] >= 0]
    terms = []
    for b, i in anchors:
        a, y = cells[b, i], labels[b, i]
        negatives = [a @ text[b, k] / tau for k in range(text.shape[1]) if k != y]
        negatives += [a @ cells[c, j] / tau for c, j in anchors if labels[c, j] != y]
        down = torch.stack(negatives).exp().sum()

        def term(p, a=a, down=down):
            return -((a @ p / tau).exp() / ((a @ p / tau).exp() + down)).log()

        mates = [term(cells[c, j]) for c, j in anchors if labels[c, j] == y and (c, j) != (b, i)]
        own = term(text[b, y])
        terms.append(0.5 * own + 0.5 * torch.stack(mates).mean() if mates else own)
    return torch.stack(terms).mean()


def test_contrastive_loss_equals_the_loop(assert_close):
    generator = torch.Generator().manual_seed(0)
    local, text = (torch.randn(*shape, generator=generator) for shape in ((2, 8, 4, 6), (2, 5, 8)))
    labels = torch.randint(-1, 5, (2, 4, 6), generator=generator)
    pixels = labels.repeat_interleave(8, 1).repeat_interleave(8, 2).masked_fill(
        labels.repeat_interleave(8, 1).repeat_interleave(8, 2) < 0, 255
    )  # fmt: skip
    assert torch.equal(cell_labels(pixels, (4, 6), 5), labels)
    config = build().config
    ours = contrastive_loss(local, text, pixels, config)
    assert_close(ours, loop_contrastive(local, text, labels.flatten(1), config.tau), 1e-5)
    config.contrastive = "text_only"
    scores = torch.einsum("bchw,bkc->bkhw", F.normalize(local, dim=1), F.normalize(text, dim=-1)) / config.tau
    expected = F.cross_entropy(scores, labels, ignore_index=-1)
    assert_close(contrastive_loss(local, text, pixels, config), expected, 1e-5)


@pytest.mark.parametrize("reading", [one for one in CONTRASTIVE if one != "none"])
def test_every_reading_has_gradients(reading):
    config = build(contrastive=reading).config
    torch.manual_seed(0)
    local, text = torch.randn(2, 8, 4, 6, requires_grad=True), torch.randn(2, 4, 8, requires_grad=True)
    labels = torch.randint(0, 4, (2, 4, 6)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    loss = contrastive_loss(local.to(torch.bfloat16), text, labels, config)
    loss.backward()
    assert loss.dtype == torch.float32 and loss > 0 and local.grad.abs().max() > 0 and text.grad.abs().max() > 0
    nothing = contrastive_loss(local, text, torch.full_like(labels, 255), config)
    assert nothing == 0 and nothing.requires_grad
    # Cells that agree with their texts lose less.
    aligned = text.detach()[torch.arange(2)[:, None, None], labels[:, ::8, ::8]].permute(0, 3, 1, 2)
    assert contrastive_loss(aligned, text, labels, config) < loss


def test_cells_and_anchors():
    labels = torch.full((1, 4, 8), 255)
    labels[0, :2, :2] = 1  # a quarter of the first cell
    labels[0, :3, 4:] = 0
    labels[0, 0, 4:] = 2
    assert cell_labels(labels, (1, 2), 3).tolist() == [[[-1, 0]]]
    classes, images = torch.tensor([0] * 40 + [1] * 10), torch.zeros(50, dtype=torch.int64)
    hard = torch.arange(50) % 40 < 30
    chosen = sample_anchors(Anchors(torch.zeros(50, 2), classes, images), hard, 20, 1000)
    assert len(chosen) == len(set(chosen.tolist())) == 30
    assert sum(bool(hard[i]) for i in chosen if classes[i] == 0) == 10  # half, though three quarters are
    assert len(sample_anchors(Anchors(torch.zeros(50, 2), classes, images), hard, 20, 7)) == 7


def test_batches_in_parts_give_the_gradients_of_one(pixels, labels):
    model = build("static", contrastive="text_only")
    whole = model(pixels, labels=labels, normalizers=model.normalizers(list(labels)))
    divisors = model.normalizers(list(labels))
    parts = [model(pixels[i : i + 1], labels=labels[i : i + 1], normalizers=divisors) for i in range(2)]
    for name in ("segmentation", "identity", "align_16"):
        total = sum(part.losses[name] for part in parts)
        assert torch.allclose(total, whole.losses[name], rtol=1e-5)


def test_loss_at_the_logits_size(pixels, labels):
    model = build(loss_stride=4)
    assert model.normalizers(list(labels)).pixels == (labels[:, 2::4, 2::4] != 255).sum()
    assert torch.isfinite(model(pixels, labels=labels).loss)


@pytest.mark.parametrize("dense", ["vanilla", "identity", "clearclip", "naclip"])
def test_dense_blocks_and_checkpointing(dense, pixels, labels):
    gradients = []
    for checkpointing in (False, True):
        model = build(dense_block=dense).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        for module in model.modules():  # batch statistics are taken once more by the second pass
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        model(pixels, labels=labels, generator=torch.Generator().manual_seed(0)).loss.backward()
        gradients.append(model.prompts.contexts.grad.clone())
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dense", ["vanilla", "identity", "clearclip", "naclip"])
def test_patches_are_those_of_the_labeler(dense, pixels, assert_close):
    """The labeler's recipes over the same tower, its own code."""
    model = build("names", dense_block=dense, dense_sigma=1.5, dense_scale=5.0)
    tower, settings = model.backbone.tower, {"sigma": 1.5, "scale": 5.0} if dense == "naclip" else {}
    with torch.no_grad():
        _, _, ours = model.backbone(pixels)
        x = tower.vision_model.pre_layrnorm(model.backbone._embed(pixels))
        recipe = Recipe(dense, **settings)
        tokens, grid = run_blocks(tower.vision_model.encoder.layers, x, Layout((8, 12)), recipe)
        theirs = tower.visual_projection(tower.vision_model.post_layernorm(tokens))
    assert_close(ours, theirs.transpose(1, 2).unflatten(2, grid), 1e-5)


def test_texts_of_another_image(pixels):
    """Given text features stand in for those that the model makes: its own change nothing, others do."""
    model = build()
    with torch.no_grad():
        own = model(pixels)
        assert torch.equal(model(pixels, text_embeds=own.text_embeds).logits, own.logits)
        swapped = model(pixels, text_embeds=own.text_embeds.flip(0))
        assert torch.equal(swapped.text_embeds[0], own.text_embeds[1])
        assert (swapped.score_maps[8] - own.score_maps[8]).abs().max() > 1e-6


def test_bfloat16(pixels, labels):
    model = build(post=True).to(torch.bfloat16)
    output = model(pixels.to(torch.bfloat16), labels=labels)
    assert output.logits.dtype == torch.bfloat16 and output.loss.dtype == torch.float32
    output.loss.backward()


HIDDEN = """
from PIL import Image
from transformers import pipeline
segmenter = pipeline("image-segmentation", model=sys.argv[1], trust_remote_code=True)
for one in segmenter(Image.new("RGB", (90, 60), "red")):
    print(one["label"], one["mask"].size)
"""


def test_stock_pipeline(tmp_path):
    build().save_pretrained(tmp_path, with_code=True)
    IcpcImageProcessor(size={"longest_edge": 64}).save_pretrained(tmp_path)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is IcpcImageProcessor
    found = pipeline("image-segmentation", str(tmp_path))(Image.new("RGB", (90, 60), "red"))
    assert found and all(one["mask"].size == (90, 60) and one["label"] in NAMES for one in found)
    assert sum((np.asarray(one["mask"]) > 0).sum() for one in found) == 90 * 60
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"]["AutoModelForSemanticSegmentation"] == "modeling_icpc.IcpcForSemanticSegmentation"


@pytest.mark.slow
def test_pushed_code_works_without_the_library(without_library, tmp_path):
    build().save_pretrained(tmp_path / "model", with_code=True)
    IcpcImageProcessor(size={"longest_edge": 64}).save_pretrained(tmp_path / "model")
    done = processes.run(without_library + HIDDEN, tmp_path / "model", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("(90, 60)")


def test_a_resnet_and_no_texts(pixels, labels):
    config = IcpcConfig(
        resnet_config={"width": 8, "depths": [1, 1, 1, 1], "pool_heads": 4, "pool_size": 3}, prompt="none",
        num_labels=4, fpn_channels=16, head_channels=16,
    )  # fmt: skip
    model = IcpcForSemanticSegmentation(config)
    model(pixels, labels=labels).loss.backward()
    assert all(one.grad is not None for one in model.parameters() if one.requires_grad)
    assert model(pixels).text_embeds is None
