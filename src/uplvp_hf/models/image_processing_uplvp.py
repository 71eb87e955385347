"""The image processor on torchvision: images of equal shape are resized together, on a GPU where asked for.

Copied to the Hub beside the weights. What it does is described in `UplvpProcessing`; without torchvision,
`AutoImageProcessor` takes `UplvpImageProcessorPil`.
"""

from typing import Any

import torch
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_transforms import group_images_by_shape, reorder_images
from transformers.image_utils import SizeDict
from transformers.processing_utils import Unpack
from transformers.utils import requires_backends

from .image_processing_base_uplvp import UplvpImageProcessorKwargs, UplvpProcessing, resized_size


class UplvpImageProcessor(UplvpProcessing, TorchvisionBackend):
    __doc__ = f"""
    Resizes, normalizes and pads images; turns COCO annotations into `mask_labels` / `class_labels`; turns model
    outputs into instances.
    {UplvpProcessing.__doc__}"""

    def __init__(self, **kwargs: Unpack[UplvpImageProcessorKwargs]) -> None:
        requires_backends(self, ["torchvision"])
        super().__init__(**kwargs)

    def _resized(
        self,
        images: list[torch.Tensor],
        do_resize: bool,
        size: SizeDict,
        resample: Any,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
        disable_grouping: bool | None,
        **kwargs,
    ) -> list[torch.Tensor]:
        groups, index = group_images_by_shape(images, disable_grouping=disable_grouping)
        for shape, stacked in groups.items():
            if do_resize:
                stacked = self.resize(stacked, size, resample=resample)
            groups[shape] = self.rescale_and_normalize(
                stacked, do_rescale, rescale_factor, do_normalize, image_mean, image_std
            )
        return reorder_images(groups, index)


__all__ = ["UplvpImageProcessor", "UplvpImageProcessorKwargs", "resized_size"]
