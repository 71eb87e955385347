"""Turns the micro-batches of a step into arguments of the model."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from ..models.losses import Normalizers
from ..models.modeling_uplvp import UplvpPreTrainedModel


def model_inputs(batch: dict, device: torch.device, stage: str) -> dict:
    """The arguments for the model of this stage, on the device, with masks as dense tensors."""
    inputs = {key: batch[key].to(device, non_blocking=True) for key in ("pixel_values", "pixel_mask")}
    for key in ("class_labels", "prompt_scores", "kernel_targets"):
        if key in batch:
            inputs[key] = [item.to(device, non_blocking=True) for item in batch[key]]
    inputs["mask_labels"] = [masks.dense().to(device, non_blocking=True) for masks in batch["mask_labels"]]
    if stage != "pretrain":
        del inputs["prompt_scores"]
    return inputs


def effective_normalizers(
    model: UplvpPreTrainedModel, accelerator: Accelerator, micro_batches: list[dict]
) -> Normalizers:
    """Divisors over the whole effective batch, with which accumulated gradients equal those of one large batch."""
    masks = [masks for batch in micro_batches for masks in batch["mask_labels"]]
    counts = [len(one) for one in masks]
    # Divisors that have to be counted from the masks are left to the loss where it sees the whole batch.
    several = len(micro_batches) > 1 or accelerator.num_processes > 1
    dense = (one.dense() for one in masks) if several else None  # one at a time, where they are looked at
    own = model.segmenter.normalizers(counts, model.config.most_targets, dense)
    known = {name: float(value) for name, value in vars(own).items() if value is not None}
    values = torch.tensor(list(known.values()), dtype=torch.float32)
    if accelerator.num_processes > 1:
        # Gradients are averaged over processes, so the divisors are too.
        values = accelerator.reduce(values.to(accelerator.device), "mean")
    # Over the whole batch counts are at least 1, as in the original implementations; a sum of weights may be less.
    least = {"class_weight": 1e-6}
    floors = [least.get(name, 1.0) / accelerator.num_processes for name in known]
    return Normalizers(
        **{name: max(value, floor) for name, value, floor in zip(known, values.tolist(), floors, strict=True)}
    )
