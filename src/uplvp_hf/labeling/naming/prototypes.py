"""Named vectors as a classifier: similarity to the examples of each class and to the ground."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

# Tried for the temperature and for what is added to the similarity with the ground, whichever pair makes the
# left-out examples and ground likeliest.
TEMPERATURES = torch.logspace(-2, 0, 41)
BIASES = torch.linspace(-0.5, 0.5, 41)
TEMPERATURE = 0.1  # where too few examples are there to leave one out


@dataclass(frozen=True)
class Calibration:
    """temperature, bias: similarities s of the classes and b of the ground give softmax([s, b + bias] / temperature).
    floor: least similarity to its class that a mask needs; anything below is like none of the examples."""

    temperature: float
    bias: float
    floor: float


class Prototypes:
    """Examples of classes and of the ground, as unit vectors.

    Args:
        vectors: (N, D) of the examples. labels: (N,) int64 in 0..K-1, at least one of each class.
        groups: (N,) the image that each example is from.
        ground: (M, D) of what is no object, and its images `ground_groups` (M,).
        neighbors: examples of a class, the most similar ones, whose similarities are averaged; None: all of them.

    Similarities are cosines after the mean of the class means (and of the ground's mean) is subtracted: features of
    one network share a large common part, which says nothing about the class. Ground that is more similar to a class
    than half of its own left-out examples are shows an object that nobody outlined, and is left out.
    """

    def __init__(
        self,
        vectors: torch.Tensor,
        labels: torch.Tensor,
        groups: torch.Tensor,
        ground: torch.Tensor | None = None,
        ground_groups: torch.Tensor | None = None,
        neighbors: int | None = None,
    ) -> None:
        self.classes, self.neighbors = int(labels.max()) + 1, neighbors
        self.labels, self.groups = labels, groups
        ground = vectors[:0] if ground is None else ground
        ground_groups = groups[:0] if ground_groups is None else ground_groups
        means = [vectors[labels == k].mean(dim=0) for k in range(self.classes)]
        means += [ground.mean(dim=0)] if len(ground) else []
        self.center = torch.stack(means).mean(dim=0) if len(means) > 1 else torch.zeros_like(means[0])
        self.vectors = self._centered(vectors)
        ground = self._centered(ground)
        if len(ground):
            own = self.leave_one_out()
            usual = torch.stack([own[labels == k, k].nanmedian() for k in range(self.classes)]).nan_to_num(
                nan=torch.inf
            )
            keep = (self._to_classes(ground @ self.vectors.T) <= usual).all(dim=1)
            ground, ground_groups = ground[keep], ground_groups[keep]
        self.ground, self.ground_groups = ground, ground_groups

    def similarities(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """To each class and to the ground: (B, D) -> (B, K), (B,). Without ground the latter is -inf."""
        vectors = self._centered(vectors)
        return self._to_classes(vectors @ self.vectors.T), self._to_ground(vectors @ self.ground.T)

    def name(self, vectors: torch.Tensor, calibration: Calibration) -> tuple[torch.Tensor, torch.Tensor]:
        """The class of each vector and its probability among the classes and the ground: (B, D) -> (B,), (B,).
        The label is -1 where the class is less similar than `calibration.floor`."""
        classes, ground = self.similarities(vectors)
        logits = torch.cat([classes, ground[:, None] + calibration.bias], dim=1) / calibration.temperature
        confidences, labels = logits.softmax(dim=1)[:, :-1].max(dim=1)
        return labels.masked_fill(classes.gather(1, labels[:, None])[:, 0] < calibration.floor, -1), confidences

    def leave_one_out(self) -> torch.Tensor:
        """Similarity of each example to each class without itself, and without the others of its image where the
        class has others still: (N, K). NaN to its own class where it is the only example of it."""
        cosines = self.vectors @ self.vectors.T
        own_class = self.labels[:, None] == self.labels
        same_image = self.groups[:, None] == self.groups
        lacking = torch.stack([(~same_image & (self.labels == k)).sum(dim=1) == 0 for k in range(self.classes)], dim=1)
        left_out = same_image & ~lacking[:, self.labels]
        left_out |= torch.eye(len(cosines), dtype=torch.bool)
        alone = (own_class & ~left_out).sum(dim=1) == 0
        result = self._to_classes(cosines.masked_fill(left_out, torch.nan))
        result[alone, self.labels[alone]] = torch.nan
        return result

    def calibrate(self, spread: float = 3.0) -> Calibration:
        """Temperature and bias that make the left-out examples and ground likeliest, and as the floor the mean
        similarity of the left-out examples to their class less `spread` standard deviations, or the least of them.

        Examples that are the only ones of their class have nothing to be compared with. Without two others, the
        temperature is `TEMPERATURE` and there is no floor.
        """
        scores = self.leave_one_out()
        own = self._own(scores)
        if len(own) < 2:
            return Calibration(TEMPERATURE, 0.0, -1.0)
        known = ~scores.isnan().any(dim=1)
        rows, targets = scores[known], self.labels[known]
        if len(self.ground):
            rows = torch.cat([rows, self._to_ground(self.vectors[known] @ self.ground.T)[:, None]], dim=1)
            cosines = self.ground @ self.ground.T
            same_image = self.ground_groups[:, None] == self.ground_groups
            others = self._to_ground(cosines.masked_fill(same_image, torch.nan))
            ground = torch.cat([self._to_classes(self.ground @ self.vectors.T), others[:, None]], dim=1)
            ground = ground[~others.isnan()]
            rows = torch.cat([rows, ground])
            targets = torch.cat([targets, torch.full((len(ground),), self.classes)])
        temperature, bias = _likeliest(rows, targets, self.classes)
        return Calibration(temperature, bias, float(min(own.min(), own.mean() - spread * own.std())))

    def _centered(self, vectors: torch.Tensor) -> torch.Tensor:
        return F.normalize(vectors - self.center, dim=-1)

    def _own(self, scores: torch.Tensor) -> torch.Tensor:
        own = scores[torch.arange(len(scores)), self.labels]
        return own[~own.isnan()]

    def _to_classes(self, cosines: torch.Tensor) -> torch.Tensor:
        """(B, N) cosines with the examples, NaN for those left out -> (B, K)."""
        return torch.stack(
            [_mean_of_best(cosines[:, self.labels == k], self.neighbors) for k in range(self.classes)], 1
        )

    @staticmethod
    def _to_ground(cosines: torch.Tensor) -> torch.Tensor:
        """Mean of the three best cosines with the ground: it has many faces, of which a mask shows one."""
        if not cosines.shape[1]:
            return cosines.new_full((len(cosines),), -torch.inf)
        return _mean_of_best(cosines, 3)


def _mean_of_best(cosines: torch.Tensor, count: int | None) -> torch.Tensor:
    """(B, N) with NaN for what is left out -> (B,), NaN where nothing is left."""
    if count is None:
        return cosines.nanmean(dim=1)
    ranked = cosines.nan_to_num(nan=-torch.inf).sort(dim=1, descending=True).values[:, :count]
    return ranked.masked_fill(ranked == -torch.inf, torch.nan).nanmean(dim=1)


def _likeliest(rows: torch.Tensor, targets: torch.Tensor, classes: int) -> tuple[float, float]:
    """Temperature and bias of the columns from `classes` on, by a grid: (N, columns) similarities, (N,) right columns.

    Each group counts alike, however many members it has. Some of the likelihood is that of every other column, so that
    a few examples that are easily told apart do not ask for a temperature near zero.
    """
    weights = 1 / torch.bincount(targets, minlength=rows.shape[1]).float()[targets]
    best, chosen = torch.inf, (TEMPERATURE, 0.0)
    for bias in BIASES.tolist() if rows.shape[1] > classes else [0.0]:
        shifted = torch.cat([rows[:, :classes], rows[:, classes:] + bias], dim=1)
        for temperature in TEMPERATURES.tolist():
            losses = F.cross_entropy(shifted / temperature, targets, reduction="none", label_smoothing=0.05)
            loss = float((losses * weights).sum())
            if loss < best:
                best, chosen = loss, (temperature, bias)
    return chosen
