"""The third stage: minutes and memory of what comes, from a few steps that are timed on this machine."""

from __future__ import annotations

import dataclasses
import logging
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..benchmark.plan import Job
from ..training.config import TrainSettings
from ..training.loop import train

_STEPS = (3, 8)  # the first are not timed: they set up what the others find ready
_LABEL_SECONDS = 15.0  # of starting `uplvp label`


def time_training(settings: TrainSettings, data: dict[str, Any]) -> dict[str, float]:
    """Seconds of a step, and of what a run takes beside its steps (loading, one evaluation, saving), GB at most.

    data: settings of `data` in place of those of the run, for labels that are not made yet.
    Raises as `train` does; what does not fit into memory is torch.OutOfMemoryError.
    """
    optim = dataclasses.replace(settings.optim, steps=_STEPS[1], epochs=None, warmup=0)
    with tempfile.TemporaryDirectory() as folder:
        given = dataclasses.replace(
            settings,
            output=f"{folder}/timed",
            gradients_every=0,
            data=dataclasses.replace(settings.data, **data),
            optim=optim,
            evaluation=dataclasses.replace(settings.evaluation, at=[_STEPS[0]], every=0, every_epochs=None, patience=0),
            checkpoint=dataclasses.replace(settings.checkpoint, every=0, best=False),
        )
        log = logging.getLogger("uplvp_hf.training")
        level = log.level
        log.setLevel(logging.WARNING)  # the run itself will say it
        began = time.perf_counter()
        try:
            result = train(given, progress=False)
        finally:
            log.setLevel(level)
        whole = time.perf_counter() - began
    seconds = [result.evaluations[step]["training_seconds"] for step in _STEPS]
    step = (seconds[1] - seconds[0]) / (_STEPS[1] - _STEPS[0])
    return {"step": step, "rest": whole - result.seconds, "memory_gb": _memory()}


def _memory() -> float:
    """Peak so far, in GB: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)


def make_estimate(jobs: Sequence[Job], refit: bool, trial: dict | None, images: int, train: str) -> dict[str, Any]:
    """Seconds of every job, by its folder, and of all, and memory. jobs: of the plan. trial: of the chosen source.

    train: the folder of the labeled images, which stand in for pseudo labels in the timed pre-training.
    """
    truth = {"train": train, "train_split": "train", "train_images": None, "extra": None}
    truth |= {"val": train, "val_split": "train"}  # evaluations tell how long the steps between them took
    timed: dict[str, dict[str, float]] = {}
    seconds: dict[str, float] = {}
    for job in jobs:
        if job.kind == "label":
            assert trial is not None
            seconds[job.folder] = _LABEL_SECONDS + trial["load_seconds"] + images * trial["seconds_per_image"]
            continue
        assert job.settings is not None
        if job.kind not in timed:
            timed[job.kind] = time_training(job.settings, truth)  # the first of the kind needs no other training
        one = timed[job.kind]
        seconds[job.folder] = one["step"] * _steps(job.settings, images) + 2 * one["rest"]
    if refit:
        seconds["refit"] = max(value for folder, value in seconds.items() if folder.startswith("runs/"))
    memory = max(one["memory_gb"] for one in timed.values())
    whole = round(sum(seconds.values()), 1)
    return {"seconds": {key: round(value, 1) for key, value in seconds.items()}, "all": whole, "memory_gb": memory}


def _steps(settings: TrainSettings, images: int) -> int:
    optim = settings.optim
    if optim.epochs is None:
        return optim.steps
    return max(1, round(optim.epochs * images / (optim.batch_size * optim.accumulation)))


def in_words(estimate: dict[str, Any]) -> str:
    """For people."""
    parts: dict[str, float] = {}
    names = {
        "labels": "labeling",
        "pretrain": "pre-training",
        "runs": "fine-tuning",
        "refit": "training on all labels",
    }
    for folder, seconds in estimate["seconds"].items():
        name = names[Path(folder).parts[0]]
        parts[name] = parts.get(name, 0.0) + seconds
    listed = ", ".join(f"{name} {minutes(seconds)}" for name, seconds in parts.items())
    return f"About {minutes(estimate['all'])} ({listed}) and {estimate['memory_gb']:.1f} GB of memory"


def minutes(seconds: float) -> str:
    """Such as 40 s, 3 min or 2.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
