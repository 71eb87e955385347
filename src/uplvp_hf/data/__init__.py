"""Data: COCO rows in, batches out.

What reads and checks annotations is here at once; what makes tensors loads torch when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ..models.images import image_size, open_image, to_rgb
from ..models.masks import (
    decode_segmentation,
    encode_mask,
    encode_masks,
    mask_area,
    mask_iou,
    rle_areas,
    rle_boxes,
    segmentation_to_rle,
    tight_boxes,
)
from .cityscapes import read_cityscapes
from .coco import read_coco, write_coco
from .ctw1500 import read_ctw1500
from .dataset import InstanceDataset, Objects, Row, RowStream, empty_objects
from .errors import DataError, DataWarning, ImageError
from .inputs import read_huggingface, read_path_list
from .rows import load_dataset_rows, read_image_folder, stream_dataset_rows
from .store_reader import read_failures, read_header, read_store, shard_files, stream_store
from .voc import read_voc

if TYPE_CHECKING:  # what editors and type checkers see; `_LATE` says the same to Python
    from .collator import collate
    from .instance_masks import InstanceMasks
    from .training_set import TrainingSet
    from .transforms import TrainTransform

_LATE = {
    "collate": "collator",
    "InstanceMasks": "instance_masks",
    "TrainingSet": "training_set",
    "TrainTransform": "transforms",
}

__all__ = [
    "DataError",
    "DataWarning",
    "ImageError",
    "InstanceDataset",
    "InstanceMasks",
    "Objects",
    "Row",
    "RowStream",
    "TrainTransform",
    "TrainingSet",
    "collate",
    "decode_segmentation",
    "empty_objects",
    "encode_mask",
    "encode_masks",
    "image_size",
    "load_dataset_rows",
    "mask_area",
    "mask_iou",
    "open_image",
    "read_cityscapes",
    "read_coco",
    "read_ctw1500",
    "read_failures",
    "read_header",
    "read_huggingface",
    "read_image_folder",
    "read_path_list",
    "read_store",
    "read_voc",
    "rle_areas",
    "rle_boxes",
    "segmentation_to_rle",
    "shard_files",
    "stream_dataset_rows",
    "stream_store",
    "tight_boxes",
    "to_rgb",
    "write_coco",
]


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LATE[name]}", __name__), name)
