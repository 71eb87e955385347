"""Checkpoints of a run: written beside their final name, then renamed, so that a torn one is never chosen.

A checkpoint is a folder `checkpoint-<step>` with the model (safetensors and config), the optimiser's tensors and the
random state (safetensors), and `state.json`. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..files import write_json, writing

_STATE = "state.json"


def save_checkpoint(folder: Path, step: int, model: nn.Module, optimizer, state: dict, keep: int) -> Path:
    """Writes `folder/checkpoint-<step>` atomically and removes all but the `keep` newest. Returns the folder.

    Raises OSError naming the folder when it cannot be written; earlier checkpoints stay.
    """
    final = folder / f"checkpoint-{step}"
    draft = folder / f".checkpoint-{step}.tmp"
    for torn in folder.glob(".checkpoint-*.tmp"):  # left by a run that was killed here
        shutil.rmtree(torn)
    try:
        with writing(final):
            draft.mkdir(parents=True)
            model.save_pretrained(draft)
            save_file(_optimizer_tensors(model, optimizer), draft / "optimizer.safetensors")
            save_file(_random_state(), draft / "random_state.safetensors")
            write_json(draft / _STATE, {**state, "step": step})
            shutil.rmtree(final, ignore_errors=True)
            os.replace(draft, final)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if (path / _STATE).is_file()]
    return sorted(found, key=lambda path: int(path.name.rsplit("-", 1)[1]))


def load_checkpoint(path: Path, model: nn.Module, optimizer) -> dict:
    """Restores model, optimiser and random state in place; returns the state that was saved with them."""
    # `from_pretrained` knows the names under which transformers saves some backbones.
    saved, info = type(model).from_pretrained(path, output_loading_info=True)
    fault = {key: sorted(map(str, info[key]))[:3] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(fault.values()) or saved.state_dict().keys() != model.state_dict().keys():
        raise ValueError(
            f"{path} does not fit the model of this run ({fault}): resume with the settings that it was started with."
        )
    model.load_state_dict(saved.state_dict())
    _restore_optimizer(model, optimizer, load_file(path / "optimizer.safetensors"))
    _restore_random_state(load_file(path / "random_state.safetensors"))
    return json.loads((path / _STATE).read_text())


def _optimizer_tensors(model: nn.Module, optimizer) -> dict[str, torch.Tensor]:
    """State of the optimiser by parameter name: `<name>|<field>`."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{names[id(parameter)]}|{key}": torch.as_tensor(value).contiguous()
        for parameter, fields in optimizer.state.items()
        for key, value in fields.items()
    }


def _restore_optimizer(model: nn.Module, optimizer, tensors: dict[str, torch.Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        parameter_name, key = name.rsplit("|", 1)
        parameter = parameters[parameter_name]
        # Step counters stay on the host, as torch keeps them; the moments live beside their parameter.
        device = "cpu" if key == "step" else parameter.device
        optimizer.state[parameter][key] = value.to(device)


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state.update({f"cuda{i}": value for i, value in enumerate(torch.cuda.get_rng_state_all())})
    return state


def _restore_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all([state[key] for key in sorted(state) if key.startswith("cuda")])
