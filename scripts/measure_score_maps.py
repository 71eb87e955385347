"""How near the patches of a CLIP are to its texts, by kind of last block: mIoU of score maps before any training.

Commands:

    python scripts/measure_score_maps.py                       # the shipped small CLIP on generated scenes
    python scripts/measure_score_maps.py --count 100 --size 128 --cast 0 0.55 --json rows.json

Every pixel gets the class whose plain name is nearest to its patch. The rows of docs/icpc.md are those of the first
command.
"""

from __future__ import annotations

import argparse
import json
from importlib import resources
from typing import Any

import numpy as np
import torch

from uplvp_hf.data.synthetic import BACKGROUND, CLASSES, make_scene
from uplvp_hf.evaluation.mean_iou import MeanIoU
from uplvp_hf.evaluation.semantic import segment_image
from uplvp_hf.files import write_json
from uplvp_hf.models.image_processing_icpc import IcpcImageProcessor
from uplvp_hf.models.modeling_icpc import IcpcForSemanticSegmentation

BLOCKS: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "identity": {},
    "clearclip": {},
    "naclip": {},
    "naclip, local": {"dense_block": "naclip", "dense_sigma": 1.5, "dense_scale": 5.0},
}
FIRST_SEED = 10_000  # far from the seeds of training scenes


def measure(model: IcpcForSemanticSegmentation, scenes: list[Any]) -> dict[str, float]:
    """mIoU, mAcc and aAcc of the score map of CLIP's own patches."""
    size = scenes[0]["image"].width
    processor = IcpcImageProcessor(size={"shortest_edge": size, "longest_edge": size})
    metric = MeanIoU(len(CLASSES) + 1)
    for scene in scenes:
        true = np.zeros((size, size), dtype=np.int64)
        for mask, label in zip(scene["masks"], scene["labels"], strict=True):
            true[mask] = label + 1
        with torch.inference_mode():
            found = segment_image(model, processor, scene["image"], score_maps=True).argmax(0).numpy()
        metric.add(found, true)
    numbers = metric.compute()
    return {name: round(numbers[name], 4) for name in ("mIoU", "mAcc", "aAcc")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40, help="scenes (default: 40)")
    parser.add_argument("--size", type=int, default=96, help="of the scenes, pixels (default: 96)")
    parser.add_argument("--cast", type=float, nargs="+", default=[0.0, 0.55], help="of the light (default: 0 and 0.55)")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    arguments = parser.parse_args()
    clip = resources.files("uplvp_hf") / "assets" / "synthetic_clip"
    names = dict(enumerate((BACKGROUND, *CLASSES)))
    scenes = {
        cast: [make_scene(FIRST_SEED + index, arguments.size, cast=cast) for index in range(arguments.count)]
        for cast in arguments.cast
    }
    rows = []
    for name, settings in BLOCKS.items():
        chosen = {"dense_block": name, "prompt": "names", "align_strides": [], "contrastive": "none"} | settings
        model = IcpcForSemanticSegmentation.from_clip(str(clip), names, position_interpolation="bicubic", **chosen)
        for cast, some in scenes.items():
            rows.append({"block": name, "cast": cast, **measure(model.eval(), some)})
            print(json.dumps(rows[-1]), flush=True)
    if arguments.json:
        write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
