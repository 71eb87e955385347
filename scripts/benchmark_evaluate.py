"""What evaluation costs beside the inference that it evaluates, at 100 detections an image of 640 x 480 pixels.

Inference is the forward pass and the post-processing to run lengths of a Mask2Former with random weights; its backbone
is a ResNet-18 by default, smaller than any published one, so that inference is cheap and the ratio on the high side
(`--backbone resnet50` is the papers'). Evaluation is all that `evaluate_model` does with a result: truth from polygons
to run lengths, masks compared, the numbers computed, by every installed backend. It is timed on two kinds of
detections: those of the model, whose ragged masks have long run lengths, and made ones of which most lie on an object,
as a trained model's do. The ratio is that of the dearer kind, per image, in processor time, which other processes
disturb less. The last line is one JSON object.

Commands:

    OMP_NUM_THREADS=1 python scripts/benchmark_evaluate.py
    OMP_NUM_THREADS=1 python scripts/benchmark_evaluate.py --backbone resnet50 --inferred 6
    python scripts/benchmark_evaluate.py --device cuda --inferred 50
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from statistics import median
from typing import Any

import numpy as np

WIDTH, HEIGHT, CLASSES, OBJECTS, DETECTIONS = 640, 480, 80, 8, 100  # COCO has 7.3 objects an image
DEPTHS = {"resnet18": [2, 2, 2, 2], "resnet50": [3, 4, 6, 3]}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=tuple(DEPTHS), default="resnet18")
    parser.add_argument("--inferred", type=int, default=4, help="images that the model is timed on")
    parser.add_argument("--images", type=int, default=100, help="images of an evaluation")
    parser.add_argument("--rounds", type=int, default=3, help="evaluations of which the median is taken")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args(argv)

    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    generator = np.random.default_rng(0)
    rows = [make_row(generator, number) for number in range(arguments.inferred)]
    result, own = inference(arguments, rows)
    made = [made_detections(generator, row) for row in rows]
    for kind, detections in (("own", own), ("made", made)):
        for backend, seconds in evaluation(arguments, rows, detections).items():
            result[f"evaluation_{backend}_{kind}_ms"] = 1000 * seconds
            print(f"{kind} detections, {backend}: {1000 * seconds:.2f} ms an image")
    print(json.dumps({name: round(value, 4) for name, value in summary(result).items()}))
    return 0


def summary(result: dict[str, float]) -> dict[str, float]:
    """The ratios in front: of every backend, of the one that "fastest" stands for, and of the latter to the
    post-processing alone, which is as if the forward pass cost nothing."""
    from uplvp_hf.evaluation.backends import BACKENDS, resolve_backend

    ratios = {}
    for backend in BACKENDS:
        times = [result.get(f"evaluation_{backend}_{kind}_ms") for kind in ("own", "made")]
        if None not in times:
            ratios[f"evaluation_over_inference_{backend}"] = max(times) / result["inference_ms"]
    fastest = ratios[f"evaluation_over_inference_{resolve_backend('fastest')}"]
    ratios["evaluation_over_postprocessing"] = fastest * result["inference_ms"] / result["postprocess_ms"]
    return {"evaluation_over_inference": fastest, **ratios, **result}


def outline(generator: np.random.Generator, center: np.ndarray, radius: float) -> list[float]:
    """A star-shaped polygon of 40 vertices, inside the image, as COCO writes it."""
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    waves = sum(generator.normal(0, 0.2 / k) * np.cos(k * angles + generator.uniform(0, 6.3)) for k in range(1, 6))
    distance = radius * np.clip(1 + waves + generator.normal(0, 0.02, 40), 0.2, 3)
    x = np.clip(center[0] + distance * np.cos(angles), 0, WIDTH)
    y = np.clip(center[1] + distance * np.sin(angles), 0, HEIGHT)
    return np.round(np.stack([x, y], 1).flatten(), 2).tolist()


def make_row(generator: np.random.Generator, number: int) -> dict[str, Any]:
    """An image of noise, clutter and objects that overlap, with their outlines."""
    from PIL import Image, ImageDraw

    image = Image.fromarray(generator.integers(0, 255, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8))
    image = image.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    shapes = []
    for _ in range(3 * OBJECTS):  # two thirds are clutter
        center, radius = generator.uniform((0, 0), (WIDTH, HEIGHT)), float(generator.lognormal(3.9, 0.7))
        shapes.append((outline(generator, center, radius), center, radius))
        draw.polygon(shapes[-1][0], fill=tuple(generator.integers(0, 255, 3).tolist()))
    shapes = shapes[:OBJECTS]
    objects = {"category_id": generator.integers(1, CLASSES + 1, OBJECTS).tolist(), "iscrowd": [0] * OBJECTS}
    objects |= {"segmentation": [[shape] for shape, _, _ in shapes], "area": [r * r * 3 for _, _, r in shapes]}
    row = {"image": image, "image_id": number, "width": WIDTH, "height": HEIGHT, "objects": objects}
    return {**row, "centers": [(center, radius) for _, center, radius in shapes]}


def made_detections(generator: np.random.Generator, row: dict[str, Any]) -> dict[str, Any]:
    """100 detections, 70 of them around an object, of those 80 % of its class."""
    from pycocotools import mask as coco_mask

    rles, labels = [], []
    for place in range(DETECTIONS):
        k = int(generator.integers(OBJECTS))
        center, radius = row["centers"][k]
        label = row["objects"]["category_id"][k] - 1
        if place >= 70:
            center, radius = generator.uniform((0, 0), (WIDTH, HEIGHT)), float(generator.lognormal(3.9, 0.7))
        shape = np.array(row["objects"]["segmentation"][k][0]) + generator.normal(0, 0.05 * radius, 80)
        shape = shape.clip(0, WIDTH).tolist() if place < 70 else outline(generator, center, radius)
        rle = coco_mask.merge(coco_mask.frPyObjects([shape], HEIGHT, WIDTH))
        rles.append({"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode("ascii")})
        labels.append(label if generator.random() < 0.8 else int(generator.integers(CLASSES)))
    return {"scores": -np.sort(-generator.random(DETECTIONS)), "labels": np.array(labels), "rle": rles}


def build(backbone: str, device: str) -> tuple[Any, Any]:
    """A Mask2Former of 100 queries with random weights, and its processor."""
    import torch

    from uplvp_hf.models.configuration_uplvp import UplvpConfig
    from uplvp_hf.models.image_processing_uplvp import UplvpImageProcessor
    from uplvp_hf.models.modeling_uplvp import UplvpForInstanceSegmentation

    basic = backbone == "resnet18"
    settings = {"model_type": "resnet", "depths": DEPTHS[backbone], "layer_type": "basic" if basic else "bottleneck"}
    settings["hidden_sizes"] = [64, 128, 256, 512] if basic else [256, 512, 1024, 2048]
    settings["out_features"] = ["stage1", "stage2", "stage3", "stage4"]
    torch.manual_seed(0)
    config = UplvpConfig(
        id2label={k: f"class {k}" for k in range(CLASSES)},
        category_ids=list(range(1, CLASSES + 1)),
        segmenter_config={"model_type": "mask2former", "backbone_config": settings},
    )
    model = UplvpForInstanceSegmentation(config).to(device).eval()
    return model, UplvpImageProcessor(size={"longest_edge": WIDTH})


def inference(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> tuple[dict[str, float], list[dict]]:
    """Median milliseconds of processor time an image, and the detections. On a GPU elapsed time, after waiting."""
    import torch

    model, processor = build(arguments.backbone, arguments.device)
    clock, forward, after, results = _clock(arguments.device), [], [], []
    for row in [rows[0], *rows]:  # a first pass is slower than those after it
        inputs = processor(row["image"], return_tensors="pt").to(arguments.device)
        start = clock()
        with torch.inference_mode():
            outputs = model(pixel_values=inputs["pixel_values"], pixel_mask=inputs["pixel_mask"])
        middle = clock()
        found = processor.post_process_instance_segmentation(
            outputs,
            threshold=0.0,
            target_sizes=[(HEIGHT, WIDTH)],
            input_sizes=processor.get_input_sizes(inputs["pixel_mask"]),
            top_k=DETECTIONS,
            return_rle=True,
            return_segmentation=False,
        )[0]
        forward.append(middle - start)
        after.append(clock() - middle)
        results.append(
            {key: found[key] if key == "rle" else found[key].cpu().numpy() for key in ("scores", "labels", "rle")}
        )
    times = {"forward_ms": 1000 * median(forward[1:]), "postprocess_ms": 1000 * median(after[1:])}
    size = sum(parameter.numel() for parameter in model.parameters())
    counts = [len(found["rle"]) for found in results[1:]]
    print(f"{arguments.backbone}, {size / 1e6:.1f} million weights: forward {times['forward_ms']:.0f} ms, ", end="")
    print(f"post-processing {times['postprocess_ms']:.0f} ms an image of {min(counts)} to {max(counts)} detections")
    result = {"inference_ms": sum(times.values()), **times, "detections": float(np.mean(counts))}
    return {**result, "million_weights": size / 1e6}, results[1:]


def _clock(device: str) -> Any:
    if device == "cpu":
        return time.process_time
    import torch

    def clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return clock


def evaluation(
    arguments: argparse.Namespace, rows: list[dict[str, Any]], detections: list[dict[str, Any]]
) -> dict[str, float]:
    """Seconds an image of every installed backend, after one evaluation that is not counted."""
    from uplvp_hf.evaluation.backends import BACKENDS, resolve_backend

    times: dict[str, float] = {}
    clock, aps = time.process_time if arguments.device == "cpu" else time.perf_counter, {}
    for backend in BACKENDS:
        try:
            resolve_backend(backend)
        except ValueError as error:
            print(error)
            continue
        seconds = []
        for _ in range(arguments.rounds + 1):
            start = clock()
            aps[backend] = evaluate_once(backend, rows, detections, arguments.images)["AP"]
            seconds.append((clock() - start) / arguments.images)
        times[backend] = median(seconds[1:])
    if max(aps.values()) - min(aps.values()) > 1e-12:
        raise SystemExit(f"The backends disagree: {aps}")
    print(f"AP {100 * aps['streaming']:.2f}, the same by all")
    return times


def evaluate_once(
    backend: str, rows: list[dict[str, Any]], detections: list[dict[str, Any]], images: int
) -> dict[str, Any]:
    """The numbers over `images` images: the rows again and again, under new ids."""
    from uplvp_hf.evaluation import as_prediction, as_reference, make_evaluator

    evaluator, category_ids = make_evaluator(backend, across_classes=False), list(range(1, CLASSES + 1))
    for number in range(images):
        row = {**rows[number % len(rows)], "image_id": number}
        prediction = as_prediction(row, detections[number % len(rows)], category_ids)
        evaluator.add(prediction=prediction, reference=as_reference(row))
    return evaluator.compute()


if __name__ == "__main__":
    sys.exit(main())
