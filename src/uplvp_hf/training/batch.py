"""Turns the micro-batches of a step into arguments of the model."""

from __future__ import annotations

import re

import torch
from accelerate import Accelerator
from torch import Tensor

from ..models.losses import Normalizers
from ..models.modeling_uplvp import UplvpPreTrainedModel
from ..models.query_segmenter import SegmenterOutput


def model_inputs(batch: dict, device: torch.device, stage: str) -> dict:
    """The arguments for the model of this stage, on the device, with masks as dense tensors."""
    inputs = {key: batch[key].to(device, non_blocking=True) for key in ("pixel_values", "pixel_mask")}
    for key in ("class_labels", "prompt_scores", "kernel_targets"):
        if key in batch:
            inputs[key] = [item.to(device, non_blocking=True) for item in batch[key]]
    inputs["mask_labels"] = [masks.dense().to(device, non_blocking=True) for masks in batch["mask_labels"]]
    if stage != "pretrain" and not batch.get("prompts"):
        del inputs["prompt_scores"]
    if "pseudo" in batch:
        inputs["pseudo"] = batch["pseudo"].to(device)
    return inputs


def weighted_loss(output: SegmenterOutput, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a micro-batch and its terms, detached. Those of pseudo-labeled images are multiplied by the weight of
    the batch, and go by names of their own, summed over the layers: `unsup_class`, `unsup_mask`, ..."""
    terms = {name: value.detach().float() for name, value in output.losses.items()}
    weight = batch.get("weight")
    if weight is None:
        return output.loss, terms
    summed: dict[str, Tensor] = {}
    for name, value in terms.items():
        name = f"unsup_{re.sub(r'_[0-9]+$', '', name)}"
        summed[name] = summed.get(name, 0.0) + weight * value
    return weight * output.loss, summed


def effective_normalizers(
    model: UplvpPreTrainedModel, accelerator: Accelerator, micro_batches: list[dict]
) -> Normalizers:
    """Divisors over the whole effective batch, with which accumulated gradients equal those of one large batch.

    What is in a batch with a weight counts so much, but for the pairs of kernel supervision: where pseudo instances are
    prompts, only theirs count, and their term is a mean whatever its weight.
    """
    prompted = any(batch.get("prompts") for batch in micro_batches)
    # Divisors that have to be counted from the masks are left to the loss where it sees the whole batch.
    several = len(micro_batches) > 1 or accelerator.num_processes > 1
    known: dict[str, float] = {}
    for weight in dict.fromkeys(batch.get("weight") for batch in micro_batches):
        masks = [one for batch in micro_batches if batch.get("weight") == weight for one in batch["mask_labels"]]
        dense = (one.dense() for one in masks) if several else None  # one at a time, where they are looked at
        own = model.segmenter.normalizers([len(one) for one in masks], model.config.most_targets, dense)
        factors = dict.fromkeys(vars(own), 1.0 if weight is None else weight)
        if prompted:
            factors["pairs"] = float(weight is not None)
        for name, value in vars(own).items():
            if value is not None:
                known[name] = known.get(name, 0.0) + float(value) * factors[name]
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
