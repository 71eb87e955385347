"""Parts of ICPC against tensors recorded from the original code of DenseCLIP, CoCoOp, CLIP and mmsegmentation."""

import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from uplvp_hf.models.backbones import FeaturePyramid
from uplvp_hf.models.clip_resnet import ClipResNet
from uplvp_hf.models.configuration_icpc import IcpcConfig
from uplvp_hf.models.icpc_decoder import ContextDecoder
from uplvp_hf.models.icpc_prompts import ClassPrompts
from uplvp_hf.models.semantic_fpn import SemanticFpnHead

pytestmark = pytest.mark.golden


def close(ours, theirs, relative=1e-5):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= relative * theirs.abs().max()


def part(tensors, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def openai_text(state, heads):
    """OpenAI's text transformer in transformers' class."""
    width = state["token_embedding.weight"].shape[1]
    depth = 1 + max(int(name.split(".")[2]) for name in state if "resblocks" in name)
    config = CLIPTextConfig(
        vocab_size=len(state["token_embedding.weight"]), hidden_size=width, intermediate_size=4 * width,
        projection_dim=state["text_projection"].shape[1], num_hidden_layers=depth, num_attention_heads=heads,
        max_position_embeddings=len(state["positional_embedding"]), hidden_act="quick_gelu",
        bos_token_id=len(state["token_embedding.weight"]) - 2, eos_token_id=len(state["token_embedding.weight"]) - 1,
    )  # fmt: skip
    ours = {
        "text_projection.weight": state["text_projection"].T,
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        **{f"text_model.final_layer_norm.{kind}": state[f"ln_final.{kind}"] for kind in ("weight", "bias")},
    }
    names = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
             "attn.out_proj": "self_attn.out_proj"}  # fmt: skip
    for index in range(depth):
        there, here = f"transformer.resblocks.{index}.", f"text_model.encoder.layers.{index}."
        for kind in ("weight", "bias"):
            for old, new in names.items():
                ours[f"{here}{new}.{kind}"] = state[f"{there}{old}.{kind}"]
            for letter, rows in zip("qkv", state[f"{there}attn.in_proj_{kind}"].chunk(3), strict=True):
                ours[f"{here}self_attn.{letter}_proj.{kind}"] = rows
    tower = CLIPTextModelWithProjection(config)
    tower.load_state_dict(ours, strict=True)
    return tower.eval()


def names_of(ids, end):
    """Tokens between the start token and the end token of every row."""
    return [row[1 : row.index(end)] for row in ids.tolist()]


def prompts(tower, names, dim, **settings):
    config = IcpcConfig(
        vision_config={"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "patch_size": 16},
        text_config=tower.config.to_dict(), projection_dim=dim, class_token_ids=names, num_labels=len(names),
        **settings,
    )  # fmt: skip
    return ClassPrompts(config)


def test_shared_contexts_of_denseclip(golden):
    tensors, info = golden("denseclip_text_contexts")
    tower = openai_text(part(tensors, "state."), info["config"]["transformer_heads"])
    names = names_of(tensors["input.texts"], tower.config.eos_token_id)
    model = prompts(tower, names, 24, prompt="static", num_context=4)
    model.contexts.data = tensors["input.contexts_shared"][0]
    close(model(tower, torch.zeros(1, 24), None), tensors["shared.out"])


def test_contexts_per_image_of_denseclip(golden):
    """An image token that differs per context vector: the recording's (B, N, C) added to contexts of zero."""
    tensors, info = golden("denseclip_text_contexts")
    tower = openai_text(part(tensors, "state."), info["config"]["transformer_heads"])
    names = names_of(tensors["input.texts"], tower.config.eos_token_id)
    model = prompts(tower, names, 24, prompt="dynamic_add", num_context=4)
    model.contexts.data.zero_()
    contexts = tensors["input.contexts_per_image"].clone().requires_grad_()
    model.image.forward = lambda pooled, memory: contexts
    for checkpointing in (False, True):
        contexts.grad = None
        out = model(tower, torch.zeros(3, 24), torch.zeros(3, 1, 24), checkpointing)
        close(out, tensors["per_image.out"])
        (out * tensors["input.cotangent"]).sum().backward()
        close(contexts.grad, tensors["grad.input.contexts_per_image"])


def test_cocoop(golden):
    tensors, info = golden("cocoop_metanet")
    tower = openai_text(part(tensors, "state.clip."), info["config"]["text_heads"])
    words = info["words"]
    names = [[words[word] for word in name.split()] + [words["."]] for name in info["class_names"]]
    model = prompts(tower, names, 32, prompt="dynamic_add", num_context=4, prompt_hidden=2)
    state = part(tensors, "state.cocoop.prompt_learner.")
    model.contexts.data = state["ctx"]
    model.image.load_state_dict(part(state, "meta_net."), strict=True)
    model.ends.tokens.copy_(tensors["input.input_ids"][0, [0, 0]])
    model.ends.tokens[1] = info["eos_token_id"]
    pooled = tensors["image_features_normalised"]
    close(model.image(pooled)[:, 0], tensors["cocoop.meta_net_out"])
    text = F.normalize(model(tower, pooled, pooled[:, None]), dim=-1)
    theirs = F.normalize(tensors["cocoop.text_features"], dim=-1)
    close(text, theirs)


def test_static_contexts_of_coop(golden):
    tensors, info = golden("cocoop_metanet")
    tower = openai_text(part(tensors, "state.clip."), info["config"]["text_heads"])
    words = info["words"]
    names = [[words[word] for word in name.split()] + [words["."]] for name in info["class_names"]]
    model = prompts(tower, names, 32, prompt="static", num_context=4)
    model.contexts.data = tensors["state.coop.ctx"]
    model.ends.tokens[0], model.ends.tokens[1] = tensors["input.input_ids"][0, 0], info["eos_token_id"]
    close(F.normalize(model(tower, torch.zeros(1, 32), None)[0], dim=-1),
          F.normalize(tensors["coop.end.text_features"], dim=-1))  # fmt: skip


@pytest.mark.parametrize("name", ["clip_openai_vit", "clip_openai_resnet"])
def test_names_alone_equal_clip(golden, name):
    tensors, info = golden(name)
    tower = openai_text({k: v for k, v in part(tensors, "state.").items() if not k.startswith("visual.")}, 4)
    ids = tensors["input.input_ids"]
    model = prompts(tower, names_of(ids, info["eos_token_id"]), 32, prompt="names")
    model.ends.tokens[0], model.ends.tokens[1] = ids[0, 0], info["eos_token_id"]
    close(model(tower, torch.zeros(1, 32), None)[0], tensors["text_features"])


def test_clip_resnet(golden):
    tensors, info = golden("clip_openai_resnet")
    settings = info["config"]
    model = ClipResNet(settings["vision_width"], settings["vision_layers"], settings["vision_heads"], 3, 32).eval()
    missing, unexpected = model.load_state_dict(part(tensors, "state.visual."), strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)
    maps, pooled, _ = model(tensors["input.pixel_values"])
    for level, map_ in enumerate(maps):
        close(map_, tensors[f"vision.layer{level + 1}"])
    close(pooled, tensors["image_features"])


def test_clip_resnet_of_denseclip(golden):
    """Every cell is a query, and the position table is resized to the map."""
    tensors, info = golden("denseclip_resnet")
    model = ClipResNet(4, info["config"]["backbone"]["layers"], 32, 3, 32)
    for phase in ("test", "train"):
        model.load_state_dict(part(tensors, "state.backbone."), strict=False)
        maps, pooled, local = model.train(phase == "train")(tensors["input.img"])
        for level, map_ in enumerate(maps):
            close(map_, tensors[f"{phase}.backbone.{level}"])
        close(pooled, tensors[f"{phase}.global"])
        close(local, tensors[f"{phase}.local"])


def test_context_decoder(golden):
    tensors, _ = golden("denseclip_context_decoder")
    config = IcpcConfig(
        vision_config={"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "patch_size": 16},
        text_config={}, projection_dim=32, decoder_width=24, decoder_layers=3, dropout=0.0,
    )  # fmt: skip
    model = ContextDecoder(config)
    model.load_state_dict(part(tensors, "state."), strict=True)
    out = model(tensors["input.text"], tensors["input.visual"])
    close(out, tensors["out"])
    (out * tensors["input.cotangent"]).sum().backward()
    for name, parameter in model.named_parameters():
        if f"grad.{name}" in tensors:
            close(parameter.grad, tensors[f"grad.{name}"], 1e-3)


@pytest.mark.parametrize("case", ["even", "odd"])
def test_semantic_fpn(golden, case):
    tensors, _ = golden("semantic_fpn")
    neck, head = FeaturePyramid([8, 12, 16, 24], 16), SemanticFpnHead(16, 12, 6, 0.0)
    old = part(tensors, "state.neck.")
    neck.load_state_dict(
        {k.replace("lateral_convs", "lateral").replace("fpn_convs", "output").replace(".conv.", "."): v
         for k, v in old.items()}
    )  # fmt: skip

    def ours(name):
        if name.startswith("conv_seg"):
            return name.replace("conv_seg", "classifier")
        _, level, step, rest = name.split(".", 3)
        return f"scales.{level}.{int(step) // 2}.{rest}"

    missing, unexpected = head.load_state_dict(
        {ours(k): v for k, v in part(tensors, "state.decode_head.").items()}, strict=False
    )
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)
    head.eval()
    maps = neck([tensors[f"input.{case}.{level}"] for level in range(4)])
    for level in range(4):
        close(maps[level], tensors[f"test.{case}.neck.{level}"])
        close(head.scale(level, maps[level]), tensors[f"test.{case}.scale_head.{level}"])
    close(head(maps), tensors[f"test.{case}.seg_logits"])
