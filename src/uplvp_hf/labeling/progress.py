"""How far a labeling run is, shown by process 0 alone, of its own share."""

from __future__ import annotations

from .. import progress
from .processes import Processes


class Progress(progress.Progress):
    """What `uplvp_hf.progress.Progress` is, of the images of this process. total: None where nobody knows."""

    def __init__(self, what: str, total: int | None, shown: bool, processes: Processes) -> None:
        named = what if processes.size == 1 else f"{what} (process 1 of {processes.size})"
        super().__init__(named, total, shown and processes.rank == 0)
