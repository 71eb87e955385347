"""What became of every tensor of a converted checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from ..models.errors import UserError

INITIALIZED = "not in the checkpoint: initialized"


@dataclass
class ConversionReport:
    """kept: names that are the same on both sides. renamed: {old name: [new names]} (a packed attention becomes three).
    dropped: {old name: reason}. missing: {our name: reason}: tensors that keep the value of initialization."""

    kept: list[str] = field(default_factory=list)
    renamed: dict[str, list[str]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        source: dict[str, Tensor],
        converted: dict[str, Tensor],
        dropped: dict[str, str],
        model_names: Iterable[str],
        missing_reason: dict[str, str] | None = None,
    ) -> ConversionReport:
        """From the tensors before and after, which share storage because converters copy nothing.

        model_names: every name of our model. missing_reason: {pattern end: reason} for expected gaps.
        Raises UserError when a tensor of `source` is neither converted nor dropped.
        """
        owners: dict[int, list[str]] = {}
        for name, tensor in converted.items():
            owners.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)
        report = cls(dropped=dict(dropped))
        found = {name: owners.get(tensor.untyped_storage().data_ptr(), []) for name, tensor in source.items()}
        report.kept = [name for name, ours in found.items() if ours == [name]]
        report.renamed = {name: ours for name, ours in found.items() if ours and ours != [name]}
        lost = [name for name, ours in found.items() if not ours and name not in dropped]
        if lost:
            raise UserError(f"{len(lost)} tensors were neither converted nor dropped: {', '.join(lost[:5])}.")
        for name in model_names:
            if name not in converted:
                ends = [reason for end, reason in (missing_reason or {}).items() if name.endswith(end)]
                report.missing[name] = ends[0] if ends else INITIALIZED
        return report

    @property
    def untrained(self) -> list[str]:
        """Our tensors that should have been in the checkpoint: the model does not work as the original did."""
        return [name for name, reason in self.missing.items() if reason == INITIALIZED]

    def __str__(self) -> str:
        lines = [
            f"{len(self.kept)} tensors kept their name, {len(self.renamed)} were renamed, "
            f"{len(self.dropped)} dropped, {len(self.missing)} of ours are missing there."
        ]
        for title, reasons in (("dropped", self.dropped), ("missing", self.missing)):
            lines += [f"  {title} {count} x {reason}" for reason, count in Counter(reasons.values()).items()]
        return "\n".join(lines)
