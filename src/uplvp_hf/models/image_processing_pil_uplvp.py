"""The image processor on Pillow and numpy, for where torchvision is not installed.

Copied to the Hub beside the weights. What it does is described in `UplvpProcessing`. Pixels differ from those of the
torchvision one by the rounding of the resizing; shapes, masks and results do not.
"""

from typing import Any

import numpy as np
from transformers.image_processing_backends import PilBackend

from .image_processing_base_uplvp import UplvpProcessing


class UplvpImageProcessorPil(UplvpProcessing, PilBackend):
    __doc__ = f"""
    As `UplvpImageProcessor`, without torchvision. Saved settings load into either.
    {UplvpProcessing.__doc__}"""

    def rescale_and_normalize(
        self, image: np.ndarray, do_rescale: bool, factor: float, do_normalize: bool, mean: Any, std: Any
    ) -> np.ndarray:
        image = self.rescale(image, factor) if do_rescale else image
        return self.normalize(image, mean, std) if do_normalize else image
