"""`uplvp demo`: the benchmark recipe `demo`, on generated scenes, with its table and page."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace
from importlib import resources
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from ..benchmark.plan import Job, make_plan
from ..benchmark.recipe import Benchmark, load_benchmark
from ..benchmark.rows import read_rows, training_seconds
from ..benchmark.run import claim, do_job, run_benchmark
from ..benchmark.sources import prepare_sources
from ..models.errors import UserError
from ..training.config import load_settings
from ..training.loop import train

_LARGEST = 10


def synthetic_clip_path() -> str:
    """Folder of the small CLIP that ships with the package (see its README for how it was trained)."""
    return str(resources.files("uplvp_hf") / "assets" / "synthetic_clip")


def demo_benchmark(seed: int = 0, scale: float = 1.0) -> Benchmark:
    """The recipe `demo`. scale: factor on images and steps, for a quick look."""
    if not 0 < scale <= _LARGEST:
        raise UserError(f"--scale must be above 0 and at most {_LARGEST}, got {scale}.")
    whole = load_benchmark("demo", [f"seeds=[{seed}]"])
    counts = {name: max(4, round(count * scale)) for name, count in whole.data.scenes.items()}
    words = [f"seeds=[{seed}]", *(f"data.scenes.{name}={count}" for name, count in counts.items())]
    if scale != 1:
        for stage, recipe in (("pretrain", "scenes_pretrain"), ("finetune", "scenes_finetune")):
            usual = load_settings(recipe).optim
            steps = max(4, round(usual.steps * scale))
            words += [f"{stage}.optim.steps={steps}", f"{stage}.optim.warmup={min(usual.warmup, steps // 4)}"]
    return load_benchmark("demo", words)


def run_demo(output: str = "runs/demo", seed: int = 0, scale: float = 1.0) -> list[dict]:
    """Runs what is not finished, prints the table, leaves `report.html`, `rows.jsonl` and `model/` in `output`.

    Returns the rows. Raises UserError when `output` holds something else, and as `run_benchmark` does.
    """
    _quiet()
    began, folder, benchmark = time.perf_counter(), Path(output), demo_benchmark(seed, scale)
    counts = benchmark.data.scenes
    print(
        f"Scenes: {counts['unlabeled']} unlabeled, {counts['train']} to label some of, {counts['val']} to test on.",
        flush=True,
    )
    run_benchmark(benchmark, output, workers=min(3, os.cpu_count() or 1), progress=False)
    rows = read_rows(folder / "rows.jsonl")
    last = make_plan(benchmark, folder, prepare_sources(benchmark, folder))[-1]
    shutil.copytree(folder / last.folder, folder / "model", dirs_exist_ok=True)
    print_table([row for row in rows if row["seed"] == seed], benchmark)
    print(f"\n{time.perf_counter() - began:.0f} s in all. Report: {folder}/report.html  Model: {folder}/model")
    return rows


def print_table(rows: list[dict], benchmark: Benchmark) -> None:
    """The closing table: mask AP and AP50 in per cent, seconds of training; a star at the best."""
    best = max(row["metrics"]["AP"] for row in rows)
    width = max(len(benchmark.arms[row["arm"]].about) for row in rows)
    print(f"\n{'':{width}}  {'AP':>5}  {'AP50':>5}  {'seconds':>7}")
    for row in rows:
        metrics, star = row["metrics"], " *" if row["metrics"]["AP"] == best else ""
        about, seconds = benchmark.arms[row["arm"]].about, training_seconds(row)
        print(f"{about:{width}}  {100 * metrics['AP']:5.1f}  {100 * metrics['AP50']:5.1f}  {seconds:7.0f}{star}")


def pretrain_default(output: str = "runs/pretrain_default", scale: float = 1.0) -> None:
    """What `scripts/pretrain.py` does without arguments: pseudo-label generated scenes and pre-train on them."""
    _quiet()
    from accelerate import PartialState

    from ..training.launch import several_on_cpu

    state, folder, benchmark = PartialState(cpu=several_on_cpu()), Path(output), demo_benchmark(scale=scale)
    if state.is_main_process:
        print("No settings given: running the embedded default, pre-training on generated scenes labeled by the small")
        print(f"CLIP of the package. Output: {folder}. For your own images see `uplvp pretrain --help`.", flush=True)
        claim(benchmark, folder)
        do_job(benchmark, folder, _first(benchmark, folder, "label"))
    state.wait_for_everyone()
    given = _first(benchmark, folder, "pretrain").settings
    assert given is not None  # only jobs that train have settings; these do
    settings = replace(given, output=str(folder / "model"))
    result = train(settings, resume=(folder / "model" / "settings.json").is_file())
    if state.is_main_process:
        print(f"{settings.optim.steps} steps in {result.seconds:.0f} s. Model: {settings.output}")


def _first(benchmark: Benchmark, folder: Path, kind: str) -> Job:
    jobs = make_plan(benchmark, folder, prepare_sources(benchmark, folder))
    return next(job for job in jobs if job.kind == kind)


def _quiet() -> None:
    """Our own lines only, and one core: several trainings run at a time."""
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
