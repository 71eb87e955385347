"""What a run reports while it trains: `log.jsonl` in its folder, and a tracker such as TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from ..files import write_text, writing
from .config import TrainSettings


class RunLog:
    """Writes one line of JSON per report, and the same numbers to the tracker, in the main process."""

    def __init__(self, settings: TrainSettings, accelerator: Accelerator):
        self.settings, self.accelerator = settings, accelerator
        self.path = Path(settings.output) / "log.jsonl"

    def start(self, step: int) -> None:
        """Continues after `step`: drops from log and curves what a stopped run logged later."""
        if self.accelerator.is_main_process and self.path.is_file():
            lines = [line for line in self.path.read_text().splitlines() if line.endswith("}")]
            write_text(self.path, "".join(line + "\n" for line in lines if json.loads(line)["step"] <= step))
        if self.settings.tracker:
            # TensorBoard then leaves out later points of earlier event files.
            options = {"tensorboard": {"purge_step": step + 1}} if step else {}
            config = {"settings": json.dumps(self.settings.to_dict())}
            self.accelerator.init_trackers("uplvp_hf", config=config, init_kwargs=options)

    def write(self, step: int, values: dict) -> None:
        if self.settings.tracker:
            self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            with writing(self.path), open(self.path, "a") as log:
                log.write(json.dumps({"step": step, **values}) + "\n")

    def end(self) -> None:
        if self.settings.tracker:
            self.accelerator.end_training()


class LossMeans:
    """Means of the loss terms over the updates since the last report, and over all processes."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._sums: dict[str, Tensor] = {}
        self._updates = 0

    def add(self, terms: dict[str, Tensor]) -> None:
        """Adds the terms of an update, which are empty if it was skipped."""
        self._updates += bool(terms)
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def take(self) -> dict[str, float]:
        """Returns the means by name (empty when every update was skipped) and starts afresh. All processes call it."""
        self._gather()
        means = {name: (value / self._updates).item() for name, value in self._sums.items()}
        self._sums, self._updates = {}, 0
        return means

    def state(self) -> dict:
        """The state that `load` restores. All processes call it."""
        self._gather()
        return {"terms": {name: value.item() for name, value in self._sums.items()}, "counted": self._updates}

    def load(self, state: dict) -> None:
        device = self.accelerator.device
        self._sums = {name: torch.tensor(value, device=device) for name, value in state["terms"].items()}
        self._updates = state["counted"]

    def _gather(self) -> None:
        """Divisors are averaged over processes, so the mean over processes is the loss of the effective batch."""
        if self.accelerator.num_processes > 1 and self._sums:
            values = self.accelerator.reduce(torch.stack(list(self._sums.values())), "mean")
            self._sums = dict(zip(self._sums, values, strict=True))
