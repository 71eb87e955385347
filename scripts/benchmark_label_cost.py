"""Processor time of labelers and namers, an image or a mask, on one thread.

Commands:

    OMP_NUM_THREADS=1 python scripts/benchmark_label_cost.py
    OMP_NUM_THREADS=1 python scripts/benchmark_label_cost.py --photos photos --backbone-weights mobilenetv2.safetensors

The small CLIP of the package works on generated scenes. `--photos` (COCO, or anything that is read) with the weights of
timm's MobileNetV2 adds what a backbone costs. Every part runs once before it is timed; processor time does not count
what else a machine does. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from uplvp_hf.data import InstanceDataset, load_dataset_rows
from uplvp_hf.data.synthetic import write_scenes
from uplvp_hf.demo.pipeline import synthetic_clip_path
from uplvp_hf.labeling import DenseClipLabeler, load_clip, load_encoder
from uplvp_hf.labeling.cutting.proposals import Proposals
from uplvp_hf.labeling.labelers.foreground import ForegroundLabeler
from uplvp_hf.labeling.labelers.saliency import SaliencyLabeler
from uplvp_hf.labeling.naming.examples import ExamplesNamer, read_examples

IMAGES, EXAMPLES, MASKS = 4, 8, 4  # images labeled, annotated ones, masks named in each


def seconds(run: Callable[[], object]) -> float:
    """Processor time of the second run."""
    run()
    began = time.process_time()
    run()
    return time.process_time() - began


def masks_of(dataset: InstanceDataset, index: int) -> Proposals:
    mask = dataset.mask(index, 0)
    return Proposals.build([mask] * MASKS, [1.0] * MASKS, mask.shape)


def naming(network: object, few: InstanceDataset, rest: InstanceDataset) -> float:
    """Seconds a mask of the namer `examples`."""
    namer = ExamplesNamer(network, read_examples(few), nms=None)
    images, proposals = [rest.load_image(k) for k in range(IMAGES)], [masks_of(rest, k) for k in range(IMAGES)]
    return seconds(lambda: namer(images, proposals)) / (IMAGES * MASKS)


def of_scenes() -> dict[str, float]:
    """What the small CLIP costs on scenes of 128 pixels."""
    with tempfile.TemporaryDirectory() as folder:
        scenes = load_dataset_rows(write_scenes(Path(folder) / "scenes", EXAMPLES + IMAGES, 5))
        few, rest = scenes.subset(range(EXAMPLES)), scenes.subset(range(EXAMPLES, EXAMPLES + IMAGES))
        clip = load_clip(synthetic_clip_path())
        labeler = DenseClipLabeler(clip, [], examples=read_examples(few))
        images = [rest.load_image(k) for k in range(IMAGES)]
        labeler.restore(labeler.calibrate(labeler.measure(images)))
        return {
            "clip_by_examples_seconds_an_image": seconds(lambda: list(labeler(images))) / IMAGES,
            "examples_small_clip_seconds_a_mask": naming(clip, few, rest),
        }


def of_photographs(photos: str, split: str | None, weights: str, pad_type: str | None) -> dict[str, float]:
    """What MobileNetV2 costs."""
    dataset = load_dataset_rows(photos, split=split)
    labeled = [k for k in range(len(dataset)) if dataset[k]["objects"]["area"]][: EXAMPLES + IMAGES]
    few, rest = dataset.subset(labeled[:EXAMPLES]), dataset.subset(labeled[EXAMPLES:])
    images = [rest.load_image(k) for k in range(IMAGES)]
    network = load_encoder("timm:mobilenetv2_100", weights, pad_type)
    found = {"pixels_an_image": float(np.mean([image.width * image.height for image in images]))}
    for kind in (ForegroundLabeler, SaliencyLabeler):
        labeler = kind(network)
        found[f"{labeler.name}_seconds_an_image"] = seconds(lambda labeler=labeler: labeler(images)) / IMAGES
    found["examples_mobilenetv2_seconds_a_mask"] = naming(network, few, rest)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Processor time of labeling; see the head of the file.")
    parser.add_argument("--photos", help="labeled images, with --backbone-weights")
    parser.add_argument("--split", help="of the photos")
    parser.add_argument("--backbone-weights", help="safetensors file for timm:mobilenetv2_100")
    parser.add_argument("--pad-type", help="same, where the weights come from TensorFlow")
    arguments = parser.parse_args()
    if (arguments.photos is None) != (arguments.backbone_weights is None):
        parser.error("--photos and --backbone-weights go together")
    torch.set_num_threads(1)
    found = of_scenes()
    if arguments.photos:
        found |= of_photographs(arguments.photos, arguments.split, arguments.backbone_weights, arguments.pad_type)
    for name, value in found.items():
        print(f"{name:<44} {value:.4g}")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
