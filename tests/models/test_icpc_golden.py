"""ICPC's model as a DenseCLIP, against tensors recorded from the original code: forward, losses and gradients."""

import pytest
import torch
from torch.nn import functional as F

from uplvp_hf.conversion.denseclip import convert_denseclip, denseclip_settings, fold_class_embedding
from uplvp_hf.models.configuration_icpc import IcpcConfig
from uplvp_hf.models.losses_icpc import pixel_cross_entropy
from uplvp_hf.models.modeling_icpc import IcpcForSemanticSegmentation

pytestmark = pytest.mark.golden
HEADS = {"num_attention_heads": 4}  # the recorded towers are too narrow for OpenAI's rule


def build(tensors):
    """The recorded DenseCLIP as our model, dropout off, the text tower with gradients as it was recorded."""
    state = {name.removeprefix("state."): value for name, value in tensors.items() if name.startswith("state.")}
    converted = convert_denseclip(state)
    found = denseclip_settings(converted)
    for tower in ("text_config", "vision_config"):
        if tower in found:
            found[tower] |= HEADS
    end = found["text_config"]["eos_token_id"]
    found["class_token_ids"] = [row[1 : row.index(end)] for row in tensors["input.texts"].tolist()]
    model = IcpcForSemanticSegmentation(IcpcConfig(**found, dropout=0.0, head_dropout=0.0, drop_path_rate=0.0))
    missing, unexpected = model.load_state_dict(converted, strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)
    fold_class_embedding(model)
    model.text.requires_grad_(True)
    return model


@pytest.fixture(params=["denseclip_resnet", "denseclip_vit"])
def recorded(request, golden):
    tensors, info = golden(request.param)
    return build(tensors), tensors, info


@pytest.mark.parametrize("phase", ["test", "train"])
def test_forward(recorded, phase, assert_close):
    model, tensors, _ = recorded
    output = model.train(phase == "train")(tensors["input.img"], output_hidden_states=True)
    for level, map_ in enumerate(output.hidden_states):
        if f"{phase}.backbone.{level}" in tensors:
            assert_close(map_, tensors[f"{phase}.backbone.{level}"], 1e-5)
    for ours, theirs in (
        (output.image_embeds, "global"), (output.text_embeds, "text_embeddings"),
        (output.score_maps[model.config.score_stride], "score_map"), (output.logits, "seg_logits"),
    ):  # fmt: skip
        assert_close(ours, tensors[f"{phase}.{theirs}"], 1e-5)


def test_losses_and_gradients(recorded, assert_close):
    model, tensors, info = recorded
    model.train()
    labels = tensors["input.gt_semantic_seg"][:, 0].long()
    output = model(tensors["input.img"], labels=labels)
    assert_close(output.losses["segmentation"], tensors["loss_valid_mean.decode"], 1e-5)
    assert_close(output.losses["identity"], 0.4 * tensors["loss_valid_mean.identity_unweighted"], 1e-5)
    # The original divides by all pixels, ours by those that count.
    share = (labels != 255).float().mean()
    assert_close(share * output.losses["segmentation"], tensors["loss.decode.loss_ce"], 1e-5)
    assert_close(share * output.losses["identity"], tensors["loss.aux_identity.loss_ce"], 1e-5)
    model.zero_grad()
    (share * output.loss).backward()
    gradients = {f"grad.{name}": value.grad for name, value in model.named_parameters() if value.grad is not None}
    recorded_gradients = {
        name: value
        for name, value in tensors.items()
        if name.startswith("grad.") and name not in info["grad_negligible"]
    }
    theirs = convert_denseclip({name.removeprefix("grad."): value for name, value in recorded_gradients.items()})
    largest = max(value.abs().max() for value in theirs.values())
    assert len(theirs) > 50
    embedding = "backbone.tower.vision_model.embeddings.class_embedding"
    if embedding in theirs:
        theirs[embedding] = theirs[embedding] / 2  # the original adds it twice
    for name, value in theirs.items():
        scale = max(value.abs().max(), 1e-4 * largest)
        assert (gradients[f"grad.{name}"] - value).abs().max() <= 1e-3 * scale, name


def test_sizes_other_than_the_native_one(recorded, assert_close):
    model, tensors, _ = recorded
    model.eval()
    logits = model(tensors["input.img"]).logits
    assert_close(
        F.interpolate(logits, size=tensors["input.img"].shape[-2:], mode="bilinear"), tensors["test.whole_logits"], 1e-5
    )


def test_class_embedding_once(golden, assert_close):
    """What an OpenAI checkpoint gives: the same weights without folding."""
    tensors, _ = golden("denseclip_vit")
    model = build(tensors).eval()
    embeddings = model.backbone.tower.vision_model.embeddings
    embeddings.position_embedding.weight.data[0] -= embeddings.class_embedding.data
    output = model(tensors["input.img"])
    assert_close(output.image_embeds, tensors["test.single_cls.global"], 1e-5)


def test_native_size(golden, assert_close):
    tensors, _ = golden("denseclip_vit")
    model = build(tensors).eval()
    image = tensors["input.img"][..., :64, :64]
    _, pooled, local = model.backbone(image)
    assert_close(pooled, tensors["test.native.global"], 1e-5)
    assert_close(local, tensors["test.native.local"], 1e-5)


def test_mean_over_what_counts():
    logits, labels = torch.randn(1, 3, 4, 4), torch.full((1, 4, 4), 255)
    assert pixel_cross_entropy(logits, labels, 255) == 0
    labels[0, 0, 0] = 1
    assert torch.allclose(
        pixel_cross_entropy(logits, labels, 255), F.cross_entropy(logits[:, :, 0, 0], labels[:, 0, 0])
    )
