"""Whether rows of a benchmark support what the papers claim: differences between two arms, paired over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

from .prompt_claims import PROMPT_CLAIMS
from .rows import label_counts, labels_text, row_value
from .semantic import with_controls

LEVEL = 0.05
"""Largest p-value, two-sided, at which a difference counts."""

_NO_SPREAD = 1e-9  # differences that are equal to rounding

# What is claimed (SP and UPLVP, papers and released ablation settings; the last nineteen are ours), the arm that should
# be better, and the other. Arms go by the names that they have in the recipes of this folder.
CLAIMS = (
    ("pre-training beats the supervised backbone, equal fine-tuning steps", "full", "scratch"),
    ("pre-training beats the supervised backbone, equal total steps", "full", "scratch total"),
    ("a quarter of the fine-tuning steps beats the full schedule without pre-training", "full quarter", "scratch"),
    ("pseudo labels alone help", "pseudo", "scratch"),
    ("prompts add to pseudo labels", "prompts", "pseudo"),
    ("kernel supervision adds to prompts", "full", "prompts"),
    ("cosine matching is at least sequential", "full", "full sequential"),
    ("sequential matching is at least random", "full sequential", "full random"),
    ("cosine matching is at least random", "full", "full random"),
    ("names in the pseudo labels help", "full", "full agnostic"),
    ("pre-training on masks without names beats none", "full agnostic", "scratch"),
    ("keeping the class head helps", "full", "full new head"),
    ('starting all classes from "object" helps', "full agnostic spread", "full agnostic"),
    ("a moving average of the weights helps", "full average", "full"),
    ("mixing in the labels of pre-training helps fine-tuning", "mixed", "plain"),
    ("a lower rate than 1e-3 helps fine-tuning", "rate 3e-4", "plain"),
    ("a lower rate than 1e-3 helps mixed fine-tuning", "mixed rate 3e-4", "mixed"),
    ("a falling share helps mixed fine-tuning", "mixed falling", "mixed"),
    ("fine-tuning is at least the pre-trained model without a human label", "plain", "no human label"),
    ("mixed fine-tuning is at least the pre-trained model without a human label", "mixed", "no human label"),
    ("the measured share is at least none", "mixed measured", "plain"),
    ("the measured share is at least half", "mixed measured", "mixed"),
    (
        "fine-tuning by default is at least the pre-trained model without a human label",
        "mixed measured",
        "no human label",
    ),
    ("a teacher on unlabeled images helps", "teacher", "average"),
    ("a teacher on unlabeled images helps after pre-training", "pretrained teacher", "pretrained average"),
    ("pre-training helps before a teacher", "pretrained teacher", "teacher"),
    ("a teacher beats mixing in the labels of pre-training", "pretrained teacher", "pretrained mixed"),
    ("the teacher's masks help as prompts", "pretrained teacher prompts", "pretrained teacher"),
    ("mixing in the labels of pre-training helps beside a teacher", "pretrained teacher mixed", "pretrained teacher"),
)


@dataclass
class Verdict:
    """differences: AP or mIoU (0 to 1) of the better arm less that of the other, one a seed that both have."""

    claim: str
    better: str
    worse: str
    segmenter: str
    labels_per_class: int | str
    differences: list[float]

    @property
    def mean(self) -> float:
        return statistics.mean(self.differences)

    @property
    def error(self) -> float | None:
        """Standard error of the mean over seeds; None for one seed."""
        count = len(self.differences)
        return statistics.stdev(self.differences) / count**0.5 if count > 1 else None

    @property
    def p_value(self) -> float | None:
        """Of the paired t-test over seeds, two-sided; None for one seed."""
        if len(self.differences) < 2:
            return None
        if max(self.differences) - min(self.differences) < _NO_SPREAD:  # the statistic is infinite, or 0 / 0
            return 0.0 if abs(self.mean) >= _NO_SPREAD else 1.0
        return float(stats.ttest_rel(self.differences, [0.0] * len(self.differences)).pvalue)

    @property
    def word(self) -> str:
        """`supported` or `contradicted` where the p-value is at most `LEVEL`, else `undecided`, or `not contradicted`
        where the claim is "at least" and there are several seeds."""
        if self.p_value is None:
            return "undecided"
        if self.p_value > LEVEL:
            return "not contradicted" if " is at least " in self.claim else "undecided"
        return "supported" if self.mean > 0 else "contradicted"


def judge(rows: Sequence[dict[str, Any]]) -> list[Verdict]:
    """A verdict for every claim, segmenter and number of labels for which both arms have runs with the same seed.

    A model without any human label (0 labels a class) is compared with every number of labels; where it was pre-trained
    once for all seeds, with every seed.
    """
    found: dict[tuple[str, str, int | str], dict[int, float]] = {}
    for row in with_controls(rows):
        value = row_value(row)
        if value is not None and not row["class_agnostic"]:
            key = (row["segmenter"], row["arm"], row["labels_per_class"])
            found.setdefault(key, {})[row["seed"]] = value
    segmenters = sorted({row["segmenter"] for row in rows})
    places = [(segmenter, count) for segmenter in segmenters for count in label_counts(rows)]
    verdicts = []
    for claim, better, worse in (*CLAIMS, *PROMPT_CLAIMS):
        for segmenter, count in places:
            ours, theirs = found.get((segmenter, better, count), {}), found.get((segmenter, worse, count), {})
            if not theirs and (unlabeled := found.get((segmenter, worse, 0))):
                theirs = unlabeled if len(unlabeled) > 1 else dict.fromkeys(ours, next(iter(unlabeled.values())))
            seeds = sorted(set(ours) & set(theirs))
            if seeds:
                differences = [ours[seed] - theirs[seed] for seed in seeds]
                verdicts.append(Verdict(claim, better, worse, segmenter, count, differences))
    return verdicts


def claims_table(verdicts: Sequence[Verdict], metric: str = "AP") -> str:
    """Markdown: difference in points of the metric, its standard error, seeds in favor, p-value, verdict."""
    lines = [
        f"| claim | segmenter | labels | difference in {metric} | seeds in favor | p | verdict |",
        "|---|---|---|---:|---:|---:|---|",
    ]
    for one in verdicts:
        spread = "" if one.error is None else f" ± {100 * one.error:.1f}"
        won = f"{sum(value > 0 for value in one.differences)} of {len(one.differences)}"
        p_value = "-" if one.p_value is None else f"{one.p_value:.3f}" if one.p_value >= 0.0005 else "< 0.001"
        lines.append(
            f"| {one.claim} (`{one.better}` - `{one.worse}`) | {one.segmenter} | {labels_text(one.labels_per_class)} | "
            f"{100 * one.mean:+.1f}{spread} | {won} | {p_value} | {one.word} |"
        )
    return "\n".join(lines)
