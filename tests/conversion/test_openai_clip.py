"""CLIP's weights in four forms, OpenAI's, TorchScript, transformers' and timm's, as towers of ICPC."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, CLIPModel

from uplvp_hf.conversion import checkpoint_file
from uplvp_hf.conversion.convert import convert_checkpoint
from uplvp_hf.conversion.openai_clip import build_openai, icpc_from_clip
from uplvp_hf.models.errors import UserError
from uplvp_hf.models.modeling_icpc import IcpcForSemanticSegmentation

NAMES = ("background", "orange disc")


@pytest.fixture(scope="module")
def clip_dir():
    from importlib.resources import files

    return files("uplvp_hf") / "assets" / "synthetic_clip"


@pytest.mark.golden
@pytest.mark.parametrize("name", ["clip_openai_resnet", "clip_openai_vit"])
def test_both_towers_are_openais(golden, name, assert_close):
    tensors, info = golden(name)
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    ids, config = tensors["input.input_ids"], info["config"]
    end = len(state["token_embedding.weight"]) - 1
    towers = {"text_config": {"num_attention_heads": config["text_heads"]}}
    part = "vision_config" if config["patch_size"] else "resnet_config"
    towers[part] = {"num_attention_heads" if config["patch_size"] else "pool_heads": config["vision_heads"]}
    names = [row[1 : row.index(end)] for row in ids.tolist()]
    settings = {"prompt": "names", "class_token_ids": names, "contrastive": "none", **towers}
    model, converted, dropped = build_openai(state, dict(enumerate("abcdefgh"[: len(ids)])), None, settings)
    assert "logit_scale" in dropped and len(converted) > len(state) - 5
    pixels = tensors["input.pixel_values"]
    with torch.no_grad():
        _, pooled, local = model.eval().backbone(pixels)
        text = model.text_features(pooled, local)[0]
    assert_close(pooled, tensors["image_features"], 1e-5)
    assert_close(text, tensors["text_features"], 1e-5)


def openai_state(clip: CLIPModel) -> dict[str, torch.Tensor]:
    """transformers' CLIP under OpenAI's names, written independently of the converter."""
    state, found = clip.state_dict(), {}
    for tower, prefix in (("text_model", ""), ("vision_model", "visual.")):
        count = len(getattr(clip, tower).encoder.layers)
        for index in range(count):
            old, new = f"{tower}.encoder.layers.{index}.", f"{prefix}transformer.resblocks.{index}."
            for kind in ("weight", "bias"):
                packed = [state[f"{old}self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
                found[f"{new}attn.in_proj_{kind}"] = torch.cat(packed)
                for theirs, ours in (
                    ("attn.out_proj", "self_attn.out_proj"), ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"),
                    ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"),
                ):  # fmt: skip
                    found[f"{new}{theirs}.{kind}"] = state[f"{old}{ours}.{kind}"]
    embeddings = "vision_model.embeddings."
    for kind in ("weight", "bias"):
        found[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
        found[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
        found[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
    found |= {
        "visual.class_embedding": state[f"{embeddings}class_embedding"],
        "visual.positional_embedding": state[f"{embeddings}position_embedding.weight"],
        "visual.conv1.weight": state[f"{embeddings}patch_embedding.weight"],
        "visual.proj": state["visual_projection.weight"].T, "text_projection": state["text_projection.weight"].T,
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "logit_scale": state["logit_scale"], "input_resolution": torch.tensor(64),
    }  # fmt: skip
    return {name: tensor.contiguous() for name, tensor in found.items()}


class Tree(torch.nn.Module):
    """Modules and tensors as the dots of their names have them, as in OpenAI's archives."""

    def __init__(self, state: dict[str, torch.Tensor]):
        super().__init__()
        for name in dict.fromkeys(key.partition(".")[0] for key in state):
            inside = {key.partition(".")[2]: value for key, value in state.items() if key.partition(".")[0] == name}
            if "" in inside:
                self.register_buffer(name, inside[""])
            else:
                self.add_module(name, Tree(inside))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.fixture(scope="module")
def archive(clip_dir, tmp_path_factory):
    state = openai_state(CLIPModel.from_pretrained(clip_dir))
    state = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    file = tmp_path_factory.mktemp("clip") / "ViT-tiny.pt"
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; OpenAI's files are as they are
        torch.jit.save(torch.jit.trace(Tree(state), torch.zeros(1)), file)
    return file, state


def test_a_torchscript_archive_is_read_without_its_code(archive, monkeypatch, tmp_path):
    file, state = archive
    monkeypatch.setattr(torch.jit, "load", None)
    found = checkpoint_file.read_checkpoint(file)
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    # Names that weights do not need are refused.
    import zipfile

    evil = tmp_path / "evil.pt"
    with zipfile.ZipFile(evil, "w") as target:
        target.writestr("evil/data.pkl", b"cos\nsystem\n(S'true'\ntR.")
        target.writestr("evil/constants.pkl", b"")
    with pytest.raises(checkpoint_file.CheckpointError, match=r"os\.system"):
        checkpoint_file.read_checkpoint(evil)


def test_openais_file_gives_the_model_of_the_folder(archive, clip_dir, tmp_path, assert_close):
    """From the archive and from transformers' folder the same model; and through `uplvp convert`."""
    file, _ = archive
    classes, heads = dict(enumerate(NAMES)), {"vision_config": {"num_attention_heads": 4}}
    heads |= {"text_config": {"num_attention_heads": 2, "bos_token_id": 2, "eos_token_id": 3}}
    small = {"fpn_channels": 16, "head_channels": 16, "prompt": "names"}
    tokenizer = AutoTokenizer.from_pretrained(clip_dir)
    torch.manual_seed(0)
    ours = icpc_from_clip(file, classes, tokenizer, **small, **heads).eval()
    torch.manual_seed(0)
    theirs = icpc_from_clip(clip_dir, classes, **small).eval()
    assert isinstance(ours, IcpcForSemanticSegmentation) and ours.dtype == torch.float32
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(ours(pixels).score_maps[8], theirs(pixels).score_maps[8], 5e-3)  # half precision in the file
    report = convert_checkpoint(clip_dir, tmp_path / "out", classes=NAMES, settings={**small, "num_context": 2})
    assert not report.untrained or all(name.startswith(("neck", "head", "align", "backbone.pyramid")) for name in
                                       report.untrained)  # fmt: skip
    loaded = IcpcForSemanticSegmentation.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert_close(loaded(pixels).score_maps[8], theirs(pixels).score_maps[8], 1e-6)
    assert json.loads((tmp_path / "out" / "conversion_report.json").read_text())["format"] == "clip"


def test_timms_resnet_has_equal_features(tmp_path, assert_close):
    """timm's own class with random weights, all of whose tensors have a place; without a text tower."""
    from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg

    blocks = tuple(ByoBlockCfg(type="bottle", d=2, c=32 * 2**k, s=2 if k else 1, br=0.25) for k in range(4))
    layout = ByoModelCfg(
        blocks=blocks, stem_chs=(4, 4, 8), stem_type="", stem_pool="avg2", downsample="avg", aa_layer="avg",
        head_type="attn_abs", act_layer="relu",
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = ByobNet(layout, num_classes=24, img_size=64).eval()
    for name, buffer in theirs.named_buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5) if name.endswith("var") else buffer.normal_(std=0.1)
    assert theirs.state_dict().keys() >= {"head.pos_embed", "stages.0.0.shortcut.conv.bn.weight"}
    file = tmp_path / "model.safetensors"
    save_file(theirs.state_dict(), file)
    heads = {"resnet_config": {"pool_heads": theirs.head.num_heads}}
    ours = icpc_from_clip(file, dict(enumerate(NAMES)), fpn_channels=16, head_channels=16, **heads).eval()
    assert ours.config.prompt == "none" and ours.config.resnet_config["depths"] == [2, 2, 2, 2]
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        maps, pooled, _ = ours.backbone(pixels)
        wanted = theirs.forward_intermediates(pixels, indices=[1, 2, 3, 4], intermediates_only=True)
        assert_close(pooled, theirs(pixels), 1e-5)
    for found, one in zip(maps, wanted, strict=True):
        assert_close(found, one, 1e-5)
    with pytest.raises(UserError, match=r"no text tower, which prompt=static needs"):
        icpc_from_clip(file, dict(enumerate(NAMES)), prompt="static", **heads)
    with pytest.raises(UserError, match="no CLIP ResNet with an attention pool"):
        icpc_from_clip("timm:resnet50", dict(enumerate(NAMES)))
    assert {"resnet50_clip", "resnet101_clip"} <= set(timm.list_models("resnet*_clip"))


def test_what_is_no_clip(tmp_path):
    save_file({"layer1.0.conv1.weight": torch.zeros(2, 2, 1, 1)}, tmp_path / "resnet.safetensors")
    with pytest.raises(UserError, match="holds no CLIP, but a resnet"):
        icpc_from_clip(tmp_path / "resnet.safetensors", {0: "a"})
    save_file({"visual.class_embedding": torch.zeros(4), "odd": torch.zeros(1)}, tmp_path / "clip.safetensors")
    with pytest.raises(UserError, match="1 tensors have no place in a CLIP: odd"):
        icpc_from_clip(tmp_path / "clip.safetensors", {0: "a"})
