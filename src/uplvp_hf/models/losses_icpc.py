"""Losses of ICPC: cross-entropy on logits and on score maps, and the align-guided contrastive loss.

The abstract of ICPC (arXiv 2308.07078) names the contrastive loss and does not define it. Everything about its form is
inferred: four readings of the name, A to D, and a control with texts alone. The sampling of anchors follows
ContrastiveSeg (arXiv 2101.11939).

Letters: B images, K classes, D channels of the space of images and texts, N anchors (cells of the score map).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .configuration_icpc import IcpcConfig
from .errors import UserError

NEAREST_CLASSES = 16  # negatives of an anchor in reading C


def on_grid(labels: Tensor, stride: int) -> Tensor:
    """The labels at the centers of cells of `stride` pixels: (B, H, W) -> (B, H / stride, W / stride)."""
    return labels[:, stride // 2 :: stride, stride // 2 :: stride] if stride > 1 else labels


def check_semantic_labels(labels: Tensor, size: tuple[int, int], config: IcpcConfig) -> None:
    """Raises UserError for a label map of another size than the image, and for ids that are no class."""
    if labels.dim() != 3 or tuple(labels.shape[-2:]) != tuple(size):
        raise UserError(
            f"labels have the shape {tuple(labels.shape)}, but the images are {size[0]} x {size[1]} pixels: give one "
            "integer map (H, W) an image, resized and padded as the image."
        )
    if labels.device.type == "cpu":  # on an accelerator this would cost a transfer
        ignored = config.semantic_loss_ignore_index
        wrong = labels[(labels != ignored) & ((labels < 0) | (labels >= config.num_labels))]
        if len(wrong):
            raise UserError(
                f"labels hold the id {int(wrong[0])}, but the model has the classes 0 to {config.num_labels - 1} "
                f"(and {ignored} for pixels that do not count). Are the labels to be reduced by one (`reduce_labels`)?"
            )


def pixel_cross_entropy(logits: Tensor, labels: Tensor, ignored: int, count: Tensor | float | None = None) -> Tensor:
    """Cross-entropy of logits (B, K, h, w), resized bilinearly to labels (B, H, W), summed over the pixels that count
    and divided by `count`, by default their number. The original divides by all pixels."""
    if logits.shape[-2:] != labels.shape[-2:]:
        logits = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
    total = F.cross_entropy(logits.float(), labels, ignore_index=ignored, reduction="sum")
    return total / ((labels != ignored).sum().clamp(min=1) if count is None else count)


def cell_labels(labels: Tensor, grid: tuple[int, int], num_classes: int) -> Tensor:
    """The class of every cell, (B, H, W) -> (B, h, w), -1 where there is none: the class of at least half of the
    labeled pixels of the cell, where at least half of its pixels are labeled."""
    batch, (rows, columns) = len(labels), grid
    tall, wide = labels.shape[-2] // rows, labels.shape[-1] // columns
    cells = labels[:, : rows * tall, : columns * wide].unflatten(1, (rows, tall)).unflatten(3, (columns, wide))
    cells = cells.transpose(2, 3).reshape(batch, rows * columns, tall * wide)
    known = (cells >= 0) & (cells < num_classes)
    counts = labels.new_zeros((batch, rows * columns, num_classes + 1))
    counts.scatter_add_(2, torch.where(known, cells, num_classes), torch.ones_like(cells))
    most, found = counts[..., :num_classes].max(-1)
    labeled = known.sum(-1)
    valid = (2 * most >= labeled) & (2 * labeled >= tall * wide)
    return torch.where(valid, found, -1).unflatten(1, grid)


@dataclass
class Anchors:
    """Cells that are contrasted: vectors (N, D) of unit length, their class and their image (N,)."""

    vectors: Tensor
    classes: Tensor
    images: Tensor


def contrastive_loss(
    local: Tensor, text: Tensor, labels: Tensor, config: IcpcConfig, generator: torch.Generator | None = None
) -> Tensor:
    """The loss that `config.contrastive` names, without its weight, in float32.

    local (B, D, h, w): CLIP's patch features; text (1 or B, K, D); labels (B, H, W). Without a labeled cell the result
    is a zero that touches both.
    """
    grid = tuple(local.shape[-2:])
    cells = F.normalize(local.float().flatten(2).transpose(1, 2), dim=-1)  # (B, h * w, D)
    text = F.normalize(text.float(), dim=-1).expand(len(local), -1, -1)
    classes = cell_labels(labels, grid, text.shape[1]).flatten(1)
    image, place = (classes >= 0).nonzero(as_tuple=True)
    anchors = Anchors(cells[image, place], classes[image, place], image)
    if not len(image):
        return 0 * (cells.sum() + text.sum())
    alignment = torch.einsum("nd,nkd->nk", anchors.vectors, text[image])
    if config.contrastive == "text_only":
        return F.cross_entropy(alignment / config.tau, anchors.classes)
    if config.contrastive == "prototypes":
        return _prototypes(anchors, alignment, text, config.tau)
    hard = alignment.argmax(1) != anchors.classes
    chosen = sample_anchors(anchors, hard, config.anchors_per_class, config.max_anchors, generator)
    anchors = Anchors(anchors.vectors[chosen], anchors.classes[chosen], anchors.images[chosen])
    if config.contrastive == "text_negatives":
        return _text_negatives(anchors, alignment[chosen], text, config.tau)
    loss = _align_guided(anchors, alignment[chosen], config.tau)
    return loss + _text_to_cells(anchors, text, config.tau) if config.contrastive == "symmetric" else loss


def sample_anchors(
    anchors: Anchors, hard: Tensor, per_class: int, total: int, generator: torch.Generator | None = None
) -> Tensor:
    """Indices of at most `per_class` cells of every image and class, and of at most `total` in all. Half of those of a
    class are hard, as far as there are enough of either kind."""

    def draw(indices: Tensor, count: int) -> Tensor:
        order = torch.rand(len(indices), generator=generator, device=None if generator is None else generator.device)
        return indices[order.argsort().to(indices.device)[:count]]

    chosen = []
    groups = anchors.images * (int(anchors.classes.max()) + 1) + anchors.classes
    for group in groups.unique():
        difficult, easy = (((groups == group) & kind).nonzero()[:, 0] for kind in (hard, ~hard))
        count = min(len(difficult) + len(easy), per_class)
        first = min(len(difficult), max(count // 2, count - len(easy)))
        chosen += [draw(difficult, first), draw(easy, count - first)]
    found = torch.cat(chosen)
    return draw(found, total) if len(found) > total else found


def _align_guided(anchors: Anchors, alignment: Tensor, tau: float) -> Tensor:
    """Reading A: every cell is drawn to its class's text and to cells of its class, and pushed off the other texts and
    cells. With s the cosines over tau, -log(e^s+ / (e^s+ + sum e^s-)) = softplus(logsumexp(s-) - s+)."""
    same = anchors.classes[:, None] == anchors.classes[None]
    scores = anchors.vectors @ anchors.vectors.T / tau  # (N, N)
    texts = alignment / tau  # (N, K)
    own = F.one_hot(anchors.classes, texts.shape[1]).bool()
    against = torch.cat([texts.masked_fill(own, float("-inf")), scores.masked_fill(same, float("-inf"))], dim=1)
    against = against.logsumexp(1, keepdim=True)
    to_text = F.softplus(against[:, 0] - texts[own])
    mates = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
    count = mates.sum(1)
    to_cells = (F.softplus(against - scores) * mates).sum(1) / count.clamp(min=1)
    return torch.where(count > 0, 0.5 * to_text + 0.5 * to_cells, to_text).mean()


def _text_to_cells(anchors: Anchors, text: Tensor, tau: float) -> Tensor:
    """What reading D adds: every text of a class in an image is drawn to its cells and pushed off those of others."""
    terms = []
    for image, kind in torch.stack([anchors.images, anchors.classes], 1).unique(dim=0).tolist():
        scores = anchors.vectors @ text[image, kind] / tau
        own, other = (anchors.images == image) & (anchors.classes == kind), anchors.classes != kind
        against = scores[other].logsumexp(0) if bool(other.any()) else scores.new_tensor(float("-inf"))
        terms.append(F.softplus(against - scores[own]).mean())
    return torch.stack(terms).mean()


def _prototypes(anchors: Anchors, alignment: Tensor, text: Tensor, tau: float) -> Tensor:
    """Reading B: the cells of a class in an image, weighted by their alignment, against texts of all present classes.
    The same class's texts of other images take no part."""
    groups = torch.stack([anchors.images, anchors.classes], 1).unique(dim=0)
    prototypes = []
    for image, kind in groups.tolist():
        own = (anchors.images == image) & (anchors.classes == kind)
        weights = (alignment[own, kind] / tau).softmax(0)
        prototypes.append(F.normalize(weights @ anchors.vectors[own], dim=0))
    scores = torch.stack(prototypes) @ text[groups[:, 0], groups[:, 1]].T / tau  # (groups, groups)
    same = groups[:, None, 1] == groups[None, :, 1]
    other_image = same & ~torch.eye(len(groups), dtype=torch.bool, device=same.device)
    scores = scores.masked_fill(other_image, float("-inf"))
    return F.cross_entropy(scores, torch.arange(len(groups), device=scores.device))


def _text_negatives(anchors: Anchors, alignment: Tensor, text: Tensor, tau: float) -> Tensor:
    """Reading C: against the nearest other classes' texts, and the same class's texts of the other images. Where all
    images share their texts the latter say nothing and are left out."""
    own = F.one_hot(anchors.classes, alignment.shape[1]).bool()
    others = alignment.masked_fill(own, float("-inf")) / tau
    against = [others.topk(min(NEAREST_CLASSES, max(others.shape[1] - 1, 1)), dim=1).values]
    if len(text) > 1 and text.stride(0) != 0:
        elsewhere = torch.einsum("nd,bnd->nb", anchors.vectors, text[:, anchors.classes]) / tau  # (N, B)
        here = F.one_hot(anchors.images, len(text)).bool()
        against.append(elsewhere.masked_fill(here, float("-inf")))
    return F.softplus(torch.cat(against, 1).logsumexp(1) - alignment[own] / tau).mean()


__all__ = ["Anchors", "cell_labels", "check_semantic_labels", "contrastive_loss", "on_grid", "pixel_cross_entropy"]
