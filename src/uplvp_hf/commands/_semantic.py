"""What `uplvp evaluate` and `uplvp predict` do with a semantic segmenter."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..models.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from uplvp_hf.data import InstanceDataset
    from uplvp_hf.labeling.processes import Processes


MAPS = "maps"
_ARGUMENTS = ("window", "stride", "scales", "flip", "swap_prompts")


def add_semantic_arguments(parser: argparse.ArgumentParser, evaluates: bool = False) -> None:
    group = parser.add_argument_group("semantic segmenters")
    group.add_argument("--window", type=int, metavar="SIZE", help="cut the resized image into windows of that side")
    group.add_argument("--stride", type=int, metavar="PIXELS", help="between windows (default: two thirds of a window)")
    group.add_argument("--scales", metavar="LIST", help="mean over several sizes, such as 0.5,1,1.5 (default: 1)")
    group.add_argument("--flip", action="store_true", help="mean over the image and its mirror image")
    if evaluates:
        group.add_argument(
            "--swap-prompts", action="store_true", help="every image with the prompts of another one, as a control"
        )


def refuse_flags(arguments: argparse.Namespace, parser: argparse.ArgumentParser, others: Sequence[str]) -> bool:
    """Whether the model is a semantic segmenter. Raises UserError for flags that this kind of model has no use for.

    others: names of the arguments that only instance segmenters heed.
    """
    from uplvp_hf.evaluation.semantic import is_semantic_model

    semantic = is_semantic_model(arguments.model)
    useless = others if semantic else _ARGUMENTS
    given = [name for name in useless if getattr(arguments, name, None) != parser.get_default(name)]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        kind, other = ("a", "instance") if semantic else ("no", "semantic")
        verb, them = ("is", "it") if len(given) == 1 else ("are", "them")
        raise UserError(
            f"{arguments.model} is {kind} semantic segmenter, and {flags} {verb} only for {other} segmenters: leave "
            f"{them} out."
        )
    return semantic


def load(arguments: argparse.Namespace, options: dict[str, Any]) -> tuple[Any, Any]:
    """Model and image processor; an exported model in windows of its size. Raises UserError where that cannot be."""
    from uplvp_hf.evaluation.semantic import load_semantic

    folder = Path(arguments.model)
    if not (folder / "model.onnx").is_file():
        return load_semantic(arguments.model, arguments.device)
    from uplvp_hf.inference.onnx_runtime import OnnxSemanticSegmenter
    from uplvp_hf.models.image_processing_icpc import IcpcImageProcessor

    model = OnnxSemanticSegmenter.from_directory(folder, arguments.device)
    if options["window"] not in (None, model.window):
        raise UserError(f"--window {options['window']}: {folder} was exported with windows of {model.window} pixels.")
    options["window"] = model.window
    return model, IcpcImageProcessor.from_pretrained(folder)


def semantic_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Options of `segment_image`. Raises UserError for numbers that make no sense."""
    try:
        scales = tuple(float(word) for word in (arguments.scales or "1").split(","))
    except ValueError as error:
        raise UserError(f"--scales {arguments.scales}: write numbers such as 0.5,1,1.5") from error
    if min(scales) <= 0:
        raise UserError("--scales must be positive")
    for name in ("window", "stride"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 32:
            raise UserError(f"--{name} must be at least 32 pixels")
    if arguments.window is not None and arguments.window % 32:
        raise UserError(f"--window must be a multiple of 32 pixels, not {arguments.window}")
    if arguments.stride is not None and (arguments.window is None or arguments.stride > arguments.window):
        raise UserError("--stride needs a --window that is at least as large")
    return {"scales": scales, "flip": arguments.flip, "window": arguments.window, "stride": arguments.stride}


def evaluate(arguments: argparse.Namespace, dataset: InstanceDataset, processes: Processes) -> None:
    """Prints the numbers; with --output writes metrics.json, per_class.csv and report.html."""
    from uplvp_hf.evaluation.semantic import evaluate_semantic
    from uplvp_hf.evaluation.semantic_report import best_and_worst, write_semantic_classes, write_semantic_page
    from uplvp_hf.files import write_json, write_json_lines

    options = semantic_options(arguments)
    if arguments.swap_prompts:
        options["swap_prompts"] = True
    model, processor = load(arguments, options)
    images: list[dict[str, Any]] = []

    def keep(row: Any, found: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> None:
        total = int(counts.sum())
        right = float(counts.diagonal().sum() / total) if total else None
        entry = {"image_id": row["image_id"], "file_name": row["file_name"], "accuracy": right, "pixels": total}
        images.append(entry)

    metrics = evaluate_semantic(
        model, processor, dataset, progress=not arguments.quiet, distributed=True, on_result=keep, **options
    )
    images = [one for part in processes.gather(images) for one in part]
    if processes.rank != 0:
        return
    metrics["failures"] = [*dataset.failures, *metrics["failures"]]
    print(format_metrics(metrics))
    if not arguments.output:
        return
    output = Path(arguments.output)
    written = [output / "metrics.json", output / "per_class.csv"]
    source = {"model": arguments.model, "data": arguments.path, "split": arguments.split, **options}
    write_json(written[0], {**source, **metrics, **best_and_worst(images, 10)})
    write_semantic_classes(written[1], metrics)
    if metrics["failures"]:
        written.append(output / "failures.jsonl")
        write_json_lines(written[-1], metrics["failures"])
    if arguments.report is not False:
        written.append(output / "report.html")
        write_semantic_page(written[-1], metrics, images, (model, processor), dataset, source, **options)
    print("Written: " + ", ".join(map(str, written)))


def format_metrics(metrics: dict[str, Any]) -> str:
    """The numbers and the IoU of every class, in per cent."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    lines = ["  ".join(f"{name} {percent(metrics[name])}" for name in ("mIoU", "mAcc", "aAcc"))]
    width = max(len(name) for name in metrics["per_class"])
    lines += [f"{name:<{width}} {percent(value):>6}" for name, value in metrics["per_class"].items()]
    if metrics["absent"]:
        lines.append(f"{metrics['absent']} classes occur neither in labels nor in predictions, and do not count.")
    lines.append(f"{metrics['num_images']} images, {metrics['seconds']:.1f} s.")
    lines += [f"Left out: {one['file']}, {one['row']}: {one['reason']}" for one in metrics["failures"][:10]]
    return "\n".join(lines)


def predict(arguments: argparse.Namespace, dataset: InstanceDataset, settings: dict[str, Any]) -> None:
    """Writes a label map of every image into maps/, and an overlay of its classes into overlays/.

    The values of a map are the ids of the classes in the dataset that the model was trained on; classes.txt lists
    them. Images whose map is there already are not computed again, unless --overwrite was given.

    settings: what the maps depend on beside images and options. Raises DataError where those in the folder were made
    with others, or of other images, and where no image can be read.
    """
    import numpy as np
    from PIL import Image

    from uplvp_hf.data import DataError
    from uplvp_hf.data.fields import read_json
    from uplvp_hf.evaluation.semantic import segment_dataset
    from uplvp_hf.evaluation.visualize import draw_label_map
    from uplvp_hf.files import replacing, write_json, write_json_lines, write_text
    from uplvp_hf.inference.journal import check_settings
    from uplvp_hf.inference.sources import pixels_unbounded, plain_stem

    output, options = Path(arguments.output), semantic_options(arguments)
    names = "".join(f"{row['file_name']}\n" for row in dataset.rows)
    settings = {**settings, **options, "scales": list(options["scales"])}
    settings["images"] = hashlib.sha256(names.encode()).hexdigest()
    record = output / "settings.json"
    if record.is_file() and not arguments.overwrite:
        check_settings(record, read_json(str(record)), settings)
    write_json(record, settings)
    model, processor = load(arguments, options)
    config = model.config
    ids = np.array(config.category_ids)
    classes = [f"{number} {config.id2label[index]}" for index, number in enumerate(ids)]
    write_text(output / "classes.txt", "".join(f"{line}\n" for line in classes))

    def place(folder: str, row: Any) -> Path:
        return output / folder / f"{row['image_id']:06d}_{plain_stem(row['file_name'])}.png"

    known = [not arguments.overwrite and place(MAPS, row).is_file() for row in dataset.rows]
    todo = dataset.subset([index for index, done in enumerate(known) if not done])
    failures, written = list(dataset.failures), 0
    with pixels_unbounded():
        for index, row, found in segment_dataset(model, processor, todo, not arguments.quiet, failures, **options):
            values = ids[found].astype(np.uint8 if ids.max() < 256 and ids.min() >= 0 else np.uint16)
            if not arguments.no_overlays:
                with replacing(place("overlays", row), "wb") as stream:
                    draw_label_map(todo.load_image(index), found, len(ids)).save(stream, format="PNG")
            with replacing(place(MAPS, row), "wb") as stream:
                Image.fromarray(values).save(stream, format="PNG")
            written += 1
    write_json_lines(output / "failures.jsonl", failures)
    if not written and not any(known):
        raise DataError(f"none of the {len(failures)} images could be read; see {output / 'failures.jsonl'}")
    print(f"{written} label maps, {sum(known)} were there already: {output / MAPS}")
    if failures:
        print(f"{len(failures)} images could not be read: {output / 'failures.jsonl'}")
