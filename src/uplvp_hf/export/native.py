"""A model as transformers' own class, which loads without this library and without custom code."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch import Tensor, nn
from transformers import BaseImageProcessor
from transformers.image_transforms import center_to_corners_format

from ..models.errors import UserError
from ..models.modeling_uplvp import UplvpForInstanceSegmentation

# By model type: transformers' model, and its image processor.
NATIVE = {
    "mask2former": ("Mask2FormerForUniversalSegmentation", "Mask2FormerImageProcessor"),
    "eomt": ("EomtForUniversalSegmentation", "EomtImageProcessor"),
    "rf_detr": ("RfDetrForInstanceSegmentation", "RfDetrImageProcessor"),
    "eomt_dinov3": ("EomtDinov3ForUniversalSegmentation", "EomtImageProcessor"),
}


def native_class(model_type: str) -> type[nn.Module]:
    """transformers' class of a segmenter. Raises UserError for a segmenter that transformers does not have."""
    if model_type not in NATIVE:
        raise UserError(f"A `{model_type}` has no native class in transformers.")
    return getattr(import_module("transformers"), NATIVE[model_type][0])


def to_native(model: UplvpForInstanceSegmentation, directory: str, processor: BaseImageProcessor | None = None) -> None:
    """Writes a folder of transformers' own class (`NATIVE`): no custom code is needed to load it.

    With our image `processor` one of transformers' for the same size, mean and deviation is written beside it. On
    images without padding the plain model gives the same results; on padded ones a Mask2Former does not, because
    transformers' class lets the padding take part. Raises UserError for a segmenter without a native class, when the
    backbone has `timm_kwargs`, which such a class does not pass on, and for features with positions.
    """
    config = model.config.segmenter_config
    native = native_class(config.model_type)
    if getattr(getattr(config, "backbone_config", None), "timm_kwargs", None):
        raise UserError(
            "The backbone is built with timm_kwargs, which transformers' Mask2Former ignores: the exported model "
            "would give other results. Train with a backbone without timm_kwargs to export."
        )
    if getattr(config, "position_octaves", 0):
        raise UserError(
            "The features of this model carry positions (position_octaves), which transformers' Mask2Former does not "
            "have: the exported model would give other results. Train with position_octaves 0 to export."
        )
    plain = native(config)
    plain.load_state_dict(model.segmenter.state_dict())
    plain.save_pretrained(directory)
    if processor is not None:
        _native_processor(config.model_type, processor, model.config.num_labels).save_pretrained(directory)


def _native_processor(model_type: str, processor: Any, num_labels: int) -> BaseImageProcessor:
    side = processor.size["longest_edge"]
    settings: dict[str, Any] = {"size": {"shortest_edge": side, "longest_edge": side}}  # the longer side becomes `side`
    settings |= {"image_mean": processor.image_mean, "image_std": processor.image_std}
    settings |= {"num_labels": num_labels} if model_type == "mask2former" else {"do_pad": True}
    return getattr(import_module("transformers"), NATIVE[model_type][1])(**settings)


def our_names(output: Any, canvas: tuple[int, int]) -> Mapping[str, Tensor]:
    """Predictions of a native class for images without padding, by the names of `SegmenterOutput`."""
    if "pred_boxes" not in output:
        return output
    width_height = output["pred_boxes"].new_tensor([canvas[1], canvas[0]]).repeat(2)
    return {
        "class_queries_logits": output["logits"],
        "masks_queries_logits": output["pred_masks"],
        "class_scores": output["logits"].float().sigmoid(),
        "boxes": center_to_corners_format(output["pred_boxes"].float()) * width_height,
    }
