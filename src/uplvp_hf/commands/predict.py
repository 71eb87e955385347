"""`uplvp predict`: instances in pictures, as COCO JSON and as overlays to look at."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._terminal import add_verbosity, check_device, run

if TYPE_CHECKING:
    from uplvp_hf.data import InstanceDataset


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="uplvp predict", description="Instances in pictures, as COCO JSON and overlays."
    )
    parser.add_argument("model", metavar="MODEL_DIR", help="folder of a trained model, or USER/NAME on the Hub")
    parser.add_argument("paths", metavar="PATHS", nargs="+", help="pictures, or folders that are searched recursively")
    parser.add_argument(
        "--output", metavar="DIR", required=True, help="for predictions.json, overlays/, failures.jsonl"
    )
    parser.add_argument("--threshold", type=float, default=0.5, help="least score, 0 to 1 (default: 0.5)")
    parser.add_argument("--batch-size", type=int, default=8, help="pictures per forward pass (default: 8)")
    parser.add_argument("--no-overlays", action="store_true", help="write the JSON only")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the GPU if there is one)")
    add_verbosity(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 with one line on stderr for wrong input."""
    arguments = make_parser().parse_args(argv)
    return run("predict", lambda: _predict(arguments), arguments.verbose)


def _predict(arguments: argparse.Namespace) -> None:
    from uplvp_hf.data import DataError
    from uplvp_hf.evaluation import load_segmenter, predict_dataset
    from uplvp_hf.files import write_json, write_json_lines

    if arguments.batch_size < 1 or not 0 <= arguments.threshold <= 1:
        raise ValueError("--batch-size must be at least 1, and --threshold from 0 to 1")
    check_device(arguments.device)
    output = Path(arguments.output)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    dataset = find_pictures(arguments.paths)
    model, processor = load_segmenter(arguments.model, arguments.device)
    failures = list(dataset.failures)
    output.mkdir(parents=True, exist_ok=True)  # if it cannot be written, say so now
    for row, result in predict_dataset(
        model,
        processor,
        dataset,
        batch_size=arguments.batch_size,
        threshold=arguments.threshold,
        progress=not arguments.quiet,
        failures=failures,
    ):
        images.append({"id": row["image_id"], **{key: row[key] for key in ("file_name", "width", "height")}})
        annotations += _annotations(row, result, model.config.category_ids, len(annotations) + 1)
        if not arguments.no_overlays:
            _draw(row, result, model.config.id2label, output / "overlays")
    names = model.config.id2label
    categories = [{"id": int(number), "name": names[k]} for k, number in enumerate(model.config.category_ids)]
    content = {"images": images, "categories": categories, "annotations": annotations}
    write_json(output / "predictions.json", content, indent=None)
    write_json_lines(output / "failures.jsonl", failures)
    print(f"{len(annotations)} instances in {len(images)} pictures: {output / 'predictions.json'}")
    if failures:
        print(f"{len(failures)} pictures could not be read: {output / 'failures.jsonl'}")
    if not images:
        raise DataError(f"none of the {len(failures)} pictures could be read; see {output / 'failures.jsonl'}")


def find_pictures(paths: Sequence[str]) -> InstanceDataset:
    """Unlabelled rows of all pictures in `paths`, files or folders, numbered from 1.

    Raises DataError for a path that does not exist and for a folder without pictures.
    """
    from uplvp_hf.data import DataError, ImageError, InstanceDataset, Row, empty_objects, image_size, read_image_folder

    rows: list[Row] = []
    failures: list[dict[str, Any]] = []
    for path in paths:
        if os.path.isdir(path):
            folder = read_image_folder(path)
            rows += folder.rows
            failures += folder.failures
        elif os.path.isfile(path):
            try:
                width, height = image_size(path)
            except ImageError as error:
                failures.append({"file": path, "row": None, "reason": error.reason})
                continue
            image, name = os.path.abspath(path), os.path.basename(path)
            rows.append(
                Row(image=image, image_id=0, file_name=name, width=width, height=height, objects=empty_objects())
            )
        else:
            raise DataError("no such file or folder", file=path)
    numbered = [Row(**{**row, "image_id": number}) for number, row in enumerate(rows, start=1)]
    if not numbered:
        raise DataError(f"none of the {len(failures)} pictures can be read; the first: {failures[0]['reason']}")
    return InstanceDataset(numbered, [], "", failures)


def _annotations(row: Any, result: dict[str, Any], category_ids: Sequence[int], first_id: int) -> list[dict[str, Any]]:
    """COCO results, with what makes them a COCO annotation file too, so that they can serve as labels."""
    from uplvp_hf.data import rle_areas
    from uplvp_hf.evaluation import to_coco_results

    entries = to_coco_results(row, result, list(category_ids))
    areas = rle_areas(result["rle"]).tolist()
    return [{"id": first_id + k, **entry, "area": areas[k], "iscrowd": 0} for k, entry in enumerate(entries)]


def _draw(row: Any, result: dict[str, Any], id2label: dict[int, str], folder: Path) -> None:
    from uplvp_hf.data import open_image
    from uplvp_hf.evaluation.visualize import draw_instances
    from uplvp_hf.files import writing

    image = open_image(row["image"], (row["width"], row["height"]))
    drawn = draw_instances(image, result["rle"], result["labels"].tolist(), result["scores"].tolist(), id2label)
    # Numbered, because pictures of different folders and formats may share a name.
    name = f"{row['image_id']:06d}_{Path(row['file_name']).stem}.png"
    folder.mkdir(parents=True, exist_ok=True)
    with writing(folder / name):
        drawn.save(folder / name)
