"""Time and peak memory of one training step (forward, loss, backward) of our Mask2Former against transformers' own.

Same weights, images and objects for both; steps alternate in one process, and a ratio (ours over theirs) is the
median over the rounds. Before anything is timed both must give the same loss on the same random points. Peak memory is
that of a first step over what model and batch take: on CPU the growth of the resident set in a fresh process each, on
CUDA the allocator's peak. K-Net and QueryInst steps are timed beside it. The last line is one JSON object. `--teacher`
times whole steps of the training loop instead, with a teacher over without (`benchmark_teacher_step.py`), `--cached`
those from cached features of a frozen ViT over those that run it (`benchmark_cached_step.py`).
`time_ratio_N` is of elapsed time, `processor_ratio_N` of processor time, which other processes disturb less.

Commands:

    OMP_NUM_THREADS=1 python scripts/benchmark_train_step.py
    OMP_NUM_THREADS=1 python scripts/benchmark_train_step.py --backbone swin-tiny --objects 20 --rounds 5
    python scripts/benchmark_train_step.py --device cuda
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

STAGES = ["stage1", "stage2", "stage3", "stage4"]
CLASSES = 80


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=("resnet50", "swin-tiny"), default="resnet50")
    parser.add_argument("--objects", type=int, nargs="+", default=[5, 20, 100], help="objects an image")
    parser.add_argument("--size", type=int, default=512, help="side of the images in pixels, a multiple of 32")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--points", type=int, default=12544)
    parser.add_argument("--rounds", type=int, default=3, help="pairs of timed steps")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only-mask2former", action="store_true", help="leave K-Net and QueryInst out")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--peak-of", choices=("ours", "theirs"), help=argparse.SUPPRESS)  # the child process
    parser.add_argument("--teacher", action="store_true", help="steps of the loop with a teacher over those without")
    parser.add_argument("--cached", action="store_true", help="steps from cached features over those with a ViT")
    arguments = parser.parse_args(argv)

    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    if arguments.peak_of:
        print(peak_of_step(arguments, arguments.peak_of, arguments.objects[0]))
        return 0
    if arguments.teacher:
        from benchmark_teacher_step import compare_teacher

        print(json.dumps({name: round(value, 4) for name, value in compare_teacher(arguments).items()}))
        return 0
    if arguments.cached:
        from benchmark_cached_step import compare_cached

        print(json.dumps({name: round(value, 4) for name, value in compare_cached(arguments).items()}))
        return 0
    result: dict[str, float] = {}
    for objects in arguments.objects:
        result.update(compare(arguments, objects))
        if not arguments.no_memory:
            result.update(compare_memory(arguments, objects))
    print(json.dumps({name: round(value, 4) for name, value in result.items()}))
    return 0


def compare(arguments: argparse.Namespace, objects: int) -> dict[str, float]:
    """Times of all models at `objects` an image. SystemExit when the losses of the two Mask2Formers differ by more
    than rounding."""
    images = batch(arguments, objects)
    theirs = build("theirs", arguments)
    ours = build("ours", arguments)
    ours.load_state_dict(theirs.state_dict())
    difference = checked_difference(ours, theirs, images, objects)
    models = {"theirs": theirs, "ours": ours}
    if not arguments.only_mask2former:
        models |= {name: build(name, arguments) for name in ("knet", "queryinst")}
        for name in ("knet", "queryinst"):
            step(models[name], name, images)  # a first step is slower than those after it
    seconds: dict[str, list[float]] = {name: [] for name in models}
    busy: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(arguments.rounds):
        for name in list(models) if turn % 2 == 0 else list(models)[::-1]:
            elapsed, processor = timed(models[name], name, images, arguments.device)
            seconds[name].append(elapsed)
            busy[name].append(processor)
    ratios, processor_ratios = (
        [ours / theirs for ours, theirs in zip(times["ours"], times["theirs"], strict=True)]
        for times in (seconds, busy)
    )
    print(f"{objects} objects an image, loss difference {difference:.1e} (share)")
    print("  transformers {:.2f} s, ours {:.2f} s".format(median(seconds["theirs"]), median(seconds["ours"])), end="")
    print(f", ratio {median(ratios):.3f} (of the rounds: {', '.join(f'{ratio:.3f}' for ratio in ratios)})", flush=True)
    print("  processor time: transformers {:.2f} s, ours {:.2f} s".format(median(busy["theirs"]), median(busy["ours"])))
    result = {f"time_ratio_{objects}": median(ratios), f"seconds_{objects}": median(seconds["ours"])}
    result[f"processor_ratio_{objects}"] = median(processor_ratios)
    for name in list(models)[2:]:
        share = median(other / own for other, own in zip(seconds[name], seconds["ours"], strict=True))
        print(f"  {name} {median(seconds[name]):.2f} s, {share:.3f} of our Mask2Former", flush=True)
        result[f"{name}_seconds_{objects}"] = median(seconds[name])
        result[f"{name}_over_mask2former_{objects}"] = share
    return result


def build(name: str, arguments: argparse.Namespace) -> Any:
    """A randomly initialized model in training mode; the same seed for each."""
    import torch
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig, SwinConfig, logging

    logging.set_verbosity_error()
    backbone = {
        "resnet50": ResNetConfig(out_features=STAGES),
        "swin-tiny": SwinConfig(drop_path_rate=0.0, out_features=STAGES),
    }[arguments.backbone]
    torch.manual_seed(0)
    labels = {"num_queries": arguments.queries, "num_labels": CLASSES, "backbone_config": backbone}
    if name in ("ours", "theirs"):
        from uplvp_hf.models.modeling_mask2former import Mask2FormerSegmenter

        config = Mask2FormerConfig(**labels, train_num_points=arguments.points, dropout=0.0)
        model = (Mask2FormerSegmenter if name == "ours" else Mask2FormerForUniversalSegmentation)(config)
    elif name == "knet":
        from uplvp_hf.models.configuration_knet import KNetConfig
        from uplvp_hf.models.modeling_knet import KNetForInstanceSegmentation

        model = KNetForInstanceSegmentation(KNetConfig(**labels))
    else:
        from uplvp_hf.models.configuration_queryinst import QueryInstConfig
        from uplvp_hf.models.modeling_queryinst import QueryInstForInstanceSegmentation

        model = QueryInstForInstanceSegmentation(QueryInstConfig(**labels))
    return model.train().to(arguments.device)


def batch(arguments: argparse.Namespace, objects: int) -> dict[str, Any]:
    """Noise with rectangles: pixel_values, mask_labels (bool) and class_labels."""
    import torch

    generator = torch.Generator().manual_seed(1)
    size, masks = arguments.size, []
    for _ in range(arguments.batch):
        stack = torch.zeros(objects, size, size, dtype=torch.bool)
        for mask in stack:
            top, left = torch.randint(0, size - size // 8, (2,), generator=generator).tolist()
            tall, wide = torch.randint(size // 32, size // 3, (2,), generator=generator).tolist()
            mask[top : top + tall, left : left + wide] = True
        masks.append(stack.to(arguments.device))
    labels = [torch.randint(0, CLASSES, (objects,), generator=generator) for _ in masks]
    pixels = torch.randn(arguments.batch, 3, size, size, generator=generator)
    return {
        "pixel_values": pixels.to(arguments.device),
        "mask_labels": masks,
        "class_labels": [label.to(arguments.device) for label in labels],
    }


def step(model: Any, name: str, images: dict[str, Any], draw: Callable | None = None) -> float:
    """Forward, loss and backward; the loss as a number."""
    if name == "ours":
        features = model.encode(images["pixel_values"])
        layers = model.decode(features, model.initial_queries(features))
        terms, _ = model.loss(layers, features, images["mask_labels"], images["class_labels"], draw=draw)
        loss = sum(terms.values())
    elif name == "theirs":
        # Float masks, as its image processor makes them: with bool ones it is slower.
        kind = images["pixel_values"].dtype
        loss = model(**{**images, "mask_labels": [masks.to(kind) for masks in images["mask_labels"]]}).loss
    else:
        loss = model(**images).loss
    loss.backward()
    return loss.item()


def checked_difference(ours: Any, theirs: Any, images: dict[str, Any], objects: int) -> float:
    """`loss_difference` of the two, a share. What is more than a hundred times float32's resolution is looked at again
    with float64 weights and inputs: a warning where it shrinks to rounding there (parts of the losses stay in float32),
    as that adds up differently on different processors; else SystemExit."""
    import torch

    difference, resolution = loss_difference(ours, theirs, images), torch.finfo(torch.float32).eps
    if difference <= 100 * resolution:
        return difference
    if images["pixel_values"].device.type == "mps":
        raise SystemExit(f"The losses at {objects} objects differ by a share of {difference:.1e}; no float64 here.")
    exact = {**images, "pixel_values": images["pixel_values"].double()}
    torch.set_default_dtype(torch.float64)  # also of the points that are drawn
    in_float64 = loss_difference(ours.double(), theirs.double(), exact)
    torch.set_default_dtype(torch.float32)
    for model in (ours, theirs):
        model.float()
    if in_float64 > 10 * resolution:
        raise SystemExit(
            f"The losses at {objects} objects differ by a share of {difference:.1e}, in float64 of {in_float64:.1e}."
        )
    print(
        f"The losses differ by a share of {difference:.1e}, in float64 by {in_float64:.1e}: rounding.", file=sys.stderr
    )
    return difference


def loss_difference(ours: Any, theirs: Any, images: dict[str, Any]) -> float:
    """|ours - theirs| / theirs for one step on the same random points."""
    with recorded_points() as drawn:
        expected = step(theirs, "theirs", images)
    theirs.zero_grad()
    count, layers = len(images["mask_labels"]), ours.config.decoder_layers

    def draw(layer: int, kind: str, image: int, shape: tuple[int, ...]):
        place = {"match": image, "oversample": count, "uniform": count + 1}[kind]
        first = 0 if layer == layers - 1 else layer + 1  # transformers begins with the last layer
        return drawn[first * (count + 2) + place].view(shape)

    draw.per_layer = True
    found = step(ours, "ours", images, draw)
    ours.zero_grad()
    return abs(found - expected) / abs(expected)


@contextmanager
def recorded_points() -> Iterator[list]:
    """All results of `torch.rand` meanwhile, in order."""
    import torch

    drawn, rand = [], torch.rand

    def recording(*shape, **options):
        drawn.append(rand(*shape, **options))
        return drawn[-1]

    torch.rand = recording
    try:
        yield drawn
    finally:
        torch.rand = rand


def timed(model: Any, name: str, images: dict[str, Any], device: str) -> tuple[float, float]:
    """Elapsed and processor seconds of one step."""
    import torch

    model.zero_grad(set_to_none=True)
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    start, busy = time.perf_counter(), time.process_time()
    step(model, name, images)
    wait()
    seconds = time.perf_counter() - start, time.process_time() - busy
    model.zero_grad(set_to_none=True)
    return seconds


def compare_memory(arguments: argparse.Namespace, objects: int) -> dict[str, float]:
    peaks = {}
    for name in ("theirs", "ours"):
        options = {"size": arguments.size, "batch": arguments.batch, "queries": arguments.queries}
        options |= {"points": arguments.points, "device": arguments.device, "backbone": arguments.backbone}
        command = [sys.executable, __file__, "--peak-of", name, "--objects", str(objects)]
        command += [part for key, value in options.items() for part in (f"--{key}", str(value))]
        output = subprocess.run(command, capture_output=True, text=True, check=False)
        if output.returncode:
            raise SystemExit(output.stderr)
        peaks[name] = int(output.stdout.split()[-1])
    ratio = peaks["ours"] / peaks["theirs"]
    sizes = [f"{name} {peak / 2**20:.0f} MiB" for name, peak in peaks.items()]
    print(f"  peak memory of a step: {', '.join(sizes)}, ratio {ratio:.3f}", flush=True)
    return {f"memory_ratio_{objects}": ratio, f"peak_mib_{objects}": peaks["ours"] / 2**20}


def peak_of_step(arguments: argparse.Namespace, name: str, objects: int) -> int:
    """Bytes that the first step of a fresh model takes at its peak, gradients included."""
    import torch

    images, model = batch(arguments, objects), build(name, arguments)
    if arguments.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(model, name, images)
        return torch.cuda.max_memory_allocated() - before
    before = resident_peak(restart=True)
    step(model, name, images)
    return resident_peak() - before


def resident_peak(restart: bool = False) -> int:
    """Largest resident set so far, in bytes; `restart` first forgets what was before now.

    On Linux from /proc: getrusage's figure begins at that of the process that started this one. Elsewhere getrusage,
    which cannot be restarted.
    """
    status = Path("/proc/self/status")
    if status.exists():
        if restart:
            Path("/proc/self/clear_refs").write_text("5")
        return int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    sys.exit(main())
