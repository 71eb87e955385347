"""What labeling costs beside the encoder, whether its memory depends on the number of images, how good labels are.

Commands:

    python scripts/benchmark_label.py
    python scripts/benchmark_label.py --images 32 --rounds 5 --image-size 448
    python scripts/benchmark_label.py --only throughput --device cuda --dtype bfloat16 --images 256 --rounds 5
    python scripts/benchmark_label.py --only memory --memory-images 200 2000
    python scripts/benchmark_label.py --quality
    python scripts/benchmark_label.py photos/animals7:train --only quality --backbone timm:mobilenetv2_100 \
        --backbone-weights mobilenetv2.safetensors --pad-type same

throughput_ratio: images a second of `label_images` with all that it does by default (decoding JPEG files, resizing,
windows, calibration, class maps, components, filters, RLE, synced shards), over those of the bare vision transformer on
tensors of the same windows in the same batches. Both arms take turns in one process, in changing order, so that drift
of the machine cancels; the times of all rounds are summed. The encoder is a CLIP ViT-B/16 with random weights. The
labeler's own attention leaves out the last block's MLP, about a twentieth of the work, so that the ratio can exceed 1.
cpu_ratio is the same with the seconds of all cores together, which other load on the machine disturbs less.

rss_ratio: highest resident memory of a process that labels the larger number of images, over that of one that labels
the smaller; a small encoder, as only what grows with the number matters.

quality: the tables of `benchmark_label_quality.py`, which has more options: with --quality of dense CLIP on synthetic
scenes, with data folders of the sources without text on those.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GOALS = {"throughput_ratio": 0.85, "rss_ratio": 1.3}
SHAPES = {  # hidden size, MLP, layers, heads
    "vit-b/16": (768, 3072, 12, 12),
    "small": (96, 192, 2, 3),
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("data", nargs="*", metavar="FOLDER[:SPLIT]", help="COCO-style folders, to measure sources without text on")
    add("--only", choices=tuple(SECTIONS), action="append", help="repeatable (default: all that is asked for)")
    add("--quality", action="store_true", help="also the quality of dense CLIP on synthetic scenes")
    add("--quality-images", type=int, default=100, help="scenes, and images of each data folder (default: 100)")
    add("--backbone", help="of the sources without text; also --backbone-weights and --pad-type")
    add("--backbone-weights", help=argparse.SUPPRESS)
    add("--pad-type", help=argparse.SUPPRESS)
    add("--images", type=int, default=8, help="a round (default: 8)")
    add("--rounds", type=int, default=4, help="of both arms (default: 4)")
    add("--batch-size", type=int, default=8)
    add("--source-size", type=int, nargs=2, default=(640, 480), metavar=("WIDTH", "HEIGHT"))
    add("--image-size", type=int, default=224, help="shorter side that the encoder sees; the labeler's default is 448")
    add("--classes", type=int, default=20)
    add("--threads", type=int, help="of torch, for both arms (default: as torch chooses)")
    add("--device", default="cpu")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--memory-images", type=int, nargs=2, default=(200, 2000), metavar=("FEW", "MANY"))
    add("--label-folder", help=argparse.SUPPRESS)  # the child process of the memory section
    return parser


def write_images(folder: Path, count: int, size: tuple[int, int], distinct: int = 50) -> Path:
    """JPEG files with the detail of photographs: noise of all scales. The first ones recur under other names."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    for number in range(count):
        file = folder / f"{number:06d}.jpg"
        if number >= distinct:
            os.link(folder / f"{number % distinct:06d}.jpg", file)
            continue
        rng = np.random.default_rng(number)
        pixels = np.zeros((size[1], size[0], 3), dtype=np.float32)
        for scale in (4, 16, 64, 640):
            sides = (max(2, size[0] * scale // 640), max(2, size[1] * scale // 640))
            noise = Image.fromarray(rng.integers(0, 256, (*sides[::-1], 3), dtype=np.uint8))
            pixels += np.asarray(noise.resize(size, Image.Resampling.BICUBIC)) / (1 + scale / 32)
        Image.fromarray((pixels * 255 / pixels.max()).astype(np.uint8)).save(file, quality=90)
    return folder


def build_labeler(shape: str, image_size: int, classes: int, device: str = "cpu", dtype: str = "float32"):
    """The dense CLIP labeler with its defaults, on random weights and random text embeddings."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from uplvp_hf.labeling import Clip, DenseClipLabeler
    from uplvp_hf.labeling.encoders.text import TextEmbeddings

    torch.manual_seed(0)
    hidden, mlp, layers, heads = SHAPES[shape]
    sizes = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers}
    config = CLIPVisionConfig(**sizes, num_attention_heads=heads, patch_size=16, image_size=224, projection_dim=512)
    model = CLIPVisionModelWithProjection(config).eval().requires_grad_(False)
    clip = Clip(model.to(device, getattr(torch, dtype)), None, f"random {shape}")
    vectors = torch.nn.functional.normalize(torch.randn(classes, 512), dim=-1)
    names = tuple(f"class {k}" for k in range(classes))
    text = TextEmbeddings(vectors, torch.arange(classes), classes, names)
    return DenseClipLabeler(clip, names, text=text, image_size=image_size)


def bare_forward(labeler, windows, device: str) -> float:
    """Seconds for the vision transformer alone on all windows, in the labeler's batches."""
    import torch

    synchronize(device)
    started = time.perf_counter()
    with torch.inference_mode():
        for batch in windows:
            labeler.source.model(pixel_values=batch)
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()


def windows_of(labeler, dataset, batch_size: int) -> list:
    """The very tensors that the labeler's encoder sees, one a forward pass, recorded from it."""
    seen = []
    embed = labeler.source.vision.embeddings.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0] if args else kwargs["pixel_values"]).clone()),
        with_kwargs=True,
    )
    for start in range(0, len(dataset), batch_size):
        chosen = range(start, min(len(dataset), start + batch_size))
        labeler.similarities([dataset.load_image(k) for k in chosen], [dataset[k] for k in chosen])
    embed.remove()
    return seen


def measure_throughput(arguments: argparse.Namespace, folder: Path) -> dict:
    import torch

    from uplvp_hf.data import load_dataset_rows
    from uplvp_hf.labeling import label_images

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    dataset = load_dataset_rows(write_images(folder / "images", arguments.images, tuple(arguments.source_size)))
    labeler = build_labeler("vit-b/16", arguments.image_size, arguments.classes, arguments.device, arguments.dtype)
    windows = windows_of(labeler, dataset, arguments.batch_size)
    bare_forward(labeler, windows[:1], arguments.device)  # warm up
    times: dict[str, list[float]] = {"bare": [], "label": []}
    work = {"bare": 0.0, "label": 0.0}  # seconds of all cores together
    instances = 0
    for number in range(arguments.rounds):
        for arm in ("bare", "label") if number % 2 == 0 else ("label", "bare"):
            before = time.process_time()
            if arm == "bare":
                times[arm].append(bare_forward(labeler, windows, arguments.device))
            else:
                started = time.perf_counter()
                output = folder / f"labels-{number}"
                options = {"batch_size": arguments.batch_size, "progress": False, "max_failed": 0.0}
                instances = label_images(dataset, labeler, None, output, **options).instances
                times[arm].append(time.perf_counter() - started)
            work[arm] += time.process_time() - before
        print(f"round {number}: {times['bare'][-1]:.2f} s bare, {times['label'][-1]:.2f} s labeled", flush=True)
    bare, label = (sum(times[arm]) for arm in ("bare", "label"))
    images = arguments.images * arguments.rounds
    return {
        "throughput_ratio": round(bare / label, 4),
        "cpu_ratio": round(work["bare"] / work["label"], 4),
        "label_images_per_second": round(images / label, 4),
        "bare_images_per_second": round(images / bare, 4),
        "ratios_by_round": [round(alone / whole, 4) for alone, whole in zip(times["bare"], times["label"])],
        "windows_per_image": sum(len(batch) for batch in windows) / arguments.images,
        "instances_per_image": round(instances / arguments.images, 2),
        "images": images,
        "batch_size": arguments.batch_size,
        "device": torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "cpu",
        "dtype": arguments.dtype,
        "torch_threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
    }


def measure_memory(arguments: argparse.Namespace, folder: Path) -> dict:
    peaks = []
    for count in arguments.memory_images:
        images = write_images(folder / f"images-{count}", count, tuple(arguments.source_size))
        words = ["--label-folder", str(images), "--batch-size", str(arguments.batch_size)]
        words += ["--threads", str(arguments.threads or 1), "--image-size", "112", "--classes", str(arguments.classes)]
        child = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True)
        measured = json.loads(child.stdout.splitlines()[-1])
        peaks.append(measured["peak_bytes"])
        print(f"{count} images: peak {peaks[-1] / 2**20:.0f} MiB, {measured['seconds']:.0f} s", flush=True)
    return {
        "rss_ratio": round(peaks[1] / peaks[0], 4),
        "rss_images": list(arguments.memory_images),
        "rss_mib": [round(peak / 2**20, 1) for peak in peaks],
    }


def label_folder(arguments: argparse.Namespace) -> dict:
    """The child: labels a folder of images and says how much memory it took at most."""
    import torch

    from uplvp_hf.data import load_dataset_rows
    from uplvp_hf.labeling import label_images

    torch.set_num_threads(arguments.threads)
    images = Path(arguments.label_folder)
    labeler = build_labeler("small", arguments.image_size, arguments.classes)
    dataset, output = load_dataset_rows(images), images.with_name(f"{images.name}-labels")
    summary = label_images(
        dataset, labeler, None, output, batch_size=arguments.batch_size, progress=False, max_failed=0.0
    )
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"peak_bytes": peak, "seconds": summary.seconds, "instances": summary.instances}


def load_quality():
    """The sibling script as a module."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import benchmark_label_quality

    return benchmark_label_quality


def measure_quality(arguments: argparse.Namespace, folder: Path) -> dict:
    """{"quality": {"images": {dataset: rows}, "clip": rows}}, as far as asked for."""
    quality = load_quality()
    words = [*arguments.data, "--device", arguments.device, "--batch-size", str(arguments.batch_size)]
    words += ["--images", str(arguments.quality_images), "--scenes", str(arguments.quality_images)]
    for name in ("backbone", "backbone_weights", "pad_type"):
        value = getattr(arguments, name)
        words += [] if value is None else [f"--{name.replace('_', '-')}", value]
    words += ["--clip"] if arguments.quality or not arguments.data else []
    return {"quality": quality.measure_all(quality.parse(words))}


# (arguments, empty folder) -> results
SECTIONS = {"throughput": measure_throughput, "memory": measure_memory, "quality": measure_quality}


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    if arguments.label_folder:
        print(json.dumps(label_folder(arguments)))
        return 0
    asked = arguments.only or ["throughput", "memory", *(["quality"] if arguments.quality or arguments.data else [])]
    results: dict = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, measure in SECTIONS.items():
            if name in asked:
                results |= measure(arguments, Path(folder) / name)
    results["goals"] = {name: goal for name, goal in GOALS.items() if name in results}
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
