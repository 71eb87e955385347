"""Few-shot results over draws of supports: rows that say what was asked, and their table."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..data import InstanceDataset
from ..data.supports import LEAST_SHARE, draw_supports
from .few_shot import Asking, evaluate_few_shot, use_supports

SUPPORTS = ("right", "wrong")
_NUMBERS = ("AP", "AP50")


@dataclass(frozen=True)
class Questions:
    """What a model is asked. names: the classes. part: what they are called in the table, such as novel. shots, seeds:
    of the supports. supports: right, or wrong: those of another class, without which no number means that the supports
    did anything."""

    names: Sequence[str]
    part: str = "novel"
    shots: Sequence[int] = (1, 5)
    seeds: Sequence[int] = (0, 1, 2)
    askings: Sequence[Asking] = (Asking("open"), Asking("present"))
    supports: Sequence[str] = SUPPORTS
    least_share: float = LEAST_SHARE
    record: dict[str, Any] = field(default_factory=dict)


def few_shot_rows(
    model: Any, processor: Any, pool: InstanceDataset, dataset: InstanceDataset, questions: Questions, **options: Any
) -> Iterator[dict[str, Any]]:
    """One row a draw of supports, protocol and kind of supports, as soon as it is known.

    pool: where supports are drawn from; dataset: what is evaluated, other images. options: of `evaluate_model`. Raises
    DataError when an image of `dataset` holds a support.
    """
    for seed in questions.seeds:
        most = draw_supports(pool, questions.names, max(questions.shots), seed, questions.least_share)
        most.refuse_overlap(dataset)
        for shots in questions.shots:
            supports = most.fewer(shots)
            for kind in questions.supports:
                use_supports(model, processor, supports, wrong=seed if kind == "wrong" else None)
                found = evaluate_few_shot(model, processor, dataset, questions.askings, progress=False, **options)
                for metrics in found:
                    yield {
                        **questions.record,
                        "conditioning": model.config.conditioning,
                        "protocol": metrics["protocol"],
                        "ways": metrics["ways"],
                        "part": questions.part,
                        "classes": len(questions.names),
                        "shots": shots,
                        "seed": seed,
                        "supports": kind,
                        "supports_hash": supports.hash,
                        "metrics": {name: metrics[name] for name in ("AP", "AP50", "AP75")},
                        "per_class": metrics["per_class"],
                        "images": metrics["num_images"],
                    }


def few_shot_table(rows: Iterable[dict[str, Any]], by: Sequence[str] = ("model",)) -> str:
    """Markdown: a line for every arm (`by`), protocol and part, AP / AP50 of right and wrong supports in per cent, mean
    and, over several seeds, deviation. The best number of right supports of a column is set in bold."""
    rows = list(rows)
    shots = sorted({row["shots"] for row in rows})
    kinds = [kind for kind in SUPPORTS if any(row["supports"] == kind for row in rows)]
    columns = [(count, kind) for count in shots for kind in kinds]
    head = [*by, "asked", "classes", *(f"K = {count}, {kind}" for count, kind in columns), "seeds"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * (len(by) + 2) + "---:|" * (len(columns) + 1)]

    def arm_of(row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(str(row.get(name, "")) for name in by)

    asked = dict.fromkeys((row["part"], row["protocol"], row["ways"]) for row in rows)
    for part, protocol, ways in asked:
        own = [row for row in rows if (row["part"], row["protocol"], row["ways"]) == (part, protocol, ways)]
        arms = list(dict.fromkeys(map(arm_of, own)))
        found = {
            (arm, column): [
                row for row in own
                if arm_of(row) == arm and (row["shots"], row["supports"]) == column
            ]
            for arm in arms for column in columns
        }  # fmt: skip
        best = {
            column: max((_mean(found[arm, column], "AP") for arm in arms), default=-1.0)
            for column in columns if column[1] == "right"
        }  # fmt: skip
        for arm in arms:
            cells = [_cell(found[arm, column], best.get(column)) for column in columns]
            seeds = len({row["seed"] for row in own if arm_of(row) == arm})
            lines.append("| " + " | ".join([*arm, Asking(protocol, ways).text, part, *cells, str(seeds)]) + " |")
    return "\n".join(lines)


def _mean(rows: Sequence[dict[str, Any]], name: str) -> float:
    values = [row["metrics"][name] for row in rows if row["metrics"][name] is not None]
    return statistics.mean(values) if values else -1.0


def _cell(rows: Sequence[dict[str, Any]], best: float | None) -> str:
    if not rows or _mean(rows, "AP") < 0:
        return "-"
    texts = []
    for name in _NUMBERS:
        values = [100 * row["metrics"][name] for row in rows if row["metrics"][name] is not None]
        spread = f" ({statistics.stdev(values):.1f})" if len(values) > 1 else ""
        texts.append(f"{statistics.mean(values):.1f}{spread}")
    text = " / ".join(texts)
    return f"**{text}**" if best is not None and _mean(rows, "AP") == best else text
