"""The side of the training canvas, as the segmenter wants it."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..models.errors import UserError
from ..models.query_segmenter import InstanceSegmenter
from .config import ConfigError, TrainSettings

DIVISOR = InstanceSegmenter.size_divisor  # of segmenters on four maps
STANDARD = 512


def preferred_size(init: str | None, processor: dict[str, Any]) -> int:
    """The side where none is given: that of the checkpoint, by its image processor or its configuration, else 512."""
    side = processor.get("size", {}).get("longest_edge") if "pad_size" in processor else None
    if side and side % processor.get("size_divisor", DIVISOR) == 0:
        return side
    side = None
    if init is not None:
        try:
            config = AutoConfig.from_pretrained(init)
        except (OSError, ValueError):  # said by whoever loads the model
            return STANDARD
        segmenter = getattr(config, "segmenter_config", None) or config
        side = getattr(segmenter, "image_size", None)
        if segmenter.model_type == "rf_detr":  # whose images are stretched to a square
            side = processor.get("size", {}).get("height") or segmenter.backbone_config.image_size
    return side if isinstance(side, int) else STANDARD


def with_canvas(segmenter: dict[str, Any], size: int) -> dict[str, Any]:
    """Settings of a new segmenter; one whose configuration has an `image_size` is made for `data.size`."""
    name = segmenter.get("model_type")
    known = getattr(CONFIG_MAPPING[name], "__dataclass_fields__", {}) if name in CONFIG_MAPPING else {}
    return {"image_size": size, **segmenter} if "image_size" in known else dict(segmenter)


def check_canvas(segmenter: Any, settings: TrainSettings) -> None:
    """Prepares the segmenter for `data.size`. Raises ConfigError for a side or a canvas that it cannot take."""
    try:
        segmenter.fit_canvas(settings.data.size)
    except UserError as error:
        raise ConfigError(f"`data.size`: {error}") from error
    if segmenter.square_canvas and not settings.data.square:
        raise ConfigError(
            f"A `{segmenter.config.model_type}` sees the padding, and its positions depend on the canvas: leave "
            "`data.canvas` and `data.short_edges` out, so that all images have the same one."
        )
