"""Spreads weights over processes (FSDP2) and gathers whole tensors from them.

Accelerate shards on accelerators only; torch's own `fully_shard`, which it calls there, works on the CPU too. So it is
called here directly, and what the tests run on two CPU processes is what runs on GPUs. Parameters stay `nn.Parameter`s
of their own names, each a DTensor of which a process holds its rows: groups of the optimizer, frozen parameters, the
moving average and checkpoints work as without.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """Spreads the parameters of `model` over all processes, in place; gradients are averaged over them.

    The units that are gathered one after another are the backbone and the layers in `_no_split_modules`; what is left
    is one more unit. A parameter that no process trains is spread as well.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # The loop changes no output in place, which is what torch warns of at every step.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    layers = set(model._no_split_modules)
    for module in model.modules():
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh)
    fully_shard(model.segmenter.backbone, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor. If it is spread, all processes have to call this at the same time."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_like(part: Tensor, parameter: Tensor) -> Tensor:
    """Gathers the whole tensor of which this process holds `part`, spread like `parameter`; the dtype may differ."""
    if not isinstance(parameter, DTensor):
        return part
    shape, stride = parameter.shape, parameter.stride()
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride).full_tensor()


def spread_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Spreads a whole tensor, the same on every process, like `parameter` and on its device."""
    value = value.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return value
    # Every process has the values already: nothing needs to be sent.
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


@torch.no_grad()
def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """`state_dict` with whole tensors on the host. Every process has to call it when the model is spread."""
    return {name: whole(value.detach()).cpu() for name, value in model.state_dict().items()}


@torch.no_grad()
def load_whole_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Puts whole tensors into a model, spread or not. Raises KeyError for a tensor that `state` lacks."""
    for name, value in model.state_dict().items():
        value.copy_(spread_like(state[name].to(value.dtype), value))
