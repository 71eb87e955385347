"""Processor time of labelers and namers, an image or a mask, on one thread, and the size of the store.

Commands:

    OMP_NUM_THREADS=1 python scripts/benchmark_label_cost.py
    OMP_NUM_THREADS=1 python scripts/benchmark_label_cost.py --photos photos --backbone-weights mobilenetv2.safetensors

The small CLIP of the package works on generated scenes. `--photos` (COCO, or anything that is read) with the weights of
timm's MobileNetV2 adds what a backbone costs. Every part runs once before it is timed; processor time does not count
what else a machine does. *whole run* is `uplvp label`, from image files to a store, without what happens once
(calibration on other images, loading); its table goes on to more images, by multiplication alone (docs/scale.md). The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from uplvp_hf.data import InstanceDataset, load_dataset_rows
from uplvp_hf.data.synthetic import CLASSES, write_scenes
from uplvp_hf.demo.pipeline import synthetic_clip_path
from uplvp_hf.labeling import (
    CenterBoxLabeler,
    ClipZeroShotNamer,
    DenseClipLabeler,
    label_images,
    load_clip,
    load_encoder,
)
from uplvp_hf.labeling.cutting.proposals import Proposals
from uplvp_hf.labeling.labelers.foreground import ForegroundLabeler
from uplvp_hf.labeling.labelers.saliency import SaliencyLabeler
from uplvp_hf.labeling.naming.examples import ExamplesNamer, read_examples
from uplvp_hf.labeling.protocol import Labeler, Namer

IMAGES, EXAMPLES, MASKS = 4, 8, 4  # images labeled, annotated ones, masks named in each
RUN = 16  # images of a whole run
MANY = (100_000, 1_000_000)
CORES = (1, 64)


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


def whole_run(dataset: InstanceDataset, labeler: Labeler, namer: Namer | None) -> dict[str, float]:
    """Of `RUN` images, from file to store: processor seconds and bytes an image, masks an image.

    The first of two runs pays for what is made once, and gives the second its calibration.
    """
    images = dataset.subset(range(min(RUN, len(dataset)))).unlabeled()
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder) / "first", Path(folder) / "second"
        label_images(images, labeler, namer, first, progress=False, workers=1)
        began = time.process_time()
        done = label_images(images, labeler, namer, second, progress=False, workers=1, calibration=str(first))
        spent = time.process_time() - began
        size = sum(file.stat().st_size for file in second.iterdir() if file.name != "header.json")
    return {"seconds": spent / done.done, "bytes": size / done.done, "masks": done.instances / done.done}


def extrapolated(runs: dict[str, dict[str, float]]) -> list[str]:
    """Lines of a table in Markdown: what is measured an image, and what many images would take."""
    heads = [f"{count:,} images: {cores} {'core' if cores == 1 else 'cores'}" for count in MANY for cores in CORES]
    lines = [f"| whole run | seconds an image | bytes an image | {' | '.join(heads)} | disk of {MANY[-1]:,} |"]
    lines.append("|---" * (len(heads) + 4) + "|")
    for name, run in runs.items():
        hours = [f"{run['seconds'] * count / cores / 3600:.1f} h" for count in MANY for cores in CORES]
        disk = f"{run['bytes'] * MANY[-1] / 1e9:.1f} GB"
        lines.append(f"| {name} | {run['seconds']:.3f} | {run['bytes']:,.0f} | {' | '.join(hours)} | {disk} |")
    return lines


def of_scenes(runs: dict[str, dict[str, float]]) -> dict[str, float]:
    """What the small CLIP costs on scenes of 128 pixels."""
    with tempfile.TemporaryDirectory() as folder:
        scenes = load_dataset_rows(write_scenes(Path(folder) / "scenes", EXAMPLES + RUN, 5))
        few, rest = scenes.subset(range(EXAMPLES)), scenes.subset(range(EXAMPLES, EXAMPLES + RUN))
        clip = load_clip(synthetic_clip_path())
        labeler = DenseClipLabeler(clip, [], examples=read_examples(few))
        images = [rest.load_image(k) for k in range(IMAGES)]
        labeler.restore(labeler.calibrate(labeler.measure(images)))
        words = DenseClipLabeler(clip, list(CLASSES))
        runs["`center_box`, scenes of 128 px"] = whole_run(rest, CenterBoxLabeler(), None)
        runs["`clip`, small CLIP, scenes of 128 px"] = whole_run(rest, words, None)
        namer = ClipZeroShotNamer(clip, list(CLASSES))
        runs["the same with namer `clip`"] = whole_run(rest, words, namer)
        return {
            "clip_by_examples_seconds_an_image": seconds(lambda: list(labeler(images))) / IMAGES,
            "examples_small_clip_seconds_a_mask": naming(clip, few, rest),
        }


def of_photographs(
    photos: str, split: str | None, weights: str, pad_type: str | None, runs: dict[str, dict[str, float]]
) -> dict[str, float]:
    """What MobileNetV2 costs."""
    dataset = load_dataset_rows(photos, split=split)
    labeled = [k for k in range(len(dataset)) if dataset[k]["objects"]["area"]][: EXAMPLES + RUN]
    few, rest = dataset.subset(labeled[:EXAMPLES]), dataset.subset(labeled[EXAMPLES:])
    images = [rest.load_image(k) for k in range(IMAGES)]
    network = load_encoder("timm:mobilenetv2_100", weights, pad_type)
    found = {"pixels_an_image": float(np.mean([image.width * image.height for image in images]))}
    for kind in (ForegroundLabeler, SaliencyLabeler):
        labeler = kind(network)
        found[f"{labeler.name}_seconds_an_image"] = seconds(lambda labeler=labeler: labeler(images)) / IMAGES
        runs[f"`{labeler.name}`, MobileNetV2, photographs"] = whole_run(rest, labeler, None)
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
    runs: dict[str, dict[str, float]] = {}
    found: dict[str, Any] = of_scenes(runs)
    if arguments.photos:
        where = (arguments.photos, arguments.split, arguments.backbone_weights, arguments.pad_type)
        found |= of_photographs(*where, runs)
    for name, value in found.items():
        print(f"{name:<44} {value:.4g}")
    print("", *extrapolated(runs), "", sep="\n")
    print(json.dumps(found | {"whole_runs": runs}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
