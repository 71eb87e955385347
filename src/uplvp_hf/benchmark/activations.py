"""What each query has learned about place and shape: its mean mask over many images.

The Saliency Prompt poster shows these maps: after pre-training a query answers to a place and a shape, from scratch to
anything.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from ..data import ImageError, InstanceDataset
from ..models.errors import UserError

GRID = 32  # cells a side of a map; every image is stretched to it


@torch.inference_mode()
def query_activations(model: torch.nn.Module, processor, dataset: InstanceDataset, limit: int = 64) -> torch.Tensor:
    """Mean mask probability (Q, 32, 32) of every query of a UPLVP model over the first `limit` images.

    The padding is cut off before an image's maps are stretched to the grid, so that a cell is a place relative to the
    image. Raises UserError when no image can be read.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    total, count = None, 0
    for index in range(min(limit, len(dataset))):
        try:
            image = dataset.load_image(index)
        except ImageError:
            continue  # the evaluation lists it
        inputs = processor(image, return_tensors="pt").to(device)
        height, width = processor.get_input_sizes(inputs["pixel_mask"])[0]
        logits = model(**inputs).masks_queries_logits.float()
        stride = inputs["pixel_values"].shape[-1] / logits.shape[-1]
        maps = logits[:, :, : max(1, round(height / stride)), : max(1, round(width / stride))].sigmoid()
        maps = functional.interpolate(maps, (GRID, GRID), mode="bilinear", align_corners=False)[0].cpu()
        total, count = (maps if total is None else total + maps), count + 1
    model.train(was_training)
    if total is None:
        raise UserError("none of the images could be read")
    return total / count


def spread(maps: torch.Tensor) -> dict[str, float]:
    """How much queries differ in place: mean entropy of the maps (Q, h, w) as distributions over cells, 1 for an even
    map and 0 for a single cell, and the standard deviation of their centers in fractions of the image's sides."""
    flat = maps.flatten(1).double()
    share = flat / flat.sum(1, keepdim=True).clamp_min(1e-12)
    entropy = -(share * share.clamp_min(1e-12).log()).sum(1) / torch.tensor(float(flat.shape[1])).log()
    rows = (torch.arange(maps.shape[1], dtype=torch.float64) + 0.5) / maps.shape[1]
    columns = (torch.arange(maps.shape[2], dtype=torch.float64) + 0.5) / maps.shape[2]
    share = share.view(maps.shape)
    centers = torch.stack([(share.sum(2) * rows).sum(1), (share.sum(1) * columns).sum(1)])
    return {
        "entropy": round(entropy.mean().item(), 4),
        "centers": round(centers.std(dim=1, correction=0).mean().item(), 4),
    }
