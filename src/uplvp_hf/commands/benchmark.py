"""`uplvp benchmark`: does pre-training pay with few labels? Arms x seeds x segmenters, tables and figures.

    uplvp benchmark --data photos --output runs/benchmark
    uplvp benchmark --data photos --unlabeled more/ --labels-per-class 5 10 20 --seeds 0 1 2 --output runs/benchmark
    uplvp benchmark --recipe scenes_quick --output runs/quick
    uplvp benchmark --rows runs/benchmark/rows.jsonl --output figures     # tables and figures of rows that exist

A second call goes on where the first stopped; more seeds or labels may be asked for then.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..models.errors import UserError
from ._terminal import AGAIN, add_verbosity, verb

if TYPE_CHECKING:
    from ..benchmark.few_shot import FewShotBenchmark
    from ..benchmark.recipe import Benchmark


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="uplvp benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--recipe", metavar="R", help="YAML file, or the name of a shipped recipe (default with --data: photos_cpu)"
    )
    source.add_argument("--rows", metavar="FILE", nargs="+", help="run nothing: draw these rows.jsonl")
    add = parser.add_argument
    add("--output", metavar="DIR", required=True, help="runs, rows.jsonl, tables and figures")
    add("--data", metavar="DIR", help="folder with annotations/{train,val}.json and images/")
    add("--unlabeled", metavar="DIR", help="images to pre-train on (default: the training images)")
    add("--labels-per-class", type=int, nargs="+", metavar="N", help="labeled images of a class")
    add("--seeds", type=int, nargs="+", metavar="N")
    add("--arms", nargs="+", metavar="NAME", help="some of the recipe's only")
    add("--segmenters", nargs="+", metavar="NAME", help="some of the recipe's only")
    add("--var", action="append", default=[], metavar="NAME=VALUE", help="a variable of the recipe")
    add("--workers", type=int, default=1, help="processes, each with a job of its own (default: 1)")
    add("--plan", action="store_true", help="print the jobs and run nothing")
    add("words", nargs="*", metavar="section.key=value", help="settings of the benchmark")
    add_verbosity(parser)
    return parser


def _benchmark(arguments: argparse.Namespace) -> None:
    output = Path(arguments.output)
    if arguments.rows:
        from uplvp_hf.benchmark.figures import write_results
        from uplvp_hf.benchmark.rows import read_rows

        print(write_results([row for path in arguments.rows for row in read_rows(Path(path))], output))
        return
    from uplvp_hf.benchmark.run import run_benchmark, show_plan

    if not (arguments.recipe or arguments.data):
        raise UserError("give --recipe, or --data for the recipe photos_cpu, or --rows")
    if arguments.workers < 1:
        raise UserError("--workers must be at least 1")
    benchmark = _load(arguments)
    if getattr(benchmark, "kind", None) == "fewshot":
        return _few_shot(benchmark, output, arguments)
    if arguments.plan:
        print(show_plan(benchmark, output))
    else:
        print(run_benchmark(benchmark, output, arguments.workers, not arguments.quiet))


def _few_shot(benchmark: FewShotBenchmark, output: Path, arguments: argparse.Namespace) -> None:
    from uplvp_hf.benchmark.few_shot import few_shot_jobs, run_few_shot_benchmark

    if arguments.plan:
        print("\n".join(job.folder for job in few_shot_jobs(benchmark, output)))
    else:
        print(run_few_shot_benchmark(benchmark, str(output), not arguments.quiet))


def _load(arguments: argparse.Namespace) -> Benchmark | FewShotBenchmark:
    from uplvp_hf.benchmark.few_shot import FewShotBenchmark
    from uplvp_hf.benchmark.recipe import Benchmark, load_benchmark, read_benchmark

    variables = {}
    for word in arguments.var:
        name, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"--var {word} is not of the form NAME=VALUE")
        variables[name] = value
    if arguments.data:
        variables["data"] = arguments.data
    words = list(arguments.words)
    words += [f"data.unlabeled={arguments.unlabeled}"] if arguments.unlabeled else []
    words += [f"labels_per_class={arguments.labels_per_class}"] if arguments.labels_per_class else []
    words += [f"seeds={arguments.seeds}"] if arguments.seeds else []
    recipe = arguments.recipe or "photos_cpu"
    kind = FewShotBenchmark if read_benchmark(recipe)[1].get("kind") == "fewshot" else Benchmark
    return load_benchmark(recipe, words, variables, arguments.arms, arguments.segmenters, kind)


main = verb("benchmark", make_parser, _benchmark, AGAIN)
