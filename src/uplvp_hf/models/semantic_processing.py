"""What both semantic image processors share: images and label maps in, tensors out, and back: logits to label maps in
the pixels of the original image.

Copied to the Hub beside the weights: no other module of the library is imported but siblings. There is no method for
instances, so that `pipeline("image-segmentation")` answers with classes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.image_processing_base import BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, ImageInput, SizeDict
from transformers.processing_utils import Unpack

from .errors import UserError
from .image_processing_base_uplvp import SizedProcessing, UplvpImageProcessorKwargs, check_sizes, resized_size
from .label_maps import label_array, reduced_labels
from .mask_resampling import interpolated, resampling_axis

STRIDE = 4  # of the logits
CLASSES_AT_ONCE = 64


class SemanticProcessorKwargs(UplvpImageProcessorKwargs, total=False):
    r"""
    do_reduce_labels (`bool`, *optional*, defaults to `False`):
        Label 0 means "other" and classes begin at 1, as in ADE20K's files: all labels become one less, and 0 is
        ignored. Labels of 8 bits hold 254 such classes at most; ours are wider inside.
    ignore_index (`int`, *optional*, defaults to 255):
        Label of pixels that do not count, and of padding.
    """

    do_reduce_labels: bool
    ignore_index: int


class SemanticProcessing(SizedProcessing):
    __doc__ = f"""{SizedProcessing.__doc__}
    Example:

    ```python
    >>> processor = IcpcImageProcessor(size={{"shortest_edge": 512, "longest_edge": 2048}})
    >>> inputs = processor(image, segmentation_maps=labels, return_tensors="pt")  # pixel_values, labels
    >>> outputs = model(**inputs)
    >>> found = processor.post_process_semantic_segmentation(outputs, target_sizes=[(image.height, image.width)])[0]
    ```
    """

    valid_kwargs = SemanticProcessorKwargs
    model_input_names = ["pixel_values"]
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"shortest_edge": 512, "longest_edge": 2048}
    do_reduce_labels = False
    ignore_index = 255

    def preprocess(
        self,
        images: ImageInput,
        segmentation_maps: Any = None,
        **kwargs: Unpack[SemanticProcessorKwargs],
    ) -> BatchFeature:
        r"""
        Args:
            images (`ImageInput`):
                One image or a list of B images, as for `UplvpImageProcessor`.
            segmentation_maps (*optional*):
                One label map an image, of its size: PIL (gray of 8 or 16 bits, palette), numpy or torch integers.
            kwargs:
                Any setting of the processor, for this call.

        Returns:
            `BatchFeature`, with `return_tensors="pt"`: `pixel_values` (B, 3, H, W) float32 padded with zeros at the
            bottom and right, and with label maps `labels` (B, H, W) int64, padded with `ignore_index`.

        Raises:
            `ValueError`: for another number of label maps than images, a label map of another size than its image, and
            what `UplvpImageProcessor` refuses.
        """
        return super().preprocess(images, segmentation_maps, **kwargs)

    def _preprocess_image_like_inputs(self, images, segmentation_maps, **kwargs) -> BatchFeature:
        return_tensors = kwargs.pop("return_tensors", None)
        reduce, ignored = kwargs.pop("do_reduce_labels"), kwargs.pop("ignore_index")
        names = ("do_convert_rgb", "input_data_format", "device", "max_pixels", "do_rescale")
        images = self._prepare_image_like_inputs(images=images, **{name: kwargs.get(name) for name in names})
        original_sizes = [tuple(image.shape[-2:]) for image in images]
        data, input_sizes = self._preprocess(images, **kwargs)
        data.pop("pixel_mask")
        if segmentation_maps is not None:
            maps = segmentation_maps if isinstance(segmentation_maps, list | tuple) else [segmentation_maps]
            maps = list(maps) if len(maps) == len(images) else [segmentation_maps]
            if len(maps) != len(images):
                raise UserError(f"{len(maps)} label maps for {len(images)} images; pass one an image.")
            canvases = [tuple(image.shape[-2:]) for image in data["pixel_values"]]
            sizes = zip(maps, original_sizes, input_sizes, canvases, strict=True)
            data["labels"] = [self._labels(*entry, reduce, ignored) for entry in sizes]
        return BatchFeature(data=data, tensor_type=return_tensors)

    @staticmethod
    def _labels(labels: Any, original, resized, canvas, reduce: bool, ignored: int) -> np.ndarray:
        """One label map, resized to the nearest pixel centers and padded: (H, W) int64."""
        array = label_array(labels)
        if array.shape != tuple(original):
            raise UserError(
                f"A label map of {array.shape[0]} x {array.shape[1]} for an image of {original[0]} x {original[1]}: "
                "they must have the same size."
            )
        if reduce:
            array = reduced_labels(array, ignored)
        rows, columns = (
            ((np.arange(target) + 0.5) * (source / target)).astype(np.int64)
            for source, target in zip(original, resized, strict=True)
        )
        padded = np.full(canvas, ignored, dtype=np.int64)
        padded[: resized[0], : resized[1]] = array[rows[:, None], columns]
        return padded

    @torch.no_grad()
    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: Sequence[tuple[int, int]] | Tensor | None = None,
        input_sizes: Sequence[tuple[int, int]] | Tensor | None = None,
        return_segmentation_scores: bool = False,
    ) -> list[Tensor] | list[dict[str, Tensor]]:
        r"""
        The class of every pixel. Logits are resized once, straight from their un-padded part to the target size.

        Args:
            outputs (`ModelOutput`):
                With `logits` (B, K, h, w) at stride 4 of the padded input.
            target_sizes (`list[tuple[int, int]]`, *optional*):
                (height, width) of the results, usually of the original images; by default the size of the logits.
            input_sizes (`list[tuple[int, int]]`, *optional*):
                (height, width) of the resized images before padding; by default computed from `target_sizes`, which is
                right if these are the original sizes and the processor was called with its own settings.
            return_segmentation_scores (`bool`, *optional*, defaults to `False`):
                Also the class probabilities.

        Returns:
            `list`: per image (H, W) int64, or a dict of it as `segmentation` and `segmentation_scores` (K, H, W).

        Raises:
            `ValueError`: if sizes and batch disagree, or an input size is larger than what the logits cover.
        """
        logits = outputs.logits
        target_sizes = check_sizes("target_sizes", target_sizes, len(logits))
        input_sizes = check_sizes("input_sizes", input_sizes, len(logits))
        if target_sizes is None:
            found = [(image.argmax(0), image.float().softmax(0)) for image in logits]
        else:
            if input_sizes is None:
                size = self.size if isinstance(self.size, SizeDict) else SizeDict(**self.size)
                input_sizes = [resized_size(target, size) if self.do_resize else target for target in target_sizes]
            canvas = (STRIDE * logits.shape[-2], STRIDE * logits.shape[-1])
            found = []
            for index, (source, target) in enumerate(zip(input_sizes, target_sizes, strict=True)):
                if source[0] > canvas[0] or source[1] > canvas[1]:
                    raise UserError(
                        f"Image {index} of the batch: un-padded input of {source[0]} x {source[1]} is larger than the "
                        f"{canvas[0]} x {canvas[1]} that the logits cover. Pass input_sizes."
                    )
                if return_segmentation_scores:
                    resized = resized_logits(logits[index], source, target)
                    found.append((resized.argmax(0), resized.softmax(0)))
                else:
                    found.append((class_of_pixels(logits[index], source, target), logits))
        if not return_segmentation_scores:
            return [labels for labels, _ in found]
        return [{"segmentation": labels, "segmentation_scores": scores} for labels, scores in found]


def resized_logits(logits: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Logits (K, h, w) with stride 4, of which an image of `source` pixels takes the top left, at `target` pixels."""
    for dim, (cells, length, wanted) in enumerate(zip(logits.shape[-2:], source, target, strict=True), start=1):
        axis = tuple(
            torch.from_numpy(part).to(logits.device) for part in resampling_axis(cells, length, wanted, STRIDE)
        )
        logits = interpolated(logits.float(), axis, 0, wanted, dim)
    return logits


def class_of_pixels(logits: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """The class of largest resized logit, (H, W) int64, some classes at a time: 847 maps of a photo take 3 GB."""
    best, found = None, None
    for start in range(0, len(logits), CLASSES_AT_ONCE):
        value, index = resized_logits(logits[start : start + CLASSES_AT_ONCE], source, target).max(0)
        index = index + start
        if best is None:
            best, found = value, index
        else:
            better = value > best
            best, found = torch.where(better, value, best), torch.where(better, index, found)
    return found


__all__ = ["SemanticProcessing", "SemanticProcessorKwargs", "class_of_pixels", "resized_logits"]
