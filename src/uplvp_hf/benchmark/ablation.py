"""One table of an ablation that is read at two places: as pre-trained, without any human label, and fine-tuned.

An arm `NAME alone` (`steps: 0` in the recipe) is the first reading of the arm `NAME`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .claims import Verdict
from .figures import mean_text

Rows = Sequence[dict[str, Any]]
ALONE = " alone"
AGNOSTIC = " agnostic"


def ablation_table(rows: Rows, base: str) -> str:
    """Markdown: AP in per cent, mean and deviation over seeds, and what every arm differs by from `base`, paired over
    the seeds that both have: mean ± standard error, and the p-value of the paired t-test.

    Arms named `... agnostic` are compared with `BASE agnostic`; their first reading is class-agnostic AP.
    """
    lines = [
        "| segmenter | arm | no human label | difference | fine-tuned | difference | seeds |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for segmenter in dict.fromkeys(row["segmenter"] for row in rows):
        own = [row for row in rows if row["segmenter"] == segmenter]
        for arm in dict.fromkeys(row["arm"].removesuffix(ALONE) for row in own):
            other = base + AGNOSTIC if arm.endswith(AGNOSTIC) else base
            cells = []
            for suffix in (ALONE, ""):
                mine = [row for row in own if row["arm"] == arm + suffix]
                theirs = [row for row in own if row["arm"] == other + suffix]
                cells += [mean_text(mine, "AP"), "" if arm == other else _difference(mine, theirs)]
            seeds = len({row["seed"] for row in own if row["arm"].removesuffix(ALONE) == arm})
            lines.append(f"| {segmenter} | {arm} | {' | '.join(cells)} | {seeds} |")
    return "\n".join(lines)


def _difference(ours: Rows, theirs: Rows) -> str:
    mine, others = ({row["seed"]: row["metrics"]["AP"] for row in rows} for rows in (ours, theirs))
    values = [mine[seed] - others[seed] for seed in sorted(mine.keys() & others.keys())]
    if not values:
        return "-"
    verdict = Verdict("", "", "", "", 0, values)
    if verdict.error is None or verdict.p_value is None:
        return f"{100 * verdict.mean:+.1f}"
    return f"{100 * verdict.mean:+.1f} ± {100 * verdict.error:.1f}, p = {verdict.p_value:.2f}"
