"""What to do on the data of a benchmark, from its rows: which start, whether to pre-train, whether to use a teacher,
and what would help most next. Where the seeds differ as much as the arms, nothing is advised."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .claims import LEVEL, Verdict
from .rows import labels_text, row_metric, row_value

_ONE_SEED = (
    "With one seed an arm, a difference cannot be told from chance, so nothing is advised: go on with `--seeds 0 1 2` "
    "or more."
)
Rows = Sequence[dict[str, Any]]
Runs = dict[int, float]
"""The main metric (0 to 1) by seed, of one arm with one number of labels."""


@dataclass
class Comparison:
    """Two arms, each the best of its side by the mean over seeds, with one number of labels.

    verdict: of their paired difference, `by_seed`. choices: from how many arms the one that is ahead was chosen; the
    p-value is multiplied by it (Bonferroni), as the best of many arms is ahead by chance alone.
    """

    verdict: Verdict
    by_seed: Runs
    ours: float
    theirs: float
    choices: int

    @property
    def p_value(self) -> float | None:
        single = self.verdict.p_value
        return None if single is None else min(1.0, single * self.choices)

    @property
    def is_decided(self) -> bool:
        return self.p_value is not None and self.p_value <= LEVEL

    def numbers(self, metric: str) -> str:
        """`full 36.8 against scratch total 35.3 AP with 10 labels a class: +1.6 over 3 seeds, p = 0.53`."""
        one = self.verdict
        count = len(one.differences)
        p_value = "one seed, which says nothing about chance" if self.p_value is None else f"p = {self.p_value:.2g}"
        return (
            f"`{one.better}` {100 * self.ours:.1f} against `{one.worse}` {100 * self.theirs:.1f} {metric} with "
            f"{labels_text(one.labels_per_class)}, {100 * one.mean:+.1f} over {count} seed{'s' * (count > 1)}, "
            f"{p_value}"
        )


def advise(rows: Rows) -> str:
    """Sentences for a person: what to do, what would help most next, and what these runs cannot tell.

    Compared are the best arms of both sides by their means over the seeds that both have, among those with the most
    seeds. Of several numbers of labels that one is taken for which the second side has the most arms (so that equal
    steps in all count, where they were run); of several such, the largest. A difference counts at p <= 0.05 (paired
    t-test over seeds, times the number of arms that the better one was chosen from). "" for rows of which no two can be
    compared.
    """
    usable = [row for row in rows if row_value(row) is not None and not row["class_agnostic"] and row["finetune"]]
    if not usable:
        return ""
    metric = row_metric(usable)
    do, unknown = [], []
    found = _questions(usable)
    if found and all(compared.p_value is None for compared, *_ in found):
        return _ONE_SEED
    for compared, yes, no in found:
        if compared.is_decided:
            do.append(f"{yes if compared.verdict.mean > 0 else no} ({compared.numbers(metric)})")
        else:
            unknown.append(f"whether to {yes} ({compared.numbers(metric)})")
    sentences = []
    if do:
        sentences.append(f"On this data: {'; '.join(do)}.")
    if following := _next(usable, metric):
        sentences.append(following)
    if unknown:
        sentences.append(
            f"Within the noise of these runs, so that nothing is advised: {'; '.join(unknown)}. More seeds "
            "(`--seeds 0 1 2 3 4`) or more validation images would tell more."
        )
    return " ".join(sentences)


def _questions(rows: Rows) -> list[tuple[Comparison, str, str]]:
    """What can be compared, and what to do where the first side is ahead and where it is behind."""
    segmenters = list(dict.fromkeys(row["segmenter"] for row in rows))
    best = max(segmenters, key=lambda name: _best_mean([row for row in rows if row["segmenter"] == name]))
    own = [row for row in rows if row["segmenter"] == best]
    found: list[tuple[Comparison | None, str, str]] = []
    for other in segmenters:
        if other != best:
            compared = _compare(
                rows, lambda row: row["segmenter"] == best, lambda row, it=other: row["segmenter"] == it
            )
            found.append((compared, f"take {best} rather than {other}", f"take {other} rather than {best}"))
    pretrained = _compare(
        own,
        lambda row: bool(row.get("labels")) and not has_teacher(row),
        lambda row: not row.get("labels") and not has_teacher(row),
    )
    found.append((pretrained, "pre-train on the unlabeled images", "do not pre-train"))
    teacher = _compare(own, has_teacher, lambda row: not has_teacher(row))
    found.append((teacher, "fine-tune with a teacher on the unlabeled images", "fine-tune without a teacher"))
    return [(compared, yes, no) for compared, yes, no in found if compared is not None]


def has_teacher(row: dict[str, Any]) -> bool:
    """Whether a run learned from a teacher's findings on unlabeled images."""
    return bool(row.get("pseudo"))


def _runs(rows: Rows) -> dict[tuple[str, str, int | str], Runs]:
    found: dict[tuple[str, str, int | str], Runs] = {}
    for row in rows:
        found.setdefault((row["segmenter"], row["arm"], row["labels_per_class"]), {})[row["seed"]] = row_value(row)
    return found


def _best_mean(rows: Rows) -> float:
    return max(map(_mean, _runs(rows).values()))


def _images(rows: Rows, count: int | str) -> int:
    """Labeled images of runs with so many labels; 0 where the rows do not tell."""
    return max((row.get("images") or {}).get("train", 0) for row in rows if row["labels_per_class"] == count)


def _compare(rows: Rows, ours: Callable[[dict], bool], theirs: Callable[[dict], bool]) -> Comparison | None:
    """The best arms of the rows of both sides, by their mean over the seeds that both have."""
    sides = [[row for row in rows if side(row)] for side in (ours, theirs)]
    shared = set.intersection(*({row["labels_per_class"] for row in side} for side in sides))
    arms = {count: len({row["arm"] for row in sides[1] if row["labels_per_class"] == count}) for count in shared}
    for count in sorted(shared, key=lambda one: (-arms[one], -_images(rows, one))):
        first, second = (_runs([row for row in side if row["labels_per_class"] == count]) for side in sides)
        pairs = {(one, two): first[one].keys() & second[two].keys() for one in first for two in second}
        pairs = {pair: sorted(seeds) for pair, seeds in pairs.items() if seeds}
        if pairs:
            both = {
                pair: _mean({s: first[pair[0]][s] + second[pair[1]][s] for s in found}) for pair, found in pairs.items()
            }
            one, two = max(pairs, key=lambda pair: (len(pairs[pair]), both[pair]))  # two seeds are soon ahead of three
            mine, others = ({seed: runs[seed] for seed in pairs[one, two]} for runs in (first[one], second[two]))
            by_seed = {seed: mine[seed] - others[seed] for seed in mine}
            names = [key[1] if one[1] != two[1] else f"{key[0]}, {key[1]}" for key in (one, two)]
            verdict = Verdict("", names[0], names[1], one[0], count, list(by_seed.values()))
            choices = len(first if verdict.mean > 0 else second)
            return Comparison(verdict, by_seed, _mean(mine), _mean(others), choices)
    return None


def _mean(runs: Runs) -> float:
    return statistics.mean(runs.values())


def _next(rows: Rows, metric: str) -> str:
    """Whether more labels or more unlabeled images would help more: what a doubling of each has brought here, and a
    winner only where the two differ by more than noise."""
    labels, images = _gain_of_labels(rows), _gain_of_images(rows)
    said = []
    if labels is not None:
        said.append(f"twice the labels by {100 * _mean(labels.by_seed):+.1f} ({labels.how})")
    if images is not None:
        said.append(f"twice the unlabeled images by about {100 * _mean(images.by_seed):+.1f} ({images.how})")
    if not said:
        return ""
    measured = f"{metric} was changed by: {'; '.join(said)}."
    if labels is None or images is None:
        return f"What more data would bring was measured in part: {measured}"
    seeds = sorted(labels.by_seed.keys() & images.by_seed.keys())
    verdict = Verdict("", "", "", "", 0, [labels.by_seed[seed] - images.by_seed[seed] for seed in seeds] or [0.0])
    better, name = (labels, "more labels") if verdict.mean > 0 else (images, "more unlabeled images")
    if verdict.p_value is None or verdict.p_value > LEVEL or _mean(better.by_seed) <= 0:
        return f"What would help most next cannot be told from these runs: {measured}"
    return f"What would help most next is {name} (p = {verdict.p_value:.2g}), if it goes on as it did: {measured}"


@dataclass
class _Gain:
    """What a doubling brought, by seed, and how it was found."""

    by_seed: Runs
    how: str


def _gain_of_labels(rows: Rows) -> _Gain | None:
    """Of the labeled images, from the two largest numbers of labels of the best arm that has several."""
    runs = _runs(rows)
    arms: dict[tuple[str, str], list[int | str]] = {}
    for segmenter, arm, count in runs:
        arms.setdefault((segmenter, arm), []).append(count)
    several = {
        key: sorted(counts, key=lambda one: _images(rows, one)) for key, counts in arms.items() if len(counts) > 1
    }
    if not several:
        return None
    segmenter, arm = max(several, key=lambda one: _mean(runs[one[0], one[1], several[one][-1]]))
    fewer, more = several[segmenter, arm][-2:]
    small, large = runs[segmenter, arm, fewer], runs[segmenter, arm, more]
    seeds = sorted(small.keys() & large.keys())
    if not seeds or not 0 < _images(rows, fewer) < _images(rows, more):
        return None
    doublings = math.log2(_images(rows, more) / _images(rows, fewer))
    by_seed = {seed: (large[seed] - small[seed]) / doublings for seed in seeds}
    return _Gain(by_seed, f"`{arm}`, {labels_text(fewer)} to {labels_text(more)}")


def _gain_of_images(rows: Rows) -> _Gain | None:
    """Of the images of pre-training, as if every doubling from one image on had brought the same: no run has more."""
    compared = _compare(rows, lambda row: bool(row.get("labels")), lambda row: not row.get("labels"))
    images = max((row["pretrain"].get("images", 0) for row in rows if row.get("pretrain")), default=0)
    if compared is None or images < 2:
        return None
    by_seed = {seed: value / math.log2(images) for seed, value in compared.by_seed.items()}
    return _Gain(by_seed, f"what pre-training on {images} of them brought, shared out over their doublings")
