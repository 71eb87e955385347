"""The training loop of both stages, on Accelerate: pre-training with prompts, fine-tuning on labels.

    accelerate launch scripts/pretrain.py data.train=runs/labels model.init=...      (see scripts/)

What a run writes to its output folder: `settings.json`, `log.jsonl` (every loss term, learning rate, validation
numbers), `checkpoint-<step>/`, and at the end the model, its image processor and `training_summary.json`.
"""

from __future__ import annotations

import atexit
import json
import logging
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object, set_seed
from tqdm.auto import tqdm

from ..data import DataError
from ..evaluation.predictor import evaluate_model, evaluated_classes
from ..files import write_json, write_text, writing
from ..models.image_processing_uplvp import UplvpImageProcessor
from ..models.losses import Normalizers
from ..models.modeling_uplvp import UplvpPreTrainedModel
from .build import build_data, build_model, build_processor, build_samples, with_picture_settings
from .checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from .config import ConfigError, TrainingAborted, TrainSettings
from .optim import learning_rate_factor, make_optimizer
from .stream import make_loader

logger = logging.getLogger(__name__)


@dataclass
class TrainResult:
    """What a run ends with. evaluations: step -> the numbers of `evaluate_model`; seconds: training steps only."""

    model: UplvpPreTrainedModel
    processor: UplvpImageProcessor
    evaluations: dict[int, dict] = field(default_factory=dict)
    seconds: float = 0.0
    skipped: int = 0


def train(settings: TrainSettings, resume: bool = False, progress: bool = True) -> TrainResult:
    """Runs the training that `settings` describe and writes the result to `settings.output`.

    With `resume` it continues from the newest complete checkpoint there, if any. Raises ConfigError when the output
    folder holds another run or a model, DataError for unusable data (all before anything is written),
    TrainingAborted after `optim.max_skipped` non-finite steps, and OSError naming the file on a full disk.
    """
    AcceleratorState._reset_state()  # another run of this Python process may have had another precision
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision,
        log_with=settings.tracker,
        project_dir=settings.output,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if accelerator.num_processes > 1:
        atexit.register(_leave_process_group)
    set_seed(settings.seed)
    settings = with_picture_settings(settings)
    _check_output(settings, resume)
    train_rows, val_rows = build_data(settings.data)
    model = build_model(settings, train_rows)
    if val_rows is not None:
        evaluated_classes(model.config, val_rows, _evaluates_agnostic(settings))  # now, not after hours of training
    _claim_output(settings, accelerator)
    run = _Run(settings, accelerator, model, build_samples(settings, train_rows), val_rows, progress)
    return run.go(resume)


class _Run:
    def __init__(self, settings, accelerator, model, samples, val_rows, progress):
        self.settings, self.accelerator, self.samples, self.val_rows = settings, accelerator, samples, val_rows
        self.output = Path(settings.output)
        self.progress = progress and accelerator.is_main_process
        self.processor = build_processor(settings.data)
        model.to(accelerator.device)
        self.optimizer = make_optimizer(model, settings.optim)
        self.model = accelerator.prepare_model(model)
        self.plain = accelerator.unwrap_model(self.model)
        self.result = TrainResult(self.plain, self.processor)
        self.scaler = getattr(accelerator, "scaler", None)
        # Sums of the loss terms since the last line of the log, over `counted` steps.
        self.terms: dict[str, torch.Tensor] = {}
        self.counted = 0
        if settings.tracker:
            accelerator.init_trackers("uplvp_hf", config={"settings": json.dumps(settings.to_dict())})

    def go(self, resume: bool) -> TrainResult:
        start = self._restore() if resume else 0
        accelerator, optim = self.accelerator, self.settings.optim
        loader = make_loader(self.samples, self.settings, start, accelerator.process_index, accelerator.num_processes)
        batches = iter(loader)
        bar = tqdm(
            total=optim.steps,
            initial=start,
            desc=self.settings.stage,
            unit="step",
            disable=None if self.progress else True,
        )
        for step in range(start, optim.steps):
            began = time.perf_counter()
            self._training_mode()
            self.plain.set_progress(step * self._pictures_per_step() / len(self.samples))
            micro_batches = [next(batches) for _ in range(optim.accumulation)]
            losses = self._update(step, micro_batches)
            self.result.seconds += time.perf_counter() - began
            self.counted += bool(losses)
            for name, value in losses.items():
                self.terms[name] = self.terms.get(name, 0.0) + value
            done = step + 1
            if done % self.settings.log_every == 0 or done == optim.steps:
                self._log_terms(done, bar)
            bar.update()
            if self.val_rows is not None and (done in self.settings.evaluation.at or done == optim.steps):
                self._evaluate(done)
            if self.settings.checkpoint.every and done % self.settings.checkpoint.every == 0 and done < optim.steps:
                self._checkpoint(done)
        bar.close()
        self._finish()
        return self.result

    def _pictures_per_step(self) -> int:
        optim = self.settings.optim
        return optim.batch_size * optim.accumulation * self.accelerator.num_processes

    def _training_mode(self) -> None:
        """Train mode, but frozen backbones keep their statistics."""
        self.model.train()
        backbone = self.plain.segmenter.backbone
        if not any(parameter.requires_grad for parameter in backbone.parameters()):
            backbone.eval()

    def _update(self, step: int, micro_batches: list[dict]) -> dict[str, torch.Tensor]:
        """One optimiser step over the accumulated micro-batches. Returns the loss terms, detached."""
        normalizers = self._normalizers(micro_batches)
        totals: dict[str, torch.Tensor] = {}
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * learning_rate_factor(step, self.settings.optim)
        self.optimizer.zero_grad(set_to_none=True)
        ids = [identity for batch in micro_batches for identity in batch["image_ids"]]
        finite = torch.ones((), dtype=torch.bool, device=self.accelerator.device)
        for index, batch in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            with _sync(self.accelerator, self.model, last), self.accelerator.autocast():
                output = self.model(**self._inputs(batch), normalizers=normalizers)
                finite &= torch.isfinite(output.loss.detach())
                self.accelerator.backward(output.loss)
            for name, value in output.losses.items():
                totals[name] = totals.get(name, 0.0) + value.detach().float()
        if self.scaler is None:
            finite &= torch.isfinite(self._clip())
        # All processes must agree, or their weights would part.
        if bool(self.accelerator.reduce(finite.float(), "sum") < self.accelerator.num_processes):
            self._skip(step, ids)
            return {}
        if self.scaler is not None:  # it leaves out steps whose gradients are not finite, and lowers its scale
            self.scaler.unscale_(self.optimizer)
            self._clip()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        return totals

    def _clip(self) -> torch.Tensor:
        """Clips the gradients; returns their norm before that."""
        return torch.nn.utils.clip_grad_norm_(self.plain.parameters(), self.settings.optim.clip or float("inf"))

    def _inputs(self, batch: dict) -> dict:
        device = self.accelerator.device
        inputs = {key: batch[key].to(device, non_blocking=True) for key in ("pixel_values", "pixel_mask")}
        for key in ("class_labels", "prompt_scores"):
            inputs[key] = [item.to(device, non_blocking=True) for item in batch[key]]
        inputs["mask_labels"] = [masks.dense().to(device, non_blocking=True) for masks in batch["mask_labels"]]
        if self.settings.stage != "pretrain":
            del inputs["prompt_scores"]
        return inputs

    def _normalizers(self, micro_batches: list[dict]) -> Normalizers:
        """Divisors over the whole effective batch, so that accumulated gradients equal those of one large batch."""
        masks = [masks for batch in micro_batches for masks in batch["mask_labels"]]
        counts = [len(one) for one in masks]
        # Divisors that have to be counted from the masks are left to the loss where it sees the whole batch.
        several = len(micro_batches) > 1 or self.accelerator.num_processes > 1
        dense = (one.dense() for one in masks) if several else None  # one at a time, where they are looked at
        own = self.plain.segmenter.normalizers(counts, self.plain.config.num_prompts, dense)
        known = {name: float(value) for name, value in vars(own).items() if value is not None}
        values = torch.tensor(list(known.values()), dtype=torch.float32)
        if self.accelerator.num_processes > 1:
            # Gradients are averaged over processes, so the divisors are too.
            values = self.accelerator.reduce(values.to(self.accelerator.device), "mean")
        # Counts are at least 1, as in the original implementations; a sum of weights may be less.
        least = {"class_weight": 1e-6}
        return Normalizers(
            **{name: max(value, least.get(name, 1.0)) for name, value in zip(known, values.tolist(), strict=True)}
        )

    def _skip(self, step: int, ids: list) -> None:
        self.result.skipped += 1
        if self.result.skipped == 1:
            logger.warning("Step %d skipped: its loss or gradient is not finite. Pictures: %s.", step + 1, ids)
        if self.result.skipped >= self.settings.optim.max_skipped:
            raise TrainingAborted(
                f"{self.result.skipped} steps had a non-finite loss or gradient, the last one on pictures {ids}. "
                "Lower optim.lr, set optim.clip, or check these pictures."
            )

    def _evaluate(self, step: int) -> None:
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            metrics = evaluate_model(
                self.plain,
                self.processor,
                self.val_rows,
                batch_size=self.settings.evaluation.batch_size,
                class_agnostic=_evaluates_agnostic(self.settings),
                progress=self.progress,
                mask_threshold=self.settings.evaluation.mask_threshold,
            )
            self.result.evaluations[step] = metrics
            self._log(step, {f"val_{key}": metrics[key] for key in ("AP", "AP50", "AP75")})
            tqdm.write(
                f"{self.output.name}, step {step}: AP {100 * metrics['AP']:.1f}  AP50 {100 * metrics['AP50']:.1f}"
            )
        self.accelerator.wait_for_everyone()

    def _log_terms(self, step: int, bar: tqdm) -> None:
        """Means over the steps since the last line that were not skipped."""
        means = {name: (value / self.counted).item() for name, value in self._over_processes(self.terms).items()}
        loss = {"loss": sum(means.values())} if means else {}
        self._log(step, {**loss, "lr": self.optimizer.param_groups[0]["lr"], **means})
        if loss:
            bar.set_postfix(loss=f"{loss['loss']:.2f}")
        self.terms, self.counted = {}, 0

    def _over_processes(self, terms: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Divisors are averaged over processes, so the mean over processes is the loss of the effective batch."""
        if self.accelerator.num_processes == 1 or not terms:
            return terms
        values = self.accelerator.reduce(torch.stack(list(terms.values())), "mean")
        return dict(zip(terms, values, strict=True))

    def _log(self, step: int, values: dict) -> None:
        if self.settings.tracker:
            self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            path = self.output / "log.jsonl"
            with writing(path), open(path, "a") as log:
                log.write(json.dumps({"step": step, **values}) + "\n")

    def _checkpoint(self, step: int) -> None:
        self.accelerator.wait_for_everyone()
        self.terms = self._over_processes(self.terms)
        if self.accelerator.is_main_process:
            state = {
                "seconds": self.result.seconds,
                "skipped": self.result.skipped,
                "evaluations": {str(key): value for key, value in self.result.evaluations.items()},
                "terms": {name: value.item() for name, value in self.terms.items()},
                "counted": self.counted,
                "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            }
            keep = self.settings.checkpoint.keep
            save_checkpoint(self.output, step, self.plain, self.optimizer, state, keep)

    def _restore(self) -> int:
        found = list_checkpoints(self.output)
        if not found:
            logger.warning("Nothing to resume in %s: starting from step 0.", self.output)
            self._cut_log(0)
            return 0
        state = load_checkpoint(found[-1], self.plain, self.optimizer)
        self.result.seconds, self.result.skipped = state["seconds"], state["skipped"]
        self.result.evaluations = {int(key): value for key, value in state["evaluations"].items()}
        device = self.accelerator.device
        self.terms = {name: torch.tensor(value, device=device) for name, value in state["terms"].items()}
        self.counted = state["counted"]
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self._cut_log(state["step"])
        logger.info("Resumed from %s.", found[-1])
        return state["step"]

    def _cut_log(self, step: int) -> None:
        """Drops what was logged after the checkpoint, so that a resumed log has every step once."""
        path = self.output / "log.jsonl"
        if self.accelerator.is_main_process and path.is_file():
            lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
            write_text(path, "".join(line + "\n" for line in lines if json.loads(line)["step"] <= step))

    def _finish(self) -> None:
        self.accelerator.wait_for_everyone()
        # Processes see different pictures, so each may have met others that cannot be read.
        failures = [*self.samples.dataset.failures, *(self.val_rows.failures if self.val_rows else ())]
        failures = sorted({json.dumps(failure) for failure in gather_object(failures + self.samples.failures)})
        if self.accelerator.is_main_process:
            self.plain.eval()
            with writing(self.output / "model.safetensors"):
                self.plain.save_pretrained(self.output)
                self.processor.save_pretrained(self.output)
            write_json(self.output / "training_summary.json", self._summary())
            if failures:
                path = self.output / "failures.jsonl"
                write_text(path, "".join(line + "\n" for line in failures))
                logger.warning("%d pictures or objects could not be used: see %s.", len(failures), path)
        if self.settings.tracker:
            self.accelerator.end_training()

    def _summary(self) -> dict:
        evaluations = self.result.evaluations
        return {
            "stage": self.settings.stage,
            "settings": self.settings.to_dict(),
            "pictures": len(self.samples),
            "parameters": sum(parameter.numel() for parameter in self.plain.parameters()),
            "parameters_trained": sum(p.numel() for p in self.plain.parameters() if p.requires_grad),
            "seconds": round(self.result.seconds, 1),
            "hardware": f"{self.accelerator.num_processes} x {_device_name(self.accelerator.device)}",
            "skipped_steps": self.result.skipped,
            "transfer": str(self.plain.transfer_report) if self.plain.transfer_report else None,
            "metrics": evaluations[max(evaluations)] if evaluations else None,
            "evaluations": {str(step): metrics for step, metrics in evaluations.items()},
        }


def _leave_process_group() -> None:
    """Without this a process may abort at its very end, when threads of the group are still running."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _evaluates_agnostic(settings: TrainSettings) -> bool:
    return settings.evaluation.class_agnostic or settings.model.class_agnostic


def _check_output(settings: TrainSettings, resume: bool) -> None:
    """Raises ConfigError unless the output folder is free, or holds this very run and `resume` is on."""
    output = Path(settings.output)
    record = output / "settings.json"
    if not record.is_file():
        if (output / "config.json").is_file():
            raise ConfigError(f"{output} holds a model that no run of ours wrote: choose another output.")
        return
    if not resume:
        raise ConfigError(
            f"{output} already holds a run. Continue it with --resume, or choose another output or remove it."
        )
    changed = sorted(_differences(json.loads(record.read_text()), _record(settings)))
    if changed:
        raise ConfigError(f"{output} was started with other settings: {'; '.join(changed)}.")


def _claim_output(settings: TrainSettings, accelerator: Accelerator) -> None:
    """Makes the output folder this run's own."""
    accelerator.wait_for_everyone()  # until all have checked it
    if accelerator.is_main_process:
        write_json(Path(settings.output) / "settings.json", _record(settings))
    accelerator.wait_for_everyone()


def _record(settings: TrainSettings) -> dict:
    return {key: value for key, value in settings.to_dict().items() if key != "output"}


def _differences(before: dict, after: dict, prefix: str = "") -> list[str]:
    found = []
    for key in {**before, **after}:
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} was {old!r}, now {new!r}")
    return found


def _sync(accelerator: Accelerator, model, last: bool):
    """Gradients are exchanged with the last micro-batch only."""
    from contextlib import nullcontext

    return nullcontext() if last else accelerator.no_sync(model)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


__all__ = ["DataError", "TrainResult", "train"]
