"""A trained model to call on images: `load(...)`, then `predict(...)`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from uplvp_hf.data import DataError, ImageError, InstanceDataset, Row, empty_objects
from uplvp_hf.data.dataset import LazyRows
from uplvp_hf.evaluation import load_segmenter, predict_dataset

from ..models.errors import UserError
from ..models.images import array_to_rgb, as_rgb
from ..models.thresholds import MASK_THRESHOLD, score_threshold
from ..progress import with_progress
from .download import LIMITS, Limits, is_url
from .instances import Instances, instances_of
from .sources import MAX_PIXELS, check_pixels, find_images, pixels_unbounded
from .tiles import Tiles, Window, merge_windows

_IMAGES = (str, os.PathLike, Image.Image, np.ndarray)
ImageInput = str | os.PathLike[str] | Image.Image | np.ndarray


def load(name_or_dir: str | os.PathLike[str], device: str | torch.device | None = None, **settings: Any) -> Predictor:
    """A `Predictor` from a folder of a trained model, a repository of the Hub, or a folder of `uplvp export`'s ONNX.

    settings: of `Predictor`. Raises FileNotFoundError, DataError and ValueError as `load_model`.
    """
    return Predictor(*load_model(name_or_dir, device), **settings)


def load_model(
    name_or_dir: str | os.PathLike[str], device: str | torch.device | None = None
) -> tuple[torch.nn.Module, Any]:
    """The model, or an exported one in its place, and its image processor.

    Raises as `evaluation.load_segmenter`; DataError for an exported folder that is run by other means.
    """
    name = os.fspath(name_or_dir)
    if os.path.isfile(os.path.join(name, "model.safetensors")):
        return load_segmenter(name, device)
    if os.path.isfile(os.path.join(name, "model.onnx")):
        from uplvp_hf.models.image_processing_uplvp import UplvpImageProcessor

        from .onnx_runtime import OnnxSegmenter

        return OnnxSegmenter.from_directory(name, device), UplvpImageProcessor.from_pretrained(name)
    if os.path.isfile(os.path.join(name, "model.pt2")):
        raise DataError(
            "holds a program of torch.export",
            file=name,
            remedy="Load it with torch.export.load, or export with --format onnx to predict with it here.",
        )
    return load_segmenter(name, device)


def predict_rows(
    model: torch.nn.Module,
    processor: Any,
    dataset: InstanceDataset,
    tiles: Tiles | None = None,
    progress: bool = True,
    failures: list[dict[str, Any]] | None = None,
    **settings: Any,
) -> Iterator[tuple[Row, dict[str, Any]]]:
    """As `predict_dataset`, whose `settings` these are, with images larger than `tiles` cut into windows.

    With tiles an image and the windows of one batch are in memory, and run lengths; images that fit into one window
    are predicted whole, with the same result as without tiles and a batch size of 1. Images that Pillow refuses for
    their size can be decoded inside `pixels_unbounded` alone.
    """
    failures = failures if failures is not None else []
    if tiles is None:
        yield from predict_dataset(model, processor, dataset, progress=progress, failures=failures, **settings)
        return
    for index in with_progress(range(len(dataset)), "predicting", progress):
        row = dataset[index]
        try:
            result = _predict_tiled(model, processor, dataset.load_image(index), tiles, settings)
        except ImageError as error:
            file = error.file or row["file_name"]
            failures.append({"file": file, "row": f"row {index}", "reason": error.reason})
            continue
        yield row, result


def _predict_tiled(
    model: torch.nn.Module, processor: Any, image: Image.Image, tiles: Tiles, settings: dict[str, Any]
) -> dict[str, Any]:
    windows = tiles.windows(*image.size)

    def read(index: int) -> Row:
        piece = image if len(windows) == 1 else image.crop(windows[index])
        return memory_row(piece, index)

    cut = InstanceDataset(LazyRows(read, lambda index: index, range(len(windows))), [])
    found: list[tuple[Window, dict[str, Any]]] = []
    lost: list[dict[str, Any]] = []
    for row, result in predict_dataset(model, processor, cut, progress=False, failures=lost, **settings):
        found.append((windows[row["image_id"]], result))
    if lost:  # an image without some of its windows would look as if nothing were there
        raise ImageError(f"window {lost[0]['row'].split()[-1]} of {len(windows)}: {lost[0]['reason']}")
    return found[0][1] if len(windows) == 1 else merge_windows(found, *image.size, tiles)


def memory_row(image: Image.Image, number: int, name: str = "image in memory") -> Row:
    """An image without labels that is in no file."""
    return Row(
        image=image, image_id=number, file_name=name, width=image.width, height=image.height, objects=empty_objects()
    )


class Predictor:
    """A model and its image processor, called on images.

    Args:
        model, processor: as `load_model` gives them, or any pair that `predict_dataset` takes.
        batch_size: most images, or windows of one, per forward pass.
        max_pixels: an image with more is refused before it is decoded.
        limits: of downloads.

    ```python
    >>> predictor = load("runs/finetune")
    >>> instances = predictor.predict("street.jpg", threshold=0.4)
    >>> instances.draw(Image.open("street.jpg")).save("street_instances.png")
    ```
    """

    def __init__(
        self,
        model: torch.nn.Module,
        processor: Any,
        batch_size: int = 8,
        max_pixels: int = MAX_PIXELS,
        limits: Limits = LIMITS,
    ):
        if batch_size < 1 or max_pixels < 1:
            raise UserError(f"batch_size {batch_size} and max_pixels {max_pixels} must be at least 1.")
        self.model, self.processor = model, processor
        self.batch_size, self.max_pixels, self.limits = batch_size, max_pixels, limits

    @property
    def names(self) -> dict[int, str]:
        """{class index: name}"""
        return self.model.config.id2label

    def predict(
        self,
        images: ImageInput | Sequence[ImageInput],
        threshold: float | None = None,
        tiles: Tiles | int | None = None,
        mask_threshold: float = MASK_THRESHOLD,
        top_k: int = 100,
        progress: bool = False,
    ) -> Instances | list[Instances]:
        """Instances of an image, or of each in a list.

        Args:
            images: path of a file, address of http or https, PIL image, or array as `array_to_rgb` takes it:
                (H, W), (H, W, 3) or (H, W, 4), of 8 or 16 bits or floats; or a list.
            threshold: least score, 0 to 1; default: that of the model's configuration, else 0.5.
            tiles: cut images larger than this many pixels into windows; `Tiles` has more to choose.
            mask_threshold: a pixel belongs to a mask when its probability is above this.
            top_k: most instances an image, with tiles a window.
            progress: whether to show a progress bar.

        Raises ImageError for an image that cannot be read or is too large, ValueError for values out of range.
        """
        threshold = score_threshold(self.model.config) if threshold is None else threshold
        if not 0 <= threshold <= 1 or not 0 < mask_threshold < 1 or top_k < 1:
            raise UserError(f"out of range: threshold {threshold}, mask_threshold {mask_threshold} or top_k {top_k}.")
        single = isinstance(images, _IMAGES)
        inputs = [images] if single else list(images)
        tiles = Tiles(tiles) if isinstance(tiles, int) else tiles
        with tempfile.TemporaryDirectory(prefix="uplvp-") as folder, pixels_unbounded():
            rows = [self._row(image, number, folder) for number, image in enumerate(inputs)]
            failures: list[dict[str, Any]] = []
            results = predict_rows(
                self.model, self.processor, InstanceDataset(rows, []), tiles, progress, failures,
                batch_size=self.batch_size, threshold=threshold, mask_threshold=mask_threshold, top_k=top_k,
            )  # fmt: skip
            config = self.model.config
            found = [
                instances_of(
                    result,
                    (row["height"], row["width"]),
                    config.id2label,
                    config.category_ids,
                    row["file_name"] if isinstance(row["image"], str) else None,
                )
                for row, result in results
            ]
        if failures:
            raise ImageError(failures[0]["reason"], file=failures[0]["file"])
        return found[0] if single else found

    def _row(self, image: ImageInput, number: int, folder: str) -> Row:
        name = f"images[{number}]"
        if isinstance(image, np.ndarray):
            check_pixels(image.shape[1::-1] if image.ndim > 1 else (image.size, 1), self.max_pixels, name)
            return memory_row(array_to_rgb(image, name), number, name)
        if isinstance(image, Image.Image):
            check_pixels(image.size, self.max_pixels, name)
            # Taken as it stands: EXIF is not applied, so that results are in its pixels.
            return memory_row(as_rgb(image, file=name, exif=False), number, name)
        path = os.fspath(image)
        if not is_url(path) and not Path(path).is_file():
            raise ImageError("no such image", file=path)
        found = find_images([path], folder, self.max_pixels, self.limits)
        return Row(**{**found[0], "image_id": number, "file_name": path})
