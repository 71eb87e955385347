"""A training step from cached features of a frozen ViT over one that runs the ViT.

Whole steps of the training loop on generated scenes, with loading, matching and the optimizer, of the recipe
`small_vit_finetune` with a backbone of the shape of a ViT-S/16 and random weights. The same as
`benchmark_train_step.py --cached`.

Commands:

    OMP_NUM_THREADS=1 python scripts/benchmark_cached_step.py --size 384 --batch 2 --rounds 5

Steps alternate in one process; `cached_ratio` is the median over the rounds of processor time, `cached_time_ratio` of
elapsed time. What filling the cache takes, once an image and view, is not in it: `view_seconds`, processor time a view.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmark_teacher_step import alternate, run_steps

VIT_S16 = {
    "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "patch_size": 16, "image_size": 224,
    "num_register_tokens": 4,
}  # fmt: skip
IMAGES = 4


def compare_cached(arguments: argparse.Namespace) -> dict[str, float]:
    """Ratios of a cached step to one that runs the backbone."""
    import torch
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    from uplvp_hf.data.synthetic import write_scenes

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_scenes(root / "scenes", IMAGES, seed=0, size=arguments.size)
        torch.manual_seed(0)
        Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**VIT_S16)).save_pretrained(root / "vit")
        runs = {kind: run_steps(settings_of(kind, arguments, root)) for kind in ("plain", "cached")}
        start = time.process_time()
        next(runs["cached"])  # fills the cache; a step is the smaller part of it
        filling = time.process_time() - start
        elapsed, busy = alternate(runs, arguments.rounds)
    ratios = {kind: [one / other for one, other in zip(t["cached"], t["plain"], strict=True)]
              for kind, t in (("time", elapsed), ("processor", busy))}  # fmt: skip
    return {
        "cached_ratio": sorted(ratios["processor"])[len(ratios["processor"]) // 2],
        "cached_time_ratio": sorted(ratios["time"])[len(ratios["time"]) // 2],
        "plain_seconds": sorted(busy["plain"])[len(busy["plain"]) // 2],
        "view_seconds": max(filling - busy["cached"][0], 0.0) / IMAGES,
    }


def settings_of(kind: str, arguments: argparse.Namespace, folder: Path) -> Any:
    from uplvp_hf.training.config import load_settings

    words = [f"data.train={folder / 'scenes'}", f"data.size={arguments.size}", f"output={folder / kind}"]
    words += [f"optim.batch_size={arguments.batch}", "optim.steps=1000", "data.cache_views=1", "data.extra=null"]
    words += [f"model.segmenter.backbone_config.{name}={value}" for name, value in VIT_S16.items()]
    words += [f"model.backbone_weights={folder / 'vit'}", f"data.cache_features={str(kind == 'cached').lower()}"]
    return load_settings(["small_vit_finetune"], words)


def main() -> int:
    parser = argparse.ArgumentParser(description="A cached step over one with the backbone; see the head of the file.")
    for name, value in (("size", 384), ("batch", 2), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    found = compare_cached(parser.parse_args())
    print(json.dumps({name: round(value, 4) for name, value in found.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
