"""What several tests of training share: runs in other processes, comparisons of what runs leave behind."""

import json
import textwrap
from pathlib import Path

import processes
from safetensors.torch import load_file

from uplvp_hf.training import loop
from uplvp_hf.training.checkpoint import list_checkpoints


def stop_at(monkeypatch, step, error=KeyboardInterrupt):
    """Makes the update number `step` (0-based) of any run raise, once."""
    update = loop._Run._update

    def interrupted(self, current, batches):
        if current == step:
            monkeypatch.setattr(loop._Run, "_update", update)
            raise error
        return update(self, current, batches)

    monkeypatch.setattr(loop._Run, "_update", interrupted)


def assert_same_run(one: Path, other: Path):
    """Final weights, log and all that checkpoints of the same step hold are the same to the bit, but for times."""
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert timeless_log(one) == timeless_log(other)
    common = {path.name for path in list_checkpoints(one)} & {path.name for path in list_checkpoints(other)}
    assert len(common) >= 2
    for name in common:
        files = {path.name for path in (one / name).iterdir()}
        assert {path.name for path in (other / name).iterdir()} == files >= {"optimizer.safetensors", "state.json"}
        for file in files - {"state.json"}:
            assert (one / name / file).read_bytes() == (other / name / file).read_bytes(), f"{name}/{file}"
        assert state_of(one / name) == state_of(other / name)


def state_of(checkpoint: Path) -> dict:
    """`state.json` without what depends on the clock."""
    state = json.loads((checkpoint / "state.json").read_text())
    for timed in (state, *state["evaluations"].values()):
        timed.pop("seconds"), timed.pop("training_seconds", None)
    return state


PROCESS = textwrap.dedent(
    """
    import os, signal, sys
    import torch
    from uplvp_hf.training import checkpoint, loop
    from uplvp_hf.training.config import load_settings
    torch.set_num_threads(1)
    recipe, output, *words = sys.argv[1:]
    """
)
TRAIN = 'loop.train(load_settings(recipe, [*words, f"output={output}"]), progress=False)\n'


def on_two_processes(script: Path, *arguments) -> str:
    """Runs a script as torchrun would, fails with its messages if it does not end well, and returns them."""
    return "".join(processes.run_together(script, *arguments))


# Gradients are compared through plain gradient descent: Adam would blow up the noise of gradients near zero. Random
# points are the same for every mask and prompts are kept for the same queries, however the batch is cut.
DETERMINISTIC = textwrap.dedent(
    """
    rand = torch.rand

    def even(*shape, generator=None, device=None, **options):
        if generator is not None:
            return rand(*shape, generator=generator, **options)
        shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        count = shape[-2] if shape[-1] == 2 else shape[-1]
        steps = torch.arange(1, count + 1, dtype=torch.float64)
        columns = [steps * 0.7548776662466927 % 1, steps * 0.5698402909980532 % 1]
        values = torch.stack(columns, -1) if shape[-1] == 2 else columns[0]
        return values.float().expand(shape).clone()

    def plain_descent(model, settings):
        groups = loop_groups(model, settings)
        for group in groups:
            group["base_lr"] = group["lr"]
            group["weight_decay"] = 0.0
        return torch.optim.SGD(groups, lr=settings.lr)

    from uplvp_hf.training.optim import parameter_groups as loop_groups
    torch.rand = even
    loop.make_optimizer = plain_descent
    """
)
DESCENT = ["optim.lr=0.05", "optim.steps=3", "checkpoint.every=0", "log_every=1", "model.prompt_drop=0.3"]


def largest_difference(one: Path, other: Path) -> float:
    one, other = (load_file(path / "model.safetensors") for path in (one, other))
    return max((one[name] - other[name]).abs().max().item() for name in one)


def timeless_log(folder: Path) -> list[dict]:
    return [{key: value for key, value in line.items() if key != "val_training_seconds"} for line in log_of(folder)]


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
