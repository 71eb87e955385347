"""Checkpoints of a run: written beside their final name, then renamed, so that a torn one is never chosen.

A checkpoint is a folder `checkpoint-<step>` with the model (safetensors and config), further tensors (optimizer, random
state of every process, moving average; safetensors) and `state.json`, which is written last and holds the size of every
other file. Everything reaches the disk before the folder gets its name. Nothing is pickled.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..files import write_json, writing
from ..models.errors import UserError
from ..settings import ConfigError
from .sharding import spread_like, whole

logger = logging.getLogger(__name__)

_STATE = "state.json"

Tensors = dict[str, Tensor]


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, tensors: dict[str, Tensors], state: dict, keep: int
) -> Path:
    """Writes `folder/checkpoint-<step>` atomically and removes all but the `keep` newest. Returns the folder.

    tensors: contents of further files, by name without `.safetensors`. state: what `state.json` holds beside `step`.
    Raises OSError naming the folder when it cannot be written; earlier checkpoints stay.
    """
    final = folder / f"checkpoint-{step}"
    for torn in folder.glob(".checkpoint-*.tmp"):  # left by a run that was killed here
        shutil.rmtree(torn)
    with writing(final), new_folder(final) as draft:
        model.save_pretrained(draft)
        for name, content in tensors.items():
            save_file({key: value.contiguous() for key, value in content.items()}, draft / f"{name}.safetensors")
        write_json(draft / _STATE, {**state, "step": step, "files": _sizes(draft)})
    for old in list_checkpoints(folder)[:-keep]:
        remove_folder(old)
    return final


class new_folder:
    """`with new_folder(path) as draft:` what is written to `draft` becomes the folder `path` in one step, on the disk.

    When the block raises, nothing of it is left and `path` is as before.
    """

    def __init__(self, path: Path):
        self.path, self.draft = path, path.with_name(f".{path.name}.tmp")

    def __enter__(self) -> Path:
        shutil.rmtree(self.draft, ignore_errors=True)
        self.draft.mkdir(parents=True)
        return self.draft

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                for file in [*self.draft.rglob("*"), self.draft]:
                    _to_disk(file)
                if self.path.exists():
                    remove_folder(self.path)
                os.replace(self.draft, self.path)
                _to_disk(self.path.parent)
        finally:
            shutil.rmtree(self.draft, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Removes a folder in such a way that a kill in the middle never leaves one that looks complete."""
    torn = path.with_name(f".{path.name}.old.tmp")
    shutil.rmtree(torn, ignore_errors=True)
    os.replace(path, torn)
    shutil.rmtree(torn)


def _to_disk(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _sizes(folder: Path) -> dict[str, int]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _STATE)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return [path for path in _folders(folder) if _fault(path) is None]


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint, with a warning about newer ones that are not."""
    for path in reversed(_folders(folder)):
        fault = _fault(path)
        if fault is None:
            return path
        logger.warning("%s is not complete and left aside: %s.", path, fault)
    return None


def _folders(folder: Path) -> list[Path]:
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name.rsplit("-", 1)[1].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rsplit("-", 1)[1]))


def _fault(path: Path) -> str | None:
    """What is missing or truncated in a checkpoint, or None."""
    try:
        state = json.loads((path / _STATE).read_text())
        files = state["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{_STATE} cannot be read ({type(error).__name__})"
    for name, size in files.items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != size:
            return f"{name} is missing" if found is None else f"{name} has {found} bytes of {size}"
    return None


def load_checkpoint(path: Path, model: nn.Module) -> tuple[dict, dict[str, Tensors]]:
    """Puts the weights of a checkpoint into `model` and returns the state and the further tensors saved with them.

    Raises UserError when the checkpoint holds another model.
    """
    load_weights(path, model)
    files = [file for file in sorted(path.glob("*.safetensors")) if not file.name.startswith("model")]
    return json.loads((path / _STATE).read_text()), {file.stem: load_file(file) for file in files}


def load_weights(path: Path, model: nn.Module) -> None:
    """The weights in a folder that `save_pretrained` wrote, into a model of the same class and configuration."""
    # `from_pretrained` knows the names under which transformers saves some backbones.
    saved, info = type(model).from_pretrained(path, output_loading_info=True)
    fault = {key: sorted(map(str, info[key]))[:3] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(fault.values()) or saved.state_dict().keys() != model.state_dict().keys():
        raise UserError(
            f"{path} does not fit the model of this run ({fault}): resume with the settings that it was started with."
        )
    model.load_state_dict(saved.state_dict())


def check_resumed(path: Path, state: dict, steps: int, sizes: dict[str, int]) -> None:
    """Raises ConfigError when a checkpoint lies beyond the end, or the data or a step now have other images.

    state: of the checkpoint. steps: where the run is to end. sizes: `images`, `images_per_step` and `processes` of now.
    """
    if state["step"] > steps:
        raise ConfigError(f"{path} is beyond optim.steps={steps}, where the run is to end.")
    if state["images"] != sizes["images"]:
        raise ConfigError(
            f"The run was started with {state['images']} training images, now there are {sizes['images']}: the order "
            "of the images would be another. Restore the data, or start again in another folder."
        )
    before = state["images_per_step"]
    if before != sizes["images_per_step"]:
        raise ConfigError(
            f"The run was started with {before} images a step, on {state['processes']} processes; now they are "
            f"{sizes['images_per_step']}. Choose optim.batch_size x optim.accumulation x processes so that they are "
            f"{before}."
        )
    if state["processes"] != sizes["processes"]:
        logger.warning(
            "%s is of %d processes: the run goes on with the same images a step, but what is drawn at random "
            "differs from the uninterrupted run.", path, state["processes"],
        )  # fmt: skip


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """State of the optimizer by parameter name, `<name>|<field>`. When weights are spread all processes call it."""
    found = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{name}|{key}"] = whole(torch.as_tensor(value)).cpu()
    return found


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """The inverse of `optimizer_tensors`. Raises UserError when a parameter is not trained in this run."""
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    parameters = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in trained}
    for name, value in tensors.items():
        parameter_name, key = name.rsplit("|", 1)
        if parameter_name not in parameters:
            raise UserError(f"The checkpoint has moments of `{parameter_name}`, which this run does not train.")
        parameter = parameters[parameter_name]
        # Step counters stay on the host, as torch keeps them; the moments lie (and are spread) as their parameter.
        optimizer.state[parameter][key] = value if key == "step" else spread_like(value, parameter)
