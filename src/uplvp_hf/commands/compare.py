"""`uplvp compare`: learning curves and a table of several runs, mean and deviation over seeds."""

from __future__ import annotations

import argparse
import glob
from collections.abc import Sequence

from ..models.errors import UserError
from ._terminal import verb


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="uplvp compare",
        description="Learning curves and a table of several runs. Runs whose settings differ in the seeds only are one "
        "arm: its mean and standard deviation (n - 1) are shown.",
    )
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="*", help="folder of a run, or the output folder of `uplvp evaluate`")
    add(
        "--arm",
        metavar="NAME=GLOB",
        action="append",
        default=[],
        help="an arm by name and the folders of its runs, such as --arm 'scratch=runs/scratch_*'; repeatable",
    )
    add("--output", metavar="DIR", default="runs/compare", help="folder of page, figure and tables (runs/compare)")
    add(
        "--metric",
        help="AP (default), AP50, AP75, AP_S, AP_M, AP_L, AR100, ... as in metrics.json; mIoU (default), mAcc, aAcc of "
        "semantic segmenters",
    )
    add(
        "--x", choices=("epochs", "steps", "seconds"), default="epochs", help="the axis of the curves (default: epochs)"
    )
    add("--force", action="store_true", help="compare runs that were evaluated on different data, and say so")
    add("--verbose", action="store_true", help="also where in the code an error arose")
    return parser


def _compare(arguments: argparse.Namespace) -> None:
    arms = read_arms(arguments.arm)

    from uplvp_hf.evaluation.compare import compare_runs
    from uplvp_hf.evaluation.compare_page import markdown_table, write_comparison

    comparison = compare_runs(arguments.runs, arms, arguments.metric, arguments.x, arguments.force)
    written = write_comparison(comparison, arguments.output)
    print(markdown_table(comparison))
    print(f"Written: {', '.join(map(str, written))}")


def read_arms(words: Sequence[str]) -> dict[str, list[str]]:
    """{name: folders} of NAME=GLOB words. Raises UserError for other words, a name twice and a glob without match."""
    arms: dict[str, list[str]] = {}
    for word in words:
        name, equals, pattern = word.partition("=")
        if not equals or not name:
            raise UserError(f"--arm {word}: write NAME=GLOB, such as --arm 'scratch=runs/scratch_*'")
        if name in arms:
            raise UserError(f"--arm {name} is given twice")
        arms[name] = sorted(glob.glob(pattern))
        if not arms[name]:
            raise UserError(f"--arm {word}: no folder matches {pattern}")
    return arms


main = verb("compare", make_parser, _compare)
