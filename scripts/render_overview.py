"""Draws docs/overview.png, the picture of README.md: test scenes, their pseudo labels, and what a model finds in them.

Commands:

    python scripts/render_overview.py --run runs/demo      # of a finished `uplvp demo`; trains nothing
    python scripts/render_overview.py                      # runs the demo first, about eight minutes on two cores

The scenes are the first of the demo's test scenes that show at least four objects. Nothing was trained on them. The
pseudo labels are what the small CLIP of the package makes of them with the demo's settings; the predictions are those
of the demo's model, pre-trained on such labels and fine-tuned on five labeled scenes a class, at its own threshold.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from uplvp_hf.benchmark.recipe import LabelSet
from uplvp_hf.benchmark.run import label_words
from uplvp_hf.commands.label import main as label
from uplvp_hf.data import load_dataset_rows, read_store
from uplvp_hf.demo.pipeline import demo_benchmark, run_demo
from uplvp_hf.evaluation.visualize import draw_instances
from uplvp_hf.inference import load

ROOT = Path(__file__).parents[1]
COLUMNS = ("images without labels", "pseudo labels from CLIP", "what the trained model finds")
SCENES, OBJECTS = 3, 4  # rows of the picture; least objects of a scene in it
CELL, GAP, HEAD = 300, 10, 34  # px
COLORS = 160  # of the palette: textures would take a megabyte in full color


def chosen_scenes(folder: Path) -> list[Path]:
    """Files of the first scenes with enough objects."""
    dataset = load_dataset_rows(folder)
    files = [Path(row["image"]) for row in dataset.rows if len(row["objects"]["category_id"]) >= OBJECTS]
    if len(files) < SCENES:
        raise SystemExit(f"{folder}: {len(files)} scenes with {OBJECTS} objects, {SCENES} are wanted; use a full demo.")
    return files[:SCENES]


def pseudo_labels(files: list[Path], folder: Path) -> list[dict]:
    """The rows that `uplvp label` makes of these images with the settings of the demo, in the same order."""
    paths, given = folder / "images.txt", demo_benchmark().labels["clip"].label
    paths.write_text("".join(f"{file.resolve()}\n" for file in files))
    words = label_words(LabelSet(label={**given, "processes": None}))  # a few images need one
    if label([str(paths), "--output", str(folder / "store"), *words, "--quiet"]):
        raise SystemExit("Labeling failed.")
    return list(read_store(folder / "store"))


def drawn(image: Image.Image, row: dict, names: dict[int, str]) -> Image.Image:
    """The image with the objects of a row."""
    objects = row["objects"]
    return draw_instances(image, objects["segmentation"], objects["category_id"], None, names)


def sheet(columns: list[list[Image.Image]]) -> Image.Image:
    """Images in columns, a heading over each, with a palette."""
    width = len(columns) * (CELL + GAP) + GAP
    page = Image.new("RGB", (width, HEAD + len(columns[0]) * (CELL + GAP)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(19)
    for place, (heading, images) in enumerate(zip(COLUMNS, columns, strict=True)):
        left = GAP + place * (CELL + GAP)
        draw.text((left + CELL / 2, HEAD / 2), heading, font=font, fill=(30, 30, 30), anchor="mm")
        for line, image in enumerate(images):
            small = image.convert("RGB").resize((CELL, CELL), Image.Resampling.LANCZOS)
            page.paste(small, (left, HEAD + line * (CELL + GAP)))
    return page.quantize(COLORS, dither=Image.Dither.NONE)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="runs/demo", help="folder of `uplvp demo`; one that is not finished is run")
    parser.add_argument("--output", default=str(ROOT / "docs" / "overview.png"), help="the picture")
    args = parser.parse_args(argv)
    run = Path(args.run)
    if not (run / "model" / "model.safetensors").is_file():
        run_demo(str(run))
    files, predictor = chosen_scenes(run / "data" / "val"), load(run / "model")
    with tempfile.TemporaryDirectory() as folder:
        store = pseudo_labels(files, Path(folder))
        names = {category["id"]: category["name"] for category in load_dataset_rows(Path(folder) / "store").categories}
    images = [Image.open(file).convert("RGB") for file in files]
    labeled = [drawn(image, row, names) for image, row in zip(images, store, strict=True)]
    found = [predictor.predict(image).draw(image) for image in images]
    sheet([images, labeled, found]).save(args.output, optimize=True)
    print(f"{args.output}: {Path(args.output).stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
