"""What training can start from, strongest first: the first that this machine can load, and hold, is taken."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..models.errors import UserError
from .request import Request

MOBILENET = "timm/mobilenetv2_100.ra_in1k"


@dataclass(frozen=True)
class Start:
    """recipes: of pre-training and fine-tuning. settings: section.key -> value, of both. backbone: arguments of
    `uplvp label` for the network that proposes masks. gpu: too slow on a CPU."""

    about: str
    recipes: tuple[str, str]
    settings: dict[str, Any] = field(default_factory=dict)
    backbone: dict[str, Any] = field(default_factory=dict)
    gpu: bool = False


def _official(size: str) -> Start:
    name = f"facebook/mask2former-swin-{size}-coco-instance"
    # The recipes describe a K-Net R50; a checkpoint brings its own segmenter, which is trained whole.
    settings = {"model.segmenter": None, "model.freeze_stages": 0, "model.init": name}
    return Start(
        f"{name}, which has seen the labels of COCO",
        ("one_gpu_pretrain", "one_gpu_finetune"),
        settings,
        {"backbone": f"timm:hf-hub:{MOBILENET}"},
        gpu=True,
    )


STARTS = {
    "swin_large": _official("large"),
    "swin_base": _official("base"),
    "swin_tiny": _official("tiny"),
    "small": Start(
        f"a small Mask2Former on a frozen ImageNet MobileNetV2 ({MOBILENET})",
        ("small_pretrain", "small_finetune"),
        {"model.backbone_weights": f"hf-hub:{MOBILENET}"},
        {"backbone": f"timm:hf-hub:{MOBILENET}"},
    ),
}


def possible_starts(request: Request) -> dict[str, Start]:
    """name -> start, strongest first: the one that is asked for, else all that suit the hardware.

    Raises UserError for a name that there is not.
    """
    if request.start is not None and request.start not in STARTS:
        raise UserError(f"--start {request.start} is unknown. Use {', '.join(STARTS)}.")
    gpu = torch.cuda.is_available() and request.device != "cpu"
    names = [request.start] if request.start else [name for name, start in STARTS.items() if gpu or not start.gpu]
    return {name: _as_asked(STARTS[name], request) for name in names}


def _as_asked(start: Start, request: Request) -> Start:
    """The start with the recipes, and the weights of the backbone, that the request names."""
    settings, backbone = dict(start.settings), dict(start.backbone)
    if request.backbone is not None:
        backbone = {"backbone": request.backbone}
    if request.backbone_weights is not None:
        backbone = {
            "backbone": request.backbone or "timm:mobilenetv2_100",
            "backbone_weights": request.backbone_weights,
        }
        if not start.gpu:
            settings["model.backbone_weights"] = request.backbone_weights
    if request.pad_type is not None:
        backbone["settings"] = {"networks.pad_type": request.pad_type}
        if request.pad_type == "same" and not start.gpu:  # networks of TensorFlow's family, as `uplvp label` takes them
            settings["model.segmenter.backbone_config.timm_kwargs"] = {"pad_type": "same"}
            settings |= {"data.image_mean": [0.5] * 3, "data.image_std": [0.5] * 3}
    if request.recipes is not None:
        settings = {}
    return Start(start.about, request.recipes or start.recipes, settings, backbone, start.gpu)
