"""`uplvp evaluate`: COCO mask AP of a model on a labelled data set."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ._terminal import add_verbosity, check_device, run


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="uplvp evaluate", description="COCO mask AP of a model on a labelled data set."
    )
    parser.add_argument("model", metavar="MODEL_DIR", help="folder of a trained model, or USER/NAME on the Hub")
    parser.add_argument("data", metavar="DATA", help="COCO JSON file, or folder with annotations/*.json and images/")
    parser.add_argument("--images", metavar="DIR", help="folder that the file names of the JSON are relative to")
    parser.add_argument("--split", help="picks annotations/SPLIT.json of the folder")
    parser.add_argument("--output", metavar="DIR", help="write metrics.json and results.json (COCO results) there")
    parser.add_argument("--batch-size", type=int, default=8, help="pictures per forward pass (default: 8)")
    parser.add_argument("--class-agnostic", action="store_true", help="compare masks only, whatever their classes")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the GPU if there is one)")
    add_verbosity(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 with one line on stderr for wrong input."""
    arguments = make_parser().parse_args(argv)
    return run("evaluate", lambda: _evaluate(arguments), arguments.verbose)


def _evaluate(arguments: argparse.Namespace) -> None:
    from uplvp_hf.data import load_dataset_rows
    from uplvp_hf.evaluation import evaluate_model, evaluated_classes, load_segmenter, to_coco_results

    if arguments.batch_size < 1:
        raise ValueError("--batch-size must be at least 1")
    check_device(arguments.device)
    results: list[dict[str, Any]] = []
    dataset = load_dataset_rows(arguments.data, images=arguments.images, split=arguments.split)
    model, processor = load_segmenter(arguments.model, arguments.device)
    ids = evaluated_classes(model.config, dataset, arguments.class_agnostic)
    if arguments.output:
        Path(arguments.output).mkdir(parents=True, exist_ok=True)  # if it cannot be written, say so now
    metrics = evaluate_model(
        model,
        processor,
        dataset,
        batch_size=arguments.batch_size,
        class_agnostic=arguments.class_agnostic,
        progress=not arguments.quiet,
        on_result=lambda row, result: results.extend(to_coco_results(row, result, ids)),
    )
    metrics["failures"] = [*dataset.failures, *metrics["failures"]]
    print(format_metrics(metrics))
    if arguments.output:
        _write(Path(arguments.output), arguments, metrics, results)


def _write(output: Path, arguments: argparse.Namespace, metrics: dict[str, Any], results: list[dict[str, Any]]) -> None:
    from uplvp_hf.files import write_json, write_json_lines

    command = shlex.join(["uplvp", "evaluate", *_words(arguments)])
    source = {"command": command, "data": str(arguments.data), "split": arguments.split}
    record = {**source, "model": arguments.model, "class_agnostic": arguments.class_agnostic, **metrics}
    write_json(output / "results.json", results, indent=None)
    write_json(output / "metrics.json", record)
    if metrics["failures"]:
        write_json_lines(output / "failures.jsonl", metrics["failures"])
    print(f"Written: {output / 'metrics.json'}, {output / 'results.json'}")


def _words(arguments: argparse.Namespace) -> list[str]:
    words = [arguments.model, arguments.data]
    words += ["--split", arguments.split] if arguments.split else []
    words += ["--images", arguments.images] if arguments.images else []
    return words + (["--class-agnostic"] if arguments.class_agnostic else [])


def format_metrics(metrics: dict[str, Any]) -> str:
    """A table of the 12 numbers and of AP by class, in per cent."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    names = ["AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L", "AR1", "AR10", "AR100", "AR_S", "AR_M", "AR_L"]
    lines = ["".join(f"{name:>7}" for name in names), "".join(f"{percent(metrics[name]):>7}" for name in names)]
    if metrics["per_class"]:
        width = max(len(name) for name in metrics["per_class"])
        lines += ["", f"{'class':<{width}}     AP"]
        lines += [f"{name:<{width}} {percent(value):>6}" for name, value in metrics["per_class"].items()]
    lines += [
        "",
        f"{metrics['num_images']} pictures, {metrics['num_instances']} instances, {metrics['seconds']:.1f} s.",
    ]
    shown = 10
    for failure in metrics["failures"][:shown]:
        lines.append(f"Left out: {failure['file']}, {failure['row']}: {failure['reason']}")
    if len(metrics["failures"]) > shown:
        lines.append(f"... and {len(metrics['failures']) - shown} more; --output DIR lists them all.")
    return "\n".join(lines)
