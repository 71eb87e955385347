"""Runs the jobs of a benchmark, in one process or several; what is finished is not repeated, what broke off resumes."""

from __future__ import annotations

import fcntl
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ..files import write_json, write_text
from ..training.config import ConfigError
from .figures import write_results
from .plan import Job, make_plan
from .recipe import Benchmark, LabelSet
from .report import Report
from .rows import make_row, read_query_maps, write_rows
from .sources import prepare_sources

logger = logging.getLogger(__name__)

DONE = {"label": "finished.json", "pretrain": "training_summary.json", "finetune": "row.json", "evaluate": "row.json"}
_PAUSE = 2.0  # seconds between looks, while others do what a job needs


def run_benchmark(benchmark: Benchmark, output: str, workers: int = 1, progress: bool = True) -> str:
    """Runs what is not finished yet, with `workers` processes of one job each; returns tables and verdicts as Markdown.

    Several calls may share an output folder, also from several machines that share it: a job is locked while it runs.
    A job that fails is reported, what needs it is left out, the others go on. Writes `rows.jsonl`, one line a run, and
    what `write_results` draws, and `report.html`, which grows with every job.

    Raises ConfigError when the folder holds another benchmark or a job failed, and as `prepare_sources` does.
    """
    folder = Path(output)
    claim(benchmark, folder)
    with job_lock(folder / "locks" / "data", wait=True):
        sources = prepare_sources(benchmark, folder)
    jobs = make_plan(benchmark, folder, sources)
    for job in jobs:
        (folder / job.folder / "error.txt").unlink(missing_ok=True)
        _check_unchanged(benchmark, folder, job)
    _warn_of_left_out(benchmark)
    logger.info("%d jobs, %d of them finished.", len(jobs), sum(is_done(folder, job) for job in jobs))
    report = Report(benchmark, folder, jobs, sources)

    def look() -> None:
        report.update([job for job in jobs if is_done(folder, job)])

    if workers == 1:
        _work(benchmark, folder, jobs, progress, look)
    else:
        _work_together(benchmark, folder, jobs, workers, look)
    look()
    rows = write_rows(folder, jobs)
    text = write_results(rows, folder, read_query_maps(folder, jobs)) if rows else ""
    failed = [job.folder for job in jobs if has_failed(folder, job)]
    if failed:
        raise ConfigError(
            f"{len(failed)} of {len(jobs)} jobs failed: {', '.join(failed[:5])}. error.txt in their folders says why; "
            f"the same command tries them again. What is finished is in {folder / 'results.md'}."
        )
    unfinished = [job.folder for job in jobs if not is_done(folder, job)]
    if unfinished:
        raise ConfigError(
            f"{len(unfinished)} of {len(jobs)} jobs are not finished, as a process ended early (out of memory?): "
            f"{', '.join(unfinished[:5])}. The same command goes on."
        )
    return text


def _check_unchanged(benchmark: Benchmark, folder: Path, job: Job) -> None:
    """Raises ConfigError for a finished job that the benchmark now describes otherwise."""
    if not is_done(folder, job):
        return
    done = json.loads((folder / job.folder / DONE[job.kind]).read_text())
    if job.kind == "label":
        # Places of files do not count. Before the third word are `uplvp label` and the images.
        known, wanted = (
            {Path(word).name for word in words}
            for words in (done["command"][3:], label_words(benchmark.labels[job.label_set]))
        )
        changed = not wanted <= known
    else:
        changed = done.get("fingerprint", job.fingerprint) != job.fingerprint
    if changed:
        raise ConfigError(
            f"{folder / job.folder} was made with other settings than the benchmark has now: choose another output, or "
            "remove that folder to make it again."
        )


def _warn_of_left_out(benchmark: Benchmark) -> None:
    """Arms that none of the chosen numbers of labels and seeds is for."""
    left = [
        name
        for name, arm in benchmark.arms.items()
        if not set(arm.labels_per_class or benchmark.labels_per_class) & set(benchmark.labels_per_class)
        or not set(arm.seeds or benchmark.seeds) & set(benchmark.seeds)
    ]
    if left:
        logger.warning("Left out, as they are for other labels or seeds than those asked for: %s.", ", ".join(left))


def show_plan(benchmark: Benchmark, folder: Path) -> str:
    """The jobs, one a line, and what is finished of them. Makes the folder, and the data that is to be made."""
    claim(benchmark, folder)
    jobs = make_plan(benchmark, folder, prepare_sources(benchmark, folder))
    lines = [f"{'done' if is_done(folder, job) else '    '}  {job.kind:9} {job.folder}" for job in jobs]
    return "\n".join([*lines, f"{len(jobs)} jobs"])


def claim(benchmark: Benchmark, folder: Path) -> None:
    """Makes the folder this benchmark's own. More seeds, arms, labels and segmenters may be asked for later."""
    claim_folder(folder, {"name": benchmark.name, "data": benchmark.data.as_dict(), "validation": benchmark.validation})


def claim_folder(folder: Path, record: dict[str, Any]) -> None:
    """Makes the folder that of the benchmark with this record. Raises ConfigError when it is another's, or no one's."""
    marker = folder / "benchmark.json"
    if marker.is_file():
        if json.loads(marker.read_text()) != record:
            raise ConfigError(f"{folder} holds another benchmark, see {marker}: choose another output or remove it.")
    elif folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} holds something that is not a benchmark's: choose another --output.")
    write_json(marker, record)


def _work_together(benchmark: Benchmark, folder: Path, jobs: list[Job], workers: int, look: Callable[[], None]) -> None:
    context = multiprocessing.get_context("spawn")
    gpus = _gpus() if benchmark.processes == 1 else []
    processes = [
        context.Process(target=_worker, args=(benchmark, folder, jobs, gpus[number % len(gpus)] if gpus else None))
        for number in range(workers)
    ]
    for process in processes:
        process.start()
    try:
        while alive := [process for process in processes if process.is_alive()]:
            alive[0].join(_PAUSE)
            look()
        for process in processes:
            process.join()
    except KeyboardInterrupt:
        for process in processes:
            process.terminate()
        raise


def _gpus() -> list[str]:
    """Names of the GPUs that this process sees, as CUDA_VISIBLE_DEVICES takes them."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(number) for number in range(torch.cuda.device_count())]


def _worker(benchmark: Benchmark, folder: Path, jobs: list[Job], gpu: str | None) -> None:
    if gpu is not None:  # before CUDA starts in this process
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    import torch
    from transformers.utils import logging as transformers_logging

    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    _work(benchmark, folder, jobs, progress=False, look=lambda: None)


def _work(benchmark: Benchmark, folder: Path, jobs: Sequence[Job], progress: bool, look: Callable[[], None]) -> None:
    """Takes the first job that is free and whose needs are met, until none is left that could be done. `look` is called
    between jobs."""
    while waiting := [job for job in jobs if not is_done(folder, job) and not has_failed(folder, job)]:
        look()
        if not any(_try(benchmark, folder, job, progress) for job in waiting if _is_ready(folder, jobs, job)):
            if not any(_may_become_ready(folder, jobs, job) for job in waiting):
                return
            time.sleep(_PAUSE)


def is_done(folder: Path, job: Job) -> bool:
    return (folder / job.folder / DONE[job.kind]).is_file()


def has_failed(folder: Path, job: Job) -> bool:
    return (folder / job.folder / "error.txt").is_file()


def _needs(jobs: Sequence[Job], job: Job) -> list[Job]:
    return [other for other in jobs if other.folder in job.needs]


def _is_ready(folder: Path, jobs: Sequence[Job], job: Job) -> bool:
    return all(is_done(folder, need) for need in _needs(jobs, job))


def _may_become_ready(folder: Path, jobs: Sequence[Job], job: Job) -> bool:
    return all(
        is_done(folder, need) or (not has_failed(folder, need) and _may_become_ready(folder, jobs, need))
        for need in _needs(jobs, job)
    )


def _try(benchmark: Benchmark, folder: Path, job: Job, progress: bool) -> bool:
    """Does a job unless another process is at it; whether it was done, or failed, here."""
    with job_lock(folder / "locks" / job.folder.replace("/", "__")) as free:
        if not free or is_done(folder, job) or has_failed(folder, job):
            return False
        logger.info("%s ...", job.folder)
        try:
            do_job(benchmark, folder, job, progress)
        except Exception as error:
            write_text(folder / job.folder / "error.txt", traceback.format_exc())
            logger.error("%s failed: %s", job.folder, error)
        return True


def do_job(benchmark: Benchmark, folder: Path, job: Job, progress: bool = False) -> None:
    """Does a job here and now, unless it is finished. What it needs has to be there."""
    if not is_done(folder, job):
        _WORK[job.kind](benchmark, folder, job, progress)


@contextmanager
def job_lock(path: Path, wait: bool = False) -> Iterator[bool]:
    """Whether the lock was free. It is given up with the process that holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def _label(benchmark: Benchmark, folder: Path, job: Job, progress: bool) -> None:
    images = prepare_sources(benchmark, folder).unlabeled
    words = [images["path"], *(["--split", images["split"]] if "split" in images else [])]
    words += [*label_words(benchmark.labels[job.label_set]), "--output", str(folder / job.folder)]
    # A process of its own: it frees what a CLIP takes.
    command = [sys.executable, "-m", "uplvp_hf.cli", "label", *words, *([] if progress else ["--quiet"])]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=not progress, text=True)
    if done.returncode:
        said = (done.stderr or "").strip().splitlines()[-1:] or ["see above"]
        raise ConfigError(f"labeling failed: {said[0]}")
    record = {"seconds": round(time.perf_counter() - began, 1), "command": ["uplvp", "label", *words]}
    write_json(folder / job.folder / DONE["label"], record)


def label_words(labels: LabelSet) -> list[str]:
    """`labels.NAME.label` of a recipe as words of `uplvp label`. `package:...` is a file of this package."""
    words: list[str] = []
    for key, value in labels.label.items():
        name = f"--{key.replace('_', '-')}"
        if key == "settings":
            words += [f"{setting}={_word(number)}" for setting, number in value.items()]
        elif isinstance(value, list):
            words += [word for item in value for word in (name, _word(item))]
        elif value is True:
            words.append(name)
        elif value not in (False, None):
            words += [name, _word(value)]
    return words


def _word(value: Any) -> str:
    text = str(value)
    if text.startswith("package:"):
        return str(resources.files("uplvp_hf") / text.removeprefix("package:"))
    return text


def _train(benchmark: Benchmark, folder: Path, job: Job, progress: bool) -> None:
    resume = (folder / job.folder / "settings.json").is_file()
    if benchmark.processes > 1:
        _train_together(benchmark.processes, folder, job, resume, progress)
    else:
        from ..training.loop import train

        train(job.settings, resume=resume, progress=progress)


def _train_together(count: int, folder: Path, job: Job, resume: bool, progress: bool) -> None:
    """The training in `count` processes of its own."""
    recipe = folder / "settings" / f"{job.folder.replace('/', '__')}.yaml"
    write_text(recipe, yaml.safe_dump(job.settings.to_dict(), sort_keys=False))
    command = [sys.executable, "-m", "uplvp_hf.cli", job.settings.stage, "--recipe", str(recipe)]
    command += ["--processes", str(count), *(["--resume"] if resume else []), *([] if progress else ["--quiet"])]
    done = subprocess.run(command, capture_output=not progress, text=True)
    if done.returncode:
        said = (done.stderr or "").strip().splitlines()[-20:] or ["see above"]
        raise ConfigError(f"training in {count} processes failed:\n" + "\n".join(said))


def _finetune(benchmark: Benchmark, folder: Path, job: Job, progress: bool) -> None:
    if not (folder / job.folder / "training_summary.json").is_file():
        _train(benchmark, folder, job, progress)
    write_json(folder / job.folder / DONE["finetune"], make_row(folder, job))


def _evaluate(benchmark: Benchmark, folder: Path, job: Job, progress: bool) -> None:
    write_json(folder / job.folder / DONE["evaluate"], make_row(folder, job))


_WORK = {"label": _label, "pretrain": _train, "finetune": _finetune, "evaluate": _evaluate}
