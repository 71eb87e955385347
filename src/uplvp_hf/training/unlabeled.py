"""Reads `data.unlabeled` for a teacher, and sees that no validation image is among its images."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import defaultdict
from collections.abc import Iterator

from ..data import DataError, InstanceDataset, load_dataset_rows
from ..data.errors import ImageError
from ..data.transforms import TrainTransform
from ..data.usage import training_usage
from ..data.views import StrongColors, UnlabeledViews
from ..models.modeling_mask_rcnn import MaskRcnnForInstanceSegmentation
from .config import ConfigError, DataSettings, TrainSettings

logger = logging.getLogger(__name__)

_TRIED = 20  # images that are opened before the training starts


def load_unlabeled(
    settings: DataSettings, train: InstanceDataset, val: InstanceDataset | None, model: object = None
) -> InstanceDataset | None:
    """The images of `data.unlabeled`, or None. Labels that they happen to have stay, for `teacher.measure` alone.

    Labeled images among them are reported, since both parts train on them; so are classes that no label shows, which a
    teacher cannot learn. Raises ConfigError for a model without queries, and DataError for validation images among
    them, by path or content, and where none of the first images can be opened.
    """
    if settings.unlabeled is None:
        return None
    if isinstance(model, MaskRcnnForInstanceSegmentation):
        raise ConfigError("A `mask_rcnn` has no queries that could be pseudo instances: leave `data.unlabeled` out.")
    dataset = load_dataset_rows(settings.unlabeled, images=settings.unlabeled_images, split=settings.unlabeled_split)
    _refuse_unusable(dataset, settings.unlabeled)
    if val is not None:
        held_out = list(same_images(dataset, val))
        if held_out:
            first, other = held_out[0]
            raise DataError(
                f"{len(held_out)} of its {len(dataset)} images are validation images, for example "
                f"{dataset[first]['file_name']} ({val[other]['file_name']} of `data.val`)",
                file=settings.unlabeled,
                remedy="Leave them out of `data.unlabeled`: a model must not train on what it is evaluated on.",
            )
    labeled = len({index for index, _ in same_images(dataset, train)})
    if labeled:
        logger.info("%d of the %d unlabeled images are labeled ones, too.", labeled, len(dataset))
    absent = training_usage(train, settings.size, settings.max_instances).classes_without_objects
    if absent:
        logger.warning(
            "No label shows %s: the teacher cannot learn these classes, and their objects in unlabeled images are "
            "taken for background where it is sure of that. Label some, or leave these classes out.",
            ", ".join(map(repr, absent)),
        )
    return dataset


def _refuse_unusable(dataset: InstanceDataset, name: str) -> None:
    """Raises DataError when there are no images, or none of the first ones can be opened."""
    reason = ""
    for index in range(min(_TRIED, len(dataset))):
        try:
            dataset.load_image(index)
        except ImageError as error:
            reason = reason or str(error)
        else:
            return
    if len(dataset) == 0:
        raise DataError("holds no images", file=name, remedy="Give `data.unlabeled` a folder of images.")
    raise DataError(
        f"none of the first {min(_TRIED, len(dataset))} of its {len(dataset)} images can be opened; {reason}",
        file=name,
        remedy="Set `data.unlabeled_images` to their folder, or leave the broken files out.",
    )


def same_images(one: InstanceDataset, other: InstanceDataset) -> Iterator[tuple[int, int]]:
    """(index in `one`, index in `other`) of images that are one file, or have the same bytes.

    Only files of equal size are read.
    """
    paths = {path: index for index, path in _paths(other)}
    sizes = defaultdict(list)
    for index, row in enumerate(other.rows):
        size = _size(row["image"])
        if size is not None:
            sizes[size].append(index)
    digests: dict[int, bytes] = {}
    for index, row in enumerate(one.rows):
        found = paths.get(os.path.realpath(row["image"])) if isinstance(row["image"], str) else None
        candidates = sizes.get(_size(row["image"]), []) if found is None else []
        if candidates:
            own = _digest(row["image"])
            for candidate in candidates:
                if candidate not in digests:
                    digests[candidate] = _digest(other[candidate]["image"])
            found = next((candidate for candidate in candidates if digests[candidate] == own), None)
        if found is not None:
            yield index, found


def _paths(dataset: InstanceDataset) -> Iterator[tuple[int, str]]:
    for index, row in enumerate(dataset.rows):
        if isinstance(row["image"], str):
            yield index, os.path.realpath(row["image"])


def _size(image: object) -> int | None:
    """Bytes of an encoded image; None for one that is missing, or is held as pixels."""
    if isinstance(image, bytes):
        return len(image)
    if isinstance(image, str) and os.path.isfile(image):
        return os.path.getsize(image)
    return None


def _digest(image: str | bytes) -> bytes:
    if isinstance(image, str):
        with open(image, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").digest()
    return hashlib.sha256(image).digest()


def build_views(settings: TrainSettings, dataset: InstanceDataset | None) -> UnlabeledViews | None:
    """The pairs of views that a run with these settings sees of its unlabeled images, or None."""
    if dataset is None:
        return None
    data, teacher = settings.data, settings.teacher
    assert data.size is not None and data.image_mean is not None and data.image_std is not None
    fill = tuple(round(255 * value) for value in data.image_mean)
    common = {"longest_edge": data.longest_edge, "keep_ratio": data.keep_ratio, "fill": fill}
    # As at inference, but for the mirroring.
    weak = TrainTransform(
        data.size, (1.0, 1.0), data.flip, 0.0, short_edges=data.short_edges and data.short_edges[-1:], **common
    )
    strong = TrainTransform(
        data.size,
        tuple(teacher.scale_range or data.scale_range),
        data.flip,
        0.0,
        short_edges=data.short_edges,
        rotate=data.rotate,
        rotate_probability=data.rotate_probability,
        **common,
    )
    colors = StrongColors(
        teacher.color, teacher.hue, teacher.gray, teacher.blur, teacher.cutouts, tuple(teacher.cutout_area), fill
    )
    return UnlabeledViews(dataset, weak, strong, colors, data.image_mean, data.image_std, settings.seed + 2)
