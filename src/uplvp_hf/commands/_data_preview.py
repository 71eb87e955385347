"""`uplvp data preview`, and `--preview` of the training commands: a sheet of augmented samples to look at."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..models.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from uplvp_hf.data import TrainingSet
    from uplvp_hf.training.config import TrainSettings

COUNT = 16
_CELL = 320  # pixels; captions inside the images are legible
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def add_preview(subparsers: Any) -> None:
    """`uplvp data preview`"""
    from .data import add_source

    parser = subparsers.add_parser(
        "preview",
        help="write a sheet of augmented training samples",
        description="Write a sheet of training samples as a recipe augments them, with masks and class names. "
        "For example: uplvp data preview PATH --output x.png data.rotate=9 data.copy_paste=0.5",
    )
    add_source(parser)
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="settings over those of the recipe")
    parser.add_argument(
        "--recipe", action="append", default=[], help="YAML file, or the name of a shipped recipe; repeatable"
    )
    parser.add_argument("--output", metavar="FILE", required=True, help="the image to write: .png, .jpg or .webp")
    parser.add_argument("--count", type=int, default=COUNT, help=f"samples on the sheet (default: {COUNT})")
    parser.set_defaults(work=_preview)


def _preview(arguments: argparse.Namespace) -> None:
    from uplvp_hf.training.config import load_settings

    if arguments.config is not None:
        raise UserError(
            f"--config {arguments.config}: training reads no configurations of `datasets`; "
            "write the set with `uplvp data convert --config ...` and preview that"
        )
    source = {"train": arguments.path, "train_split": arguments.split, "train_images": arguments.images}
    source |= {"train_format": arguments.format, "crowds_as_objects": arguments.crowds_as_objects or None}
    words = [f"data.{key}={value}" for key, value in source.items() if value is not None]
    settings = load_settings(arguments.recipe, [*arguments.settings, *words, "data.val="])
    write_preview(settings, arguments.output, arguments.count)


def write_preview(settings: TrainSettings, file: str, count: int = COUNT) -> None:
    """Writes `count` training samples of a run with these settings to an image file, and says so.

    Raises UserError for an unknown kind of file or a count below 1, ConfigError and DataError as training does.
    """
    from uplvp_hf.files import replacing
    from uplvp_hf.training.build import build_data, build_samples, with_image_settings

    suffix = Path(file).suffix.lower()
    if suffix not in _SUFFIXES:
        raise UserError(f"{file}: the name of a preview ends in {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}")
    if count < 1:
        raise UserError(f"--count must be at least 1, got {count}")
    settings = with_image_settings(settings)
    rows, _ = build_data(settings)
    samples = build_samples(settings, rows)
    names = {0: "object"} if samples.label_map is None else rows.id2label
    sheet = preview_sheet(samples, names, count)
    with replacing(file, "wb") as stream:
        sheet.save(stream, format={".jpg": "JPEG"}.get(suffix, suffix[1:].upper()))
    print(f"{file}: {count} augmented samples of {len(samples)} images")


def preview_sheet(samples: TrainingSet, names: dict[int, str], count: int) -> Image.Image:
    """A sheet of `count` samples, their masks tinted and named, numbers of objects and file names underneath.

    Of a large set images at even distances, as in the first epoch; of a small one all, in as many epochs as needed.
    """
    from uplvp_hf.evaluation.visualize import contact_sheet, draw_instances

    total = len(samples)
    keys = [divmod(k, total) if count > total else (0, k * total // count) for k in range(count)]
    drawn, captions = [], []
    for epoch, index in keys:
        sample = samples.sample(index, epoch)
        masks, labels = sample["mask_labels"], sample["class_labels"].tolist()
        drawn.append(draw_instances(_image(sample["pixel_values"], samples), masks.dense(), labels, id2label=names))
        name = Path(samples.dataset[sample["index"]]["file_name"]).name
        captions.append(f"{len(masks)} object{'s' * (len(masks) != 1)}: {name}")  # a long name is cut at its end
    return contact_sheet(drawn, columns=max(1, round(count**0.5)), captions=captions, cell=_CELL)


def _image(values: Any, samples: TrainingSet) -> Image.Image:
    """Normalized pixels (3, h, w) as an image again."""
    from torchvision.transforms.v2.functional import to_pil_image

    return to_pil_image((values * samples.std + samples.mean).mul(255).round().clamp(0, 255).byte())
