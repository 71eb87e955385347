"""`uplvp pretrain`: pseudo labels -> a pre-trained segmenter; prompts and kernel supervision by settings."""

from __future__ import annotations

import sys

from ._terminal import run
from .training import run_training


def main(argv: list[str] | None = None) -> int:
    """Without any argument, runs the embedded default: generated scenes, labeled by the small CLIP."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments:

        def default() -> None:
            from uplvp_hf.demo.pipeline import pretrain_default

            pretrain_default()

        return run("pretrain", default)
    return run_training("pretrain", "Pre-train a segmenter on pseudo labels.", list(arguments))
