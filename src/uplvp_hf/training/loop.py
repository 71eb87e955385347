"""The training loop of both stages, on Accelerate: pre-training with prompts, fine-tuning on labels.

    accelerate launch scripts/pretrain.py data.train=runs/labels model.init=...      (see scripts/ and docs/training.md)

What a run writes to its output folder: `settings.json`, `log.jsonl` (every loss term, learning rate, validation
numbers), `checkpoint-<step>/`, `best-<step>/` with `checkpoint.best`, and at the end the model, its image processor and
`training_summary.json`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed

from ..data import DataError
from ..data.manifest import record_manifest
from ..files import only_run, usual_rights, write_json, write_text, writing
from ..models.matching import CostWatch
from ..progress import Progress
from .batch import weighted_loss
from .checkpoint import (
    check_resumed,
    load_checkpoint,
    newest_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from .config import TrainingAborted, TrainSettings
from .freezing import training_mode
from .gradient_shares import gradient_shares, is_due
from .launch import hardware, make_accelerator
from .norm_statistics import NormStatistics
from .one_batch import describe_one_batch, on_one_batch, report_one_batch
from .optim import images_per_step, learning_rate_factor, make_optimizer, with_steps
from .output import check_output, claim_output, summary
from .random_state import random_state, restore_random_state
from .result import SUMMARY, TrainResult, clear_leftovers, finished_result
from .run_log import LossMeans, RunLog
from .sharding import whole
from .share import with_share
from .task import task_of
from .teacher import Teacher, unlabeled_batches
from .unlabeled import build_views, load_unlabeled
from .validation import Validation
from .weights import RunWeights

logger = logging.getLogger(__name__)


def train(settings: TrainSettings, resume: bool = False, progress: bool = True) -> TrainResult:
    """Runs the training that `settings` describe and writes the result to `settings.output`.

    With `resume` it continues from the newest complete checkpoint there, if any; a finished run is left as it is.

    Raises ConfigError when the output folder holds another run or a model, UserError while another run is writing into
    it, DataError for unusable data (all before anything is written), TrainingAborted after `optim.max_skipped`
    non-finite steps, and OSError naming the file on a full disk.
    """
    accelerator = make_accelerator(settings)
    with only_run(settings.output) if accelerator.is_main_process else contextlib.nullcontext():
        return _train(settings, accelerator, resume, progress)


def _train(settings: TrainSettings, accelerator: Accelerator, resume: bool, progress: bool) -> TrainResult:
    set_seed(settings.seed)
    task = task_of(settings)
    settings = task.with_image_settings(settings)
    check_output(settings, resume)
    given = settings
    if settings.overfit_one_batch:
        settings = on_one_batch(settings)
    train_rows, val_rows = task.data(settings)
    extra_rows = task.extra(settings, train_rows, val_rows)
    model = task.model(settings, train_rows)
    unlabeled = load_unlabeled(settings.data, train_rows, val_rows, model)
    if val_rows is not None:
        task.check_evaluation(settings, model.config, val_rows)  # now, not after hours of training
    settings = with_steps(settings, len(train_rows), accelerator.num_processes)
    done = finished_result(settings, task, model) if resume else None
    if done is not None:
        record_manifest(train_rows.manifest, settings.output)  # refuses another split
        return done
    claim_output(given, accelerator)
    if accelerator.is_main_process:
        logger.info("%s", task.usage(settings, train_rows))
        if extra_rows is not None:
            logger.info("Mixed in: %s", task.usage(settings, extra_rows).removeprefix("Training uses "))
        if train_rows.manifest is not None:
            logger.info("The labeled images are split %(name)s, drawn with seed %(seed)s.", train_rows.manifest)
        record_manifest(train_rows.manifest, settings.output)
    if extra_rows is not None:
        settings = with_share(settings, task, accelerator, model, train_rows, resume, progress)
    if accelerator.process_index:  # all have the same weights, but should not drop the same prompts
        set_seed(settings.seed * 1_000_003 + accelerator.process_index)
    samples, views = task.samples(settings, train_rows, extra_rows), build_views(settings, unlabeled)
    return _Run(settings, task, accelerator, model, samples, views, val_rows, progress).go(resume)


class _Run:
    def __init__(self, settings, task, accelerator, model, samples, views, val_rows, progress):
        self.task, self.settings, self.accelerator = task, settings, accelerator
        self.samples, self.val_rows = samples, val_rows
        self.images = len(samples) + len(getattr(samples, "extra", ())) + len(views or ())  # all that is trained on
        self.output = Path(settings.output)
        self.progress = progress and accelerator.is_main_process
        self.processor = task.processor(settings, model)
        self.weights = RunWeights(settings, accelerator, model)
        self.model, self.plain = self.weights.wrapped, self.weights.plain
        self.teacher = None if views is None else Teacher(settings, accelerator, self.weights, views, samples.dataset)
        self.optimizer = make_optimizer(self.plain, settings.optim)
        self.statistics = NormStatistics(self.plain)
        self.result = TrainResult(self.plain, self.processor)
        self.scaler = getattr(accelerator, "scaler", None)
        self.means = LossMeans(accelerator)
        self.shares: dict[str, float] = {}  # of the gradient, for the next line of the log
        self.log = RunLog(settings, accelerator)
        self.validation = Validation(settings, task, accelerator, self.processor, val_rows, len(samples), self.progress)

    def go(self, resume: bool) -> TrainResult:
        start = self._restore() if resume else 0
        self.log.start(start)
        self.validation.start(start)
        optim, checkpoint = self.settings.optim, self.settings.checkpoint
        bar = Progress(self.settings.stage, optim.steps, self.progress, "steps", start)
        began = time.perf_counter()
        for step, micro_batches in self._batches(start):
            losses = self._step(step, micro_batches)
            self.result.seconds += time.perf_counter() - began
            self.means.add(losses)
            done = self.result.steps = step + 1
            over = done == optim.steps
            if done in self.validation.steps:
                self._evaluate(done)
                over |= self.validation.is_exhausted(self.result.evaluations)
            if done % self.settings.log_every == 0 or over:
                self._report(done, bar)
            bar.update()
            if over:
                break
            if checkpoint.every and done % checkpoint.every == 0:
                self._checkpoint(done)
            began = time.perf_counter()  # waiting for the next images counts
        bar.close()
        if self.val_rows is not None and self.result.steps not in self.result.evaluations:
            self._evaluate(self.result.steps)  # resumed at its last step
        self._finish()
        return self.result

    def _batches(self, start: int) -> Iterator[tuple[int, list[dict]]]:
        """(step, its micro-batches), from step `start` on."""
        settings, accelerator = self.settings, self.accelerator
        steps, count = range(start, settings.optim.steps), settings.optim.accumulation
        loader = self.task.loader(self.samples, settings, start, accelerator)
        batches = iter(loader)
        unlabeled = unlabeled_batches(self.teacher, start)
        if settings.overfit_one_batch:
            first = [next(batches) for _ in range(count)]
            del batches  # ends its workers
            describe_one_batch(gather_object([i for batch in first for i in batch["image_ids"]]), settings)
            for step in steps:
                yield step, first
        else:
            for step in steps:
                yield step, [*(next(batches) for _ in range(count)), *unlabeled(step)]

    def _step(self, step: int, micro_batches: list[dict]) -> dict[str, torch.Tensor]:
        """Sets up model and learning rates for this step and makes one update. Returns the loss terms."""
        settings = self.settings
        training_mode(self.plain, settings.model.freeze_backbone_norm)
        epoch = step * self._images_per_step() / len(self.samples)
        self.task.set_progress(self.plain, epoch, step / settings.optim.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * learning_rate_factor(step, settings.optim)
        return self._update(step, micro_batches)

    def _sizes(self) -> dict[str, int]:
        """What has to be the same when a run is resumed."""
        sizes = {"images_per_step": self._images_per_step(), "images": self.images}
        return {**sizes, "processes": self.accelerator.num_processes}

    def _images_per_step(self) -> int:
        return images_per_step(self.settings.optim, self.accelerator.num_processes)

    def _update(self, step: int, micro_batches: list[dict]) -> dict[str, torch.Tensor]:
        """One optimizer step over the accumulated micro-batches. Returns the loss terms, detached; none if skipped."""
        settings = self.settings
        normalizers = self.task.normalizers(self.plain, self.accelerator, micro_batches)
        totals: dict[str, torch.Tensor] = {}
        self.optimizer.zero_grad(set_to_none=True)
        self.statistics.keep()
        finite = torch.ones((), dtype=torch.bool, device=self.accelerator.device)
        with CostWatch() as costs:
            for index, batch in enumerate(micro_batches):
                inputs = self.task.inputs(batch, self.accelerator.device, settings.stage)
                with self._sync(index == len(micro_batches) - 1):
                    with self.accelerator.autocast():
                        output = self.model(**inputs, normalizers=normalizers)
                    loss, terms = weighted_loss(output, batch)
                    finite &= torch.isfinite(loss.detach())
                    if index == 0 and is_due(step + 1, settings) and not self.weights.spread:
                        self.shares = gradient_shares(output.losses, self.plain.parameters(), self.scaler)
                    self.accelerator.backward(loss)
                for name, value in terms.items():
                    totals[name] = totals.get(name, 0.0) + value
        finite &= costs.finite
        if self.scaler is None:
            finite &= torch.isfinite(self._clip())
        # All processes must agree, or their weights would part.
        if bool(self.accelerator.reduce(finite.float(), "sum") < self.accelerator.num_processes):
            self._skip(step, micro_batches)
            return {}
        if self.scaler is None:
            self.optimizer.step()
        elif not self._scaled_step():
            self._overflow(step, micro_batches)
            return totals
        if self.weights.average is not None:
            self.weights.average.update()
        return totals

    def _scaled_step(self) -> bool:
        """Lets the float16 scaler make the step. Returns whether it did: it skips steps whose gradients overflowed."""
        scale = self.scaler.get_scale()
        self.scaler.unscale_(self.optimizer)
        self._clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return self.scaler.get_scale() >= scale

    def _overflow(self, step: int, micro_batches: list[dict]) -> None:
        """Counts an overflow: normal until the scaler has found its scale; below 1 the gradients are at fault."""
        if self.scaler.get_scale() < 1:
            self._skip(step, micro_batches)
        else:
            self.result.overflows += 1

    def _sync(self, last: bool) -> AbstractContextManager:
        """Lets the processes exchange gradients with the last micro-batch only."""
        if self.weights.spread:
            self.model.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    def _clip(self) -> torch.Tensor:
        """Clips the gradients; returns their norm before that."""
        parameters, limit = self.plain.parameters(), self.settings.optim.clip or float("inf")
        return whole(torch.nn.utils.clip_grad_norm_(parameters, limit))

    def _skip(self, step: int, micro_batches: list[dict]) -> None:
        self.result.skipped += 1
        self.statistics.restore()
        ids = gather_object([identity for batch in micro_batches for identity in batch["image_ids"]])
        if self.result.skipped == 1 and self.accelerator.is_main_process:
            logger.warning(
                "Step %d skipped: its loss, a matching cost or its gradient is not finite. Images: %s.", step + 1, ids
            )
        if self.result.skipped >= self.settings.optim.max_skipped:
            raise TrainingAborted(
                f"{self.result.skipped} steps had a non-finite loss, cost or gradient, the last one on images {ids}. "
                "Lower optim.lr, set optim.clip, or check these images."
            )

    def _evaluate(self, step: int) -> None:
        metrics = self.validation.run(step, self.weights, self.result)
        self.log.write(step, {f"val_{key}": metrics[key] for key in (*self.task.metrics, "training_seconds")})

    def _report(self, step: int, bar: Progress) -> None:
        """Logs the means over the steps since the last line, without those that were skipped."""
        means = self.means.take()
        total = [sum(means.values())] if means else []
        loss = {"loss": total[0]} if means else {}
        found = {} if self.teacher is None else self.teacher.report()
        self.log.write(step, {**loss, "lr": self.optimizer.param_groups[0]["lr"], **means, **self.shares, **found})
        self.shares = {}
        self.result.losses = [*self.result.losses[:1], *total]
        if loss:
            bar.update(0, loss=loss["loss"])

    def _checkpoint(self, step: int) -> None:
        self.accelerator.wait_for_everyone()
        accelerator, average, result = self.accelerator, self.weights.average, self.result
        state = {
            **self.means.state(),
            "seconds": result.seconds,
            "skipped": result.skipped,
            "overflows": result.overflows,
            "losses": result.losses,
            "evaluations": {str(key): value for key, value in result.evaluations.items()},
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            **self._sizes(),
            "teacher": self.teacher.state() if self.teacher is not None else None,
        }
        tensors = {"optimizer": optimizer_tensors(self.plain, self.optimizer)}
        if average is not None:
            tensors["average"], state["average_updates"] = average.tensors(), average.updates
        states = gather_object([random_state(accelerator.device)])
        tensors["random_state"] = {f"{rank}.{key}": v for rank, one in enumerate(states) for key, v in one.items()}
        model = self.weights.as_trained()
        if accelerator.is_main_process:
            save_checkpoint(self.output, step, model, tensors, state, self.settings.checkpoint.keep)
            self.validation.prune(result.evaluations)
        accelerator.wait_for_everyone()

    def _restore(self) -> int:
        path = newest_checkpoint(self.output)
        if path is None:
            logger.warning("Nothing to resume in %s: starting from step 0.", self.output)
            return 0
        loaded: list = []
        self.weights.take_from(lambda model: loaded.extend(load_checkpoint(path, model)))
        state, tensors = loaded
        check_resumed(path, state, self.settings.optim.steps, self._sizes())
        restore_optimizer(self.plain, self.optimizer, tensors["optimizer"])
        if self.weights.average is not None:
            self.weights.average.load(tensors["average"], state["average_updates"])
        if self.teacher is not None:
            self.teacher.load(state["teacher"])
        result = self.result
        result.seconds, result.skipped, result.overflows = state["seconds"], state["skipped"], state["overflows"]
        result.losses, result.steps = state["losses"], state["step"]
        result.evaluations = {int(key): value for key, value in state["evaluations"].items()}
        self.means.load(state)
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        prefix = f"{self.accelerator.process_index}."
        own = {key.removeprefix(prefix): v for key, v in tensors["random_state"].items() if key.startswith(prefix)}
        if own:  # a process that was not there before keeps the state that its seed gave it
            restore_random_state(own, self.accelerator.device)
        logger.info("Resumed from %s.", path)
        return state["step"]

    def _finish(self) -> None:
        self.accelerator.wait_for_everyone()
        model, result = self.weights.finish(), self.result
        result.model = model
        self.validation.choose(model, result)
        # Processes see different images, so each may have met others that cannot be read.
        failures = [*self.samples.dataset.failures, *(self.val_rows.failures if self.val_rows else ())]
        failures += [] if self.teacher is None else self.teacher.failures
        failures = sorted({json.dumps(failure) for failure in gather_object(failures + self.samples.failures)})
        if self.accelerator.is_main_process:
            model.eval()
            with writing(self.output / "model.safetensors"):
                self.task.save(model, self.output)
                model.save_pretrained(self.output)
                self.processor.save_pretrained(self.output)
                usual_rights(self.output)
            write_json(
                self.output / SUMMARY,
                summary(self.settings, result, self.samples, hardware(self.accelerator)),
            )
            if failures:
                path = self.output / "failures.jsonl"
                write_text(path, "".join(line + "\n" for line in failures))
                logger.warning("%d images or objects could not be used: see %s.", len(failures), path)
            if not self.settings.checkpoint.stay and result.steps == self.settings.optim.steps:
                clear_leftovers(self.output)
            if self.settings.overfit_one_batch and len(result.losses) == 2:
                report_one_batch(*result.losses)
        self.log.end()
        # A launcher ends all processes when one ends badly, and none may end while the model is being written.
        self.accelerator.wait_for_everyone()


__all__ = ["DataError", "TrainResult", "train"]
