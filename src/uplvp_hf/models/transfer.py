"""Moving weights between models with different classes, and saying what happened to every tensor."""

from dataclasses import dataclass, field

import torch
from torch import nn

from .class_names import match_names
from .errors import UserError

CLASS_HEADS = ("remap", "spread", "new")


@dataclass
class TransferReport:
    """What a transfer did: names of tensors kept, remapped (class rows copied by name), re-initialized, ignored.

    classes: class names whose rows were copied; new_classes: the others, whose rows are as initialized, or, with spread
    set, the mean over the classes of the source.
    """

    kept: list[str] = field(default_factory=list)
    remapped: list[str] = field(default_factory=list)
    reinitialized: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    new_classes: list[str] = field(default_factory=list)
    spread: bool = False

    def __str__(self) -> str:
        lines = [f"kept {len(self.kept)} tensors"]
        if self.remapped:
            lines.append(f"remapped by class name ({', '.join(self.classes) or 'none'}): {', '.join(self.remapped)}")
            if self.new_classes and self.spread:
                lines.append(f"mean over all classes there for those unknown there: {', '.join(self.new_classes)}")
            elif self.new_classes:
                lines.append(f"re-initialized rows of these, of classes unknown there: {', '.join(self.new_classes)}")
        if self.reinitialized:
            lines.append(f"re-initialized: {', '.join(self.reinitialized)}")
        if self.ignored:
            lines.append(f"ignored: {', '.join(self.ignored)}")
        return "\n".join(lines)


@torch.no_grad()
def transfer_weights(source: nn.Module, target: nn.Module, class_head: str = "remap") -> TransferReport:
    """Copies the tensors of `source` into `target`, model by model of the same architecture.

    Class-sized tensors (named by `segmenter.class_sized`, classes along the first axis, an extra last row being "no
    object", or the first rows where the segmenter has `background_first`) are copied row by row by class name with
    `class_head="remap"`, left as initialized with `"new"`. `"spread"` is "remap", and classes that the source does not
    know start from the mean of its classes' rows: after a class-agnostic pre-training every class starts as "object",
    so that what tells objects from background is kept. Any other tensor of unequal shape is left as initialized and
    reported.
    """
    if class_head not in CLASS_HEADS:
        raise UserError(f"class_head must be one of {', '.join(CLASS_HEADS)}, got `{class_head}`.")
    report = TransferReport(spread=class_head == "spread")
    old, new = source.state_dict(), target.state_dict()
    # Of the segmenters: a few-shot model has classes of its own besides, which no tensor has rows for.
    known, wanted = source.segmenter.config.id2label, target.segmenter.config.id2label
    rows = class_rows(known, wanted)
    same_classes = known == wanted
    prefix = "" if target.segmenter is target else "segmenter."
    class_sized = {f"{prefix}{name}" for name in target.segmenter.class_sized}
    copy_rows = _copy_rows_after_background if getattr(target.segmenter, "background_first", False) else _copy_rows
    for name, tensor in new.items():
        if name not in old:
            report.reinitialized.append(name)
        elif name in class_sized and (report.spread or (class_head == "remap" and (rows or same_classes))):
            copy_rows(old[name], tensor, rows, len(known), len(wanted), report.spread)
            report.remapped.append(name)
        elif name not in class_sized and old[name].shape == tensor.shape:
            tensor.copy_(old[name])
            report.kept.append(name)
        else:
            report.reinitialized.append(name)
    report.ignored = [name for name in old if name not in new]
    copied = rows if report.remapped else {}
    report.classes = [name for row, name in wanted.items() if row in copied]
    report.new_classes = [name for row, name in wanted.items() if row not in copied]
    return report


def class_rows(old: dict[int, str], new: dict[int, str]) -> dict[int, int]:
    """New class id -> old class id, for classes of the same name."""
    ids = list(old)
    places = match_names(list(new.values()), list(old.values()))
    return {index: ids[place] for index, place in zip(new, places) if place is not None}


def _copy_rows(
    old: torch.Tensor, new: torch.Tensor, rows: dict[int, int], old_count: int, new_count: int, spread: bool = False
) -> None:
    if spread:
        new[:new_count] = old[:old_count].mean(0)
    for target, source in rows.items():
        new[target] = old[source]
    if old.shape[0] == old_count + 1 and new.shape[0] == new_count + 1:
        new[new_count] = old[old_count]  # "no object"


def _copy_rows_after_background(
    old: torch.Tensor, new: torch.Tensor, rows: dict[int, int], old_count: int, new_count: int, spread: bool = False
) -> None:
    """Several rows a class, such as four numbers of a box, are kept together."""
    old, new = old.unflatten(0, (old_count + 1, -1)), new.unflatten(0, (new_count + 1, -1))
    new[0] = old[0]
    _copy_rows(old[1:], new[1:], rows, old_count, new_count, spread)
