"""Names of the tensors of another code base -> ours, by a table."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..models.errors import UserError
from .resnet import resnet_name

SHOWN = 5  # names of tensors in a message


class Names:
    """What the tensors of a network with a ResNet are called there and here.

    Args:
        network: for messages.
        backbone: prefix of ours in front of what `backbone.` begins there.
        rules: pattern over a whole name there -> name here. In a pattern `#` stands for a number and `*` for any text;
            these and what is in parentheses are \\1, \\2, ... of the name here, which may also be a function of the
            match. `{qkv}` in it: three tensors, which share the packed one. The first pattern that fits counts.
        resnet: the backbone's names there -> torchvision's.
        hint: the end of the message about tensors without a place.
    """

    def __init__(
        self,
        network: str,
        backbone: str,
        rules: dict[str, str | Callable[[re.Match], str | None]],
        resnet: Callable[[str], str] = str,
        hint: str = "Other backbones are not converted.",
    ) -> None:
        self.network, self.backbone, self.resnet, self.hint = network, backbone, resnet, hint
        self.rules = [(re.compile(_pattern(there)), here) for there, here in rules.items()]

    def name(self, name: str) -> str | None:
        """Ours, None if the tensor has no place."""
        if name.startswith("backbone."):
            part = resnet_name(self.resnet(name.removeprefix("backbone.")))
            return part and self.backbone + part
        for pattern, here in self.rules:
            if match := pattern.fullmatch(name):
                return match.expand(here) if isinstance(here, str) else here(match)
        return None

    def convert(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors under our names, without copies. `num_batches_tracked` of batch norms, which inference does not
        read, is left out. Raises UserError for tensors that have no place in our model."""
        converted: dict[str, Tensor] = {}
        unknown = []
        for name, tensor in state.items():
            if name.endswith("num_batches_tracked"):
                continue
            ours = self.name(name)
            if ours is None:
                unknown.append(name)
            elif "{qkv}" in ours:
                parts = zip("qkv", torch.chunk(tensor, 3), strict=True)
                converted |= {ours.replace("{qkv}", which): part for which, part in parts}
            else:
                converted[ours] = tensor
        if unknown:
            shown = ", ".join(unknown[:SHOWN]) + (", ..." if len(unknown) > SHOWN else "")
            raise UserError(
                f"{len(unknown)} tensors have no place in a {self.network} with a ResNet: {shown}. {self.hint}"
            )
        return converted

    def require(self, what: str, found: Any, needed: Any) -> None:
        """Raises UserError where a setting of the original is none that our model has."""
        if found != needed:
            raise UserError(f"This {self.network} cannot be converted: {what} must be {needed}, got {found}.")


def _pattern(text: str) -> str:
    return text.replace(".", r"\.").replace("#", r"(\d+)").replace("*", "(.+)")


def count_numbers(state: dict[str, Tensor], pattern: str) -> int:
    """One more than the largest number that group 1 of the pattern takes, 0 where no name fits."""
    return max((int(match[1]) for name in state if (match := re.fullmatch(pattern, name))), default=-1) + 1


def renamed(
    state: dict[str, Tensor], rule: Callable[[str, Tensor], dict[str, Tensor]], network: str
) -> dict[str, Tensor]:
    """The tensors under our names, as `rule` gives them for each; no tensor is copied.

    Raises UserError naming tensors for which the rule gives nothing.
    """
    converted: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in state.items():
        found = rule(name, tensor)
        converted |= found
        if not found:
            unknown.append(name)
    if unknown:
        raise UserError(f"{len(unknown)} tensors have no place in a {network}: {', '.join(unknown[:SHOWN])}.")
    return converted


def load_fitting(model: torch.nn.Module, converted: dict[str, Tensor]) -> None:
    """Strict in one direction: what is missing is for the report, what has no place or another shape is an error."""
    wanted = model.state_dict()
    wrong = [
        f"{name} {tuple(tensor.shape)}" + (f" (ours {tuple(wanted[name].shape)})" if name in wanted else "")
        for name, tensor in converted.items()
        if name not in wanted or wanted[name].shape != tensor.shape
    ]
    if wrong:
        raise UserError(
            f"{len(wrong)} tensors do not fit the model that the settings describe: {', '.join(wrong[:5])}. "
            "Give the original's configuration, or settings."
        )
    model.load_state_dict(converted, strict=False)
