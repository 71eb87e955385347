"""Time and peak memory from query logits to COCO run lengths, ours against transformers' Mask2Former processor.

Both get the same logits, of one image each: queries with class scores and masks as a trained model gives them, a few
sure of an object, some of them duplicates, the rest unsure; a mask is one to three blobs with a rough rim. The images
have 480 x 640 and 1080 x 1920 pixels, resized to a longer side of 1024, masks at a quarter of that. None
of them needs padding, which theirs would not cut off.

Ours returns the run lengths of every instance. Theirs is timed in both of its ways, and each speed-up is over the
faster one:
  flat       `return_coco_annotation=True`: run lengths of one flat map, in which a pixel belongs to one instance. Plain
             counts along the rows, which no COCO tool reads.
  instances  `return_binary_maps=True`, and the masks encoded by pycocotools: what overlapping instances need.

Threshold 0.5 keeps a few instances, 0 all hundred. The ways take turns in one process, in alternating order; a speed-up
is the median over the rounds of theirs over ours: `speedup_...` of elapsed time, `processor_speedup_...` of processor
time, which other processes disturb less. Before anything is timed, both must find the same instances: as many
(0.5), same classes, masks that overlap. Peak memory is the growth of the resident set in a fresh process over what
libraries and logits take, the largest of four calls' ratios counts. The last line is one JSON object.

Commands:

    OMP_NUM_THREADS=1 python scripts/benchmark_postprocess.py
    OMP_NUM_THREADS=1 python scripts/benchmark_postprocess.py --rounds 9 --no-memory
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from statistics import median
from types import SimpleNamespace
from typing import Any

from benchmark_train_step import resident_peak

CLASSES = 80
SIZES = {480: (480, 640), 1080: (1080, 1920)}
THRESHOLDS = {50: 0.5, 0: 0.0}
WAYS = ("ours", "flat", "instances")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--objects", type=int, default=12, help="objects that the model is sure of")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each way")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest-edge", type=int, default=1024, help="longer side of the input, a multiple of 512")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--peak-of", nargs=3, metavar=("WAY", "SIZE", "PERCENT"), help=argparse.SUPPRESS)  # the child
    arguments = parser.parse_args(argv)

    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    if arguments.peak_of:
        way, height, percent = arguments.peak_of
        print(peak_of_call(arguments, way, SIZES[int(height)], THRESHOLDS[int(percent)]))
        return 0
    result: dict[str, float] = {}
    for name, size in SIZES.items():
        for percent, threshold in THRESHOLDS.items():
            result |= compare(arguments, f"{name}_t{percent:02}", size, threshold)
    if not arguments.no_memory:
        result |= compare_memory(arguments)
    print(json.dumps({name: round(value, 4) for name, value in result.items()}))
    return 0


def compare(arguments: argparse.Namespace, name: str, size: tuple[int, int], threshold: float) -> dict[str, float]:
    """Speed-ups at one size and threshold."""
    outputs = model_outputs(arguments, size)
    calls = {way: call(way, arguments, outputs, size, threshold) for way in WAYS}
    count, overlap = agreement(calls["ours"](), calls["instances"](), threshold)
    clocks = {"": time.perf_counter, "processor_": time.process_time}
    seconds: dict[str, dict[str, list[float]]] = {clock: {way: [] for way in WAYS} for clock in clocks}
    for turn in range(arguments.rounds):
        for way in WAYS if turn % 2 == 0 else WAYS[::-1]:
            start = {clock: read() for clock, read in clocks.items()}
            calls[way]()
            for clock, read in clocks.items():
                seconds[clock][way].append(read() - start[clock])
    print(f"{name}: {count} instances, masks overlap those of transformers by {overlap:.3f} IoU (median)")
    result = {}
    for clock, of in seconds.items():
        ratios = {
            way: median(theirs / ours for theirs, ours in zip(of[way], of["ours"], strict=True)) for way in WAYS[1:]
        }
        said = [f"transformers, {way}: {1000 * median(of[way]):.1f} ms, {ratios[way]:.2f} times" for way in ratios]
        print(f"  {clock or 'elapsed_'}time: ours {1000 * median(of['ours']):.1f} ms; {'; '.join(said)}", flush=True)
        result[f"{clock}speedup_{name}"] = min(ratios.values())
        result |= {f"{clock}speedup_{way}_{name}": ratio for way, ratio in ratios.items()}
        result[f"{clock}seconds_{name}"] = median(of["ours"])
    return result


def model_outputs(arguments: argparse.Namespace, size: tuple[int, int]) -> SimpleNamespace:
    """Logits of one image, of a model that is sure of `objects` objects and has duplicates and doubts besides."""
    import torch
    from torch.nn import functional as F

    generator = torch.Generator().manual_seed(arguments.seed)
    scale = arguments.longest_edge / max(size) / 4
    height, width = (8 * math.ceil(scale * side / 8 - 1e-6) for side in size)  # padded to multiples of 32
    queries, objects = arguments.queries, arguments.objects
    sure = torch.arange(queries) < objects
    truth = torch.randint(0, CLASSES, (queries,), generator=generator)
    twin = torch.randint(0, objects, (queries,), generator=generator)  # the object that an unsure query doubles
    doubles = ~sure & (torch.rand(queries, generator=generator) < 0.5)
    truth = torch.where(doubles, truth[twin], truth)
    classes = torch.randn(queries, CLASSES + 1, generator=generator)
    classes[torch.arange(queries), truth] += torch.where(sure, 9.0, 4.0)
    classes[:, -1] += torch.where(sure, 3.0, 8.0)
    down = torch.linspace(0, 1, height)[:, None]
    across = torch.linspace(0, width / height, width)
    masks = torch.empty(1, queries, height, width)
    for query in range(queries):
        blobs = []
        for _ in range(int(torch.randint(1, 4, (), generator=generator))):
            y, x, tall, wide = torch.rand(4, generator=generator)
            tall, wide = 0.02 * 20**tall, 0.02 * 20**wide  # half axes from 2 to 40 % of the height
            distance = ((down - y) / tall) ** 2 + ((across - x * width / height) / wide) ** 2
            blobs.append(6 * (1 - distance))
        rough = torch.randn(1, 1, height // 8, width // 8, generator=generator) * 1.5
        rough = F.interpolate(rough, (height, width), mode="bicubic")[0, 0]
        masks[0, query] = torch.stack(blobs).amax(0).clamp(-12, 6) + rough
        if doubles[query]:
            masks[0, query] = masks[0, twin[query]] + rough
    return SimpleNamespace(class_queries_logits=classes[None], masks_queries_logits=masks)


def call(way: str, arguments: argparse.Namespace, outputs: Any, size: tuple[int, int], threshold: float) -> Any:
    """A function without arguments: post-processing of one image to run lengths."""
    settings = {"threshold": threshold, "target_sizes": [size]}
    if way == "ours":
        from uplvp_hf.models.image_processing_uplvp import UplvpImageProcessor

        processor = UplvpImageProcessor(size={"longest_edge": arguments.longest_edge})
        settings |= {"return_rle": True, "return_segmentation": False, "top_k": arguments.queries}  # as theirs
        return lambda: processor.post_process_instance_segmentation(outputs, **settings)[0]
    from transformers import Mask2FormerImageProcessor

    processor = Mask2FormerImageProcessor()
    if way == "flat":
        settings["return_coco_annotation"] = True
        return lambda: processor.post_process_instance_segmentation(outputs, **settings)[0]
    settings["return_binary_maps"] = True
    return lambda: with_rle(processor.post_process_instance_segmentation(outputs, **settings)[0])


def with_rle(result: dict[str, Any]) -> dict[str, Any]:
    """The masks (N, H, W) of transformers, in float32, as COCO run lengths by the quickest way of pycocotools."""
    import torch
    from pycocotools import mask as coco_mask

    if not result["segments_info"]:
        return {**result, "rle": []}
    columns = result["segmentation"].to(torch.uint8).transpose(1, 2).contiguous().numpy()
    return {**result, "rle": coco_mask.encode(columns.T)}


def agreement(ours: dict[str, Any], theirs: dict[str, Any], threshold: float) -> tuple[int, float]:
    """Number of instances and median IoU of the masks, query by query. SystemExit where they differ."""
    import numpy as np
    from pycocotools import mask as coco_mask

    order = np.argsort([-segment["score"] for segment in theirs["segments_info"]], kind="stable")
    found, expected = len(ours["rle"]), len(theirs["rle"])
    if (threshold > 0 and found != expected) or abs(found - expected) > 0.05 * expected:
        raise SystemExit(f"We find {found} instances, transformers {expected}.")
    overlap = coco_mask.iou(ours["rle"], [theirs["rle"][index] for index in order], [0] * expected)
    labels = np.array([theirs["segments_info"][index]["label_id"] for index in order])
    overlap = overlap * (ours["labels"].numpy()[:, None] == labels)  # scores differ in the third digit, and the order
    best = float(np.median(overlap.max(1)))
    if best < 0.9:
        raise SystemExit(f"Our masks and those of transformers overlap by {best:.3f} IoU only.")
    return found, best


def compare_memory(arguments: argparse.Namespace) -> dict[str, float]:
    """Peak memory of ours as a share of that of the leaner way of transformers, the largest over sizes and
    thresholds."""
    shares = []
    for height in SIZES:
        for percent in THRESHOLDS:
            peaks = {way: _child(arguments, way, height, percent) for way in WAYS}
            shares.append(peaks["ours"] / min(peaks["flat"], peaks["instances"]))
            listed = ", ".join(f"{way} {peak / 2**20:.1f} MiB" for way, peak in peaks.items())
            print(f"{height}_t{percent:02}: peak memory {listed}", flush=True)
    return {"memory_ratio": max(shares)}


def _child(arguments: argparse.Namespace, way: str, height: int, percent: int) -> int:
    command = [sys.executable, __file__, "--peak-of", way, str(height), str(percent)]
    for name in ("queries", "objects", "seed", "longest_edge"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    output = subprocess.run(command, capture_output=True, text=True, check=False)
    if output.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{output.stderr}")
    return int(output.stdout.splitlines()[-1])


def peak_of_call(arguments: argparse.Namespace, way: str, size: tuple[int, int], threshold: float) -> int:
    """Bytes by which the resident set of this process grows at most in one call, a small one done before."""
    warm = argparse.Namespace(**{**vars(arguments), "queries": 4, "objects": 2, "longest_edge": 64})
    call(way, warm, model_outputs(warm, (32, 64)), (32, 64), threshold)()
    run = call(way, arguments, model_outputs(arguments, size), size, threshold)
    before = resident_peak(restart=True)
    run()
    return resident_peak() - before


if __name__ == "__main__":
    raise SystemExit(main())
