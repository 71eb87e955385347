"""Whole files of other code bases -> folders: values against torchvision and recorded tensors, and the reports."""

import json
import pickle
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_knet_conversion import original_config, original_names
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from transformers import AutoModelForInstanceSegmentation, Mask2FormerForUniversalSegmentation, ResNetBackbone

import uplvp_hf
from uplvp_hf.commands.convert import main
from uplvp_hf.conversion.backbones import resnet_config_of
from uplvp_hf.conversion.checkpoint_file import CheckpointError, detect_format, read_checkpoint
from uplvp_hf.conversion.convert import convert_checkpoint, knet_settings, queryinst_settings
from uplvp_hf.conversion.detectron2 import convert_detectron2_mask2former, torchvision_name
from uplvp_hf.conversion.knet import config_from_mmdet_knet, convert_mmdet_knet


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    model = ResNet(Bottleneck, [1, 2, 1, 1]).eval()
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if value.dim() == 1 and value.is_floating_point():
                value.uniform_(0.5, 1.5) if "var" in name or "weight" in name else value.uniform_(-0.2, 0.2)
    return model


WRAPPED = {
    "torchvision": lambda state: state,
    "moco": lambda state: {
        "arch": "resnet50",
        "state_dict": {f"module.encoder_q.{k}": v for k, v in state.items()}
        | {f"module.encoder_k.{k}": v.clone() for k, v in state.items()}
        | {"module.queue": torch.zeros(2, 3), "module.encoder_q.fc.2.weight": torch.zeros(2, 2)},
    },
    "densecl": lambda state: {"state_dict": {k: v for k, v in state.items() if not k.startswith("fc.")}},
    "swav": lambda state: (
        {f"module.{k}": v for k, v in state.items() if not k.startswith("fc.")}
        | {"module.prototypes.weight": torch.zeros(3, 2), "module.projection_head.0.weight": torch.zeros(2, 2)}
    ),
}


@pytest.mark.parametrize("source", WRAPPED)
def test_backbones_give_the_features_of_torchvision(resnet, source, tmp_path, close):
    content = WRAPPED[source](resnet.state_dict())
    torch.save(content, tmp_path / "weights.pth.tar")
    report = convert_checkpoint(tmp_path / "weights.pth.tar", tmp_path / "out")
    ours = ResNetBackbone.from_pretrained(tmp_path / "out").eval()
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        x = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(image))))
        for index, found in enumerate(ours(image).feature_maps):
            x = getattr(resnet, f"layer{index + 1}")(x)
            close(found, x)
    # Every tensor of the file is accounted for, once.
    names = set(content.get("state_dict", content))
    assert names == {*report.kept, *report.renamed, *report.dropped}
    assert set(report.missing) == {name for name in ours.state_dict() if name.endswith("num_batches_tracked")}
    written = json.loads((tmp_path / "out" / "conversion_report.json").read_text())
    assert written["format"] == "resnet" and written["renamed"] == report.renamed


def test_wide_bottlenecks_are_refused(resnet):
    wide = ResNet(Bottleneck, [1, 1, 1, 1], width_per_group=128).state_dict()
    from uplvp_hf.conversion.backbones import convert_resnet_backbone

    with pytest.raises(ValueError, match="wide or grouped"):
        resnet_config_of(convert_resnet_backbone(wide)[0])


class Malicious:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_files_that_want_to_run_code_are_refused(tmp_path, capsys):
    (tmp_path / "bad.pth").write_bytes(pickle.dumps({"state_dict": Malicious()}))
    with pytest.raises(CheckpointError, match="plain weights"):
        read_checkpoint(tmp_path / "bad.pth")
    torch.save({"model": Malicious()}, tmp_path / "bad2.pth")
    with pytest.raises(CheckpointError, match="plain weights"):
        read_checkpoint(tmp_path / "bad2.pth")
    assert "must not run" not in capsys.readouterr().out


def test_unreadable_and_unknown_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        read_checkpoint(tmp_path / "none.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"123")
    with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
        read_checkpoint(tmp_path / "cut.safetensors")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(CheckpointError, match="no named tensors"):
        read_checkpoint(tmp_path / "empty.pth")
    with pytest.raises(CheckpointError, match="known are knet"):
        detect_format({"something.weight": torch.zeros(1)})


def test_numbers_of_numpy_beside_the_weights_are_read(tmp_path):
    meta = {"best_score": np.float64(0.4), "epoch": np.int64(3)}
    torch.save({"meta": meta, "state_dict": {"a": torch.ones(2)}}, tmp_path / "mmcv.pth")
    assert torch.equal(read_checkpoint(tmp_path / "mmcv.pth")["a"], torch.ones(2))


def state_of(tensors):
    return {name.removeprefix("state."): value for name, value in tensors.items() if name.startswith("state.")}


@pytest.mark.golden
@pytest.mark.parametrize("with_config", [True, False])
def test_mask2former_of_mmdetection_predicts_as_recorded(golden, tmp_path, with_config, close):
    tensors, info = golden("mask2former")
    torch.save({"meta": {"epoch": 1}, "state_dict": state_of(tensors)}, tmp_path / "m2f.pth")
    (tmp_path / "config.json").write_text(json.dumps({"model": info["config"]}))
    arguments = [str(tmp_path / "m2f.pth"), str(tmp_path / "out")]
    if with_config:
        arguments += ["--config", str(tmp_path / "config.json")]
    assert main(arguments) == 0
    assert len(uplvp_hf.UplvpConfig.from_pretrained(tmp_path / "out").id2label) == count(tensors)
    model = AutoModelForInstanceSegmentation.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        output = model(tensors["input.img"])
    last = max(int(m[1]) for name in tensors if (m := re.match(r"layer(\d+)\.cls_pred", name)))
    close(output.class_queries_logits, tensors[f"layer{last}.cls_pred"])
    close(output.masks_queries_logits, tensors[f"layer{last}.mask_pred"])
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()


@pytest.mark.golden
def test_names_beside_the_weights_are_taken_and_lacking_tensors_reported(golden, tmp_path, capsys):
    tensors, info = golden("knet_inst")
    (tmp_path / "config.json").write_text(json.dumps(info["config"]))
    state = state_of(tensors)
    names = [f"kind {k}" for k in range(state["rpn_head.conv_seg.weight"].shape[0])]
    lacking = state.pop("neck.lateral_convs.0.conv.bias")
    assert lacking is not None
    torch.save({"meta": {"CLASSES": tuple(names)}, "state_dict": state}, tmp_path / "knet.pth")
    arguments = [str(tmp_path / "knet.pth"), str(tmp_path / "out"), "--config", str(tmp_path / "config.json")]
    assert main(arguments) == 0
    assert "1 tensors are not in the file: segmenter.model.pyramid.lateral.0.bias" in capsys.readouterr().err
    assert list(uplvp_hf.UplvpConfig.from_pretrained(tmp_path / "out").id2label.values()) == names


@pytest.mark.golden
def test_mask2former_alone_is_transformers_own_class(golden, tmp_path):
    tensors, _ = golden("mask2former")
    save_file({k: v.contiguous() for k, v in state_of(tensors).items()}, tmp_path / "m2f.safetensors")
    convert_checkpoint(tmp_path / "m2f.safetensors", tmp_path / "out", kind="segmenter", classes=names(count(tensors)))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "mask2former"
    Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "out")
    with pytest.raises(FileExistsError):
        convert_checkpoint(tmp_path / "m2f.safetensors", tmp_path / "out")


def count(tensors):
    return tensors["state.panoptic_head.cls_embed.weight"].shape[0] - 1


def names(count):
    return [f"kind {index}" for index in range(count)]


@pytest.mark.golden
def test_pre_training_checkpoints_keep_the_prompt_projection(golden, tmp_path):
    tensors, _ = golden("mask2former")
    state = state_of(tensors)
    width = state["panoptic_head.query_feat.weight"].shape[1]
    channels = tensors["backbone.3"].shape[1]
    state["panoptic_head.patch2query.weight"] = torch.randn(width, channels)
    state["panoptic_head.patch2query.bias"] = torch.randn(width)
    torch.save(state, tmp_path / "pre.pth")
    report = convert_checkpoint(tmp_path / "pre.pth", tmp_path / "pre", kind="pretraining")
    saved = load_file(tmp_path / "pre" / "model.safetensors")
    assert torch.equal(saved["prompt_projection.weight"], state["panoptic_head.patch2query.weight"])
    assert report.renamed["panoptic_head.patch2query.bias"] == ["prompt_projection.bias"]
    report = convert_checkpoint(tmp_path / "pre.pth", tmp_path / "plain")
    assert "panoptic_head.patch2query.bias" in report.dropped
    more = count(tensors) + 1
    with pytest.raises(CheckpointError, match=f"{more} names were given"):
        convert_checkpoint(tmp_path / "pre.pth", tmp_path / "again", classes=names(more))


@pytest.mark.golden
@pytest.mark.parametrize("name", ["knet_inst", "queryinst"])
@pytest.mark.parametrize("with_config", [True, False])
def test_knet_and_queryinst_predict_as_recorded(golden, tmp_path, name, with_config, close):
    tensors, info = golden(name)
    extra = {"roi_head.mask_head.0.cls_clip_fcs.0.weight": torch.zeros(2, 2)}  # of a pre-training checkpoint
    torch.save({"state_dict": state_of(tensors) | extra}, tmp_path / "model.pth")
    (tmp_path / "config.json").write_text(json.dumps(info["config"]))
    # What the weights cannot tell has to be given where it is not the paper's.
    settings = {"mask_padding": False} if name == "queryinst" else {}
    if not with_config:
        head = info["config"]["roi_head"]
        if name == "queryinst":
            settings |= {
                "num_attention_heads": head["bbox_head"][0]["num_heads"],
                "finest_scale": head["bbox_roi_extractor"]["finest_scale"],
                "mask_pool_size": head["mask_roi_extractor"]["roi_layer"]["output_size"],
            }
        else:
            settings |= {
                "num_attention_heads": head["mask_head"][0]["num_heads"],
                "norm_groups": info["config"]["rpn_head"]["norm_cfg"]["num_groups"],
            }
    report = convert_checkpoint(
        tmp_path / "model.pth",
        tmp_path / "out",
        config=tmp_path / "config.json" if with_config else None,
        settings=settings,
    )
    assert list(report.dropped) == list(extra)
    model = AutoModelForInstanceSegmentation.from_pretrained(tmp_path / "out").eval()
    pixel_mask = torch.zeros_like(tensors["input.img"][:, 0])
    for one, meta in zip(pixel_mask, info["img_metas"]):
        one[: meta["img_shape"][0], : meta["img_shape"][1]] = 1
    with torch.no_grad():  # the original K-Net does not look at the mask
        output = model(tensors["input.img"], pixel_mask=pixel_mask if name == "queryinst" else None)
    last = "" if name == "queryinst" else f"stage{model.segmenter.num_stages - 1}."
    close(output.class_queries_logits, tensors[f"test.{last}cls_score"])


@pytest.mark.golden
def test_the_text_class_head_of_pre_training_is_named_as_dropped(golden, tmp_path):
    tensors, info = golden("upknet_feature_clip")
    torch.save({"state_dict": state_of(tensors)}, tmp_path / "pre.pth")
    (tmp_path / "config.json").write_text(json.dumps(info["config"]))
    report = convert_checkpoint(tmp_path / "pre.pth", tmp_path / "out", "pretraining", tmp_path / "config.json")
    dropped = {name for name in report.dropped if "cls_clip_fcs" in name}
    assert dropped == {name for name in state_of(tensors) if "cls_clip_fcs" in name} and dropped
    assert uplvp_hf.UplvpForPreTraining.from_pretrained(tmp_path / "out").text_heads is None


def detectron2_name(name: str) -> str:
    """mmdetection's name of a tensor -> that of the first release. Written from the published list of names."""
    levels = {"0": "1"}
    name = re.sub(r"^backbone\.(conv1|bn1)\.", lambda m: f"backbone.stem.{m[1]}.", name)
    name = re.sub(r"^backbone\.layer(\d)\.", lambda m: f"backbone.res{int(m[1]) + 1}.", name)
    name = re.sub(r"^(backbone\..*)bn(\d)\.", r"\1conv\2.norm.", name)
    name = name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
    name = re.sub(r"panoptic_head\.pixel_decoder\.", "sem_seg_head.pixel_decoder.", name)
    name = re.sub(r"input_convs\.(\d)\.conv", r"input_proj.\1.0", name)
    name = re.sub(r"input_convs\.(\d)\.gn", r"input_proj.\1.1", name)
    name = re.sub(r"lateral_convs\.(\d)\.conv", lambda m: f"adapter_{levels[m[1]]}", name)
    name = re.sub(r"lateral_convs\.(\d)\.gn", lambda m: f"adapter_{levels[m[1]]}.norm", name)
    name = re.sub(r"output_convs\.(\d)\.conv", lambda m: f"layer_{levels[m[1]]}", name)
    name = re.sub(r"output_convs\.(\d)\.gn", lambda m: f"layer_{levels[m[1]]}.norm", name)
    name = name.replace("level_encoding.weight", "transformer.level_embed").replace("mask_feature.", "mask_features.")
    encoder = "sem_seg_head.pixel_decoder.transformer.encoder.layers."
    name = name.replace("sem_seg_head.pixel_decoder.encoder.layers.", encoder)
    if name.startswith(encoder):
        name = name.replace("attentions.0.", "self_attn.").replace("ffns.0.layers.0.0.", "linear1.")
        name = name.replace("ffns.0.layers.1.", "linear2.").replace("norms.0.", "norm1.").replace("norms.1.", "norm2.")
    predictor = "sem_seg_head.predictor."
    name = name.replace("panoptic_head.cls_embed.", predictor + "class_embed.")
    name = name.replace("panoptic_head.transformer_decoder.post_norm.", predictor + "decoder_norm.")
    name = re.sub(
        r"panoptic_head\.mask_embed\.(\d)\.", lambda m: f"{predictor}mask_embed.layers.{int(m[1]) // 2}.", name
    )
    name = re.sub(r"panoptic_head\.decoder_input_projs\.(\d)\.(?:conv\.)?", predictor + r"input_proj.\1.", name)
    name = re.sub(r"panoptic_head\.(query_embed|query_feat|level_embed)\.", predictor + r"\1.", name)
    parts = {
        "attentions.0.attn.": "transformer_cross_attention_layers.{}.multihead_attn.",
        "norms.0.": "transformer_cross_attention_layers.{}.norm.",
        "attentions.1.attn.": "transformer_self_attention_layers.{}.self_attn.",
        "norms.1.": "transformer_self_attention_layers.{}.norm.",
        "ffns.0.layers.0.0.": "transformer_ffn_layers.{}.linear1.",
        "ffns.0.layers.1.": "transformer_ffn_layers.{}.linear2.",
        "norms.2.": "transformer_ffn_layers.{}.norm.",
    }
    match = re.match(r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.(.+)", name)
    if match:
        part = next(part for part in parts if match[2].startswith(part))
        name = predictor + parts[part].format(match[1]) + match[2].removeprefix(part)
    return name


@pytest.mark.golden
def test_mask2former_of_detectron2_predicts_as_recorded(golden, tmp_path, close):
    tensors, _ = golden("mask2former")
    state = {detectron2_name(name): value for name, value in state_of(tensors).items()}
    assert "sem_seg_head.predictor.transformer_self_attention_layers.0.self_attn.in_proj_weight" in state
    torch.save({"model": state, "iteration": 7}, tmp_path / "m2f.pth")
    convert_checkpoint(tmp_path / "m2f.pth", tmp_path / "out")
    model = AutoModelForInstanceSegmentation.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        output = model(tensors["input.img"])
    last = max(int(m[1]) for name in tensors if (m := re.match(r"layer(\d+)\.cls_pred", name)))
    close(output.masks_queries_logits, tensors[f"layer{last}.mask_pred"])


def test_detectron2_names():
    assert torchvision_name("stem.conv1.norm.bias") == "bn1.bias"
    assert torchvision_name("res2.0.shortcut.norm.running_mean") == "layer1.0.downsample.1.running_mean"
    assert torchvision_name("res5.2.conv3.weight") == "layer4.2.conv3.weight"
    with pytest.raises(ValueError, match="Swin"):
        convert_detectron2_mask2former({"backbone.layers.0.blocks.0.attn.qkv.weight": torch.zeros(3, 1)})


def test_the_command_says_what_is_wrong_in_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "none.pth"), str(tmp_path / "out")]) == 2
    assert "no such file" in capsys.readouterr().err


@pytest.mark.parametrize("layers", [0, 2])
def test_numbers_of_layers_are_read_off_the_tensors(tiny_segmenter, layers):
    """None is a number too: predictors may follow the last norm directly."""
    shared = {"hidden_size": 16, "num_attention_heads": 2, "num_queries": 5, "num_stages": 2, "num_mask_layers": layers,
              "num_class_layers": layers, "backbone_config": tiny_segmenter()["backbone_config"]}  # fmt: skip
    knet = {**shared, "norm_groups": 4, "num_semantic_layers": layers, "num_localization_layers": layers}
    state = uplvp_hf.KNetForInstanceSegmentation(uplvp_hf.KNetConfig(**knet)).state_dict()
    found = knet_settings(state)
    assert {name: found[name] for name in knet if name in found and name != "backbone_config"} == {
        name: value for name, value in knet.items() if name in found and name != "backbone_config"
    }
    queryinst = {**shared, "num_box_layers": layers, "dynamic_channels": 4}
    state = uplvp_hf.QueryInstForInstanceSegmentation(uplvp_hf.QueryInstConfig(**queryinst)).state_dict()
    found = queryinst_settings(state)
    assert [found[f"num_{part}_layers"] for part in ("class", "box", "mask")] == [layers] * 3


@pytest.fixture
def knet_state(tiny_segmenter):
    """A K-Net under the names of its authors: of the backbone, and of every tensor that settings are read from."""
    config = original_config(depth=18, base=4)
    model = uplvp_hf.KNetForInstanceSegmentation(uplvp_hf.KNetConfig(**config_from_mmdet_knet(config)))
    ours, state = model.state_dict(), {}
    backbone = {f"backbone.{name}" for name in ResNet(BasicBlock, [2, 2, 2, 2]).state_dict() if "fc." not in name}
    for name in [*original_names(), *backbone]:
        if "num_batches" in name:
            continue
        places = list(convert_mmdet_knet({name: torch.zeros(3, 1, 1, 1)}))
        value = torch.cat([ours[place] for place in places])
        state[name] = value[..., None, None] if "init_kernels" in name else value.clone()
    return state, config


def test_wrapped_models_are_not_taken_for_backbones(knet_state, tmp_path):
    state, config = knet_state
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "knet.pth")
    (tmp_path / "config.json").write_text(json.dumps(config))
    report = convert_checkpoint(tmp_path / "knet.pth", tmp_path / "out", config=tmp_path / "config.json")
    assert uplvp_hf.UplvpConfig.from_pretrained(tmp_path / "out").segmenter_config.model_type == "knet"
    assert set(report.renamed) == set(state) and not report.dropped


def test_reports_tell_tensors_of_one_storage_apart(resnet, tmp_path):
    state = {name: value for name, value in resnet.state_dict().items() if value.is_floating_point()}
    block = torch.cat([value.flatten() for value in state.values()])
    pieces = block.split([value.numel() for value in state.values()])
    views = {name: piece.view(value.shape) for (name, value), piece in zip(state.items(), pieces)}
    torch.save(views, tmp_path / "views.pth")
    report = convert_checkpoint(tmp_path / "views.pth", tmp_path / "out")
    assert all(len(ours) == 1 for ours in report.renamed.values())
    assert report.renamed["bn1.weight"] == ["embedder.embedder.normalization.weight"]
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["embedder.embedder.normalization.weight"], state["bn1.weight"])


@pytest.mark.parametrize(
    ("content", "message"),
    [("[1]", "must be a JSON object"), ("{}", "not that of such a model.*rpn_head"), ("{", "no readable JSON")],
)
def test_odd_configurations_are_named(knet_state, tmp_path, capsys, content, message):
    torch.save(knet_state[0], tmp_path / "knet.pth")
    (tmp_path / "odd.json").write_text(content)
    assert main([str(tmp_path / "knet.pth"), str(tmp_path / "out"), "--config", str(tmp_path / "odd.json")]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and len(error.splitlines()) == 1


def test_what_is_missing_or_no_setting_is_named(knet_state, tmp_path, capsys):
    state = knet_state[0]
    arguments = [str(tmp_path / "knet.pth"), str(tmp_path / "out")]
    torch.save(state, tmp_path / "knet.pth")
    assert main([*arguments, "--set", "norm_groupz=4"]) == 2
    assert "Did you mean `norm_groups`?" in capsys.readouterr().err
    torch.save({name: value for name, value in state.items() if "fc_cls" not in name}, tmp_path / "knet.pth")
    assert main(arguments) == 2
    assert "stages.0.classifier.weight' (our name) is missing" in capsys.readouterr().err
