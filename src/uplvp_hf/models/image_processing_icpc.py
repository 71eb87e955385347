"""The semantic image processor on torchvision. What it does is described in `SemanticProcessing`; without torchvision,
`AutoImageProcessor` takes `IcpcImageProcessorPil`. Copied to the Hub beside the weights."""

from transformers.image_processing_backends import TorchvisionBackend
from transformers.processing_utils import Unpack
from transformers.utils import requires_backends

from .semantic_processing import SemanticProcessing, SemanticProcessorKwargs


class IcpcImageProcessor(SemanticProcessing, TorchvisionBackend):
    __doc__ = f"""
    Resizes, normalizes and pads images and label maps; turns logits into label maps.
    {SemanticProcessing.__doc__}"""

    def __init__(self, **kwargs: Unpack[SemanticProcessorKwargs]) -> None:
        requires_backends(self, ["torchvision"])
        super().__init__(**kwargs)


__all__ = ["IcpcImageProcessor"]
