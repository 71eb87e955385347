"""`uplvp finetune`: a few labeled images -> a fine-tuned segmenter."""

from __future__ import annotations

from uplvp_hf.commands.training import run_training


def main(argv: list[str] | None = None) -> int:
    return run_training("finetune", "Fine-tune a segmenter on labeled images.", argv)
