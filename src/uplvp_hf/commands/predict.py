"""`uplvp predict`: instances in images, as COCO JSON and as overlays to look at."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..models.errors import UserError
from ..models.thresholds import MASK_THRESHOLD, SCORE_THRESHOLD, score_threshold
from . import _semantic
from ._terminal import AGAIN, add_verbosity, check_device, verb

if TYPE_CHECKING:
    from uplvp_hf.inference import Tiles
    from uplvp_hf.inference.instances import Instances

# Of downloads, inside the output folder until the run is finished.
DOWNLOADS = ".downloads"
OVERLAYS = "overlays"
_INSTANCE_FLAGS = ("batch_size", "threshold", "mask_threshold", "top_k", "tiles", "overlap", "tiles_with_full")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="uplvp predict",
        description="Instances in images, as COCO JSON and overlays. Semantic segmenters write maps/ with the class of "
        "every pixel.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL_DIR", help="folder of a trained or exported (ONNX) model, or USER/NAME on the Hub")
    add(
        "paths", metavar="PATHS", nargs="+",
        help="images, folders that are searched recursively, patterns such as 'shots/**/*.jpg', http(s) addresses",
    )  # fmt: skip
    add("--output", metavar="DIR", required=True, help="for predictions.json, overlays/, failures.jsonl")
    add(
        "--threshold", type=float,
        help=f"least score, 0 to 1 (default: what was measured for the model, else {SCORE_THRESHOLD})",
    )  # fmt: skip
    add(
        "--duplicates", type=float, metavar="IOU",
        help="of two instances of a class that overlap more, leave out the worse one (default: the model's, else none)",
    )  # fmt: skip
    add(
        "--mask-threshold",
        type=float,
        default=MASK_THRESHOLD,
        help="least probability of a pixel (default: %(default)s)",
    )
    add("--top-k", type=int, default=100, help="most instances an image, or a tile (default: 100)")
    add("--batch-size", type=int, default=8, help="images, or tiles, per forward pass (default: 8)")
    add("--tiles", type=int, metavar="SIZE", help="cut images larger than SIZE pixels into windows of that side")
    add("--overlap", type=float, metavar="SHARE", help="of neighboring windows, 0 to 0.9 (default: 0.2)")
    add("--tiles-with-full", action="store_true", help="also the whole image, for objects larger than windows")
    add("--max-pixels", type=int, metavar="N", help="larger images are left out (default: 100 million)")
    add("--max-bytes", type=int, metavar="N", help="longer downloads are left out (default: 100 million)")
    add("--no-overlays", action="store_true", help="write the JSON only")
    add("--overwrite", action="store_true", help="begin anew in a folder that has results")
    add("--device", help="cpu, cuda, cuda:1, ... (default: the GPU if there is one)")
    _semantic.add_semantic_arguments(parser)
    add_verbosity(parser)
    return parser


def _predict_alone(arguments: argparse.Namespace) -> None:
    from uplvp_hf.files import only_run

    tiles = _check(arguments)
    check_device(arguments.device)
    semantic = _semantic.refuse_flags(arguments, make_parser(), _INSTANCE_FLAGS)
    with only_run(arguments.output, "name another --output"):
        if semantic:
            _semantic.predict(arguments, _find(arguments, Path(arguments.output)), _settings(arguments))
            shutil.rmtree(Path(arguments.output) / DOWNLOADS, ignore_errors=True)
        else:
            _predict(arguments, tiles)


def _predict(arguments: argparse.Namespace, tiles: Tiles | None) -> None:
    from uplvp_hf.data import DataError
    from uplvp_hf.files import write_json_lines
    from uplvp_hf.inference import load_model, predict_rows
    from uplvp_hf.inference.instances import instances_of
    from uplvp_hf.inference.journal import Journal, check_free
    from uplvp_hf.inference.sources import pixels_unbounded

    output = Path(arguments.output)
    check_free(output, arguments.overwrite)  # before anything is fetched or loaded
    dataset = _find(arguments, output)
    model, processor = load_model(arguments.model, arguments.device)
    config = model.config
    if arguments.threshold is None:
        arguments.threshold = score_threshold(config)
    journal = Journal(output, _settings(arguments), arguments.overwrite)
    known = journal.known(dataset.rows)
    if known and not arguments.quiet:
        print(f"{len(known)} of {len(dataset)} images are done already")
    failures = list(dataset.failures)
    keys = ("batch_size", "threshold", "mask_threshold", "top_k", "duplicates")
    settings = {key: getattr(arguments, key) for key in keys}
    todo = dataset.subset([index for index, row in enumerate(dataset.rows) if row["image_id"] not in known])
    with pixels_unbounded():
        for row, result in predict_rows(
            model, processor, todo, tiles, progress=not arguments.quiet, failures=failures, **settings
        ):
            found = instances_of(result, (row["height"], row["width"]), config.id2label, config.category_ids)
            if not arguments.no_overlays:
                _draw(row, found, output / OVERLAYS)
            journal.add(row, found.to_coco(row["image_id"]))
    write_json_lines(output / "failures.jsonl", failures)
    if not journal.places:
        raise DataError(f"none of the {len(failures)} images could be read; see {output / 'failures.jsonl'}")
    categories = [{"id": int(number), "name": config.id2label[k]} for k, number in enumerate(config.category_ids)]
    file = journal.finish(categories)
    shutil.rmtree(output / DOWNLOADS, ignore_errors=True)
    print(f"{journal.instances} instances in {len(journal.places)} images: {file}")
    if failures:
        print(f"{len(failures)} images could not be read: {output / 'failures.jsonl'}")


def _check(arguments: argparse.Namespace) -> Tiles | None:
    """Raises UserError for numbers that no run can use, before anything is read."""
    from uplvp_hf.inference import Tiles

    shares = (arguments.threshold or 0, arguments.duplicates or 0)
    if arguments.batch_size < 1 or not all(0 <= share <= 1 for share in shares):
        raise UserError("--batch-size must be at least 1, and --threshold and --duplicates from 0 to 1")
    if arguments.top_k < 1 or not 0 < arguments.mask_threshold < 1:
        raise UserError("--top-k must be at least 1, and --mask-threshold between 0 and 1")
    for name in ("max_pixels", "max_bytes"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if arguments.tiles is None:
        if arguments.overlap is not None or arguments.tiles_with_full:
            raise UserError("--overlap and --tiles-with-full need --tiles SIZE")
        return None
    share = {} if arguments.overlap is None else {"overlap": arguments.overlap}
    return Tiles(arguments.tiles, full=arguments.tiles_with_full, **share)


def _find(arguments: argparse.Namespace, output: Path):
    from uplvp_hf.inference import find_images
    from uplvp_hf.inference.download import Limits
    from uplvp_hf.inference.sources import MAX_PIXELS

    limits = Limits() if arguments.max_bytes is None else Limits(max_bytes=arguments.max_bytes)
    max_pixels = MAX_PIXELS if arguments.max_pixels is None else arguments.max_pixels
    return find_images(
        arguments.paths, output / DOWNLOADS, max_pixels, limits, leave_out=(output / OVERLAYS, output / _semantic.MAPS)
    )


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the results of an image depend on, for the run that goes on where this one was killed."""
    keys = ("threshold", "mask_threshold", "top_k", "duplicates", "tiles", "overlap", "tiles_with_full", "no_overlays")
    model, weights = arguments.model, []
    if os.path.isdir(model):
        model = os.path.abspath(model)
        files = (file for file in sorted(Path(model).iterdir()) if file.suffix in (".safetensors", ".onnx", ".json"))
        weights = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return {"model": model, "weights": weights, **{key: getattr(arguments, key) for key in keys}}


def _draw(row: Any, instances: Instances, folder: Path) -> None:
    from uplvp_hf.data.dataset import load_row_image
    from uplvp_hf.files import replacing
    from uplvp_hf.inference.sources import plain_stem

    drawn = instances.draw(load_row_image(row))
    # Numbered, because images of different folders and formats may share a name.
    with replacing(folder / f"{row['image_id']:06d}_{plain_stem(row['file_name'])}.png", "wb") as stream:
        drawn.save(stream, format="PNG")


main = verb("predict", make_parser, _predict_alone, AGAIN)
