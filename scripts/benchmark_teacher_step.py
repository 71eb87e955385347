"""Time and memory of a step of teacher-student training over a supervised step of the same batch.

Whole steps of the training loop, with loading, matching, the teacher and the optimizer, of a randomly initialized
Mask2Former on generated scenes. Called by `benchmark_train_step.py --teacher`.

Commands:

    OMP_NUM_THREADS=1 python scripts/benchmark_train_step.py --teacher --size 256 --rounds 5
    OMP_NUM_THREADS=1 python scripts/benchmark_teacher_step.py teacher --size 256   # bytes that two steps add

Steps alternate in one process; `teacher_ratio` is the median over the rounds of elapsed time, `teacher_processor_ratio`
of processor time. `teacher_memory_ratio` compares the growth of the resident set over the first two steps, each in a
process of its own. The thresholds of the teacher are 0, so that a random network finds something.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

WARM_UP = 1


def compare_teacher(arguments: argparse.Namespace) -> dict[str, float]:
    """Ratios of a teacher-student step to a supervised one."""
    with tempfile.TemporaryDirectory() as folder:
        runs = {kind: steps_of(kind, arguments, Path(folder)) for kind in ("supervised", "teacher")}
        elapsed, busy = alternate(runs, arguments.rounds)
    result = {
        name: median(one / other for one, other in zip(times["teacher"], times["supervised"], strict=True))
        for name, times in (("teacher_ratio", elapsed), ("teacher_processor_ratio", busy))
    }
    result["supervised_seconds"] = median(busy["supervised"])
    if not arguments.no_memory:
        peaks = {kind: peak_of(kind, arguments) for kind in runs}
        result["teacher_memory_ratio"] = peaks["teacher"] / peaks["supervised"]
        result["supervised_mib"] = peaks["supervised"] / 2**20
    return result


def alternate(runs: dict[str, Iterator[None]], rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Elapsed and processor seconds of the steps of every run, which take turns."""
    elapsed: dict[str, list[float]] = {kind: [] for kind in runs}
    busy: dict[str, list[float]] = {kind: [] for kind in runs}
    for turn in range(WARM_UP + rounds):
        for kind, steps in runs.items():
            start, processor = time.perf_counter(), time.process_time()
            next(steps)
            if turn >= WARM_UP:
                elapsed[kind].append(time.perf_counter() - start)
                busy[kind].append(time.process_time() - processor)
    return elapsed, busy


def steps_of(kind: str, arguments: argparse.Namespace, folder: Path) -> Iterator[None]:
    """Yields after every step of a run of this kind."""
    from uplvp_hf.data.synthetic import write_scenes

    for seed, name in enumerate(("labeled", "unlabeled")):
        if not (folder / name).is_dir():
            write_scenes(folder / name, 16, seed=seed, size=arguments.size)
    return run_steps(settings_of(kind, arguments, folder))


def run_steps(settings: Any) -> Iterator[None]:
    """Yields after every step of a run with these settings."""
    from uplvp_hf.training.launch import make_accelerator
    from uplvp_hf.training.loop import _Run
    from uplvp_hf.training.task import task_of
    from uplvp_hf.training.unlabeled import build_views, load_unlabeled

    task = task_of(settings)
    settings = task.with_image_settings(settings)
    accelerator = make_accelerator(settings)
    rows, _ = task.data(settings)
    model = task.model(settings, rows)
    views = build_views(settings, load_unlabeled(settings.data, rows, None))
    run: Any = _Run(settings, task, accelerator, model, task.samples(settings, rows, None), views, None, False)
    for step, micro_batches in run._batches(0):
        run._step(step, micro_batches)
        yield


def settings_of(kind: str, arguments: argparse.Namespace, folder: Path) -> Any:
    from uplvp_hf.training.config import load_settings

    words = [f"data.train={folder / 'labeled'}", f"data.size={arguments.size}", f"output={folder / kind}"]
    words += [f"optim.batch_size={arguments.batch}", "optim.steps=1000", f"optim.ema={0.999}"]
    words += [
        f"model.segmenter.num_queries={arguments.queries}",
        f"model.segmenter.train_num_points={arguments.points}",
    ]
    if kind == "teacher":
        words += [f"data.unlabeled={folder / 'unlabeled'}", "teacher.burn_in=0", "teacher.ramp=0"]
        words += ["teacher.class_threshold=0", "teacher.mask_threshold=0"]
    return load_settings(["parts/mask2former_r50"], words)


def peak_of(kind: str, arguments: argparse.Namespace) -> int:
    """Bytes that the first two steps of a fresh process add."""
    options = {name: getattr(arguments, name) for name in ("size", "batch", "queries", "points")}
    command = [sys.executable, __file__, kind, *(f"--{name}={value}" for name, value in options.items())]
    output = subprocess.run(command, capture_output=True, text=True, check=False)
    if output.returncode:
        raise SystemExit(output.stderr)
    return int(output.stdout.split()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description="Prints the bytes that two steps add; see the head of the file.")
    parser.add_argument("kind", choices=("supervised", "teacher"))
    for name, value in (("size", 512), ("batch", 2), ("queries", 100), ("points", 12544)):
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    from benchmark_train_step import resident_peak

    with tempfile.TemporaryDirectory() as folder:
        steps = steps_of(arguments.kind, arguments, Path(folder))
        before = resident_peak(restart=True)
        next(steps), next(steps)
        print(resident_peak() - before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
