"""The semantic image processor on Pillow and numpy, for where torchvision is not installed.

Copied to the Hub beside the weights.
"""

from transformers.image_processing_backends import PilBackend

from .image_processing_pil_uplvp import UplvpImageProcessorPil
from .semantic_processing import SemanticProcessing


class IcpcImageProcessorPil(SemanticProcessing, PilBackend):
    __doc__ = f"""
    As `IcpcImageProcessor`, without torchvision. Saved settings load into either.
    {SemanticProcessing.__doc__}"""

    rescale_and_normalize = UplvpImageProcessorPil.rescale_and_normalize


__all__ = ["IcpcImageProcessorPil"]
