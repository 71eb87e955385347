"""Samples of different sizes into one padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..models.errors import UserError


def collate(
    samples: Sequence[dict[str, Any]], size_divisor: int = 32, pad_to: int | None = None, dense: bool = True
) -> dict[str, Any]:
    """Pad samples of `TrainingSet` at the right and the bottom, and stack them.

    Args:
        samples: B samples.
        size_divisor: the padded height and width are multiples of this many pixels.
        pad_to: side of a square canvas in pixels (a multiple of `size_divisor`), for batches that all have one shape;
            None pads to the largest sample.
        dense: whether masks become tensors here. 200 of 1024 x 1024 pixels take 210 MB, which a worker process would
            hand over through shared memory; as `InstanceMasks` they take 0.1 MB and are made dense by whoever
            needs them, a micro-batch at a time.

    Returns:
        pixel_values (B, 3, H, W) float32, zero where padded; pixel_mask (B, H, W) int64, 1 where the image is;
        mask_labels, B tensors (N_b, H, W) bool, or B `InstanceMasks` of that shape; class_labels, B tensors (N_b,)
        int64; and, where the samples have them, prompt_scores, B tensors (N_b,) float32, kernel_targets, B tensors
        (N_b, D) float32, and image_ids, a list of B.

    Raises UserError for an empty batch and for a sample that does not fit `pad_to`.
    """
    if len(samples) == 0:
        raise UserError("cannot collate an empty batch")
    height = max(sample["pixel_values"].shape[-2] for sample in samples)
    width = max(sample["pixel_values"].shape[-1] for sample in samples)
    if pad_to is None:
        height, width = -(-height // size_divisor) * size_divisor, -(-width // size_divisor) * size_divisor
    else:
        if pad_to % size_divisor:
            raise UserError(f"pad_to must be a multiple of size_divisor {size_divisor}, got {pad_to}")
        if max(height, width) > pad_to:
            raise UserError(f"a sample of {height}x{width} pixels does not fit pad_to {pad_to}")
        height = width = pad_to
    pixel_values = torch.zeros((len(samples), 3, height, width), dtype=torch.float32)
    pixel_mask = torch.zeros((len(samples), height, width), dtype=torch.int64)
    mask_labels = []
    for index, sample in enumerate(samples):
        h, w = sample["pixel_values"].shape[-2:]
        pixel_values[index, :, :h, :w] = sample["pixel_values"]
        pixel_mask[index, :h, :w] = 1
        masks = sample["mask_labels"].on_canvas(height, width)
        mask_labels.append(masks.dense() if dense else masks)
    batch = {
        "pixel_values": pixel_values,
        "pixel_mask": pixel_mask,
        "mask_labels": mask_labels,
        "class_labels": [sample["class_labels"] for sample in samples],
    }
    optional = {"prompt_scores": "prompt_scores", "kernel_targets": "kernel_targets", "image_ids": "image_id"}
    for name, key in optional.items():
        if key in samples[0]:  # transformers' Trainer removes what the model's `forward` does not take
            batch[name] = [sample[key] for sample in samples]
    return batch
