"""Kernel supervision: what queries are to resemble, and how that is measured.

The papers' form draws a query towards the network's own prompt of its mask by a cosine (Saliency Prompt, arXiv
2302.01171, eq. 3, `losses.kernel_supervision`). Beside it stand:

* frozen targets, `given_targets`: one vector a mask that a labeler's network computed (DETReg, arXiv 2106.04550,
  whose embedding head predicts a frozen encoder's features of each region);
* a linear head on the query, which is dropped after pre-training (DETReg);
* a contrastive loss (InfoNCE, arXiv 1807.03748) among the masks of a batch, in which masks of one class and masks of
  one image that overlap much are no negatives (ProSeCo, arXiv 2310.16835, takes overlapping ones as positives);
* centered targets, by a running mean (DINO, arXiv 2104.14294).

Letters: B images, N queries, P targets an image, D channels, L layers, M matched pairs.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from .configuration_uplvp import UplvpConfig
from .errors import UserError
from .losses import LayerOutput, kernel_supervision, mean_over_pairs
from .masks import mask_iou_matrix
from .prompts import Prompts

Matches = list[list[tuple[Tensor, Tensor]]]
# A term below this is not raised any further where its weight is a share of the segmenter's loss: a cosine that is
# nearly met would get a weight without bounds.
LEAST_TERM = 0.1


def given_targets(vectors: list[Tensor] | None, mask_labels: list[Tensor], dim: int) -> Prompts:
    """Vectors of the pseudo masks, per image (G, D), in the form of prompts: mask j of an image is its prompt j.

    Raises UserError where they are missing or are not one of `dim` channels for each mask.
    """
    if vectors is None:
        raise UserError("`kernel_target` is `labeler`: give `kernel_targets`, the vectors of the masks of every image.")
    for i, (own, masks) in enumerate(zip(vectors, mask_labels, strict=True)):
        if tuple(own.shape) != (len(masks), dim):
            raise UserError(
                f"Image {i} of the batch has kernel targets of shape {tuple(own.shape)}; {len(masks)} masks and "
                f"`kernel_target_dim` {dim} need {(len(masks), dim)}."
            )
    most = max(len(own) for own in vectors)
    padded = torch.stack([F.pad(own.float(), (0, 0, 0, most - len(own))) for own in vectors])
    count = torch.tensor([len(own) for own in vectors], device=padded.device)
    place = torch.arange(most, device=padded.device).expand(len(vectors), -1)
    valid = place < count[:, None]
    return Prompts(padded, valid, torch.where(valid, place, -1))


class RunningMean(nn.Module):
    """A running mean of vectors (D,): mean <- m * mean + (1 - m) * batch mean, with m = min(momentum, n / (n + 1))
    after n batches, so that the zeros at the start do not stay in it. Changed in training mode only; saved with the
    weights. Every process of a run has the mean over what it sees; saved is that of the main one."""

    def __init__(self, channels: int, momentum: float):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def init_weights(self) -> None:
        init.zeros_(self.mean)
        init.zeros_(self.batches)

    @torch.no_grad()
    def forward(self, vectors: Tensor, valid: Tensor) -> Tensor:
        """vectors (B, P, D) less the mean, which first takes in those that are `valid` (B, P)."""
        if self.training:
            count = valid.sum()
            batch_mean = torch.where(valid[..., None], vectors, 0.0).sum((0, 1)) / count.clamp(min=1)
            momentum = (self.batches / (self.batches + 1)).clamp(max=self.momentum)
            share = torch.where(count > 0, 1 - momentum, 0.0)
            self.mean.copy_(self.mean + share * (batch_mean - self.mean))
            self.batches += count > 0
        return torch.where(valid[..., None], vectors - self.mean, 0.0)


def possible_negatives(
    targets: Prompts, mask_labels: list[Tensor], class_labels: list[Tensor] | None, overlap: float
) -> Tensor:
    """Which target (column) is a negative for a query whose target is another one (row): (B * P, B * P) bool.

    All valid targets of the batch are, except those of the same class (without `class_labels` classes do not count)
    and, in the same image, those whose masks have an IoU of at least `overlap`. No target is its own negative.
    """
    batch, most = targets.valid.shape
    device = targets.vectors.device
    apart = torch.ones((batch, most, batch, most), dtype=torch.bool, device=device)
    if class_labels is not None:
        classes = torch.full((batch, most), -1, dtype=torch.int64, device=device)
        for i, labels in enumerate(class_labels):
            if len(labels):
                classes[i] = labels.to(device).long()[targets.source[i].clamp(min=0)]
        apart &= classes[:, :, None, None] != classes[None, None]
    for i, masks in enumerate(mask_labels):
        near = torch.eye(most, dtype=torch.bool, device=device)
        if len(masks) > 1:
            source = targets.source[i].clamp(min=0)
            near |= mask_iou_matrix(masks.to(device).bool())[source][:, source] >= overlap
        apart[i, :, i] &= ~near
    return (apart & targets.valid[None, None]).flatten(2).flatten(0, 1)


def contrastive_supervision(
    layers: list[LayerOutput],
    matches: Matches,
    vectors: Tensor,
    target_of_mask: Tensor,
    negatives: Tensor,
    temperature: float,
    num_pairs: Tensor | float | None = None,
) -> Tensor:
    """Mean over layers and matched pairs of -log softmax over the pair's own target and its negatives, of the cosines
    of the query divided by `temperature`. InfoNCE; targets are detached.

    vectors (B, P, D), target_of_mask (B, G) with -1 for none, num_pairs: as of `kernel_supervision`. negatives
    (B * P, B * P): see `possible_negatives`. A pair without any negative adds nothing.
    """

    def terms(queries: Tensor, image: Tensor, target: Tensor) -> Tensor:
        own = image * vectors.shape[1] + target  # (L, M)
        goals = F.normalize(vectors.detach().float().flatten(0, 1), dim=-1)
        logits = F.normalize(queries, dim=-1) @ goals.T / temperature  # (L, M, B * P)
        positive = logits.gather(-1, own[..., None])
        compared = logits.masked_fill(~negatives[own], -torch.inf)
        return torch.logsumexp(torch.cat([positive, compared], dim=-1), dim=-1) - positive[..., 0]

    return mean_over_pairs(layers, matches, vectors, target_of_mask, num_pairs, terms)


class KernelSupervision(nn.Module):
    """The loss between queries and the targets of their masks, as the configuration says (`kernel_*`).

    channels: of the queries. Without head and centering it has neither parameters nor buffers.
    """

    def __init__(self, config: UplvpConfig, channels: int):
        super().__init__()
        self.config = config
        dim = config.kernel_target_dim if config.kernel_target == "labeler" else channels
        self.head = nn.Linear(channels, dim) if config.kernel_head == "linear" else None
        self.center = RunningMean(dim, config.kernel_centering) if config.kernel_centering else None

    @torch.no_grad()
    def init_weights(self) -> None:
        if self.head is not None:
            init.xavier_uniform_(self.head.weight)
            init.zeros_(self.head.bias)

    def forward(
        self,
        layers: list[LayerOutput],
        matches: Matches,
        targets: Prompts,
        mask_labels: list[Tensor],
        class_labels: list[Tensor],
        num_pairs: Tensor | float | None = None,
        prompted: Tensor | None = None,
    ) -> Tensor:
        """Unweighted. prompted (B, N): queries that got a prompt, which `kernel_queries=unprompted` leaves out."""
        config = self.config
        vectors = targets.vectors
        if self.center is not None:
            vectors = self.center(vectors.detach().float(), targets.valid)
        if self.head is not None:
            layers = [
                LayerOutput(layer.class_logits, layer.mask_logits, self._embed(layer.queries)) for layer in layers
            ]
        most = max((len(masks) for masks in mask_labels), default=0)
        target_of_mask = targets.of_mask(most + 1)  # the last is of no mask
        if config.kernel_queries == "unprompted" and prompted is not None:
            matches, share = _unprompted(matches, prompted.cpu(), most)
            num_pairs = None if num_pairs is None else num_pairs * share  # their number in the whole step is not known
        if config.kernel_loss == "cosine":
            return kernel_supervision(layers, matches, vectors, target_of_mask, num_pairs)
        named = not config.class_agnostic and config.num_labels > 1
        apart = possible_negatives(targets, mask_labels, class_labels if named else None, config.kernel_overlap)
        return contrastive_supervision(
            layers, matches, vectors, target_of_mask, apart, config.kernel_temperature, num_pairs
        )

    def _embed(self, queries: Tensor) -> Tensor:
        # In float32: K-Net's queries hold sums over whole objects, which are beyond the range of float16.
        with torch.autocast(queries.device.type, enabled=False):
            return F.linear(queries.float(), self.head.weight.float(), self.head.bias.float())

    def weight(self, term: Tensor, losses: dict[str, Tensor]) -> Tensor | float:
        """The factor on `term`: a number, or what makes it the share `kernel_loss_share` of the sum of `losses`."""
        share = self.config.kernel_loss_share
        if share is None:
            return self.config.kernel_supervision_weight
        whole = torch.stack([value.detach().float() for value in losses.values()]).sum()
        return share * whole / term.detach().clamp(min=LEAST_TERM)


def _unprompted(matches: Matches, prompted: Tensor, blank: int) -> tuple[Matches, float]:
    """The pairs, with the mask `blank` in place of that of a query that got a prompt, and the share of the others (of
    one pair, where there is none). prompted (B, N), on the host."""
    told = [prompted[i, query] for layer in matches for i, (query, _) in enumerate(layer)]
    pairs, left = sum(map(len, told)), sum(int((~one).sum()) for one in told)
    kept = [
        [(query, torch.where(prompted[i, query], blank, target)) for i, (query, target) in enumerate(layer)]
        for layer in matches
    ]
    return kept, max(left, 1) / max(pairs, 1)
