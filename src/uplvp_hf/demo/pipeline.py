"""`uplvp demo`: label unlabeled scenes with the small CLIP, pre-train, fine-tune on 20 labels, compare four arms.

scratch              fine-tuning steps only, from random weights
scratch_equal_total  from random weights, as many steps as pre-training and fine-tuning together
pseudo_only          pre-trained on pseudo labels, no human label at all
pretrained           pre-trained, then fine-tuned on the 20 labeled images
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from ..data import InstanceDataset, load_dataset_rows
from ..data.synthetic import BACKGROUND, CLASSES, write_scenes
from ..evaluation.predictor import evaluate_model, predict_dataset
from ..files import write_json
from ..labeling import ClipZeroShotNamer, DenseClipLabeler, label_images, load_clip, proposal_quality
from ..models.errors import UserError
from ..models.modeling_uplvp import UplvpForInstanceSegmentation
from ..training.config import TrainSettings, load_settings
from ..training.loop import train
from .report import share, write_report

ARMS = {
    "scratch": "from scratch, equal fine-tuning steps",
    "scratch_equal_total": "from scratch, equal total steps",
    "pseudo_only": "pseudo labels only, no human label",
    "pretrained": "pre-trained + 20 labels",
}


@dataclass
class DemoSizes:
    """How much the demo does. Images and optimizer steps; `scaled` shrinks them for a quick look."""

    unlabeled: int = 500
    labeled: int = 20
    test: int = 100
    pretrain_steps: int = 700
    finetune_steps: int = 300

    def scaled(self, factor: float) -> DemoSizes:
        if not 0 < factor <= 10:
            raise UserError(f"--scale must be above 0 and at most 10, got {factor}.")
        return DemoSizes(**{name: max(4, round(value * factor)) for name, value in vars(self).items()})


def synthetic_clip_path() -> str:
    """Folder of the small CLIP that ships with the package (see its README for how it was trained)."""
    return str(resources.files("uplvp_hf") / "assets" / "synthetic_clip")


def write_demo_scenes(folder: Path, sizes: DemoSizes, seed: int) -> dict[str, str]:
    """Three disjoint sets of scenes: unlabeled (truth kept aside, to measure the proposals), labeled, test."""
    counts = {"unlabeled": sizes.unlabeled, "labeled": sizes.labeled, "test": sizes.test}
    return {
        name: str(write_scenes(folder / name, count, seed=10 * seed + index))
        for index, (name, count) in enumerate(counts.items())
    }


def label_scenes(images: str, output: Path) -> dict[str, Any]:
    """Pseudo labels for a folder of scenes, by the small CLIP; returns counts and their quality (None: undefined)."""
    clip = load_clip(synthetic_clip_path())
    # The defaults, and what suits this CLIP, which is in its folder. Their quality is measured in every run, against
    # the hidden truth.
    labeler = DenseClipLabeler(clip, CLASSES)
    namer = ClipZeroShotNamer(clip, CLASSES, background=[BACKGROUND])
    truth = load_dataset_rows(images)
    summary = label_images(truth.unlabeled(), labeler, namer, output, min_confidence=0.7)
    measured = proposal_quality(load_dataset_rows(output), truth)
    # Without any mask there is no precision: nan, which JSON cannot hold.
    quality = {key: None if math.isnan(value) else round(value, 4) for key, value in measured.items()}
    return {"masks": summary.instances, "images": summary.done, "seconds": round(summary.seconds, 1), **quality}


def claim_folder(folder: Path) -> None:
    """Makes the folder the demo's own. What an earlier demo wrote there is replaced, nothing else is touched.

    Raises UserError when it holds something and was not made by a demo.
    """
    marker = folder / ".uplvp_demo"
    if folder.exists() and not marker.is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} holds something that is not a demo's: choose another --output or remove it.")
    folder.mkdir(parents=True, exist_ok=True)
    marker.touch()
    for name in ("scenes", "labels", "pretrain", "model", "scratch", "scratch_equal_total"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("results.json", "report.html"):
        (folder / name).unlink(missing_ok=True)


def run_demo(output: str = "runs/demo", seed: int = 0, scale: float = 1.0) -> dict[str, Any]:
    """Runs everything, prints the table, and writes `results.json`, `report.html` and `model/` to `output`."""
    _quiet()
    started = time.perf_counter()
    folder, sizes = Path(output), DemoSizes().scaled(scale)
    claim_folder(folder)
    print(f"Scenes: {sizes.unlabeled} unlabeled, {sizes.labeled} labeled, {sizes.test} to test on.", flush=True)
    scenes = write_demo_scenes(folder / "scenes", sizes, seed)
    proposals = label_scenes(scenes["unlabeled"], folder / "labels")
    print(
        f"Pseudo labels: {proposals['masks']} masks on {proposals['images']} images, recall@.5 "
        f"{share(proposals['recall'])}, precision@.5 {share(proposals['precision'])} (against the hidden truth).",
        flush=True,
    )
    test = load_dataset_rows(scenes["test"])
    results = _run_arms(folder, scenes, sizes, seed, test)
    seconds = time.perf_counter() - started
    names = {**ARMS, "pretrained": f"pre-trained + {sizes.labeled} labels"}
    arms = {name: {key: results[name][key] for key in ("AP", "AP50", "seconds")} for name in ARMS}
    summary = {"arms": arms, "seconds": round(seconds, 1), "seed": seed, "sizes": vars(sizes), "proposals": proposals}
    write_json(folder / "results.json", summary)
    samples = _samples(folder, scenes, test, results["pretrained"])
    write_report(folder / "report.html", summary, names, {n: results[n]["curve"] for n in ARMS}, samples)
    print_table(arms, names)
    print(f"\n{seconds:.0f} s in all. Report: {folder}/report.html  Model: {folder}/model")
    return summary


def _run_arms(
    folder: Path, scenes: dict[str, str], sizes: DemoSizes, seed: int, test: InstanceDataset
) -> dict[str, dict]:
    """name -> {"AP", "AP50", "seconds", "curve": {steps: AP}, "model", "processor"}.

    The arms from scratch run in a second process beside the others, each on one core.
    """
    before, after = sizes.pretrain_steps, sizes.finetune_steps
    finetune = {"data.train": scenes["labeled"], "data.val": scenes["test"]}
    jobs = [("scratch", after), ("scratch_equal_total", before + after)]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        beside = [pool.submit(_from_scratch, folder / name, steps, seed, finetune) for name, steps in jobs]
        print(f"Beside, from scratch: {after} and {before + after} steps on {sizes.labeled} labeled images.")
        print("Pre-training on the pseudo labels ...", flush=True)
        pretrained = train(
            _settings("scenes_pretrain", folder / "pretrain", before, seed, {"data.train": folder / "labels"})
        )
        plain = UplvpForInstanceSegmentation.from_pretrained(folder / "pretrain")
        metrics = evaluate_model(plain, pretrained.processor, test)
        first = {before: metrics["AP"]}
        outcomes = {"pseudo_only": _outcome(metrics, pretrained.seconds, first)}

        print(f"Fine-tuning on {sizes.labeled} labeled images, from the pre-trained model ...", flush=True)
        start = {"model.init": folder / "pretrain"}
        result = train(_settings("scenes_finetune", folder / "model", after, seed, {**finetune, **start}))
        curve = first | {before + step: value["AP"] for step, value in result.evaluations.items()}
        outcomes["pretrained"] = _outcome(result.evaluations[after], pretrained.seconds + result.seconds, curve)
        outcomes["pretrained"] |= {"model": result.model, "processor": result.processor}
        print("Waiting for the arms from scratch ...", flush=True)
        for (name, _), job in zip(jobs, beside, strict=True):
            outcomes[name] = job.result()
    return outcomes


def _from_scratch(output: Path, steps: int, seed: int, data: dict[str, str]) -> dict[str, Any]:
    """An arm without pre-training, in a process of its own."""
    _quiet()
    result = train(_settings("scenes_finetune", output, steps, seed, data), progress=False)
    curve = {step: value["AP"] for step, value in result.evaluations.items()}
    return _outcome(result.evaluations[steps], result.seconds, curve)


def _outcome(metrics: dict, seconds: float, curve: dict[int, float]) -> dict[str, Any]:
    return {"AP": metrics["AP"], "AP50": metrics["AP50"], "seconds": round(seconds, 1), "curve": curve}


def _settings(recipe: str, output: Path, steps: int, seed: int, values: dict[str, Any]) -> TrainSettings:
    at = sorted({round(steps * share) for share in (0.25, 0.5, 0.75)} - {0})
    words = [f"{key}={value}" for key, value in values.items()]
    words += [f"optim.steps={steps}", f"optim.warmup={min(20, steps // 4)}", f"seed={seed}", "checkpoint.every=0"]
    words += [f"evaluation.at={at}"] if "data.val" in values else []
    return load_settings(recipe, words, output=str(output))


def _samples(folder: Path, scenes: dict[str, str], test: InstanceDataset, arm: dict) -> dict[str, Any]:
    """Rows for the report: pseudo-labeled images with their truth, test images with predictions and truth."""
    count = 8
    pseudo, truth = load_dataset_rows(folder / "labels"), load_dataset_rows(scenes["unlabeled"])
    shown = test.subset(range(min(count, len(test))))
    predictions = predict_dataset(arm["model"], arm["processor"], shown, threshold=0.5, progress=False)
    return {
        "pseudo": pseudo.subset(range(min(count, len(pseudo)))),
        "pseudo_truth": {row["file_name"].split("/")[-1]: row for row in truth.rows},
        "test": shown,
        "predictions": [prediction for _, prediction in predictions],
        "id2label": arm["model"].config.id2label,
    }


def _quiet() -> None:
    """Our own lines and bars only, and one core: two arms run at a time."""
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def print_table(arms: dict[str, dict], names: dict[str, str]) -> None:
    """The closing table: mask AP and AP50 in percent, seconds of training."""
    width = max(len(text) for text in names.values())
    print(f"\n{'':{width}}  {'AP':>5}  {'AP50':>5}  {'seconds':>7}")
    for name, text in names.items():
        row = arms[name]
        print(f"{text:{width}}  {100 * row['AP']:5.1f}  {100 * row['AP50']:5.1f}  {row['seconds']:7.0f}")


def pretrain_default(output: str = "runs/pretrain_default", sizes: DemoSizes | None = None) -> None:
    """What `scripts/pretrain.py` does without arguments: pseudo-label generated scenes and pre-train on them."""
    _quiet()
    from accelerate import PartialState

    from ..training.launch import several_on_cpu

    state, folder, sizes = PartialState(cpu=several_on_cpu()), Path(output), sizes or DemoSizes()
    if state.is_main_process:
        print("No settings given: running the embedded default, pre-training on generated scenes labeled by the small")
        print(f"CLIP of the package. Output: {folder}. For your own images see `uplvp pretrain --help`.", flush=True)
        claim_folder(folder)
        scenes = str(write_scenes(folder / "scenes", sizes.unlabeled, seed=0))
        label_scenes(scenes, folder / "labels")
    state.wait_for_everyone()
    settings = _settings(
        "scenes_pretrain", folder / "model", sizes.pretrain_steps, 0, {"data.train": folder / "labels"}
    )
    result = train(settings)
    if state.is_main_process:
        print(f"{settings.optim.steps} steps in {result.seconds:.0f} s. Model: {settings.output}")
