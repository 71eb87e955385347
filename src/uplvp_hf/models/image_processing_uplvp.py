"""The image processor on torchvision, which works on tensors, on a GPU where asked for.

Copied to the Hub beside the weights. What it does is described in `UplvpProcessing`; without torchvision,
`AutoImageProcessor` takes `UplvpImageProcessorPil`.
"""

from transformers.image_processing_backends import TorchvisionBackend
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


__all__ = ["UplvpImageProcessor", "UplvpImageProcessorKwargs", "resized_size"]
