"""Support images: objects pooled under their masks, and what vectors of a class mean for masks of another image."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import DataError
from .prompts import mask_weights


def pool_supports(features: Tensor, masks: Tensor, names: list[str] | None = None) -> Tensor:
    """Average of each image's features under its mask, with gradients: (S, C, h, w) and (S, H, W) -> (S, C) float32.

    masks: bool, or shares of a pixel in 0..1, at the padded input size. names: of the images, for errors.
    Raises DataError for a mask that covers nothing.
    """
    weights = mask_weights(masks.to(features.device), features.shape[-2:]).flatten(1)  # (S, hw)
    area = weights.sum(1, keepdim=True)
    if not torch.compiler.is_compiling():
        for index, empty in enumerate((area[:, 0] <= 0).tolist()):
            if empty:
                name = names[index] if names else f"support image {index}"
                raise DataError("the mask of the object covers no pixel of the image", file=name)
    with torch.autocast(features.device.type, enabled=False):
        return torch.einsum("sp,scp->sc", weights / area, features.flatten(2).float())


def pool_predictions(features: Tensor, mask_logits: Tensor) -> Tensor:
    """Features under predicted masks: (B, C, h, w) and logits (B, N, H, W) -> (B, N, C) float32. The pixels above one
    half count by their probability; a mask without any gives zeros."""
    probabilities = mask_logits.float().sigmoid()
    inside = torch.where(probabilities > 0.5, probabilities, 0.0)
    weights = F.interpolate(inside, size=features.shape[-2:], mode="area").flatten(2)  # (B, N, hw)
    with torch.autocast(features.device.type, enabled=False):
        pooled = weights @ features.flatten(2).transpose(1, 2).float()
    return pooled / weights.sum(-1, keepdim=True).clamp(min=1e-6)


def class_vectors(vectors: Tensor, owner: Tensor, count: int) -> Tensor:
    """Mean of the vectors of every class: vectors (S, C), owner (S,) int64 in 0..count-1 -> (count, C). The order of
    the supports of a class does not matter but for rounding."""
    total = vectors.new_zeros((count, vectors.shape[1])).index_add(0, owner, vectors)
    shots = vectors.new_zeros(count).index_add(0, owner, vectors.new_ones(len(vectors)))
    return total / shots.clamp(min=1)[:, None]


def similarity(seen: Tensor, supports: Tensor, midpoint: float, temperature: float) -> Tensor:
    """sigmoid((cosine - midpoint) / temperature): (B, N, C) and (P, C), both less their common mean -> (B, N, P)."""
    seen = F.normalize(seen.float(), dim=-1)
    # Class by class: together they would be rounded otherwise when a class is added.
    cosines = [(seen * F.normalize(one.float(), dim=0)).sum(-1) for one in supports]
    columns = [((cosine - midpoint) / temperature).sigmoid() for cosine in cosines]
    return torch.stack(columns, -1) if columns else seen.new_zeros((*seen.shape[:-1], 0))


def fit_similarity(cosines: Tensor, same: Tensor) -> tuple[float, float]:
    """Midpoint and temperature of `similarity`: logistic regression of whether object and support are of one class.

    cosines (M,), same (M,) bool. Both outcomes weigh the same, so that the midpoint does not depend on the number of
    classes. Newton's method in float64 with a weak pull towards 0.5 and 0.1.
    """
    x, y = cosines.double(), same.double()
    weight = torch.where(same, 0.5 / y.sum().clamp(min=1), 0.5 / (1 - y).sum().clamp(min=1))
    design = torch.stack([x, torch.ones_like(x)], 1)
    start = torch.tensor([10.0, -5.0], dtype=torch.float64)
    theta, pull = start.clone(), torch.tensor([1e-6, 1e-6], dtype=torch.float64)
    for _ in range(100):
        chance = (design @ theta).sigmoid()
        gradient = design.T @ (weight * (chance - y)) + pull * (theta - start)
        hessian = design.T @ (design * (weight * chance * (1 - chance))[:, None]) + torch.diag(pull)
        step = torch.linalg.solve(hessian, gradient)
        theta = theta - step * min(1.0, 5.0 / step.abs().max().item())
        if step.abs().max() < 1e-9:
            break
    slope = max(theta[0].item(), 1e-3)
    return -theta[1].item() / slope, 1 / slope
