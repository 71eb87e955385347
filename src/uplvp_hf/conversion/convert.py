"""Any checkpoint that we know -> a folder that `from_pretrained` reads, with a report of every tensor."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..data.coco_classes import COCO_CLASSES
from ..files import usual_rights, write_json
from ..models.errors import UserError
from .backbones import convert_resnet_backbone, resnet_config_of
from .checkpoint_file import CheckpointError, detect_format, open_checkpoint
from .denseclip import build_denseclip
from .detectron2 import convert_detectron2_mask2former
from .knet import config_from_mmdet_knet, convert_mmdet_knet
from .mask2former import config_from_mmdet, convert_mmdet_mask2former
from .naming import count_numbers, load_fitting
from .openai_clip import build_openai, folder_settings
from .queryinst import config_from_mmdet_queryinst, convert_mmdet_queryinst
from .report import ConversionReport

# Tensors of the originals that have no place in ours, with the reason that the report gives.
COUNTER = r".*num_batches_tracked"
_DROPPED = {
    COUNTER: "counter that inference does not read",
    r"(panoptic_head\.loss_cls\.class_weight|(sem_seg_head\.)?criterion\..*)": "follows from the configuration",
    r"(module\.)?pixel_(mean|std)": "in the image processor",
    r".*patch2query\..*": "projection of prompts, which only pre-training uses",
    r"gen_gt_kernel\..*": "projection of kernel targets, which only pre-training uses",
    r".*cls_clip_fcs\..*": "CLIP class head, which only pre-training uses; ours compares in another form",
    r".*(_pos\.|init_kernels_pos).*": "position kernels of an ablation",
    r"linear\.(weight|bias)": "joins query and prompt, which only pre-training uses",
    r"(?!panoptic_head|rpn_head|roi_head|backbone|neck|sem_seg_head).*(queue|ema_).*": "state of the optimizer",
}
_CLIPS = ("clip", "timm-clip-resnet")
# Tensors of the original pre-training that `UplvpForPreTraining` has, where its configuration builds them.
_PRETRAINING = [
    (r"(?:panoptic_head\.)?patch2query\.(weight|bias)", r"prompt_projection.\1"),
    (r"linear\.(weight|bias)", r"prompt_fusion.linear.\1"),
]
_GAPS = {
    "num_batches_tracked": "counter that starts at zero",
    "criterion.empty_weight": "follows from the configuration",
}


def mask2former_settings(state: dict[str, Tensor]) -> dict[str, Any]:
    """Settings of `Mask2FormerConfig`, and `num_labels`, read off tensors under our names.

    Points, losses and costs leave no trace in the weights; they keep their defaults, which are the paper's.
    """
    pixel, module = "model.pixel_level_module.decoder.", "model.transformer_module."
    backbone = _inside(state, "model.pixel_level_module.encoder.")
    offsets = state[f"{pixel}encoder.layers.0.self_attn.sampling_offsets.bias"].shape[0]
    return {
        "backbone_config": resnet_config_of(backbone),
        "num_labels": state["class_predictor.weight"].shape[0] - 1,
        "feature_size": state[f"{pixel}mask_projection.weight"].shape[1],
        "mask_feature_size": state[f"{pixel}mask_projection.weight"].shape[0],
        "hidden_dim": state[f"{module}queries_features.weight"].shape[1],
        "num_queries": state[f"{module}queries_features.weight"].shape[0],
        "encoder_layers": count_numbers(state, pixel + r"encoder\.layers\.(\d+)\..+"),
        "encoder_feedforward_dim": state[f"{pixel}encoder.layers.0.fc1.weight"].shape[0],
        "decoder_layers": count_numbers(state, module + r"decoder\.layers\.(\d+)\..+") + 1,
        "dim_feedforward": state[f"{module}decoder.layers.0.fc1.weight"].shape[0],
        "num_attention_heads": offsets // (3 * 4 * 2),  # levels, points, x and y
        "enforce_input_projection": f"{module}input_projections.0.weight" in state,
    }


def knet_settings(state: dict[str, Tensor]) -> dict[str, Any]:
    """Settings of `KNetConfig`, and `num_labels`, read off tensors under our names.

    Attention heads, norm groups, losses and costs leave no trace in the weights; they keep their defaults.
    """
    kernels, stage = state["model.kernel_head.kernels.weight"], "model.stages.0."
    return {
        "backbone_config": resnet_config_of(_inside(state, "model.backbone.")),
        "num_labels": state[f"{stage}classifier.weight"].shape[0],
        "num_queries": kernels.shape[0],
        "hidden_size": kernels.shape[1],
        "num_stages": count_numbers(state, r"model\.stages\.(\d+)\..+"),
        "intermediate_size": state[f"{stage}fc1.weight"].shape[0],
        "num_localization_layers": count_numbers(state, r"model\.kernel_head\.localization\.(\d+)\..+"),
        "num_semantic_layers": count_numbers(state, r"model\.kernel_head\.semantic\.(\d+)\..+"),
        # linear layer, norm and ReLU stand in one list
        "num_class_layers": (count_numbers(state, r"model\.stages\.0\.class_layers\.(\d+)\..+") + 1) // 3,
        "num_mask_layers": (count_numbers(state, r"model\.stages\.0\.mask_layers\.(\d+)\..+") + 1) // 3,
    }


def queryinst_settings(state: dict[str, Tensor]) -> dict[str, Any]:
    """Settings of `QueryInstConfig`, and `num_labels`, read off tensors under our names.

    Attention heads, the size of mask windows, losses and costs leave no trace in the weights; they keep their defaults.
    """
    features, stage = state["model.proposal_features.weight"], "model.stages.0."
    width = features.shape[1]
    return {
        "backbone_config": resnet_config_of(_inside(state, "model.backbone.")),
        "num_labels": state[f"{stage}class_predictor.weight"].shape[0],
        "num_queries": features.shape[0],
        "hidden_size": width,
        "num_stages": count_numbers(state, r"model\.stages\.(\d+)\..+"),
        "intermediate_size": state[f"{stage}fc1.weight"].shape[0],
        "dynamic_channels": state[f"{stage}dynamic_conv.kernels.weight"].shape[0] // (2 * width),
        "num_class_layers": count_numbers(state, r"model\.stages\.0\.class_layers\.(\d+)\..+"),
        "num_box_layers": count_numbers(state, r"model\.stages\.0\.box_layers\.(\d+)\..+"),
        "num_mask_layers": count_numbers(state, r"model\.mask_heads\.0\.convs\.(\d+)\..+"),
        "box_pool_size": math.isqrt(state[f"{stage}dynamic_projection.weight"].shape[1] // width),
    }


def _inside(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


# By kind of checkpoint: model type, converter of the tensors, settings of the segmenter from its tensors under our
# names, and the same from the original's configuration.
_NETWORKS = {
    "knet": ("knet", convert_mmdet_knet, knet_settings, config_from_mmdet_knet),
    "queryinst": ("queryinst", convert_mmdet_queryinst, queryinst_settings, config_from_mmdet_queryinst),
    "mask2former-mmdet": ("mask2former", convert_mmdet_mask2former, mask2former_settings, config_from_mmdet),
    "mask2former-detectron2": ("mask2former", convert_detectron2_mask2former, mask2former_settings, None),
}


def convert_checkpoint(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    kind: str = "instance",
    config: str | os.PathLike[str] | None = None,
    classes: Sequence[str] | None = None,
    category_ids: Sequence[int] | None = None,
    settings: dict[str, Any] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
) -> ConversionReport:
    """Converts a file and writes a folder.

    Args:
        checkpoint: K-Net, QueryInst or Mask2Former of mmdetection, detectron2 or UPLVP's pre-training, a ResNet in
            torchvision's names (torchvision, MoCo, DenseCL, SwAV), a DenseCLIP, or a CLIP (OpenAI's and OpenCLIP's
            files, timm's CLIP ResNets, a folder of transformers). The kind is told from the names.
        output: new folder. A ResNet becomes a `ResNetBackbone`, whose model.safetensors recipes take as
            `model.backbone_weights`, a DenseCLIP or CLIP an `IcpcForSemanticSegmentation`, whose pyramid and head are
            to be trained in case of a CLIP; everything else as `kind` says.
        kind: "instance" (`UplvpForInstanceSegmentation`), "pretraining" (`UplvpForPreTraining`, which keeps the
            projection of prompts), or "segmenter" (the network alone, as transformers or we have it).
        config: JSON file of the original's configuration, its `model` section or a file that holds one. Without it
            sizes are read off the tensors.
        classes, category_ids: names and original ids; None: the names that mmdetection saved, else COCO's for 80
            classes, else "class 0", ...; ids of COCO for its 80 classes, else 1, 2, ...
        settings: of the segmenter's configuration, to replace what was found.
        tokenizer: folder or repository with the tokenizer of a DenseCLIP's class names, by default OpenAI's.

    Writes `conversion_report.json` beside the model. Raises CheckpointError or ValueError for what cannot be
    converted, FileExistsError for a folder with contents.
    """
    if kind not in ("instance", "pretraining", "segmenter"):
        raise UserError(f"kind `{kind}` is unknown: choose instance, pretraining or segmenter.")
    output = Path(output)
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"{output} is not empty; choose another folder.")
    if Path(checkpoint).is_dir():  # transformers' CLIP
        settings, tokenizer = {**folder_settings(checkpoint), **(settings or {})}, tokenizer or checkpoint
        checkpoint = Path(checkpoint) / "model.safetensors"
    source, named = open_checkpoint(checkpoint)
    found = detect_format(source)
    if found != "resnet":  # of a model that was saved inside a wrapper for several devices
        source = {name.removeprefix("module."): tensor for name, tensor in source.items()}
    options = (kind, config, (classes, named), category_ids, settings, tokenizer)
    try:
        model, converted, dropped = _converted(source, found, *options)
    except KeyError as error:
        raise CheckpointError(f"{checkpoint} ({found}): the tensor {error} (our name) is missing.") from error
    except ValueError as error:
        raise CheckpointError(f"{checkpoint} ({found}): {error}") from error
    report = ConversionReport.build(source, converted, dropped, model.state_dict(), _GAPS)
    model.save_pretrained(output)
    usual_rights(output)
    if found in ("denseclip", *_CLIPS):
        _semantic_processor(model.config).save_pretrained(output)
    elif found != "resnet" and kind != "segmenter":
        _processor().save_pretrained(output)
    write_json(output / "conversion_report.json", {"source": Path(checkpoint).name, "format": found, **vars(report)})
    return report


def _converted(source, found: str, kind: str, config, classes, category_ids, settings, tokenizer):
    """The model, its tensors under our names, and {name: reason} of those that have no place in it."""
    if found == "resnet":
        return _backbone(source)
    if found in _CLIPS:
        names = None if classes[0] is None else dict(enumerate(classes[0]))
        return build_openai(source, names, category_ids, settings or {}, tokenizer)
    if found == "denseclip":
        model, converted = build_denseclip(source, classes[0] or classes[1], category_ids, settings or {}, tokenizer)
        return model, converted, {name: _DROPPED[COUNTER] for name in source if re.fullmatch(COUNTER, name)}
    segmenter_config, labels, converted, dropped = _segmenter(source, found, config, classes, settings)
    return _wrapped(source, segmenter_config, labels, converted, dropped, kind, category_ids)


def _backbone(source: dict[str, Tensor]):
    from transformers import ResNetBackbone, ResNetConfig

    converted, dropped = convert_resnet_backbone(source)
    settings = resnet_config_of(converted)
    settings.pop("model_type")
    model = ResNetBackbone(ResNetConfig(**settings))
    load_fitting(model, converted)
    return model, converted, dropped


def _segmenter(source, form: str, config, classes, settings):
    """Configuration of the segmenter, its class names, its tensors, and the reasons of those left out."""
    model_type, convert, infer, from_config = _NETWORKS[form]
    reasons = {name: _drop_reason(name) for name in source}
    dropped = {name: reason for name, reason in reasons.items() if reason}
    converted = convert({name: tensor for name, tensor in source.items() if name not in dropped})
    found = infer(converted)
    if config is not None:
        if from_config is None:
            raise UserError("a configuration file is read for mmdetection's models only; leave it out.")
        try:
            found |= from_config(_read_config(config))
        except (KeyError, TypeError, IndexError) as error:
            raise UserError(f"configuration {config} is not that of such a model: {error!r}.") from error
    found |= settings or {}
    labels = _labels(found.pop("num_labels"), *classes)
    return {"model_type": model_type, **found}, labels, converted, dropped


def _wrapped(source, segmenter_config: dict, labels: dict[int, str], converted, dropped, kind: str, category_ids):
    """The model with its weights, its tensors, and the reasons of those left out."""
    from ..models.configuration_uplvp import UplvpConfig
    from ..models.modeling_base_uplvp import coco_category_ids
    from ..models.modeling_uplvp import UplvpForInstanceSegmentation, UplvpForPreTraining

    if kind == "segmenter":
        model = _plain(segmenter_config, labels)
        load_fitting(model, converted)
        return model, converted, dropped
    found = {
        match.expand(ours): (name, tensor)
        for name, tensor in source.items()
        for pattern, ours in _PRETRAINING
        if kind == "pretraining" and (match := re.fullmatch(pattern, name))
    }
    method: dict[str, Any] = {"prompt_injection": "concat"} if "prompt_fusion.linear.weight" in found else {}
    ids = list(category_ids) if category_ids is not None else coco_category_ids(labels)
    config = UplvpConfig(segmenter_config=segmenter_config, id2label=labels, category_ids=ids, **method)
    model = (UplvpForPreTraining if kind == "pretraining" else UplvpForInstanceSegmentation)(config)
    built = model.state_dict()
    converted = {f"segmenter.{name}": tensor for name, tensor in converted.items()}
    for ours, (name, tensor) in found.items():
        if ours in built:
            converted[ours] = tensor
            dropped.pop(name, None)
    load_fitting(model, converted)
    return model, converted, dropped


def _plain(segmenter_config: dict, labels: dict[int, str]):
    """The segmenter alone; Mask2Former as transformers' own class."""
    from transformers import AutoConfig, Mask2FormerForUniversalSegmentation

    from ..models.modeling_base_uplvp import SEGMENTERS

    name = segmenter_config.pop("model_type")
    names = {"id2label": labels, "label2id": {label: index for index, label in labels.items()}}
    config = AutoConfig.for_model(name, **segmenter_config, **names)
    return (Mask2FormerForUniversalSegmentation if name == "mask2former" else SEGMENTERS[name])(config)


def _drop_reason(name: str) -> str | None:
    return next((reason for pattern, reason in _DROPPED.items() if re.fullmatch(pattern, name)), None)


def _labels(count: int, classes: Sequence[str] | None, named: Sequence[str] | None) -> dict[int, str]:
    """Names that were given, else those in the checkpoint if they fit its number of classes."""
    if classes is None and named is not None and len(named) == count:
        classes = named
    if classes is None:
        classes = COCO_CLASSES if count == len(COCO_CLASSES) else [f"class {index}" for index in range(count)]
    if len(classes) != count:
        raise UserError(f"the checkpoint has {count} classes, {len(classes)} names were given.")
    return dict(enumerate(classes))


def _read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"configuration {path} is no readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"configuration {path} must be a JSON object, this is a {type(content).__name__}.")
    return content.get("model", content)


def _processor():
    """As the originals look at images: RGB, ImageNet's mean and deviation, 800 pixels on the shorter side."""
    from ..models.image_processing_uplvp import UplvpImageProcessor

    return UplvpImageProcessor(
        size={"shortest_edge": 800, "longest_edge": 1333},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )


def _semantic_processor(config):
    """As DenseCLIP looks at images: CLIP's mean and deviation, the shorter side as in training."""
    from ..models.image_processing_icpc import IcpcImageProcessor

    side = 512 if config.vision_config is None else 640
    return IcpcImageProcessor(
        size={"shortest_edge": side, "longest_edge": 2048}, ignore_index=config.semantic_loss_ignore_index
    )
