"""What frozen kernel targets cost: time of labeling, bytes of the store, and time of a step of pre-training.

Commands:

    OMP_NUM_THREADS=1 python scripts/benchmark_kernel_targets.py
    OMP_NUM_THREADS=1 python scripts/benchmark_kernel_targets.py --images 40 --rounds 20

Generated scenes, the small CLIP of the package and the tiny Mask2Former of `scenes_pretrain`, a K-Net and a QueryInst
on the same backbone. Labelings with and without features alternate, and so do the steps of a run with
`kernel_target=labeler`, contrastive and centered, and of one without any kernel loss. Ratios are medians of processor
time, which does not count what else a machine does. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from benchmark_teacher_step import run_steps

from uplvp_hf.cli import main as uplvp
from uplvp_hf.data.synthetic import write_scenes
from uplvp_hf.demo.pipeline import synthetic_clip_path
from uplvp_hf.training.config import load_settings

FROZEN = ["model.kernel_target=labeler", "model.kernel_loss=contrastive", "model.kernel_centering=0.9"]
NONE = ["model.kernel_supervision_weight=0"]
BACKBONE = {
    "model_type": "resnet",
    "layer_type": "basic",
    "embedding_size": 16,
    "hidden_sizes": [16, 32, 64, 96],
    "depths": [1, 1, 1, 1],
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
SMALL = {"backbone_config": BACKBONE, "hidden_size": 64, "intermediate_size": 128, "num_stages": 3, "num_queries": 20}
SEGMENTERS = {
    "mask2former": None,
    "knet": {"model_type": "knet", **SMALL, "num_attention_heads": 4, "norm_groups": 16},
    "queryinst": {
        "model_type": "queryinst", **SMALL, "num_attention_heads": 4,
        "dynamic_channels": 16, "num_mask_layers": 2, "finest_scale": 28,
    },
}  # fmt: skip


def ratio(measured: Callable[[], object], other: Callable[[], object], rounds: int) -> float:
    """Median of the processor time of `measured` over that of `other`, called in turns; the first round is left out."""
    found = []
    for turn in range(rounds + 1):
        began = time.process_time()
        measured()
        between = time.process_time()
        other()
        found += [(between - began) / (time.process_time() - between)] if turn else []
    return median(found)


def label(scenes: Path, output: Path, *words: str) -> None:
    names = "red striped star,orange disc,yellow striped triangle,green cross,teal striped square,blue heart"
    command = ["label", scenes, "--labeler", "clip", "--clip", synthetic_clip_path(), "--vocabulary", names]
    command += ["--background", "background", "--output", output, "--quiet", *words]
    if uplvp([str(word) for word in command]):
        raise SystemExit("labeling failed")


def main() -> int:
    parser = argparse.ArgumentParser(description="The cost of frozen kernel targets; see the head of the file.")
    parser.add_argument("--images", type=int, default=32, help="scenes that are labeled")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        scenes = write_scenes(root / "scenes", arguments.images, 5)
        count = itertools.count()
        found = {
            "label_ratio": ratio(
                lambda: label(scenes, root / f"with{next(count)}"),
                lambda: label(scenes, root / f"without{next(count)}", "run.features=false"),
                min(arguments.rounds, 5),
            )
        }
        store = root / "with0"
        masks = sum(len(json.loads(line)["objects"]["area"]) for file in store.glob("rows-*") for line in file.open())
        found["bytes_a_mask"] = sum(file.stat().st_size for file in store.glob("features-*")) / max(masks, 1)
        for name, segmenter in SEGMENTERS.items():
            words = [f"data.train={store}", "optim.steps=1000", f"output={root / name}"]
            words += [] if segmenter is None else [f"model.segmenter={json.dumps(segmenter)}"]
            words += ["model.prompt_matching=none"]
            one, other = (run_steps(load_settings("scenes_pretrain", [*words, *kind])) for kind in (FROZEN, NONE))
            found[f"step_ratio_{name}"] = ratio(one.__next__, other.__next__, 2 * arguments.rounds)
    for name, value in found.items():
        print(f"{name:<28} {value:.4g}")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
