"""Precision and recall of what a teacher would take for pseudo instances, by its thresholds, on labeled images.

Commands:

    python scripts/measure_pseudo_labels.py --model runs/supervised --data held_out/
    python scripts/measure_pseudo_labels.py --model runs/supervised --data DATA --split val --masks 0.8 0.9 0.95

The images must not be those that the model was trained on, else it looks surer and better than it is. An instance is
right when its mask has an IoU of at least 0.5 with an object of its class, each object counting once; `mask precision`
leaves the class out. Use it to choose `teacher.class_threshold` and `teacher.mask_threshold`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a fine-tuned query segmenter")
    parser.add_argument("--data", required=True, help="labeled images that it has not seen")
    parser.add_argument("--split", help="of the data")
    parser.add_argument("--images", type=int, default=200, help="the first so many")
    parser.add_argument("--classes", type=float, nargs="+", default=[0.3, 0.5, 0.7, 0.9], help="class thresholds")
    parser.add_argument("--masks", type=float, nargs="+", default=[0.0, 0.8, 0.9, 0.95], help="mask thresholds")
    arguments = parser.parse_args(argv)
    lines = measure(arguments)
    print("| class threshold | mask threshold | an image | precision | mask precision | recall |")
    print("|---:|---:|---:|---:|---:|---:|")
    for line in lines:
        print("| " + " | ".join("-" if value is None else f"{value:.2f}" for value in line.values()) + " |")
    print(json.dumps(lines))
    return 0


def measure(arguments: argparse.Namespace) -> list[dict[str, float | None]]:
    """A line for every pair of thresholds."""
    import torch
    from accelerate import Accelerator

    from uplvp_hf.data import load_dataset_rows
    from uplvp_hf.data.window import Window
    from uplvp_hf.evaluation.predictor import load_segmenter
    from uplvp_hf.training.pseudo_labels import find_pseudo_instances
    from uplvp_hf.training.pseudo_quality import PseudoStatistics
    from uplvp_hf.training.teacher_settings import TeacherSettings

    model, processor = load_segmenter(arguments.model, "cpu")
    dataset = load_dataset_rows(arguments.data, split=arguments.split)
    names, accelerator = model.config.id2label, Accelerator(cpu=True)
    pairs = [(score, mask) for score in arguments.classes for mask in arguments.masks]
    named = {pair: PseudoStatistics(accelerator, dataset, names) for pair in pairs}
    # The same with every class called 0.
    alike = [{**category, "name": "object"} for category in dataset.categories]
    agnostic: dict[tuple[float, float], Any] = {
        pair: PseudoStatistics(accelerator, type(dataset)(dataset.rows, alike), {0: "object"}) for pair in pairs
    }
    for index in range(min(arguments.images, len(dataset))):
        inputs = processor(images=dataset.load_image(index), return_tensors="pt")
        height, width = (int(inputs["pixel_mask"][0].any(axis).sum()) for axis in (1, 0))
        view = Window(width, height, 0, 0, width, height, False)
        with torch.no_grad():
            outputs = model(**{name: inputs[name] for name in ("pixel_values", "pixel_mask")})
        views = {"index": [index], "windows": [(view, view)]}
        for score, mask in pairs:
            settings = TeacherSettings(mask_threshold=mask)
            found = find_pseudo_instances(outputs, 0, (height, width), torch.full((len(names),), score), settings)
            named[score, mask].add(views, [found])
            agnostic[score, mask].add(views, [dataclasses.replace(found, labels=found.labels * 0)])
    lines = []
    for score, mask in pairs:
        own, masks = named[score, mask].take(), agnostic[score, mask].take()
        line = {"class_threshold": score, "mask_threshold": mask, "instances": own.get("pseudo_instances")}
        line |= {"precision": own.get("pseudo_precision"), "mask_precision": masks.get("pseudo_precision")}
        lines.append({**line, "recall": own.get("pseudo_recall")})
    return lines


if __name__ == "__main__":
    sys.exit(main())
