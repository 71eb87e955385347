"""Named vectors as a classifier: similarity to the examples of each class and to the ground."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

# Tried for the temperature and for what is added to the similarity with the ground, whichever pair makes the
# left-out examples and ground likeliest.
TEMPERATURES = torch.logspace(-2, 0, 41)
BIASES = torch.linspace(-0.5, 0.5, 41)


@dataclass(frozen=True)
class Calibration:
    """temperature, bias: similarities s of the classes and b of the ground give softmax([s, b + bias] / temperature).
    floor: least similarity to its class that a mask needs; anything below is like none of the examples. most_ground:
    a mask whose probability of being ground is above this is no object."""

    temperature: float = 0.1
    bias: float = 0.0
    floor: float = -1.0
    most_ground: float = 1.0


class Prototypes:
    """Examples of classes and of the ground, as unit vectors.

    Args:
        vectors: (N, D) of the examples. labels: (N,) int64 in 0..K-1, at least one of each class.
        groups: (N,) the image that each example is from.
        ground: (M, D) of what is no object, and its images `ground_groups` (M,).
        neighbors: examples of a class, the most similar ones, whose similarities are averaged; None: all of them.

    Similarities are cosines after the mean of the class means (and of the ground's mean) is subtracted: features of
    one network share a large common part, which says nothing about the class. Ground that is more similar to a class
    than half of its own left-out examples are shows an object that nobody outlined, and is left out. Wherever examples
    and ground are compared with each other, those of one image are not: they share its surroundings and its light.
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
        self.vectors, self.ground, self.ground_groups = self._centered(vectors), self._centered(ground), ground_groups
        if len(ground):
            own = self.leave_one_out()
            usual = torch.stack([own[labels == k, k].nanmedian() for k in range(self.classes)])
            keep = ~(self._ground_to_classes() > usual).any(dim=1)  # what cannot be compared (NaN) stays
            self.ground, self.ground_groups = self.ground[keep], ground_groups[keep]

    def similarities(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """To each class and to the ground: (B, D) -> (B, K), (B,). Without ground the latter is -inf."""
        vectors = self._centered(vectors)
        return self._to_classes(vectors @ self.vectors.T), self._to_ground(vectors @ self.ground.T)

    def name(self, vectors: torch.Tensor, calibration: Calibration) -> tuple[torch.Tensor, torch.Tensor]:
        """The class of each vector and its probability among the classes and the ground: (B, D) -> (B,), (B,).
        The label is -1 where the class is less similar than `calibration.floor`, or the ground too likely."""
        classes, ground = self.similarities(vectors)
        logits = torch.cat([classes, ground[:, None] + calibration.bias], dim=1) / calibration.temperature
        probabilities = logits.softmax(dim=1)
        confidences, labels = probabilities[:, :-1].max(dim=1)
        unlike = classes.gather(1, labels[:, None])[:, 0] < calibration.floor
        return labels.masked_fill(unlike | (probabilities[:, -1] > calibration.most_ground), -1), confidences

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

    def calibrate(self) -> Calibration:
        """Temperature and bias that make the left-out examples and ground likeliest. The floor lies one standard
        deviation below the least similarity of a left-out example to its class (of N examples, one in N + 1 new ones
        would be below that least itself), or three below their mean. Masks that are ground with a probability of .8 are
        no objects.

        Examples that are the only ones of their class have nothing to be compared with. Without two others, nothing
        is known: the defaults of `Calibration` name every mask.
        """
        scores = self.leave_one_out()
        own = scores[torch.arange(len(scores)), self.labels]
        own = own[~own.isnan()]
        if len(own) < 2:
            return Calibration()
        rows, targets = scores, self.labels
        if len(self.ground):
            apart = self.groups[:, None] != self.ground_groups
            to_ground = self._to_ground(_only(apart, self.vectors @ self.ground.T))
            apart = self.ground_groups[:, None] != self.ground_groups
            among = self._to_ground(_only(apart, self.ground @ self.ground.T))
            others = torch.cat([self._ground_to_classes(), among[:, None]], dim=1)
            rows = torch.cat([torch.cat([rows, to_ground[:, None]], dim=1), others])
            targets = torch.cat([targets, torch.full((len(others),), self.classes)])
        known = ~rows.isnan().any(dim=1)
        temperature, bias = _likeliest(rows[known], targets[known], self.classes)
        floor = min(own.min() - own.std(), own.mean() - 3 * own.std())
        return Calibration(temperature, bias, float(floor), most_ground=0.8)

    def _centered(self, vectors: torch.Tensor) -> torch.Tensor:
        return F.normalize(vectors - self.center, dim=-1)

    def _ground_to_classes(self) -> torch.Tensor:
        """(M, K) of the ground and the examples of other images."""
        apart = self.ground_groups[:, None] != self.groups
        return self._to_classes(_only(apart, self.ground @ self.vectors.T))

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


def _only(keep: torch.Tensor, cosines: torch.Tensor) -> torch.Tensor:
    return cosines.masked_fill(~keep, torch.nan)


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
    best, chosen = torch.inf, (Calibration.temperature, Calibration.bias)
    for bias in BIASES.tolist() if rows.shape[1] > classes else [0.0]:
        shifted = torch.cat([rows[:, :classes], rows[:, classes:] + bias], dim=1)
        for temperature in TEMPERATURES.tolist():
            losses = F.cross_entropy(shifted / temperature, targets, reduction="none", label_smoothing=0.05)
            loss = float((losses * weights).sum())
            if loss < best:
                best, chosen = loss, (temperature, bias)
    return chosen
