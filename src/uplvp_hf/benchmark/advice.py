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
    "With one seed an arm, nothing tells a difference from chance, so nothing is advised: go on with `--seeds 0 1 2` "
    "or more."
)
Rows = Sequence[dict[str, Any]]
Runs = dict[int, float]
"""The main metric (0 to 1) by seed, of one arm with one number of labels."""


@dataclass
class Comparison:
    """Two arms, each the best of its side by the mean over seeds, with one number of labels.

    verdict: of their paired difference. choices: from how many arms the one that is ahead was chosen; the p-value is
    multiplied by it (Bonferroni), as the best of many arms is ahead by chance alone.
    """

    verdict: Verdict
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

    Compared are the means over seeds of the best arms of both sides, at the number of labels with the most arms of the
    other side (equal steps in all count, where they were run), and the largest of these. A difference counts at
    p <= 0.05 (paired t-test over seeds, times the number of arms that the better one was chosen from). "" for rows of
    which no two can be compared.
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
        pairs = [(one, two) for one in first for two in second if first[one].keys() & second[two].keys()]
        if pairs:
            one, two = max(pairs, key=lambda pair: _mean(first[pair[0]]) + _mean(second[pair[1]]))
            seeds = sorted(first[one].keys() & second[two].keys())
            mine, others = ({seed: runs[seed] for seed in seeds} for runs in (first[one], second[two]))
            names = [key[1] if one[1] != two[1] else f"{key[0]}, {key[1]}" for key in (one, two)]
            verdict = Verdict("", names[0], names[1], one[0], count, [mine[seed] - others[seed] for seed in seeds])
            choices = len(first if verdict.mean > 0 else second)
            return Comparison(verdict, _mean(mine), _mean(others), choices)
    return None


def _mean(runs: Runs) -> float:
    return statistics.mean(runs.values())


def _next(rows: Rows, metric: str) -> str:
    """Whether more labels or more unlabeled images would help more, by what a doubling of each has brought here."""
    gains = {}
    if (labels := _gain_of_labels(rows)) is not None:
        gains["more labels"] = labels
    if (images := _gain_of_images(rows)) is not None:
        gains["more unlabeled images"] = images
    if not gains:
        return ""
    best = max(gains, key=lambda name: gains[name][0])
    gain, _, decided = gains[best]
    said = [f"{name} by {100 * value[0]:+.1f} ({value[1]})" for name, value in gains.items()]
    measured = f"a doubling of each changed {metric} here: {'; '.join(said)}"
    if not decided or gain <= 0:
        return f"What would help most next cannot be told from these runs: {measured}."
    return f"What would help most next is {best}, if the next doubling brings what the last did: {measured}."


def _gain_of_labels(rows: Rows) -> tuple[float, str, bool] | None:
    """Gain of a doubling of the labeled images, how it was found, and whether it is more than noise."""
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
    verdict = Verdict("", "", "", segmenter, more, [large[seed] - small[seed] for seed in seeds])
    how = f"`{arm}`, {labels_text(fewer)} to {labels_text(more)}"
    return verdict.mean / doublings, how, verdict.p_value is not None and verdict.p_value <= LEVEL


def _gain_of_images(rows: Rows) -> tuple[float, str, bool] | None:
    """The same of the images of pre-training, as if every doubling from one image on had brought the same."""
    compared = _compare(rows, lambda row: bool(row.get("labels")), lambda row: not row.get("labels"))
    sizes = [row["pretrain"].get("images", 0) for row in rows if row["pretrain"]]
    if compared is None or not any(sizes):
        return None
    how = f"pre-training on {max(sizes)} of them, shared out over its doublings"
    return compared.verdict.mean / math.log2(max(2, max(sizes))), how, compared.is_decided
