"""A model as transformers' own class, which loads without this library and without custom code."""

from __future__ import annotations

from transformers import BaseImageProcessor, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor

from ..models.errors import UserError
from ..models.modeling_uplvp import UplvpForInstanceSegmentation


def to_mask2former(
    model: UplvpForInstanceSegmentation, directory: str, processor: BaseImageProcessor | None = None
) -> None:
    """Writes a plain `Mask2FormerForUniversalSegmentation` directory: no custom code is needed to load it.

    With our image `processor` a `Mask2FormerImageProcessor` of the same size, mean and deviation is written beside
    it. On images without padding the plain model gives the same results; on padded ones it does not, because
    transformers' class lets the padding take part. Raises UserError for another segmenter, and when the backbone has
    `timm_kwargs`, which that class does not pass on.
    """
    config = model.config.segmenter_config
    if config.model_type != "mask2former":
        raise UserError(f"A `{config.model_type}` has no native class in transformers.")
    if getattr(config.backbone_config, "timm_kwargs", None):
        raise UserError(
            "The backbone is built with timm_kwargs, which transformers' Mask2Former ignores: the exported model "
            "would give other results. Train with a backbone without timm_kwargs to export."
        )
    plain = Mask2FormerForUniversalSegmentation(config)
    plain.load_state_dict(model.segmenter.state_dict())
    plain.save_pretrained(directory)
    if processor is not None:
        side = processor.size["longest_edge"]
        Mask2FormerImageProcessor(
            size={"shortest_edge": side, "longest_edge": side},  # the longer side becomes `side`
            image_mean=processor.image_mean,
            image_std=processor.image_std,
            num_labels=model.config.num_labels,
        ).save_pretrained(directory)
