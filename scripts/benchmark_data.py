"""What the instances of a training sample cost in host memory, and how fast samples are made.

The sample: one image of `--size` pixels with `--instances` star-shaped objects, half of them polygons and half RLE,
resized by U(1, 1) (so that no instance leaves the crop), mirrored and jittered in color, as `TrainingSet` makes it.

* `bytes_per_sample`: host memory that the instances need while one sample is made and held, before collation and beyond
  what the same image without instances needs. The larger of two growths of the resident set at its peak (Linux,
  VmHWM; every measurement in a process of its own, after a small sample has warmed everything up, with an allocator
  that keeps nothing back): of the whole sample over that of the image alone, and of the step that makes the masks,
  whose peak may hide below that of the pixels.
* `bytes_per_sample_rotated`, `bytes_per_sample_pasted`: the same with `rotate=9` on every image, and with copy-paste
  from another such image.
* `dense_float_bytes`: peak growth of making and holding the masks of that sample as one float32 stack, filled in place
  one instance at a time, which is the least that dense float masks can take.
* `samples_per_second`, `dense_samples_per_second`: sample and collation on a square canvas, with our masks (made dense
  bool at the end, as the model gets them) and with the float stack. Rounds alternate in one process, medians.
  `speed_ratio` is ours over theirs.

* `held_bytes`: the masks of a finished sample, as they are handed from a worker process to the training process.

The table shows the masks of the sample in the forms that were considered: their bytes, and the time to make all of them
and to fill the dense bool masks from them. The last line is one JSON object.

Commands:

    OMP_NUM_THREADS=1 python scripts/benchmark_data.py
    OMP_NUM_THREADS=1 python scripts/benchmark_data.py --radius 200 500      # large, all over each other
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

    from uplvp_hf.data import TrainingSet

# Freed memory goes back to the system at once (glibc), or a peak depends on what the allocator happens to keep.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, help="side of image and canvas in pixels, multiple of 32")
    parser.add_argument("--instances", type=int, default=200)
    parser.add_argument("--radius", type=int, nargs=2, default=[8, 200], help="of the objects, pixels, log-uniform")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of timed samples")
    parser.add_argument("--quick", action="store_true", help="only bytes_per_sample")
    arguments = parser.parse_args(argv)
    if not os.access("/proc/self/clear_refs", os.W_OK):
        parser.error("peak memory is read from /proc, which needs Linux")

    result: dict[str, Any] = {"instances": arguments.instances, "size": arguments.size, "radius": arguments.radius}
    result |= _fresh("memory", arguments)
    if not arguments.quick:
        result |= _fresh("forms", arguments) | _fresh("speed", arguments)
    print(json.dumps(result))
    return 0


def _fresh(task: str, arguments: argparse.Namespace) -> dict[str, Any]:
    words = [sys.executable, __file__, task, json.dumps(vars(arguments))]
    environment = {**os.environ, **(GIVE_BACK if task == "memory" else {})}
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    *table, last = done.stdout.splitlines()
    print(*table, sep="\n", end="\n" if table else "", flush=True)
    return json.loads(last)


# ---- the image ----


def make_rows(count: int, size: int, radius: list[int], images: int = 2) -> list[dict[str, Any]]:
    """Rows of images in memory with `count` objects each."""
    from PIL import Image

    from uplvp_hf.data import segmentation_to_rle

    rng, rows = np.random.default_rng(0), []
    for index in range(images):
        pixels = rng.integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8)
        polygons = [_star(rng, size, radius) for _ in range(count)]
        objects = {
            "segmentation": [p if k % 2 else segmentation_to_rle(p, size, size) for k, p in enumerate(polygons)],
            "category_id": [k % 80 for k in range(count)],
            "iscrowd": [0] * count,
            "score": [1.0] * count,
        }
        image = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)
        row = {"image": image, "image_id": index, "file_name": f"{index}", "width": size, "height": size}
        rows.append({**row, "objects": objects})
    return rows


def without_objects(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same images as negatives."""
    return [{**row, "objects": {key: [] for key in row["objects"]}} for row in rows]


def _star(rng: np.random.Generator, size: int, radius: list[int]) -> list[list[float]]:
    """A polygon of 24 corners around a point of the image."""
    angles = np.arange(24) * (2 * np.pi / 24)
    lengths = np.exp(rng.uniform(*np.log(radius))) * rng.uniform(0.6, 1, 24)
    center = rng.uniform(0, size, 2)
    return [np.stack([center[0] + lengths * np.cos(angles), center[1] + lengths * np.sin(angles)], 1).ravel().tolist()]


def make_samples(rows: list[dict[str, Any]], size: int, rotate: float = 0.0, copy_paste: float = 0.0) -> TrainingSet:
    """Samples of these rows that keep every instance."""
    from uplvp_hf.data import InstanceDataset, TrainingSet, TrainTransform

    transform = TrainTransform(size, (1, 1), rotate=rotate, rotate_probability=1)
    categories = [{"id": k, "name": str(k)} for k in range(80)]
    most = 2 * max(len(row["objects"]["score"]) for row in rows) + 1
    return TrainingSet(
        InstanceDataset(rows, categories), transform, None, MEAN, STD, 0, max_instances=most, copy_paste=copy_paste
    )


# ---- memory ----


def memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """See the head of the file."""
    size, count = arguments.size, arguments.instances
    rows, small = make_rows(count, size, arguments.radius), make_rows(4, 64, [5, 20])
    bare = without_objects(rows)
    result = {}
    more = {} if arguments.quick else {"_rotated": {"rotate": 9}, "_pasted": {"copy_paste": 1}}
    for name, settings in {"": {}, **more}.items():
        warm_up = make_samples(small, 64, **settings)
        ours, none = make_samples(rows, size, **settings), make_samples(bare, size, **settings)
        whole = peak_growth(lambda ours=ours: ours[0], warm_up)
        image = peak_growth(lambda none=none: none[0], warm_up)
        masks = peak_growth(lambda ours=ours: masks_only(ours), warm_up)
        result[f"bytes_per_sample{name}"] = max(whole - image, masks)
        print(f"{name[1:] or 'plain':8} sample {whole / 1e6:6.1f} MB at its peak, without instances "
              f"{image / 1e6:6.1f} MB, masks alone {masks / 1e6:6.1f} MB")  # fmt: skip
    if arguments.quick:
        return result
    ours = make_samples(rows, size)
    result["dense_float_bytes"] = peak_growth(lambda: dense_masks(ours), make_samples(small, 64))
    print(f"dense float masks {result['dense_float_bytes'] / 1e6:.1f} MB")
    return result


def masks_only(samples: TrainingSet) -> Any:
    """The masks of the first sample, without its pixels."""
    from uplvp_hf.data import segmentation_to_rle

    row, transform = samples.dataset[0], samples.transform
    height, width = row["height"], row["width"]
    window = transform.draw_window(height, width, samples._generator(0, 0))
    rles = [segmentation_to_rle(segmentation, height, width) for segmentation in row["objects"]["segmentation"]]
    return window.masks(rles, height, width, transform.min_area)


def dense_masks(samples: TrainingSet) -> torch.Tensor:
    """The masks of the first sample as (N, h, w) float32: each decoded, resampled as a whole, and written to its
    place."""
    import torch

    from uplvp_hf.data import decode_segmentation

    row, transform = samples.dataset[0], samples.transform
    height, width = row["height"], row["width"]
    window = transform.draw_window(height, width, samples._generator(0, 0))
    columns = ((window.left + np.arange(window.width) + 0.5) * (width / window.resized_width)).astype(np.int64)
    rows = ((window.top + np.arange(window.height) + 0.5) * (height / window.resized_height)).astype(np.int64)
    columns = columns[::-1] if window.flip else columns
    segmentations = row["objects"]["segmentation"]
    masks = torch.empty((len(segmentations), window.height, window.width))
    for mask, segmentation in zip(masks.numpy(), segmentations):
        mask[...] = decode_segmentation(segmentation, height, width)[rows[:, None], columns[None, :]]
    return masks


def peak_growth(work: Callable[[], Any], warm_up: TrainingSet) -> int:
    """Bytes by which the resident set grows at most while `work` runs, in a process of its own."""
    context = multiprocessing.get_context("fork")  # code and data are there already
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        for index in range(4):
            warm_up.sample(index % 2, index)
        masks_only(warm_up)
        gc.collect()
        with open("/proc/self/clear_refs", "w") as stream:
            stream.write("5")  # the peak starts from here
        before = _status("VmRSS")
        kept = work()
        sender.send(_status("VmHWM") - before)
        del kept

    process = context.Process(target=child)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def _status(key: str) -> int:
    with open("/proc/self/status") as stream:
        return next(1024 * int(line.split()[1]) for line in stream if line.startswith(f"{key}:"))


# ---- speed ----


def speed(arguments: argparse.Namespace) -> dict[str, Any]:
    """See the head of the file."""
    import torch

    from uplvp_hf.data import collate

    samples = make_samples(make_rows(arguments.instances, arguments.size, arguments.radius), arguments.size)

    def ours() -> torch.Tensor:
        return collate([samples[0]], pad_to=arguments.size)["mask_labels"][0]

    bare = make_samples(without_objects(samples.dataset.rows), arguments.size)

    def dense() -> torch.Tensor:
        masks, batch = dense_masks(samples), collate([bare[0]], pad_to=arguments.size)
        height, width = batch["pixel_values"].shape[2:]
        return torch.nn.functional.pad(masks, (0, width - masks.shape[2], 0, height - masks.shape[1]))

    if not torch.equal(ours().float(), dense()):
        raise AssertionError("the two ways give different masks")
    seconds: dict[str, list[float]] = {"ours": [], "dense": []}
    for _ in range(arguments.rounds):
        for name, work in (("ours", ours), ("dense", dense)):
            began = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - began)
    ratio = median(slow / quick for quick, slow in zip(seconds["ours"], seconds["dense"], strict=True))
    result = {
        "samples_per_second": round(1 / median(seconds["ours"]), 2),
        "dense_samples_per_second": round(1 / median(seconds["dense"]), 2),
        "speed_ratio": round(ratio, 2),
    }
    print(f"{result['samples_per_second']} samples/s, dense float {result['dense_samples_per_second']} samples/s")
    return result


def forms(arguments: argparse.Namespace) -> dict[str, Any]:
    """Bytes and times of the masks of one sample in the forms that were considered."""
    from pycocotools import mask as coco_mask

    samples = make_samples(make_rows(arguments.instances, arguments.size, arguments.radius), arguments.size)
    patches = samples[0]["mask_labels"].patches
    boxes = [np.ascontiguousarray(patch.mask()) for patch in patches]
    size = arguments.size

    def bits(code: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        return np.unpackbits(code, count=shape[0] * shape[1]).reshape(shape)

    ways = {
        "bool boxes": (np.copy, lambda code, shape: code, lambda code: code.nbytes),
        "bits of boxes": (np.packbits, bits, lambda code: code.nbytes),
        "RLE of boxes, rows": (
            lambda box: coco_mask.encode(box.view(np.uint8).T),
            lambda code, shape: coco_mask.decode(code).T,
            lambda code: len(code["counts"]),
        ),
        "RLE of boxes, COCO": (
            lambda box: coco_mask.encode(np.asfortranarray(box.view(np.uint8))),
            lambda code, shape: coco_mask.decode(code),
            lambda code: len(code["counts"]),
        ),
    }
    for name, (encode, decode, weight) in ways.items():
        codes, made, filled = [], [], []
        for _ in range(3):  # the first round pays for fresh memory
            began = time.perf_counter()
            codes = [encode(box) for box in boxes]
            middle = time.perf_counter()
            dense = np.zeros((len(boxes), size, size), dtype=bool)
            for mask, patch, box, code in zip(dense, patches, boxes, codes, strict=True):
                window = mask[patch.top : patch.top + patch.height, patch.left : patch.left + patch.width]
                window[...] = decode(code, box.shape)
            made.append(1e3 * (middle - began))
            filled.append(1e3 * (time.perf_counter() - middle))
        print(f"{name:20} {sum(map(weight, codes)) / 1e6:7.3f} MB, made in {min(made):6.1f} ms, "
              f"dense in {min(filled):6.1f} ms")  # fmt: skip
    return {"held_bytes": samples[0]["mask_labels"].nbytes}


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] in ("memory", "forms", "speed"):
        import torch

        torch.set_num_threads(1)
        task = {"memory": memory, "forms": forms, "speed": speed}[sys.argv[1]]
        print(json.dumps(task(argparse.Namespace(**json.loads(sys.argv[2])))))
        sys.exit(0)
    sys.exit(main())
