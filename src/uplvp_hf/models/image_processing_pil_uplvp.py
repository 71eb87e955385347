"""The image processor on Pillow and numpy, for where torchvision is not installed.

Copied to the Hub beside the weights. What it does is described in `UplvpProcessing`. Pixels differ from those of the
torchvision one by the rounding of the resizing; shapes, masks and results do not.
"""

from typing import Any

import numpy as np
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import SizeDict

from .image_processing_base_uplvp import UplvpProcessing


class UplvpImageProcessorPil(UplvpProcessing, PilBackend):
    __doc__ = f"""
    As `UplvpImageProcessor`, without torchvision. Saved settings load into either.
    {UplvpProcessing.__doc__}"""

    def _resized(
        self,
        images: list[np.ndarray],
        do_resize: bool,
        size: SizeDict,
        resample: Any,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
        **kwargs,
    ) -> list[np.ndarray]:
        resized = []
        for image in images:
            if do_resize:
                image = self.resize(image, size, resample=resample)
            if do_rescale:
                image = self.rescale(image, rescale_factor)
            if do_normalize:
                image = self.normalize(image, image_mean, image_std)
            resized.append(image)
        return resized


__all__ = ["UplvpImageProcessorPil"]
